import hashlib
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from swarm_protocol.errors import CheckpointError
from swarm_protocol.model import hub_shards, load_ends, load_span, open_checkpoint, range_reads
from swarm_protocol.model.anatomy import build_empty
from swarm_protocol.model.checkpoint import Checkpoint, SafetensorsCheckpoint
from swarm_protocol.model.safetensors_files import read_header
from swarm_protocol.model.tensor_loading import TensorLoader
from swarm_protocol.spans import Span
from tests.model.hub_server import COMMIT, REPO, TOKEN, Hub, hub_of
from tests.tiny_models import NUM_BLOCKS, save_tiny_model

FLOAT32: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
SPAN = Span(1, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One shard for all blocks, which is bigger than any span that is served."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_model("llama", path, max_shard_size="1GB")
    return path


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between tries, which take no time here."""
    taken: list[float] = []
    monkeypatch.setattr(hub_shards._Download, "sleep", lambda _, seconds: taken.append(seconds))
    return taken


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_of(folder, monkeypatch) as hub:
        yield hub


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def opened(cache: Path, **options: Any) -> Checkpoint:
    return open_checkpoint(REPO, cache_dir=str(cache), **options)


def weights(checkpoint: Checkpoint, span: Span = SPAN) -> dict[str, torch.Tensor]:
    return load_span(checkpoint, span, **FLOAT32).state_dict()


def assert_equals_local(found: dict[str, torch.Tensor], folder: Path, span: Span = SPAN) -> None:
    wanted = weights(open_checkpoint(str(folder)), span)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def span_bytes(folder: Path, span: Span = SPAN) -> int:
    entries = read_header(folder / "model.safetensors").items()
    return sum(e.size_bytes for name, e in entries if any(f".layers.{block}." in name for block in span_blocks(span)))


def span_blocks(span: Span) -> range:
    return range(span.start, span.end)


def header_bytes(folder: Path) -> int:
    with (folder / "model.safetensors").open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def pieces(cache: Path) -> list[Path]:
    return sorted(path for path in (cache / "umbel-pieces").rglob("*-*") if path.is_file())


def test_only_the_bytes_of_the_span_are_downloaded(server: Hub, cache: Path, folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    assert_equals_local(weights(opened(cache, on_download=lambda *counts: seen.append(counts))), folder)
    assert server.sent_bytes() == 8 + header_bytes(folder) + span_bytes(folder)
    assert server.sent_bytes() < (folder / "model.safetensors").stat().st_size / 2
    # The start, the header, and all that lies side by side.
    assert len([request for request in server.downloads() if request.method == "GET"]) == 3
    assert seen[-1] == (span_bytes(folder), span_bytes(folder))
    assert not list(cache.rglob("model.safetensors"))


def test_a_span_in_several_shards_equals_the_local_one(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model("llama", tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    with hub_of(tmp_path / "sharded", monkeypatch) as server:
        assert_equals_local(weights(opened(cache, max_disk_bytes=10**9)), tmp_path / "sharded")
        index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())["weight_map"]
        wanted = {f"/storage/{file}" for name, file in index.items() if ".layers.1." in name or ".layers.2." in name}
        assert {request.path for request in server.downloads()} == wanted


def test_the_ends_are_downloaded_without_blocks(server: Hub, cache: Path, folder: Path) -> None:
    mine, theirs = (load_ends(one, **FLOAT32).state_dict() for one in (opened(cache), open_checkpoint(str(folder))))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    in_all = (folder / "model.safetensors").stat().st_size
    assert server.sent_bytes() < in_all - span_bytes(folder, Span(0, NUM_BLOCKS)) + 2 * header_bytes(folder)


def test_big_tensors_are_several_pieces_and_requests_have_a_bound(
    server: Hub, cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_shards, "PIECE_BYTES", 1000)
    monkeypatch.setattr(hub_shards, "REQUEST_BYTES", 3000)
    assert_equals_local(weights(opened(cache)), folder)
    asked = [request.sent_bytes for request in server.downloads()[2:]]
    assert len(asked) >= span_bytes(folder) / 3000
    assert max(asked) <= 3000
    assert sum(asked) == span_bytes(folder)


def test_what_is_in_the_cache_is_not_asked_for_again(
    server: Hub, cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights(opened(cache))
    server.requests.clear()
    assert_equals_local(weights(opened(cache)), folder)
    assert not server.downloads()
    assert_equals_local(weights(opened(cache), Span(2, 4)), folder, Span(2, 4))
    assert server.sent_bytes() == span_bytes(folder, Span(3, 4))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    server.requests.clear()
    assert_equals_local(weights(opened(cache), Span(1, 4)), folder, Span(1, 4))
    with pytest.raises(CheckpointError, match="is not in the local cache and cannot be downloaded"):
        weights(opened(cache), Span(0, 1))
    assert not server.requests


def test_a_node_knows_which_blocks_are_on_its_disk_without_asking(server: Hub, cache: Path) -> None:
    def here() -> tuple[Span, ...]:
        server.requests.clear()
        checkpoint = opened(cache)
        loader = TensorLoader(checkpoint, build_empty(checkpoint.config, torch.float32))
        server.requests.clear()
        found = loader.spans_here(NUM_BLOCKS)
        assert not server.requests
        return found

    assert here() == ()
    weights(opened(cache))
    assert here() == (SPAN,)
    first = set(pieces(cache))
    weights(opened(cache), Span(4, 5))
    assert here() == (SPAN, Span(4, 5))
    (set(pieces(cache)) - first).pop().unlink()
    assert here() == (SPAN,)


def test_nearly_all_of_a_shard_is_downloaded_as_a_whole(
    server: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_shards, "WHOLE_SHARE", 0.2)
    weights(opened(cache))
    assert len(list(cache.rglob("model.safetensors"))) == 1
    # What a bound could not hold is not fetched where there is one.
    cache_with_bound = cache.with_name("bound")
    weights(opened(cache_with_bound, max_disk_bytes=10**9))
    assert not list(cache_with_bound.rglob("model.safetensors"))


def test_a_whole_shard_is_held_to_its_checksum(
    server: Hub, cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_shards, "WHOLE_SHARE", 0.2)
    opened(cache)
    server.faults.extend(["zeros"])
    assert_equals_local(weights(opened(cache)), folder)
    assert not server.faults
    opened(cache.with_name("other"))
    server.faults.extend(["zeros"] * 9)
    with pytest.raises(CheckpointError, match="wrong SHA-256"):
        weights(opened(cache.with_name("other")))


def test_a_broken_connection_is_taken_up_where_it_broke(
    server: Hub, cache: Path, folder: Path, pauses: list[float]
) -> None:
    checkpoint = opened(cache)
    server.requests.clear()
    server.faults.extend(["cut", "cut", "cut"])
    assert_equals_local(weights(checkpoint), folder)
    assert len(server.downloads()) == 4
    assert server.sent_bytes() == span_bytes(folder)
    assert pauses == [0.5, 1.0, 2.0]


@pytest.mark.parametrize("fault", ["short", "long", "other range", "other size", "compressed", "503", "429"])
def test_a_wrong_answer_is_asked_for_again(
    server: Hub, cache: Path, folder: Path, pauses: list[float], fault: str
) -> None:
    checkpoint = opened(cache)
    server.faults.extend([fault, fault])
    assert_equals_local(weights(checkpoint), folder)
    # One who is told to wait longer does.
    assert pauses == ([7.0, 7.0] if fault == "429" else [0.5, 1.0])


@pytest.mark.parametrize("fault", ["cut", "other range", "503"])
def test_tries_have_an_end(server: Hub, cache: Path, pauses: list[float], fault: str) -> None:
    checkpoint = opened(cache)
    server.faults.extend([fault] * 20)
    with pytest.raises(CheckpointError, match=f"^model.safetensors of {REPO} is not in the local cache and cannot be"):
        weights(checkpoint)
    assert len(pauses) == range_reads.MAX_TRIES - 1
    assert max(pauses) <= 30


def test_what_came_before_the_tries_ended_is_kept(
    server: Hub, cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(range_reads, "MAX_TRIES", 1)
    checkpoint = opened(cache)
    server.faults.append("cut")
    with pytest.raises(CheckpointError, match="cannot be downloaded"):
        weights(checkpoint)
    server.requests.clear()
    assert_equals_local(weights(opened(cache)), folder)
    assert span_bytes(folder) / 4 < server.sent_bytes() < span_bytes(folder) * 3 / 4
    assert not list(cache.rglob("*.part"))


@pytest.mark.parametrize(("status", "said"), [("403", "status 403"), ("404", "status 404"), ("416", "status 416")])
def test_a_refusal_is_not_tried_again(server: Hub, cache: Path, pauses: list[float], status: str, said: str) -> None:
    checkpoint = opened(cache)
    server.faults.append(status)
    with pytest.raises(CheckpointError, match=said):
        weights(checkpoint)
    assert not pauses


def test_a_repository_without_access_says_what_the_hub_says(server: Hub, cache: Path) -> None:
    server.is_gated = True
    with pytest.raises(CheckpointError, match="ask for access"):
        opened(cache)


def test_redirects_in_a_circle_are_an_error(server: Hub, cache: Path, pauses: list[float]) -> None:
    server.has_loop = True
    with pytest.raises(CheckpointError, match="redirects"):
        opened(cache)
    assert not pauses


def test_no_bytes_are_not_asked_for(server: Hub) -> None:
    range_reads.RemoteFile(REPO, COMMIT, "model.safetensors").read(5, 5, bytearray().extend)
    assert [request.method for request in server.requests] == ["HEAD"]


def test_a_server_that_ignores_ranges_is_asked_for_the_whole_file(
    server: Hub, cache: Path, folder: Path, pauses: list[float]
) -> None:
    for num_good in (0, 2):
        folder_of_cache = cache.with_name(f"cache-{num_good}")
        server.faults.extend([*[""] * num_good, *["no ranges"] * 5])
        assert_equals_local(weights(opened(folder_of_cache)), folder)
        assert len(list(folder_of_cache.rglob("model.safetensors"))) == 1
        server.faults.clear()
    server.faults.extend(["no ranges"] * 5)
    with pytest.raises(CheckpointError, match="ignores ranges"):
        weights(opened(cache.with_name("bound"), max_disk_bytes=10**9))
    assert not pauses


def test_contents_of_two_revisions_never_mix(server: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_shards, "REQUEST_BYTES", 3000)
    checkpoint = opened(cache)
    server.faults.extend(["", "", "other etag"])
    with pytest.raises(CheckpointError, match="changed on the hub while it was downloaded"):
        weights(checkpoint)
    server.faults.clear()
    server.linked_etag["model.safetensors"] = "0" * 64
    with pytest.raises(CheckpointError, match="changed on the hub while it was downloaded"):
        weights(checkpoint)


def test_a_new_revision_shares_what_is_equal(
    server: Hub, cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = opened(cache).revision
    weights(opened(cache))
    server.requests.clear()
    server.commit = COMMIT[::-1]
    checkpoint = opened(cache)
    assert checkpoint.revision != before
    assert_equals_local(weights(checkpoint), folder)
    assert server.sent_bytes() == 8


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 64, b"\x05" + bytes(7) + b"{oops" + bytes(50)])
def test_a_file_that_is_no_safetensors_is_refused(server: Hub, cache: Path, content: bytes) -> None:
    server.files["model.safetensors"] = content
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        opened(cache)


def test_a_header_that_came_wrong_is_not_kept(server: Hub, cache: Path, folder: Path) -> None:
    good = server.files["model.safetensors"]
    server.linked_etag["model.safetensors"] = hashlib.sha256(good).hexdigest()
    server.files["model.safetensors"] = good[:8] + b"?" + good[9:]
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        opened(cache)
    server.files["model.safetensors"] = good
    assert_equals_local(weights(opened(cache)), folder)


def test_a_commit_whose_content_changed_is_refused_once(server: Hub, cache: Path) -> None:
    opened(cache)
    server.linked_etag["model.safetensors"] = "0" * 64
    with pytest.raises(CheckpointError, match="changed on the hub while it was downloaded"):
        weights(opened(cache))
    weights(opened(cache))


def test_a_cache_that_cannot_be_read_is_no_note(server: Hub, cache: Path, folder: Path) -> None:
    weights(opened(cache))
    (note,) = cache.rglob("model.safetensors.json")
    for text in ("", "[]", '{"size": 5}', json.loads(note.read_text()) | {"header_end": 10**15}):
        note.write_text(text if isinstance(text, str) else json.dumps(text))
        assert_equals_local(weights(opened(cache)), folder)


def test_whole_files_in_a_folder_that_is_not_written_to_are_enough(server: Hub, cache: Path, folder: Path) -> None:
    snapshot = opened(cache).folder  # type: ignore[attr-defined]
    shutil.copy(folder / "model.safetensors", snapshot)
    shutil.rmtree(cache / "umbel-pieces")
    server.requests.clear()
    assert_equals_local(weights(opened(cache, max_disk_bytes=1000)), folder)
    assert not server.downloads()
    assert not (cache / "umbel-pieces").exists()


def test_a_damaged_piece_is_downloaded_again(server: Hub, cache: Path, folder: Path) -> None:
    weights(opened(cache))
    server.requests.clear()
    damaged = max(pieces(cache), key=lambda path: path.stat().st_size)
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    assert_equals_local(weights(opened(cache)), folder)
    assert server.sent_bytes() == len(data) - 32


def test_the_least_recently_used_pieces_make_room(server: Hub, cache: Path, folder: Path) -> None:
    one_block = span_bytes(folder, Span(0, 1)) + header_bytes(folder)
    bound = int(2.5 * one_block)
    for block in (0, 1, 2):
        weights(opened(cache, max_disk_bytes=bound), Span(block, block + 1))
        assert sum(path.stat().st_size for path in pieces(cache)) <= bound
    server.requests.clear()
    weights(opened(cache, max_disk_bytes=bound), Span(1, 3))
    assert not server.downloads()
    with pytest.raises(CheckpointError, match=r"take .* on disk, but the disk cache may hold"):
        weights(opened(cache, max_disk_bytes=bound), Span(0, 4))


def test_the_token_goes_to_the_hub_only(server: Hub, cache: Path) -> None:
    weights(opened(cache))
    assert {request.token for request in server.downloads()} == {None}
    asked = [request for request in server.requests if "/resolve/" in request.path]
    assert {request.token for request in asked} == {f"Bearer {TOKEN}"}


def test_whoever_hears_of_the_progress_can_end_the_download(server: Hub, cache: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done:
            raise InterruptedError("stopped while loading")

    with pytest.raises(InterruptedError):
        weights(opened(cache, on_download=stop))


def test_several_at_once_share_a_cache(server: Hub, cache: Path, folder: Path) -> None:
    file_name = "model.safetensors"
    wanted = load_file(folder / file_name)

    def load(_: int) -> dict[str, torch.Tensor]:
        # Not load_span: transformers builds one model at a time, here as in a node.
        checkpoint = opened(cache, max_disk_bytes=10**9)
        assert isinstance(checkpoint, SafetensorsCheckpoint)
        checkpoint.prepare(list(wanted))
        entries = checkpoint.shards.entries(file_name)
        return {name: checkpoint.shards.read(file_name, entries[name]) for name in wanted}

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(load, range(8)):
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    server.requests.clear()
    weights(opened(cache))
    assert not server.downloads()
