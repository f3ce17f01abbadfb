"""What `umbel-node` says and how it ends: one line and status 2 for what cannot start, else the documented lines."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_models import save_tiny_model

LOCAL = ("--host", "127.0.0.1", "--no-relay", "--no-port-mapping")


def umbel_node(*arguments: str) -> "subprocess.Popen[str]":
    # The filters of the test run are not inherited: what other packages warn of belongs to stderr there as well.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    return subprocess.Popen(
        [sys.executable, "-m", "server_node.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def refusal(*arguments: str) -> str:
    """Return the only line that a command prints which ends with status 2."""
    process = umbel_node(*arguments)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("umbel-node")
    return line


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    save_tiny_model("llama", folder)
    return str(folder)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "required: command"),
        (("run",), "required: MODEL"),
        (("run", "m", "--blocks", "5"), "a span is written start:end"),
        (("run", "m", "--blocks", "5:5"), "0 <= start < end"),
        (("run", "m", "--blocks", "0:2", "--num-blocks", "2"), "not allowed with"),
        (("run", "m", "--num-blocks", "0"), "a whole number above 0 is needed, not '0'"),
        (("run", "m", "--threads", "many"), "a whole number above 0"),
        (("run", "m", "--cache-tokens", "-1"), "a whole number above 0"),
        (("run", "m", "--dtype", "int3"), "invalid choice"),
        (("run", "m", "--port", "65536"), "a port is 0 to 65535, not '65536'"),
        (("run", "m", "--name", "n" * 41), "at most 40 printable characters"),
        (("bootstrap", "--port", "x"), "a port is 0 to 65535"),
    ],
)
def test_bad_arguments_are_one_line(arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]):
    from server_node.cli import main

    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path):
    assert "no checkpoint at" in refusal("run", f"{tmp_path}/nothing here", *LOCAL)


def test_a_device_that_is_not_there_is_one_line(model: str):
    assert "device 'abacus' cannot be used here" in refusal("run", model, "--device", "abacus", *LOCAL)


def test_blocks_outside_of_the_model_are_one_line(model: str):
    assert "tiny-llama has the blocks 0:5, not 3:9" in refusal("run", model, "--blocks", "3:9", *LOCAL)


@pytest.mark.p2p
def test_peers_that_are_no_addresses_are_one_line(model: str):
    assert "multiaddress" in refusal("run", model, "--initial-peers", "localhost:80", *LOCAL)


@pytest.mark.p2p
def test_a_node_says_that_it_is_online_and_leaves_on_a_signal(model: str):
    bootstrap = umbel_node("bootstrap", *LOCAL)
    address = bootstrap.stdout.readline().strip()
    assert re.fullmatch(r"/ip4/127\.0\.0\.1/tcp/\d+/p2p/12D3KooW\w+", address)
    node = umbel_node("run", model, "--initial-peers", address, "--num-blocks", "2", "--threads", "1", *LOCAL)
    online = node.stdout.readline().strip()
    assert re.fullmatch(r"online: tiny-llama blocks 0:2 /ip4/127\.0\.0\.1/tcp/\d+/p2p/12D3KooW\w+", online)
    for process in (node, bootstrap):
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert out == ""
        assert "Traceback" not in err
