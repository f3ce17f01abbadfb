"""What a node measures of itself, and what of it is still known after a start."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from server_node import cli
from server_node.admission import ServedSpan
from server_node.benchmark import measure_speed
from server_node.figure_store import FOLDER, FigureStore
from server_node.figures import MAX_AGE_S, Figures, FiguresKey, figures_table, from_text, to_text
from server_node.probing import Prober
from server_node.speed import SpeedMeter
from server_node.uplink import Uplink, measure_uplink, uplink_from
from swarm_protocol.errors import LimitExceededError, SwarmError
from swarm_protocol.ids import PeerId
from swarm_protocol.message_stream import MessageStream
from swarm_protocol.messages import PROBE_PROTOCOL, ErrorReply, Payload, PayloadArrived, WireTensor
from swarm_protocol.transport.base import FrameStream
from swarm_protocol.transport.memory_net import LinkProfile, MemoryNetwork
from tests.node.node_scenario import HIDDEN, MODEL, REVISION, SPAN, GatedWorker, virtual
from tests.tiny_models import save_tiny_model

KEY = FiguresKey("m", "r/float32/cpu", 2, "a CPU", 2, "umbel 1, torch 2")
FIGURES = Figures({1: 0.001, 8: 0.002, 16: 0.004}, 0.0001, 1000.0)
SERVED = ServedSpan(MODEL, REVISION, SPAN, HIDDEN, "float32", 1000, "test")


# --- what is kept


def test_what_is_kept_is_known_again() -> None:
    assert from_text(to_text(KEY, FIGURES), KEY, 1000.0 + MAX_AGE_S) == FIGURES


@pytest.mark.parametrize(
    "change",
    [
        {"model": "n"}, {"numerics": "r/bfloat16/cpu"}, {"span_class": 3}, {"device": "b CPU"}, {"threads": 1},
        {"software": "umbel 2, torch 2"},
    ],
)  # fmt: skip
def test_anything_else_is_measured_anew(change: dict[str, object]) -> None:
    other = replace(KEY, **change)  # type: ignore[arg-type]
    assert other.file_name != KEY.file_name
    assert from_text(to_text(KEY, FIGURES), other, 1000.0) is None


@pytest.mark.parametrize("now_s", [999.0, 1000.1 + MAX_AGE_S])
def test_old_figures_and_those_of_the_future_are_none(now_s: float) -> None:
    assert from_text(to_text(KEY, FIGURES), KEY, now_s) is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"block_token_s": 0.0001', '"block_token_s": 0'),
        ('"block_token_s": 0.0001', '"block_token_s": -1'),
        ('"block_token_s": 0.0001', '"block_token_s": NaN'),
        ('"block_token_s": 0.0001', '"block_token_s": "fast"'),
        ('"block_token_s": 0.0001', '"block_token": 1'),
        ('"1": 0.001', '"2": 0.001'),
        ('"1": 0.001', '"1": 1e9'),
        ('{"1": 0.001', '{"one": 0.001'),
        ('"version": 1', '"version": 2'),
        ('{"version": 1', '["version"'),
    ],
)
def test_a_file_that_is_not_ours_is_none(old: str, new: str) -> None:
    text = to_text(KEY, FIGURES)
    assert old in text
    assert from_text(text.replace(old, new), KEY, 1000.0) is None


def test_spans_of_about_as_many_blocks_share_figures(tmp_path: Path) -> None:
    store = FigureStore(tmp_path, "a CPU", 2, "umbel 1")
    assert store.key("m", "n", 4) == store.key("m", "n", 7) != store.key("m", "n", 8)


def test_a_folder_that_cannot_be_used_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FOLDER).write_text("a file")
    store = FigureStore(tmp_path, "a CPU", 2, "umbel 1")
    assert store.read(KEY) is None
    store.write(KEY, FIGURES)
    assert "what was measured cannot be kept" in caplog.text


def test_the_table_is_of_the_span() -> None:
    assert figures_table(FIGURES, 10).split() == [
        "rows", "steps/s", "tokens/s", "1", "100.0", "100.0", "8", "50.0", "400.0", "16", "25.0", "400.0",
        "prompt", "1000.0",
    ]  # fmt: skip


# --- measuring


@virtual
async def test_a_span_is_measured_once_and_known_at_the_next_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    store = FigureStore(tmp_path, "a CPU", 2, "umbel 1")
    first, again, other = SpeedMeter(), SpeedMeter(), SpeedMeter()
    await measure_speed(GatedWorker(), SERVED, first, store)
    assert first.figures is not None
    assert set(first.figures.decode_s) == {1, 8, 16}
    assert "the speed was measured in" in caplog.text
    (file,) = (tmp_path / FOLDER).iterdir()
    idle = GatedWorker()
    idle.bug = LimitExceededError("nothing is to be computed")
    await measure_speed(idle, SERVED, again, store)
    assert again.figures == first.figures
    assert again.facts((), 0.0) == first.facts((), 0.0)
    assert "the speed is known from an earlier start" in caplog.text
    file.write_text(file.read_text()[:-5])
    await measure_speed(GatedWorker(), SERVED, other, store)
    assert other.figures is not None
    assert other.figures.measured_s > first.figures.measured_s
    assert json.loads(file.read_text())["figures"]["measured_s"] == other.figures.measured_s


@virtual
async def test_no_more_rows_are_measured_than_the_cache_has_room_for(tmp_path: Path) -> None:
    speed = SpeedMeter()
    await measure_speed(GatedWorker(), replace(SERVED, cache_tokens=50), speed)
    assert speed.figures is not None
    assert set(speed.figures.decode_s) == {1, 8}


def test_the_command_shows_what_is_measured_and_then_what_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_WAIT_POLICY", "KMP_BLOCKTIME"):
        monkeypatch.setenv(name, "PASSIVE" if name == "OMP_WAIT_POLICY" else "0")  # the command sets them
    save_tiny_model("llama", tmp_path / "tiny-llama")
    command = ["benchmark", str(tmp_path / "tiny-llama"), "--cache-dir", str(tmp_path), "--blocks", "1:4"]
    command += ["--threads", "1", "--cache-tokens", "200"]
    shown = []
    for extra in ([], [], ["--refresh"]):
        assert cli.main([*command, *extra]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0].splitlines()[0] == "tiny-llama blocks 1:4 in float32"
    assert [line.split()[0] for line in shown[0].splitlines()[1:]] == ["rows", "1", "8", "16", "prompt"]
    assert shown[1] == shown[0]
    assert shown[2] != shown[0]
    assert cli.main([*command[:4], "--num-blocks", "9"]) == 2


# --- the uplink


@pytest.mark.parametrize("rate", [50_000, 1_000_000, 50_000_000])
def test_the_uplink_is_what_the_line_carries(rate: int) -> None:
    @virtual
    async def scenario() -> None:
        network = MemoryNetwork()
        me, other = network.transport(), network.transport()
        network.set_link(me.peer_id, other.peer_id, LinkProfile(0.02, rate), both_ways=False)
        network.set_link(other.peer_id, me.peer_id, LinkProfile(0.02), both_ways=False)
        await other.serve(PROBE_PROTOCOL, Prober(other).serve)
        assert await measure_uplink(me, other.peer_id) == pytest.approx(rate, rel=0.1)

    scenario()


@virtual
async def test_the_uplink_is_measured_with_two_peers_at_most_and_known_for_a_day(tmp_path: Path) -> None:
    network = MemoryNetwork(LinkProfile(0.01, 1_000_000))
    me, asked = network.transport(), []

    async def add() -> PeerId:
        peer = network.transport()

        async def serve(stream: FrameStream) -> None:
            asked.append(peer.peer_id)
            await Prober(peer).serve(stream)

        await peer.serve(PROBE_PROTOCOL, serve)
        return peer.peer_id

    silent = network.transport().peer_id
    peers = [silent, await add(), await add()]

    async def found() -> list[PeerId]:
        return peers

    first, again = SpeedMeter(), SpeedMeter()
    await Uplink(me, tmp_path, first).know(found)
    assert asked == [peers[1]]
    assert first.uplink_bytes_per_s == pytest.approx(1_000_000, rel=0.1)
    await Uplink(me, tmp_path, again).know(found)
    assert again.uplink_bytes_per_s == first.uplink_bytes_per_s
    assert len(asked) == 1
    bounded = SpeedMeter()
    await Uplink(me, tmp_path, bounded, 125_000).know(found)
    assert bounded.uplink_bytes_per_s == 125_000


@pytest.mark.parametrize("text", [None, "", "{}", "[]", '{"bytes_per_s": 0, "measured_s": 5}', '{"bytes_per_s": 9}'])
def test_a_file_without_an_uplink_is_none(text: str | None) -> None:
    assert uplink_from(text, 10.0) is None


@pytest.mark.parametrize(("now_s", "known"), [(4.0, None), (5.0, 9.0), (5.0 + 86_400, 9.0), (6.0 + 86_400, None)])
def test_an_uplink_is_known_for_a_day(now_s: float, known: float | None) -> None:
    assert uplink_from('{"bytes_per_s": 9, "measured_s": 5}', now_s) == known


@virtual
async def test_a_peer_takes_no_more_than_a_mebibyte() -> None:
    network = MemoryNetwork()
    me, other = network.transport(), network.transport()
    await other.serve(PROBE_PROTOCOL, Prober(other).serve)
    stream = MessageStream(await me.dial(other.peer_id, PROBE_PROTOCOL))
    half = Payload(WireTensor("int64", (1 << 16,), bytes(1 << 19)))
    for _ in range(2):
        await stream.send(half)
        assert await stream.receive() == PayloadArrived()
    await stream.send(half)
    reply = await stream.receive()
    assert isinstance(reply, ErrorReply)
    assert reply.code == "limit_exceeded"
    with pytest.raises(SwarmError):
        await stream.receive()
    again = MessageStream(await me.dial(other.peer_id, PROBE_PROTOCOL))
    await again.send(half)
    refused = await again.receive()
    assert isinstance(refused, ErrorReply)
    assert refused.code == "limit_exceeded"
