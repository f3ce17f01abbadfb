"""Real nodes leave in the middle of an answer: the answer is the undisturbed one, and the node ends well."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from app.demo import find_model
from bench.node_processes import NodeProcess
from swarm_client import ClientConfig, SamplingParams, Swarm, open_text_model
from swarm_protocol.identity import load_or_create_identity

pytestmark = [pytest.mark.p2p, pytest.mark.timeout(600)]

NUM_TOKENS = 40


def test_an_answer_goes_on_while_the_nodes_of_its_second_half_leave(tmp_path: Path) -> None:
    source = str(find_model())
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(NodeProcess(source, "0:15")).wait_until_online()
        nodes: dict[str, tuple[NodeProcess, Path]] = {}
        for number in range(3):
            path = tmp_path / f"{number}.key"
            node = stack.enter_context(NodeProcess(source, "15:30", [first.address], "--identity", str(path)))
            nodes[load_or_create_identity(path).peer_id] = node, path
        for node, _ in nodes.values():
            node.wait_until_online()
        swarm = Swarm.connect(ClientConfig((first.address,), host="127.0.0.1", relay=False))
        stack.callback(swarm.close)
        model = open_text_model(source, swarm=swarm)
        prompt = list(range(100, 250))

        def answer(events: dict[int, Callable[[NodeProcess, Path], None]]) -> tuple[list[int], list[str]]:
            session, used = model.open_session(len(prompt) + NUM_TOKENS), []
            session.replace_tail(0, prompt)
            tokens: list[int] = []
            for delta in session.generate(SamplingParams(NUM_TOKENS, stop_at_eos=False)):
                tokens += delta.token_ids
                used.append(session.route[-1].split()[-1])
                if len(tokens) in events:
                    events.pop(len(tokens))(*nodes[used[-1]])
            session.close()
            return tokens, used

        wanted, _ = answer({})
        following: list[subprocess.Popen[str]] = []

        def drain(_: NodeProcess, path: Path) -> None:
            command = [sys.executable, "-m", "server_node.cli", "drain", "--identity", str(path)]
            following.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))

        def terminate(node: NodeProcess, _: Path) -> None:
            os.kill(node.pid, signal.SIGTERM)

        found, used = answer({6: terminate, 24: drain})
        assert found == wanted
        assert len(set(used)) == 3  # twice in the middle of the answer
        shown, _ = following[0].communicate(timeout=60)
        assert shown.splitlines()[-1] == "the node has left"
        assert following[0].returncode == 0
        assert answer({})[0] == wanted
