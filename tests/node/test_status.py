"""What a node tells its owner, as a table, a line, JSON over its socket, and metrics."""

import asyncio
import json
import socket
import stat
from pathlib import Path

import pytest

from server_node.metrics import metrics_page, metrics_text
from server_node.owner_commands import show_status
from server_node.run_file import run_file
from server_node.status import NodeStatus, ServedWork, status_from, status_line, status_table
from server_node.status_socket import read_status, status_socket
from swarm_protocol.errors import ConfigError

OPENING = NodeStatus("opening", "m", "umbel 1", 1.0)
ONLINE = NodeStatus(
    state="online",
    model="tiny-llama",
    software="umbel 1",
    uptime_s=90_061.5,
    peer_id="12D3KooWa",
    addresses=("/memory/0", "/memory/1"),
    blocks="0:3",
    loaded_blocks=3,
    blocks_to_load=3,
    num_sessions=1,
    num_peers=2,
    tokens_per_s=12.34,
    cache_tokens=200,
    cache_used_tokens=50,
    memory_bytes=1_500_000_000,
    num_steps=7,
    num_tokens=99,
    queue_s=0.5,
    decode_steps_per_s={"1": 40.0, "8": 20.0},
    prompt_tokens_per_s=500.0,
    uplink_bytes_per_s=2_500_000.0,
    errors={"cache_full": 2, "node_draining": 1},
)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


# --- words


@pytest.mark.parametrize(
    ("status", "line"),
    [
        (OPENING, "m | opening"),
        (NodeStatus("loading", "m", "umbel 1", 1.0, loaded_blocks=2, blocks_to_load=5), "m | loading 2 of 5 blocks"),
        (ONLINE, "tiny-llama | blocks 0:3 | online | 1 session | 12.3 tokens/s | cache 25 % | 2 peers"),
    ],
)
def test_the_line_says_what_changes(status: NodeStatus, line: str) -> None:
    assert status_line(status) == line


def test_the_table_says_all_of_it() -> None:
    assert status_table(ONLINE).splitlines() == [
        "state     online",
        "model     tiny-llama",
        "blocks    0:3",
        "peer id   12D3KooWa",
        "address   /memory/0",
        "address   /memory/1",
        "sessions  1",
        "peers     2",
        "speed     12.3 tokens/s in the last 10 s",
        "measured  40.0 steps/s of 1, 20.0 steps/s of 8 rows, 500.0 tokens/s of prompts",
        "uplink    2.50 MB/s",
        "served    99 tokens in 7 steps",
        "cache     50 of 200 tokens",
        "errors    2 cache_full, 1 node_draining",
        "memory    1.50 GB",
        "up for    1 d 1 h 1 min 1 s",
        "software  umbel 1",
    ]


@pytest.mark.parametrize("status", [OPENING, ONLINE], ids=lambda status: status.state)
def test_json_keeps_every_fact(status: NodeStatus) -> None:
    assert status_from(json.loads(json.dumps(status.as_json()))) == status


@pytest.mark.parametrize("values", [None, [], {}, {"state": "online"}, {**ONLINE.as_json(), "of_tomorrow": 1}])
def test_what_is_no_status_is_refused(values: object) -> None:
    with pytest.raises(ValueError, match="status"):
        status_from(values)


def test_the_rate_is_that_of_the_last_seconds() -> None:
    work = ServedWork()
    assert work.tokens_per_s(0.0) == 0.0
    for now_s in range(100):
        work.computed(2, 0.25, float(now_s))
        work.computed(3, 0.0, now_s + 0.5)
    assert work.tokens_per_s(99.9) == 5.0
    assert work.tokens_per_s(104.9) == 2.5
    assert work.tokens_per_s(200.0) == 0.0
    assert (work.num_steps, work.num_tokens, work.queue_s) == (200, 500, 25.0)


# --- the socket


def asked(tmp_path: Path, status: NodeStatus, *, is_json: bool) -> int:
    """Return what `umbel-node status` ends with beside a node that says `status`."""
    identity = str(tmp_path / "node.key")

    async def scenario() -> int:
        with run_file(identity) as running:
            async with status_socket(running.socket_path, lambda: status):
                return await asyncio.to_thread(show_status, identity, is_json=is_json)

    return asyncio.run(scenario())


@pytest.mark.parametrize("state", ["opening", "loading", "joining", "online", "draining"])
def test_the_exit_status_says_whether_it_is_online(
    tmp_path: Path, state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = NodeStatus(state, "m", "umbel 1", 1.0)
    assert asked(tmp_path, status, is_json=True) == (0 if state == "online" else 1)
    assert json.loads(capsys.readouterr().out)["state"] == state


def test_people_get_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert asked(tmp_path, ONLINE, is_json=False) == 0
    assert capsys.readouterr().out == status_table(ONLINE) + "\n"


def test_without_a_node_it_is_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show_status(str(tmp_path / "node.key"), is_json=False) == 2
    assert "no node runs with the identity file" in capsys.readouterr().err


def test_a_node_that_does_not_answer_yet_is_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    identity = str(tmp_path / "node.key")
    with run_file(identity):
        assert show_status(identity, is_json=False) == 1
    assert "try again" in capsys.readouterr().err


def test_the_socket_is_its_users_alone_and_goes_with_the_node(tmp_path: Path) -> None:
    path = tmp_path / "node.key.sock"
    path.write_text("of one that was killed")

    async def scenario() -> None:
        async with status_socket(path, lambda: ONLINE):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert await asyncio.to_thread(read_status, path) == ONLINE
        assert not path.exists()

    asyncio.run(scenario())


def test_a_node_runs_where_no_socket_can_be_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with status_socket(tmp_path / ("long" * 50) / "s.sock", lambda: ONLINE):
            pass
        async with status_socket(None, lambda: ONLINE):
            pass

    asyncio.run(scenario())
    assert "`umbel-node status` will not find this node" in caplog.text


def test_a_bug_in_the_status_ends_the_answer_alone(tmp_path: Path) -> None:
    answers = iter([None, ONLINE])

    async def scenario() -> None:
        path = tmp_path / "s.sock"
        async with status_socket(path, lambda: next(answers)):  # type: ignore[arg-type,return-value]
            with pytest.raises(ConfigError, match="answers with something else"):
                await asyncio.to_thread(read_status, path)
            assert await asyncio.to_thread(read_status, path) == ONLINE

    asyncio.run(scenario())


# --- metrics


def test_metrics_name_every_fact() -> None:
    lines = set(metrics_text(lambda: ONLINE).decode().splitlines())
    assert {
        'umbel_node_state{state="online"} 1.0',
        'umbel_node_state{state="draining"} 0.0',
        "umbel_node_sessions 1.0",
        "umbel_node_peers 2.0",
        "umbel_node_cache_used_tokens 50.0",
        "umbel_node_tokens_total 99.0",
        "umbel_node_steps_total 7.0",
        "umbel_node_queue_seconds_total 0.5",
        'umbel_node_errors_total{code="cache_full"} 2.0',
    } <= lines
    assert "umbel_node_memory_bytes" not in metrics_text(lambda: OPENING).decode()


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


async def fetch(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = await reader.read()
    writer.close()
    return answer


def test_metrics_are_served_on_loopback_and_nothing_else_is(free_port: int) -> None:
    async def scenario() -> None:
        async with metrics_page(free_port, lambda: ONLINE):
            head, _, body = (await fetch(free_port, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 OK\r\n")
            assert f"Content-Length: {len(body)}".encode() in head
            assert body == metrics_text(lambda: ONLINE)
            for request in (b"GET / HTTP/1.1\r\n\r\n", b"POST /metrics HTTP/1.1\r\n\r\n", b"\r\n\r\n"):
                assert (await fetch(free_port, request)).startswith(b"HTTP/1.1 404 ")
            with pytest.raises(ConfigError, match="cannot listen on 127"):
                async with metrics_page(free_port, lambda: ONLINE):
                    pass

    asyncio.run(scenario())
