"""What the owner of a running node reads of it."""

import asyncio
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from server_node import cli
from server_node.reporting import reporting
from server_node.run_file import RunState, find_node, run_file
from server_node.status import REPORT_S, NodeStatus, TokenRate, lines
from swarm_protocol.messages import CloseSession
from tests.node.node_scenario import CACHE_TOKENS, MODEL, SPAN, serving_node, states, virtual

STATUS = NodeStatus(
    "online", "bloom-560m", "0:8", "12D3KooWpeer", "/ip4/192.0.2.7/tcp/31337/p2p/12D3KooWpeer", 3, 41.25, 8192, 6144,
    93_784.0, "umbel 0.1.0",
)  # fmt: skip


def test_people_read_a_table() -> None:
    shown = lines(STATUS.as_json(), 1.0)
    assert shown[0] == "state          online"
    assert "open sessions  3" in shown
    assert "tokens/s       41.2" in shown
    assert "KV cache       2,048 of 8,192 tokens reserved (25 %)" in shown
    assert "up for         26 h 3 min" in shown
    assert lines(STATUS.as_json(), 60.0)[-1] == "last heard     1 min ago: the node may be frozen"
    for uptime_s, words in ((5.0, "5 s"), (200.0, "3 min"), (260_000.0, "3 days 0 h")):
        assert f"up for         {words}" in lines(replace(STATUS, uptime_s=uptime_s).as_json(), 0.0)


def test_the_rate_is_that_since_the_last_look() -> None:
    rate = TokenRate(100.0)
    assert rate.at(10, 102.0) == 5.0
    assert rate.at(10, 104.0) == 0.0
    assert rate.at(40, 105.0) == 30.0
    assert rate.at(40, 105.0) == 0.0


def test_a_node_tells_how_it_gets_on() -> None:
    @virtual
    async def scenario() -> None:
        told: list[NodeStatus] = []
        async with (
            serving_node() as node,
            reporting(node.node.admission, node.node.speed, node.node._announcer, "/here", told.append),
        ):
            await asyncio.sleep(0)
            assert (told[-1].state, told[-1].model, told[-1].blocks) == ("online", MODEL, str(SPAN))
            assert (told[-1].sessions, told[-1].free_tokens, told[-1].tokens_per_s) == (0, CACHE_TOKENS, 0.0)
            talk, _ = await node.open(max_tokens=16)
            await talk.step(1, 0, states(6))
            await asyncio.sleep(REPORT_S)
            assert (told[-1].sessions, told[-1].cache_tokens) == (1, CACHE_TOKENS)
            assert told[-1].free_tokens < CACHE_TOKENS
            assert told[-1].tokens_per_s == pytest.approx(6 / REPORT_S, rel=0.01)
            await talk.ask(CloseSession())
            await asyncio.sleep(REPORT_S)
            assert (told[-1].sessions, told[-1].tokens_per_s) == (0, 0.0)
        count = len(told)
        await asyncio.sleep(3 * REPORT_S)
        assert len(told) == count

    scenario()


def test_another_process_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    identity = str(tmp_path / "node.key")

    def shown(*arguments: str) -> tuple[int, str]:
        status = cli.main(["status", "--identity", identity, *arguments])
        return status, capsys.readouterr().out

    assert shown() == (2, "")
    with run_file(identity) as running:
        assert shown() == (1, "state  loading, or joining the swarm\n")
        assert shown("--json") == (1, "null\n")
        running.report(STATUS)
        status, text = shown()
        assert (status, text.splitlines()[0]) == (0, "state          online")
        status, text = shown("--json")
        assert (status, json.loads(text)) == (0, STATUS.as_json())
        running.report(replace(STATUS, state="draining"))
        assert shown()[0] == 1
        running.leaving(2)
        with find_node(identity) as node:
            state = node.state()
            assert state is not None
            assert (state.is_leaving, state.num_sessions) == (True, 2)
        assert shown("--json")[1] == json.dumps(replace(STATUS, state="draining").as_json()) + "\n"


def test_the_longest_status_fits(tmp_path: Path) -> None:
    identity = str(tmp_path / "node.key")
    with run_file(identity) as running, find_node(identity) as node:
        running.report(replace(STATUS, model="m" * 160, address="a" * 400, software="s" * 160))
        running.report(STATUS)
        state = node.state()
        assert state is not None
        assert state == RunState(os.getpid(), status=STATUS.as_json(), reported_s=state.reported_s)
