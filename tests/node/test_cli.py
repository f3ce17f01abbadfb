"""What `umbel-node` says and how it ends: one line and status 2 for what cannot start, else the documented lines."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from server_node import cli
from swarm_protocol.transport.memory_net import MemoryNetwork
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


Refusal = Callable[..., str]


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refusal:
    """Return the only line that a command prints which ends with status 2."""
    # Device threads of other tests are none of its business, and the environment is everybody's.
    monkeypatch.setattr(cli, "_leave_device_thread", lambda _: None)
    monkeypatch.setattr(os, "environ", os.environ.copy())

    def run(*arguments: str) -> str:
        assert cli.main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        (line,) = err.splitlines()
        assert line.startswith("umbel-node")
        return line

    return run


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
        (("run", "m", "--quantization", "int3"), "invalid choice"),
        (("run", "m", "--port", "65536"), "a port is 0 to 65535, not '65536'"),
        (("run", "m", "--name", "n" * 41), "at most 40 printable characters"),
        (("bootstrap", "--port", "x"), "a port is 0 to 65535"),
    ],
)
def test_bad_arguments_are_one_line(arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path, refusal: Refusal):
    assert "no checkpoint at" in refusal("run", f"{tmp_path}/nothing here", *LOCAL)


def test_a_device_that_is_not_there_is_one_line(model: str, refusal: Refusal):
    assert "device 'abacus' cannot be used here" in refusal("run", model, "--device", "abacus", *LOCAL)


def test_quantization_on_a_device_that_cannot_is_one_line(
    model: str, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("server_node.compute.device.usable_device", torch.device)
    says = "--quantization nf4 is for CPUs and CUDA, not for mps: leave it out"
    assert says in refusal("run", model, "--device", "mps", "--quantization", "nf4", *LOCAL)


def test_blocks_outside_of_the_model_are_one_line(model: str, refusal: Refusal):
    assert "tiny-llama has the blocks 0:5, not 3:9" in refusal("run", model, "--blocks", "3:9", *LOCAL)


def test_a_host_name_to_listen_on_is_one_line(model: str, refusal: Refusal):
    says = "cannot listen on 'localhost': an IPv4 or IPv6 address is needed"
    assert says in refusal("run", model, "--host", "localhost")


@pytest.mark.p2p
def test_peers_that_are_no_addresses_are_one_line(model: str, refusal: Refusal):
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


@pytest.mark.p2p
def test_a_node_whose_network_daemon_dies_says_so_and_ends(model: str):
    node = umbel_node("run", model, "--threads", "1", *LOCAL)
    online = node.stdout.readline().strip()
    address = online.rpartition(" ")[2]
    assert node.stdout.readline() == f"others join with: umbel-node run {model} --initial-peers {address}\n"
    (daemon,) = psutil.Process(node.pid).children()
    daemon.kill()
    _, err = node.communicate(timeout=30)
    assert node.returncode == 1
    assert err.splitlines()[-1] == (
        "umbel-node: error: StreamLostError: the network daemon ended; start the node again"
    )


def test_a_bootstrap_peer_whose_network_is_lost_ends_with_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    @asynccontextmanager
    async def joined(_: Any) -> AsyncIterator[tuple[Any, None]]:
        network = MemoryNetwork()
        transport = network.transport()
        asyncio.get_running_loop().call_later(0.05, network.kill, transport.peer_id)
        yield transport, None

    monkeypatch.setattr("server_node.node.joined", joined)
    monkeypatch.setattr(cli, "_leave_device_thread", lambda _: None)
    assert cli.main(["bootstrap", *LOCAL]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("/memory/0/p2p/")
    assert "the network daemon ended" in err
