"""How a node of this machine is found and told to leave."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from server_node import cli
from server_node.run_file import RunState, find_node, run_file
from swarm_protocol.errors import ConfigError


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def identity(tmp_path: Path) -> str:
    return str(tmp_path / "node.key")


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *sent_to: sent.append(sent_to))
    return sent


@pytest.fixture
def running() -> Iterator["subprocess.Popen[str]"]:
    """A process that is as a node to whoever looks for one, and takes a while to leave."""
    program = """
        import signal, sys, time
        from server_node.run_file import run_file

        with run_file(sys.argv[1]) as running:
            is_asked = []
            signal.signal(signal.SIGTERM, lambda *_: is_asked.append(1))
            print("up", flush=True)
            while not is_asked:
                time.sleep(0.02)
            for count in (2, 1):
                running.leaving(count)
                time.sleep(0.6)
    """
    started: list[subprocess.Popen[str]] = []

    def start(identity: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program), identity], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "up\n"
        return process

    yield start  # type: ignore[misc]
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("is_named", [True, False])
def test_a_node_is_found_while_it_runs(is_named: bool, identity: str, signals: list[tuple[int, int]]) -> None:
    named = identity if is_named else None
    with pytest.raises(ConfigError, match="no node"):
        find_node(named)
    with run_file(named) as running, find_node(named) as node:
        assert node.state() == RunState(os.getpid())
        node.ask_to_leave()
        assert signals == [(os.getpid(), signal.SIGTERM)]
        running.leaving()
        assert node.state() == RunState(os.getpid(), is_leaving=True)
        for count in (1000, 3):
            running.leaving(count)
            assert node.state() == RunState(os.getpid(), is_leaving=True, num_sessions=count)
        assert not node.has_ended()
    with pytest.raises(ConfigError, match="no node"):
        find_node(named)


def test_a_node_that_leaves_already_is_not_signalled_again(identity: str, signals: list[tuple[int, int]]) -> None:
    with run_file(identity) as running, find_node(identity) as node:
        running.leaving(2)
        node.ask_to_leave()
    assert signals == []


def test_what_a_killed_node_left_behind_is_no_node(identity: str, signals: list[tuple[int, int]]) -> None:
    Path(f"{identity}.run").write_text('{"pid": 1, "is_leaving": false, "num_sessions": null}')
    with pytest.raises(ConfigError, match="no node runs with the identity file"):
        find_node(identity)
    with run_file(identity), find_node(identity) as node:
        assert node.state() == RunState(os.getpid())
    assert signals == []


def test_two_nodes_with_one_identity_are_refused(identity: str) -> None:
    with run_file(identity), pytest.raises(ConfigError, match="runs with the identity file"), run_file(identity):
        pass


def test_a_file_that_makes_no_sense_signals_nobody(identity: str, signals: list[tuple[int, int]]) -> None:
    with run_file(identity), find_node(identity) as node:
        Path(f"{identity}.run").write_text("{}")
        with pytest.raises(ConfigError, match="try again"):
            node.ask_to_leave()
    assert signals == []


def test_a_folder_that_others_can_write_to_is_not_used(own_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = own_folder / f"umbel-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    with run_file(None) as running:
        running.leaving(1)
        assert list(folder.iterdir()) == []
    assert "will not find this node" in caplog.text


def test_files_of_other_users_name_no_node(
    own_folder: Path, signals: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with run_file(None):
        folder = own_folder / f"umbel-{os.getuid()}"
        other = os.getuid() + 1
        folder.rename(own_folder / f"umbel-{other}")
        monkeypatch.setattr(os, "getuid", lambda: other)
        with pytest.raises(ConfigError, match="no node"):
            find_node(None)
    assert signals == []


def test_the_command_follows_a_node_until_it_has_left(
    identity: str, running: object, capsys: pytest.CaptureFixture[str]
) -> None:
    process = running(identity)  # type: ignore[operator]
    assert cli.main(["drain", "--identity", identity]) == 0
    assert process.wait(10) == 0
    *counts, last = capsys.readouterr().out.splitlines()
    assert last == "the node has left"
    assert counts  # on a busy machine it may be only one of them
    assert set(counts) <= {"2 sessions still here", "1 session still here"}


def test_the_command_says_in_one_line_that_there_is_no_node(identity: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["drain", "--identity", identity]) == 2
    assert capsys.readouterr().err == f"umbel-node: error: no node runs with the identity file {identity}\n"
