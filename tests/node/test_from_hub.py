"""A node whose model is in a hub repository."""

import asyncio
import logging
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from server_node import cli, flags
from server_node.capacity import num_blocks_to_hold
from server_node.compute.opened_model import open_model
from server_node.config import ComputeChoice, ModelChoice, NodeConfig
from server_node.life import run_node
from server_node.node import Observer, Online
from server_node.progress import show_progress
from swarm_protocol.errors import ConfigError
from swarm_protocol.identity import load_identity
from swarm_protocol.model import load_span, open_checkpoint
from swarm_protocol.spans import Span
from swarm_protocol.transport.base import Transport
from swarm_protocol.transport.memory_net import MemoryNetwork
from swarm_protocol.transport.network_config import NetworkConfig
from tests.model.hub_server import REPO, hub_of
from tests.node.node_scenario import virtual
from tests.tiny_models import save_tiny_model

SPAN = Span(1, 3)


async def run_until_online(config: NodeConfig, downloads: list[tuple[int, int]], stop: asyncio.Event) -> Online:
    network = MemoryNetwork()
    online: asyncio.Future[Online] = asyncio.get_running_loop().create_future()

    async def open_network(config: NetworkConfig) -> Transport:
        return network.transport(load_identity(Path(config.identity_path or "")).peer_id)

    def on_online(facts: Online) -> None:
        online.set_result(facts)
        stop.set()

    observer = Observer(lambda *_: None, on_online, on_download=lambda *counts: downloads.append(counts))
    await run_node(config, stop, observer, open_network)
    return await online


def test_it_downloads_what_its_span_needs_and_tells_how_that_gets_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model("llama", tmp_path / "tiny", max_shard_size="1GB")
    choice = ModelChoice(REPO, cache_dir=str(tmp_path / "cache"), max_disk_bytes=10**6, blocks=SPAN)
    downloads: list[tuple[int, int]] = []

    @virtual
    async def scenario() -> None:
        config = NodeConfig(choice, ComputeChoice(threads=1, cache_tokens=100))
        online = await run_until_online(config, downloads, asyncio.Event())
        assert online.model == REPO
        assert online.span == SPAN

    with hub_of(tmp_path / "tiny", monkeypatch) as hub:
        scenario()
    span = load_span(open_checkpoint(str(tmp_path / "tiny")), SPAN, dtype=torch.float32, device=torch.device("cpu"))
    size_bytes = sum(weight.nbytes for weight in span.parameters())
    # The first ones know of no size yet, as headers are read.
    assert [counts for counts in downloads if counts[1]][-1] == (size_bytes, size_bytes)
    assert hub.sent_bytes() < size_bytes + 10_000


def test_a_node_takes_no_more_blocks_than_the_disk_cache_may_hold_and_says_how_many_those_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model("llama", tmp_path / "tiny", max_shard_size="1GB")
    folder = load_span(open_checkpoint(str(tmp_path / "tiny")), SPAN, dtype=torch.float32, device=torch.device("cpu"))
    block_bytes = sum(weight.nbytes for weight in folder.parameters()) // len(SPAN)
    choice = ModelChoice(REPO, cache_dir=str(tmp_path / "cache"), max_disk_bytes=19 * block_bytes // 5)
    with hub_of(tmp_path / "tiny", monkeypatch):
        model = open_model(choice, "cpu", "auto", "none")
        assert num_blocks_to_hold(choice, model) == 3
        assert model.disk is not None
        assert block_bytes < model.disk.block_bytes < block_bytes + 8000  # the file's header, checksums
        for asked in (replace(choice, num_blocks=4), replace(choice, blocks=Span(0, 4))):
            with pytest.raises(ConfigError, match=r"4 blocks of .* but --max-disk leaves .*: 3 blocks would fit"):
                num_blocks_to_hold(asked, open_model(asked, "cpu", "auto", "none"))
        unbounded = replace(choice, max_disk_bytes=None)
        assert num_blocks_to_hold(unbounded, open_model(unbounded, "cpu", "auto", "none")) == 5
        free = type(shutil.disk_usage("/"))(10**9, 10**9, 2 * block_bytes)
        monkeypatch.setattr("swarm_protocol.model.piece_cache.shutil.disk_usage", lambda _: free)
        assert num_blocks_to_hold(unbounded, open_model(unbounded, "cpu", "auto", "none")) == 1


@pytest.mark.parametrize(
    ("text", "size_bytes"), [("50GB", 50 * 10**9), ("1.5g", 1_500_000_000), ("800 MB", 8 * 10**8), ("2T", 2 * 10**12)]
)
def test_a_bound_of_the_disk_is_a_size(text: str, size_bytes: int) -> None:
    arguments = flags.settings().parse(["run", "m", "--max-disk", text], {})
    assert flags.node_config(arguments).model.max_disk_bytes == size_bytes


def test_what_is_no_size_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("50", "GB", "0GB", "-1GB", "1XB"):
        with pytest.raises(SystemExit):
            cli.main(["run", "m", f"--max-disk={text}"])
        assert "a size above 0 is needed, such as 50GB" in capsys.readouterr().err


def test_progress_is_lines_of_the_log_or_a_bar(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    show = show_progress("downloading m", "B")
    for done, in_all in ((0, 0), (5 * 10**8, 4 * 10**9), (4 * 10**9, 4 * 10**9), (0, 0), (2 * 10**6, 2 * 10**6)):
        show(done, in_all)
    show_progress("loading m", "block")(3, 3)
    assert caplog.messages == [
        "downloading m: 4.00 of 4.00 GB",
        "downloading m: 2.00 of 2.00 MB",
        "loading m: 3 of 3 blocks",
    ]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    show = show_progress("downloading m", "B")
    for done in (0, 10**9, 4 * 10**9):
        show(done, 4 * 10**9)
    show(0, 0)
    shown = capsys.readouterr().err
    assert "downloading m" in shown
    assert "4.00G/4.00G" in shown
