"""What a node shows on its terminal while it runs, and in its log where there is none."""

import asyncio
import io
import json
import logging
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from server_node import live_line
from server_node.live_line import Screen, keep_shown
from server_node.owner_commands import show_status
from server_node.status import NodeStatus
from tests.tiny_models import save_tiny_model

LIMIT_S = 120.0
CLEAR = "\r\x1b[K"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def log(screen: Screen, text: str) -> None:
    screen.handle(logging.LogRecord("n", logging.INFO, "p", 1, text, (), None))


def test_log_lines_stand_above_the_line() -> None:
    terminal = Terminal()
    screen = Screen(terminal)
    screen.setFormatter(logging.Formatter("%(message)s"))
    log(screen, "first")
    screen.show("online")
    log(screen, "second")
    screen.show("")
    log(screen, "third")
    screen.show("")
    assert terminal.getvalue() == f"first\n{CLEAR}online{CLEAR}second\nonline{CLEAR}third\n"


def test_the_line_never_wraps() -> None:
    terminal = Terminal()
    Screen(terminal).show("x" * 300)
    assert terminal.getvalue() == CLEAR + "x" * 79


def test_a_terminal_that_is_held_is_not_waited_for() -> None:
    master, slave = pty.openpty()
    try:
        with open(slave, "w", encoding="utf-8", closefd=False) as terminal:
            screen = Screen(terminal)
            screen.show("seen")
            termios.tcflow(slave, termios.TCOOFF)
            screen.show("not seen")  # would never return
            termios.tcflow(slave, termios.TCOON)
            screen.show("seen again")
        shown = read_until(master, lambda text: "seen again" in text)
        assert "not seen" not in shown
    finally:
        os.close(master)
        os.close(slave)


def test_a_terminal_that_is_gone_is_no_matter() -> None:
    terminal = Terminal()
    screen = Screen(terminal)
    terminal.close()
    screen.show("online")


def test_without_a_terminal_changes_are_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(live_line, "_SUMMARY_S", 0.0)
    states = ["loading", "joining", "joining", "online", "online", "draining"]
    left = iter(states)
    done = asyncio.Event()

    def status() -> NodeStatus:
        state = next(left, None)
        if state is None:
            done.set()
        return NodeStatus(state or states[-1], "m", "umbel 1", 1.0)

    async def scenario() -> None:
        output = io.StringIO()
        shown = asyncio.create_task(keep_shown(Screen(output), status))
        async with asyncio.timeout(LIMIT_S):
            await done.wait()
        shown.cancel()
        await asyncio.gather(shown, return_exceptions=True)
        assert output.getvalue() == ""

    with caplog.at_level(logging.INFO):
        asyncio.run(scenario())
    assert [record.message for record in caplog.records] == ["m | joining", "m | online", "m | draining"]


def read_until(descriptor: int, is_enough: Callable[[str], bool]) -> str:
    """Return what a terminal shows, up to where it is enough."""
    text, ends_s = "", time.monotonic() + LIMIT_S
    while not is_enough(text):
        assert time.monotonic() < ends_s, text
        if select.select([descriptor], [], [], 1.0)[0]:
            text += os.read(descriptor, 65536).decode(errors="replace")
    return text


@pytest.mark.p2p
def test_a_node_in_a_terminal_shows_its_line_and_answers_its_owner(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_model("llama", tmp_path / "tiny-llama")
    identity = str(tmp_path / "node.key")
    master, slave = pty.openpty()
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    local = ("--host", "127.0.0.1", "--no-relay", "--no-port-mapping", "--threads", "1", "--cache-tokens", "200")
    command = (sys.executable, "-m", "server_node.cli", "run", str(tmp_path / "tiny-llama"), "--identity", identity)
    node = subprocess.Popen([*command, *local], stdout=slave, stderr=slave, env=environ)
    try:
        line = "tiny-llama | blocks 0:5 | online | "
        shown = read_until(master, lambda text: CLEAR + line in text)
        assert "online: tiny-llama blocks 0:5 /ip4/127.0.0.1/tcp/" in shown
        assert show_status(identity, is_json=True) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["state"], found["blocks"], found["cache_tokens"]) == ("online", "0:5", 200)
        assert found["addresses"][0].endswith(found["peer_id"])
        assert found["memory_bytes"] > 10_000_000
        node.send_signal(signal.SIGTERM)
        rest = read_until(master, lambda text: "node is offline" in text)
        assert node.wait(LIMIT_S) == 0
        while select.select([master], [], [], 0)[0]:
            rest += os.read(master, 65536).decode(errors="replace")
        assert rest.rfind(CLEAR) > rest.rfind("tiny-llama | ")  # the line was taken away
    finally:
        node.kill()
        node.wait()
        os.close(master)
        os.close(slave)
    assert not Path(identity + ".sock").exists()
