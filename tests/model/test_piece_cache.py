import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from swarm_protocol.errors import CheckpointError
from swarm_protocol.model import piece_cache
from swarm_protocol.model.piece_cache import DIGEST_BYTES, Piece, PieceCache

SIZE = 1000
ON_DISK = SIZE + DIGEST_BYTES


def piece(number: int, file: str = "models--some--thing/abc") -> Piece:
    return Piece(file, number * SIZE, (number + 1) * SIZE)


def content(of: Piece) -> bytes:
    return bytes((of.start + index) % 251 for index in range(of.size_bytes))


def fill(cache: PieceCache, pieces: Sequence[Piece]) -> None:
    for one in cache.claim(pieces):
        with cache.writing(one) as writer:
            writer.write(memoryview(content(one)))


def read(cache: PieceCache, one: Piece) -> bytes | None:
    data = bytearray(one.size_bytes)
    return bytes(data) if cache.read_into(one, memoryview(data)) else None


def there(folder: Path, numbers: Sequence[int]) -> list[int]:
    return [number for number in numbers if (folder / piece(number).path).exists()]


def age(folder: Path, one: Piece, hours: float) -> None:
    when = time.time() - 3600 * hours
    os.utime(folder / one.path, (when, when))


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    cache = PieceCache(tmp_path / "new" / "folder")
    assert cache.claim([piece(1), piece(0)]) == [piece(0), piece(1)]
    assert read(cache, piece(0)) is None
    fill(cache, [piece(0), piece(1)])
    assert cache.claim([piece(0), piece(1)]) == []
    assert [read(PieceCache(cache.folder), piece(number)) for number in (0, 1)] == [
        content(piece(0)),
        content(piece(1)),
    ]


@pytest.mark.parametrize("harm", ["a byte", "a checksum", "cut", "longer"])
def test_a_damaged_piece_is_dropped(tmp_path: Path, harm: str) -> None:
    cache = PieceCache(tmp_path)
    fill(cache, [piece(0)])
    path = tmp_path / piece(0).path
    data = bytearray(path.read_bytes())
    if harm == "cut":
        del data[-1:]
    elif harm == "longer":
        data += b"x"
    else:
        data[17 if harm == "a byte" else SIZE + 3] ^= 1
    path.write_bytes(data)
    assert read(cache, piece(0)) is None
    assert not path.exists()
    assert cache.claim([piece(0)]) == [piece(0)]


def test_a_piece_that_was_not_finished_is_not_there(tmp_path: Path) -> None:
    cache = PieceCache(tmp_path)
    with cache.writing(piece(0)) as writer:
        writer.write(memoryview(b"half of it"))
    with suppress(ConnectionError), cache.writing(piece(1)) as writer:
        writer.write(memoryview(content(piece(1))))
        raise ConnectionError
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_was_not_claimed_for_longest_goes_first(tmp_path: Path) -> None:
    fill(PieceCache(tmp_path), [piece(number) for number in range(4)])
    for number, hours in enumerate((2, 4, 3, 1)):
        age(tmp_path, piece(number), hours)
    bounded = PieceCache(tmp_path, 4 * ON_DISK)
    fill(bounded, [piece(2), piece(7)])
    assert there(tmp_path, range(8)) == [0, 2, 3, 7]
    fill(PieceCache(tmp_path, 4 * ON_DISK), [piece(8)])
    assert there(tmp_path, range(9)) == [2, 3, 7, 8]


def test_nothing_is_deleted_without_a_bound(tmp_path: Path) -> None:
    fill(PieceCache(tmp_path), [piece(0)])
    fill(PieceCache(tmp_path), [piece(number) for number in range(1, 9)])
    assert there(tmp_path, range(9)) == list(range(9))


def test_what_is_claimed_stays_and_too_much_is_refused(tmp_path: Path) -> None:
    mine, theirs = PieceCache(tmp_path, 3 * ON_DISK), PieceCache(tmp_path, 3 * ON_DISK)
    fill(mine, [piece(0), piece(1)])
    age(tmp_path, piece(0), 9)
    with pytest.raises(CheckpointError, match=r"take 0\.0 MB on disk, but the disk cache may hold 0\.0 MB"):
        theirs.claim([piece(5), piece(6)])
    fill(theirs, [piece(5)])
    assert there(tmp_path, range(7)) == [0, 1, 5]
    del mine
    fill(theirs, [piece(5), piece(6)])
    assert there(tmp_path, range(7)) == [1, 5, 6]


def test_an_earlier_claim_stands_while_there_is_room(tmp_path: Path) -> None:
    cache = PieceCache(tmp_path, 3 * ON_DISK)
    fill(cache, [piece(0)])
    fill(cache, [piece(1)])
    fill(cache, [piece(2)])
    assert there(tmp_path, range(3)) == [0, 1, 2]
    # A node that moved to other blocks needs the first ones no more.
    fill(cache, [piece(3), piece(4)])
    assert there(tmp_path, range(5)) == [2, 3, 4]


def test_a_claim_ends_with_its_process(tmp_path: Path) -> None:
    fill(PieceCache(tmp_path), [piece(0)])
    # By its path: the package around it takes seconds to load.
    script = (
        "import importlib.util, sys\nfrom pathlib import Path\n"
        "spec = importlib.util.spec_from_file_location('piece_cache', sys.argv[1])\n"
        "module = sys.modules['piece_cache'] = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(module)\n"
        "cache = module.PieceCache(Path(sys.argv[2]))\n"
        f"cache.claim([module.Piece({piece(0).file!r}, 0, {SIZE})])\n"
        "print('claimed', flush=True)\nsys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, piece_cache.__file__, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"claimed\n"
        with pytest.raises(CheckpointError, match="are needed by others"):
            PieceCache(tmp_path, ON_DISK).claim([piece(1)])
        process.kill()
        process.wait()
    fill(PieceCache(tmp_path, ON_DISK), [piece(1)])
    assert there(tmp_path, range(2)) == [1]


def test_what_a_killed_process_left_half_written_goes(tmp_path: Path) -> None:
    fill(PieceCache(tmp_path), [piece(0)])
    folder = (tmp_path / piece(0).path).parent
    for name, hours in (("old.part", 2.0), ("new.part", 0.0)):
        (folder / name).write_bytes(b"x")
        os.utime(folder / name, (time.time() - 3600 * hours,) * 2)
    PieceCache(tmp_path, 9 * ON_DISK).claim([piece(0)])
    assert sorted(path.name for path in folder.glob("*.part")) == ["new.part"]


def test_threads_that_write_and_read_the_same_pieces_see_whole_ones(tmp_path: Path) -> None:
    pieces = [piece(number) for number in range(6)]

    def work(_: int) -> list[bytes | None]:
        cache = PieceCache(tmp_path, 6 * ON_DISK)
        fill(cache, pieces)
        return [read(cache, one) for one in pieces]

    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(work, range(24)):
            assert found == [content(one) for one in pieces]


def test_notes_are_kept(tmp_path: Path) -> None:
    PieceCache(tmp_path).note("a/b.json", "{}")
    PieceCache(tmp_path).note("a/b.json", '{"c": 1}')
    assert PieceCache(tmp_path).noted("a/b.json") == '{"c": 1}'
    assert PieceCache(tmp_path).noted("a/c.json") is None


def test_room_is_what_others_do_not_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = [10 * ON_DISK]
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(piece_cache.shutil, "disk_usage", lambda _: usage(10**9, 10**9, free[0]))
    mine, other = PieceCache(tmp_path, 6 * ON_DISK), PieceCache(tmp_path, 6 * ON_DISK)
    assert mine.room_bytes("models--some--thing") == 6 * ON_DISK
    fill(other, [piece(0), piece(1)])
    assert mine.room_bytes("models--some--thing") == 4 * ON_DISK
    fill(mine, [piece(2)])
    free[0] = 2 * ON_DISK
    assert mine.room_bytes("models--some--thing") == 3 * ON_DISK  # what is there already and what is free
    assert PieceCache(tmp_path).room_bytes("models--some--thing") == 2 * ON_DISK


def test_what_nobody_needs_goes_where_the_disk_itself_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(PieceCache(tmp_path, 9 * ON_DISK), [piece(0), piece(1), piece(2)])
    for number in range(3):
        age(tmp_path, piece(number), hours=3 - number)
    usage = type(shutil.disk_usage("/"))

    def disk_usage(_: object) -> object:
        return usage(10**9, 10**9, ON_DISK + (3 - len(there(tmp_path, range(3)))) * ON_DISK)

    monkeypatch.setattr(piece_cache.shutil, "disk_usage", disk_usage)
    cache = PieceCache(tmp_path, 9 * ON_DISK)
    assert cache.claim([piece(7), piece(8), piece(9)]) == [piece(7), piece(8), piece(9)]
    assert there(tmp_path, range(3)) == [2]
