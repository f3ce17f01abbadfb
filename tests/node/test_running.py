"""A node's whole life on the network in memory: it chooses blocks, joins, loads, serves and leaves, or refuses to."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from server_node.config import ComputeChoice, ModelChoice, NodeConfig
from server_node.life import run_node
from server_node.node import Observer, Online, best_address
from server_node.status_board import StatusBoard
from swarm_protocol.errors import CheckpointError, ConfigError, PeerUnreachableError, StreamLostError
from swarm_protocol.identity import load_identity, verify
from swarm_protocol.messages import SESSION_PROTOCOL, OpenSession
from swarm_protocol.model.checkpoint import open_checkpoint
from swarm_protocol.records import NodeRecord, directory_keys, unseal
from swarm_protocol.spans import Span
from swarm_protocol.transport.base import Transport
from swarm_protocol.transport.memory_net import MemoryNetwork
from swarm_protocol.transport.network_config import NetworkConfig
from tests.node.node_scenario import Conversation, assert_error, assert_output, states, virtual
from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    save_tiny_model("llama", path)
    return str(path)


class Runner:
    """Runs nodes on one memory network."""

    def __init__(self) -> None:
        self.network = MemoryNetwork()
        self.loaded: list[tuple[int, int]] = []

    async def open_network(self, config: NetworkConfig) -> Transport:
        self.key_path = Path(config.identity_path or "")
        return self.network.transport(load_identity(Path(config.identity_path or "")).peer_id)

    async def start(self, config: NodeConfig) -> "RunningNode":
        stop, online = asyncio.Event(), asyncio.get_running_loop().create_future()
        observer = Observer(lambda done, in_all: self.loaded.append((done, in_all)), online.set_result)
        task = asyncio.create_task(run_node(config, stop, observer, self.open_network))
        await asyncio.wait({task, online}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
        return RunningNode(stop, task, await online)

    def records(self, model: str = "tiny-llama") -> list[NodeRecord]:
        return [
            unseal(value, owner, verify, self.network.now_s())
            for key in directory_keys(model, 5)
            for owner, (value, _) in self.network.records.get(key, {}).items()
        ]


class RunningNode:
    def __init__(self, stop: asyncio.Event, task: "asyncio.Task[None]", online: Online) -> None:
        self.stop, self.task, self.online = stop, task, online

    async def leave(self) -> None:
        self.stop.set()
        await self.task


def config(folder: str, **choice: object) -> NodeConfig:
    return NodeConfig(
        ModelChoice(folder, **choice),  # type: ignore[arg-type]
        ComputeChoice(threads=1, cache_tokens=100),
    )


def test_nodes_take_the_blocks_that_are_missing_serve_and_withdraw(folder: str):
    @virtual
    async def scenario() -> None:
        runner = Runner()
        first = await runner.start(config(folder, num_blocks=3))
        assert first.online.model == "tiny-llama"
        assert first.online.span == Span(0, 3)
        assert runner.loaded[-1] == (3, 3)
        second = await runner.start(config(folder, num_blocks=2))
        assert second.online.span == Span(3, 5)
        assert {(str(record.span), record.state, record.free_tokens) for record in runner.records()} == {
            ("0:3", "online", 100),
            ("3:5", "online", 100),
        }
        record = next(record for record in runner.records() if record.span == Span(3, 5))
        talk = Conversation(await runner.network.transport().dial(record.peer_id, SESSION_PROTOCOL))
        await talk.ask(OpenSession(b"s" * 16, (1,), "tiny-llama", record.revision, 3, 5, 1, 10))
        reply = await talk.step(1, 0, states(4))
        from swarm_protocol.model.parts import load_span

        span = load_span(open_checkpoint(folder), Span(3, 5), dtype=torch.float32, device=torch.device("cpu"))
        with torch.inference_mode():
            assert_output(reply, span(states(4)))
        await first.leave()
        await second.leave()
        assert {record.state for record in runner.records()} == {"offline"}
        third = await runner.start(config(folder, num_blocks=2))
        assert third.online.span == Span(0, 2)
        await third.leave()

    scenario()


def test_the_board_says_how_a_node_gets_on(folder: str):
    @virtual
    async def scenario() -> None:
        runner, stop, online = Runner(), asyncio.Event(), asyncio.get_running_loop().create_future()
        board = StatusBoard("m")
        early = board.status()
        assert (early.state, early.model, early.blocks) == ("opening", "m", None)
        leaving: list[str] = []
        observer = Observer(
            board.loading, online.set_result, lambda _: leaving.append(board.status().state), board.loaded
        )
        node = asyncio.create_task(run_node(config(folder, num_blocks=3), stop, observer, runner.open_network))
        await online
        assert board.status().state == "joining"
        board.online()
        now = board.status()
        assert (now.state, now.model, now.blocks) == ("online", "tiny-llama", "0:3")
        assert (now.loaded_blocks, now.blocks_to_load, now.cache_tokens, now.cache_used_tokens) == (3, 3, 100, 0)
        # What others tried out is counted, what the node measured by itself is not.
        assert (now.num_steps, now.num_tokens, now.num_sessions) == (1, 1, 0)
        (record,) = runner.records()
        assert now.peer_id == record.peer_id
        talk = Conversation(await runner.network.transport().dial(record.peer_id, SESSION_PROTOCOL))
        assert_error(
            await talk.ask(OpenSession(b"t" * 16, (1,), "other", record.revision, 0, 3, 1, 10)), "revision_mismatch"
        )
        await talk.ask(OpenSession(b"s" * 16, (1,), "tiny-llama", record.revision, 0, 3, 1, 10))
        await talk.step(1, 0, states(4))
        now = board.status()
        assert (now.num_steps, now.num_tokens, now.num_sessions, now.num_peers) == (2, 5, 1, 1)
        assert (now.cache_used_tokens, now.tokens_per_s) == (10, 0.5)
        assert now.errors == {"revision_mismatch": 1}
        stop.set()
        await node
        assert set(leaving) == {"draining"}

    scenario()


def test_without_a_choice_the_whole_small_model_is_served(folder: str):
    @virtual
    async def scenario() -> None:
        node = await Runner().start(config(folder))
        assert node.online.span == Span(0, 5)
        await node.leave()

    scenario()


def test_a_key_for_this_run_alone_is_in_no_file_while_the_node_serves(folder: str):
    @virtual
    async def scenario() -> None:
        runner = Runner()
        node = await runner.start(config(folder))
        assert not runner.key_path.exists()
        await node.leave()

    scenario()


def test_a_node_that_is_stopped_while_it_loads_withdraws(folder: str):
    @virtual
    async def scenario() -> None:
        runner = Runner()
        task = asyncio.current_task()
        loop, stop = asyncio.get_running_loop(), asyncio.Event()

        def on_loading(done: int, _: int) -> None:
            if done == 2:
                loop.call_soon_threadsafe(running.cancel)
            runner.loaded.append((done, 5))

        running = asyncio.create_task(
            run_node(config(folder), stop, Observer(on_loading, lambda _: None), runner.open_network)
        )
        assert task is not running
        with pytest.raises(asyncio.CancelledError):
            await running
        assert {record.state for record in runner.records()} == {"offline"}

    scenario()


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"blocks": Span(3, 9)}, ConfigError, "has the blocks 0:5, not 3:9"),
        ({"num_blocks": 6}, ConfigError, "has 5 blocks, not 6"),
        ({"source": "/nowhere/at all"}, CheckpointError, "no checkpoint at"),
    ],
)
def test_what_cannot_be_served_is_said_before_anybody_is_told(
    folder: str, change: dict[str, object], error: type[Exception], says: str
):
    @virtual
    async def scenario() -> None:
        runner = Runner()
        chosen = config(folder)
        with pytest.raises(error, match=says):
            await runner.start(replace(chosen, model=replace(chosen.model, **change)))
        assert not runner.network.records

    scenario()


def test_peers_that_do_not_answer_end_the_start(folder: str):
    @virtual
    async def scenario() -> None:
        async def open_network(_: NetworkConfig) -> Transport:
            raise PeerUnreachableError("no initial peer answered")

        with pytest.raises(PeerUnreachableError):
            await run_node(config(folder), asyncio.Event(), Observer(lambda *_: None, lambda _: None), open_network)

    scenario()


def test_a_node_whose_network_is_lost_ends_with_an_error(folder: str):
    @virtual
    async def scenario() -> None:
        runner = Runner()
        node = await runner.start(config(folder))
        runner.network.kill(runner.records()[0].peer_id)
        with pytest.raises(ExceptionGroup) as caught:
            await node.task
        assert caught.group_contains(StreamLostError, match="start the node again")

    scenario()


@pytest.mark.parametrize(("quantization", "ending"), [("none", "float32/cpu"), ("int8", "bfloat16/int8-row/cpu")])
def test_the_record_says_how_weights_are_held(folder: str, quantization: str, ending: str):
    @virtual
    async def scenario() -> None:
        runner = Runner()
        node = await runner.start(replace(config(folder), compute=ComputeChoice(quantization=quantization, threads=1)))
        (record,) = runner.records()
        assert record.numerics == f"{record.revision}/{ending}"
        await node.leave()

    scenario()


def test_the_address_that_is_shown_works_beyond_this_machine():
    local, lan = "/ip4/127.0.0.1/tcp/1/p2p/a", "/ip4/10.0.0.1/tcp/1/p2p/a"
    assert best_address([local, lan]) == lan
    assert best_address([local]) == local
    with pytest.raises(ConfigError):
        best_address([])
