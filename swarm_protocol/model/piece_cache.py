"""Keep pieces of big files on disk, for several processes at once, up to a size.

A piece is a range of bytes of one file, such as a tensor in a shard of weights. It is one file here: its bytes and
their SHA-256, written under another name and renamed, so that it is there as a whole or not at all, and found out when
the disk changed it. What was not needed for longest goes first, but never what a process that runs has claimed: a claim
is a file with names of pieces under a lock that ends with its process.
"""

import fcntl
import hashlib
import logging
import os
import re
import shutil
import time
import weakref
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from swarm_protocol.errors import CheckpointError

logger = logging.getLogger(__name__)

DIGEST_BYTES = hashlib.sha256().digest_size
"""Behind the bytes of a piece."""

_STALE_S = 3600.0
"""Nobody writes for so long at a piece: one that is unfinished and older was left by a process that was killed."""

_PART_SUFFIX = ".part"
_PIECE_NAME = re.compile(r"(\d+)-(\d+)")


@dataclass(frozen=True, slots=True, order=True)
class Piece:
    """Bytes `[start, end)` of a file; `file` is its folder in the cache, which names the file's content."""

    file: str
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.start

    @property
    def path(self) -> str:
        """Where it lies in the cache's folder."""
        return f"{self.file}/{self.start}-{self.end}"

    @property
    def disk_bytes(self) -> int:
        return self.size_bytes + DIGEST_BYTES


class PieceWriter:
    """Takes the bytes of a piece one after the other."""

    def __init__(self, piece: Piece, descriptor: int) -> None:
        self.piece = piece
        self.num_written = 0
        self._descriptor = descriptor
        self._digest = hashlib.sha256()

    @property
    def num_missing(self) -> int:
        return self.piece.size_bytes - self.num_written

    def write(self, data: memoryview) -> None:
        """Append `data`, which must not be more than what is missing."""
        assert len(data) <= self.num_missing
        self._digest.update(data)
        self.num_written += len(data)
        _write_all(self._descriptor, data)

    def finish(self) -> None:
        assert not self.num_missing
        _write_all(self._descriptor, memoryview(self._digest.digest()))


class PieceCache:
    """Pieces in `folder`, at most `max_bytes` of them. Any thread may use it, and any number of processes."""

    def __init__(self, folder: Path, max_bytes: int | None = None) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._claims: list[frozenset[Piece]] = []
        self._claim: tuple[Path, int] | None = None

    def claim(self, pieces: Collection[Piece]) -> list[Piece]:
        """Keep `pieces` from being deleted while this process runs, make room, and return those that are not there.

        Earlier claims of this object stand as long as there is room for them as well. Raises CheckpointError if there
        is not enough room.
        """
        new = frozenset(pieces)
        if not new:
            return []  # a folder that cannot be written to is none of its business
        with self._locked():
            mine = [claim for claim in self._claims if not claim <= new]
            others = self._claimed_by_others()
            while mine and not self._may_hold(others.union(new, *mine)):
                mine.pop(0)
            missing = sorted(piece for piece in new if not self._touch(piece))
            self._make_room(new, missing, others.union(new, *mine))
            self._claims = [*mine, new]
            self._write_claim()
        return missing

    def has(self, pieces: Iterable[Piece]) -> bool:
        """Whether all of `pieces` seem to be there; whether they are undamaged is seen when they are read."""
        return all(_size_of(self.folder / piece.path) == piece.disk_bytes for piece in pieces)

    def room_bytes(self, folder: str) -> int:
        """Return how many bytes of pieces below `folder` can be kept, those that are there included."""
        with self._locked():
            claimed = self._claimed_by_others()
            others = {piece.path for piece in claimed}
            free_bytes = shutil.disk_usage(self.folder).free
            spare = [(size, name) for _, size, name in self._stored() if name not in others]
        if self.max_bytes is None:  # then nothing is ever deleted
            return free_bytes + sum(size for size, name in spare if name.startswith(f"{folder}/"))
        return max(0, min(self.max_bytes - _disk_bytes(claimed), free_bytes + sum(size for size, _ in spare)))

    def read_into(self, piece: Piece, view: memoryview) -> bool:
        """Fill `view`, of the piece's size, and return True; else False, and a piece that is damaged is gone."""
        path = self.folder / piece.path
        try:
            with path.open("rb", buffering=0) as file:
                is_whole = _read_all(file.fileno(), view)
                trailer = file.read(DIGEST_BYTES + 1)
        except FileNotFoundError:
            return False
        if is_whole and trailer == hashlib.sha256(view).digest():
            return True
        logger.warning("a piece in the disk cache is damaged and dropped: %s", path)
        self.drop(piece)
        return False

    def drop(self, piece: Piece) -> None:
        """Delete a piece whose content is wrong."""
        (self.folder / piece.path).unlink(missing_ok=True)

    @contextmanager
    def writing(self, piece: Piece) -> Iterator[PieceWriter]:
        """Give a writer of `piece`, which is in the cache at the end if it was written whole and nothing was raised."""
        path = self.folder / piece.path
        descriptor, part = _create(path.parent, _PART_SUFFIX)
        try:
            writer = PieceWriter(piece, descriptor)
            yield writer
            if not writer.num_missing:
                writer.finish()
                # No fsync: the checksum tells a piece that a power cut left half written.
                os.replace(part, path)
        finally:
            os.close(descriptor)
            part.unlink(missing_ok=True)

    def note(self, name: str, text: str) -> None:
        """Keep a short text under a name, of letters, digits, `-_.` and `/`. Texts are never deleted."""
        path = self.folder / "notes" / name
        descriptor, part = _create(path.parent, _PART_SUFFIX)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(part, path)

    def noted(self, name: str) -> str | None:
        """Return the text that was noted, if one was."""
        try:
            return (self.folder / "notes" / name).read_text(encoding="utf-8")
        except (FileNotFoundError, UnicodeDecodeError):
            return None

    def _touch(self, piece: Piece) -> bool:
        """Return whether it is there; if so, it is the most recently needed one."""
        path = self.folder / piece.path
        try:
            os.utime(path)
            return path.stat().st_size == piece.disk_bytes
        except FileNotFoundError:
            return False

    def _may_hold(self, pieces: Collection[Piece]) -> bool:
        return self.max_bytes is None or _disk_bytes(pieces) <= self.max_bytes

    def _make_room(self, new: Collection[Piece], missing: Collection[Piece], kept: Collection[Piece]) -> None:
        """Delete what is not `kept` until all of that has room, the least recently claimed first."""
        if not self._may_hold(kept):
            others = _disk_bytes(kept) - _disk_bytes(new)
            raise CheckpointError(
                f"the weights that are needed take {_gb(_disk_bytes(new))} on disk, but the disk cache may hold "
                f"{_gb(self.max_bytes or 0)}, of which {_gb(others)} are needed by others"
            )
        if self.max_bytes is not None:
            short_bytes = _disk_bytes(missing) - shutil.disk_usage(self.folder).free
            self._evict(self.max_bytes - _disk_bytes(kept), short_bytes, {piece.path for piece in kept})
        free_bytes = shutil.disk_usage(self.folder).free
        if _disk_bytes(missing) > free_bytes:
            raise CheckpointError(
                f"{_gb(_disk_bytes(missing))} have to be downloaded, but only {_gb(free_bytes)} are free on the disk "
                f"of {self.folder}"
            )

    def _evict(self, spare_bytes: int, short_bytes: int, kept: Collection[str]) -> None:
        """Delete what is not `kept` until no more than `spare_bytes` of it are left and `short_bytes` are gone."""
        spare = [piece for piece in self._stored() if piece[2] not in kept]
        total = sum(size_bytes for _, size_bytes, _ in spare)
        spare_bytes = min(spare_bytes, total - short_bytes)
        num_deleted = 0
        for _, size_bytes, name in sorted(spare):
            if total <= spare_bytes:
                break
            (self.folder / name).unlink(missing_ok=True)
            total -= size_bytes
            num_deleted += 1
        if num_deleted:
            logger.info("disk cache: %d pieces deleted that were not needed for longest", num_deleted)

    def _stored(self) -> Iterator[tuple[int, int, str]]:
        """Yield time of the last claim in nanoseconds, size and name of every piece; what was left behind goes."""
        for path in self.folder.rglob("*"):
            is_part = path.suffix == _PART_SUFFIX
            if not is_part and not _PIECE_NAME.fullmatch(path.name):
                continue
            try:
                facts = path.stat()
            except FileNotFoundError:
                continue
            if not is_part:
                yield facts.st_mtime_ns, facts.st_size, path.relative_to(self.folder).as_posix()
            elif time.time() - facts.st_mtime > _STALE_S:
                path.unlink(missing_ok=True)

    # claims; all of this under the cache's lock

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            # Held for as long as it takes to look through the folder.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _claimed_by_others(self) -> frozenset[Piece]:
        """Return what processes that still run have claimed, and drop the claims of those that ended."""
        claimed: set[Piece] = set()
        for path in (self.folder / "claims").glob("*"):
            if self._claim is not None and path == self._claim[0]:
                continue
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                claimed.update(_parse_claim(path.read_text(encoding="utf-8")))
            else:
                path.unlink()
            finally:
                os.close(descriptor)
        return frozenset(claimed)

    def _write_claim(self) -> None:
        if self._claim is None:
            descriptor, path = _create(self.folder / "claims")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # The descriptor is the lock: it lives as long as this object.
            weakref.finalize(self, os.close, descriptor)
            self._claim = path, descriptor
        descriptor = self._claim[1]
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        text = "".join(f"{piece.path}\n" for piece in sorted(frozenset[Piece]().union(*self._claims)))
        _write_all(descriptor, memoryview(text.encode()))


def _create(folder: Path, suffix: str = "") -> tuple[int, Path]:
    """Open a new file for writing; who may read it is as for any other file of this user."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{uuid4().hex}{suffix}"
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), path


def _parse_claim(text: str) -> Iterator[Piece]:
    for line in text.splitlines():
        file, _, name = line.rpartition("/")
        if bounds := _PIECE_NAME.fullmatch(name):
            yield Piece(file, int(bounds[1]), int(bounds[2]))


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _disk_bytes(pieces: Collection[Piece]) -> int:
    return sum(piece.disk_bytes for piece in pieces)


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:.1f} MB"


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _read_all(descriptor: int, view: memoryview) -> bool:
    """Fill `view`; return whether there was enough."""
    while view:
        count = os.readv(descriptor, [view])
        if not count:
            return False
        view = view[count:]
    return True
