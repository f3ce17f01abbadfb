"""Nodes that take other blocks, or pause, on the network in memory: they drain, load and join anew."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import pytest

from server_node.config import ComputeChoice, ModelChoice, NodeConfig
from server_node.life import Owner, run_node, watch_owner_of
from server_node.move_turns import ROUND_S
from server_node.node import Observer, Online
from server_node.speed import RoutingFacts, SpeedMeter
from server_node.status_board import StatusBoard
from server_node.swarm_records import read_records
from swarm_protocol.errors import CheckpointError, PeerUnreachableError, StreamLostError
from swarm_protocol.identity import load_identity
from swarm_protocol.messages import SESSION_PROTOCOL, Draining, OpenSession
from swarm_protocol.records import RECORD_LIFETIME_S, REFRESH_PERIOD_S, NodeRecord
from swarm_protocol.spans import Span, uncovered
from swarm_protocol.transport.base import Transport
from swarm_protocol.transport.memory_net import MemoryNetwork
from swarm_protocol.transport.network_config import NetworkConfig
from tests.node.node_scenario import Conversation, assert_output, states, virtual
from tests.node.swarm_looks import records_of
from tests.tiny_models import save_tiny_model

PATIENCE_S = 400.0
"""For a dead node's record to expire, and for two rounds of claims."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    save_tiny_model("llama", path)
    return str(path)


@pytest.fixture(autouse=True)
def equal_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nodes measure of this machine would decide where they go."""
    monkeypatch.setattr(SpeedMeter, "facts", lambda *_: RoutingFacts(block_step_s=0.01))


class OwnerOnCall:
    """Somebody who comes and goes as the test says."""

    def __init__(self) -> None:
        self.is_there = False
        self._changed = asyncio.Event()

    def set(self, is_there: bool) -> None:
        self.is_there = is_there
        self._changed.set()

    async def until_away(self) -> None:
        await self._until(False)

    async def until_there(self) -> None:
        await self._until(True)

    async def _until(self, is_there: bool) -> None:
        while self.is_there != is_there:
            self._changed.clear()
            await self._changed.wait()


class RunNode:
    """A node of `run_node`, and what it tells."""

    def __init__(self, network: MemoryNetwork, config: NodeConfig, owner: Owner | None = None) -> None:
        self.network = network
        self.peer_id = ""
        self.stop = asyncio.Event()
        self.board = StatusBoard("m")
        self.spans: list[Span] = []
        self.online_s: list[float] = []
        self.problem: Exception | None = None
        """Raised once, when blocks are loaded next."""
        self._news = asyncio.Event()
        observer = Observer(
            self._on_loading, self._on_online, lambda _: None, self.board.loaded, lambda *_: None, self.board.unloaded,
            self.board.waiting,
        )  # fmt: skip
        watch: Callable[[str], Owner] = watch_owner_of if owner is None else lambda _: owner
        self.task = asyncio.create_task(run_node(config, self.stop, observer, self._open_network, watch))

    async def online(self, times: int = 1, timeout_s: float = PATIENCE_S) -> Span:
        """Wait until the node has come online so many times; return its blocks."""
        async with asyncio.timeout(timeout_s):
            while len(self.spans) < times:
                self._news.clear()
                news = asyncio.create_task(self._news.wait())
                await asyncio.wait({self.task, news}, return_when=asyncio.FIRST_COMPLETED)
                news.cancel()
                if self.task.done():
                    await self.task
        return self.spans[-1]

    def record(self) -> NodeRecord:
        return next(record for record in records_of(self.network, 5) if record.peer_id == self.peer_id)

    async def paused(self) -> None:
        """Wait until the node waits for its owner's programs to end."""
        async with asyncio.timeout(PATIENCE_S):
            while self.board.status().state != "paused":  # noqa: ASYNC110 - nothing tells it
                await asyncio.sleep(0.1)

    def is_listed(self) -> bool:
        return any(record.peer_id == self.peer_id for record in records_of(self.network, 5))

    async def leave(self) -> None:
        self.stop.set()
        await self.task

    async def die(self) -> None:
        self.network.kill(self.peer_id)
        with pytest.raises(ExceptionGroup) as caught:
            await self.task
        assert caught.group_contains(StreamLostError)

    async def _open_network(self, config: NetworkConfig) -> Transport:
        transport = self.network.transport(load_identity(Path(config.identity_path or "")).peer_id)
        # What it opens later is the second peer that tries it out.
        if not self.peer_id:
            self.peer_id, self.transport = transport.peer_id, transport
        return transport

    def _on_loading(self, num_done: int, num_all: int) -> None:
        self.board.loading(num_done, num_all)
        problem, self.problem = self.problem, None
        if problem is not None:
            raise problem

    def _on_online(self, online: Online) -> None:
        self.board.online()
        self.spans.append(online.span)
        self.online_s.append(asyncio.get_running_loop().time())
        self._news.set()


def config(folder: str, **choice: object) -> NodeConfig:
    return NodeConfig(
        ModelChoice(folder, **choice),  # type: ignore[arg-type]
        ComputeChoice(threads=1, cache_tokens=100),
    )


class Swarm:
    """Two nodes that hold all five blocks, and more that repeat the first ones; the second node is the only one of
    its blocks."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.network = MemoryNetwork()

    async def start(self, num_spare: int) -> list[RunNode]:
        nodes = [RunNode(self.network, config(self.folder, blocks=span)) for span in (Span(0, 3), Span(3, 5))]
        for node in nodes:
            await node.online()
        # Beside nodes of the last blocks, which leave again, spares take the first ones.
        beside = [RunNode(self.network, config(self.folder, blocks=Span(2, 5))) for _ in range(2 * num_spare)]
        for node in beside:
            await node.online()
        for _ in range(num_spare):
            nodes.append(RunNode(self.network, config(self.folder, num_blocks=2)))
            assert await nodes[-1].online() == Span(0, 2)
        await asyncio.gather(*(node.leave() for node in beside))
        return nodes


async def open_session(node: RunNode, span: Span) -> Conversation:
    talk = Conversation(await node.network.transport().dial(node.peer_id, SESSION_PROTOCOL))
    revision = node.record().revision
    await talk.ask(OpenSession(b"s" * 16, (1,), "tiny-llama", revision, span.start, span.end, 1, 10))
    return talk


def test_a_node_moves_to_blocks_that_have_lost_their_last_node(folder: str):
    @virtual
    async def scenario() -> None:
        nodes = await Swarm(folder).start(num_spare=1)
        keeper, lost, spare = nodes
        talk = await open_session(spare, Span(0, 2))
        incarnation = spare.record().incarnation
        await lost.die()
        assert isinstance(await talk.receive(), Draining)
        record = spare.record()
        assert (record.state, record.span, record.planned_span) == ("draining", Span(0, 2), Span(3, 5))
        assert await spare.online(2) == Span(3, 5)
        record = spare.record()
        assert (record.state, record.span, record.next_blocks) == ("online", Span(3, 5), None)
        assert record.incarnation > incarnation
        assert record.max_tokens == 100
        now = spare.board.status()
        assert (now.state, now.blocks, now.num_sessions) == ("online", "3:5", 0)
        assert now.num_steps == 2, "both probes are counted, before and after the move"
        again = await open_session(spare, Span(3, 5))
        reply = await again.step(1, 0, states(4))
        assert_output(reply, output_of(folder, Span(3, 5)))
        assert keeper.spans == [Span(0, 3)]
        await asyncio.gather(spare.leave(), keeper.leave())

    scenario()


def output_of(folder: str, span: Span):
    import torch

    from swarm_protocol.model.checkpoint import open_checkpoint
    from swarm_protocol.model.parts import load_span

    with torch.inference_mode():
        return load_span(open_checkpoint(folder), span, dtype=torch.float32, device=torch.device("cpu"))(states(4))


def test_several_that_could_fill_a_hole_move_one_at_a_time(folder: str):
    @virtual
    async def scenario() -> None:
        nodes = await Swarm(folder).start(num_spare=3)
        await nodes[1].die()
        await asyncio.sleep(2 * PATIENCE_S)
        moved_s = sorted(time_s for node in nodes[2:] for time_s in node.online_s[1:])
        assert moved_s, "nobody filled the hole"
        assert all(later - earlier > ROUND_S / 2 for earlier, later in pairwise(moved_s))
        held = [node.record().span for node in nodes if node is not nodes[1]]
        assert not uncovered(held, 5)
        await asyncio.gather(*(node.leave() for node in nodes if node is not nodes[1]))

    scenario()


def test_nobody_moves_where_all_is_well_or_the_owner_has_said_where(folder: str):
    @virtual
    async def scenario() -> None:
        network = MemoryNetwork()
        nodes = [RunNode(network, config(folder, **choice)) for choice in ({"blocks": Span(0, 3)}, {"num_blocks": 5})]
        for node in nodes:
            await node.online()
        await asyncio.sleep(3600)
        assert [len(node.spans) for node in nodes] == [1, 1]
        # Now blocks are missing, but the one that is left must stay.
        await nodes[1].leave()
        await asyncio.sleep(1200)
        assert nodes[0].spans == [Span(0, 3)]
        await nodes[0].leave()

    scenario()


def test_blocks_that_cannot_be_loaded_are_given_up_for_the_former_ones(folder: str, caplog: pytest.LogCaptureFixture):
    @virtual
    async def scenario() -> None:
        nodes = await Swarm(folder).start(num_spare=1)
        keeper, lost, spare = nodes
        spare.problem = CheckpointError("the shard is gone")
        await lost.die()
        assert await spare.online(2) == Span(0, 2)
        assert "blocks 3:5 could not be loaded: the shard is gone" in caplog.text
        assert spare.record().span == Span(0, 2)
        assert await spare.online(3) == Span(3, 5), "it tries again in a later round"
        await asyncio.gather(spare.leave(), keeper.leave())

    scenario()


def test_a_node_that_is_stopped_while_it_moves_leaves(folder: str):
    @virtual
    async def scenario() -> None:
        nodes = await Swarm(folder).start(num_spare=1)
        keeper, lost, spare = nodes
        talk = await open_session(spare, Span(0, 2))
        await lost.die()
        assert isinstance(await talk.receive(), Draining)
        await spare.leave()
        assert spare.record().state == "offline"
        assert spare.spans == [Span(0, 2)]
        await keeper.leave()

    scenario()


async def no_network(keys: object) -> NoReturn:
    raise PeerUnreachableError("no network")


def test_a_node_pauses_while_its_owner_uses_the_device(folder: str, caplog: pytest.LogCaptureFixture):
    @virtual
    async def scenario() -> None:
        owner = OwnerOnCall()
        owner.set(True)
        chosen = replace(config(folder, num_blocks=3), only_when_idle=True)
        node = RunNode(MemoryNetwork(), chosen, owner)
        await node.paused()
        assert not records_of(node.network, 5)
        owner.set(False)
        assert await node.online() == Span(0, 3)
        talk = await open_session(node, Span(0, 3))
        owner.set(True)
        assert isinstance(await talk.receive(), Draining)
        await node.paused()
        await asyncio.sleep(60)
        assert not node.is_listed()
        assert node.board.status().blocks is None
        directory = node.transport.directory
        lookup, directory.lookup = directory.lookup, no_network  # type: ignore[method-assign]
        owner.set(False)
        await asyncio.sleep(300)
        assert "no blocks can be taken now" in caplog.text
        directory.lookup = lookup  # type: ignore[method-assign]
        assert await node.online(2) == Span(0, 3)
        assert node.record().state == "online"
        owner.set(True)
        await node.paused()
        await node.leave()

    scenario()


def test_a_killed_node_is_gone_after_the_life_of_its_record(folder: str):
    @virtual
    async def scenario() -> None:
        network = MemoryNetwork()
        node, other = RunNode(network, config(folder)), network.transport()
        await node.online()
        await asyncio.sleep(REFRESH_PERIOD_S)
        assert [record.peer_id for record in await read_records(other, "tiny-llama", 5)] == [node.peer_id]
        await node.die()
        await asyncio.sleep(RECORD_LIFETIME_S - REFRESH_PERIOD_S - 1)
        assert await read_records(other, "tiny-llama", 5), "two refreshes may be lost"
        await asyncio.sleep(REFRESH_PERIOD_S + 1)
        assert not await read_records(other, "tiny-llama", 5)

    scenario()
