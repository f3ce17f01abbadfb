"""Real nodes leave in the middle of an answer: the answer is the undisturbed one, and the node ends well."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from app.demo import find_model
from bench.node_processes import NodeProcess
from swarm_client import ClientConfig, SamplingParams, Swarm, open_text_model
from swarm_protocol.identity import load_or_create_identity

pytestmark = [pytest.mark.p2p, pytest.mark.timeout(600)]

MAX_TOKENS = 600  # many more than are made while a node leaves
EACH = 6


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
        following: list[subprocess.Popen[str]] = []

        def drain(_: NodeProcess, path: Path) -> None:
            command = [sys.executable, "-m", "server_node.cli", "drain", "--identity", str(path)]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            following.append(process)

        def terminate(node: NodeProcess, _: Path) -> None:
            os.kill(node.pid, signal.SIGTERM)

        def answer(max_tokens: int, leaving: Sequence[Callable[[NodeProcess, Path], None]]) -> tuple[list[int], int]:
            """Return the tokens and how many nodes made their second half; each of them leaves after a few tokens.

            Where some leave, it ends a few tokens after the last: how long that takes depends on the machine.
            """
            session, used = model.open_session(len(prompt) + max_tokens), []
            session.replace_tail(0, prompt)
            tokens: list[int] = []
            left_to_go = list(leaving)
            for delta in session.generate(SamplingParams(max_tokens, stop_at_eos=False)):
                tokens += delta.token_ids
                used.append(session.route[-1].split()[-1])
                if used[-EACH:] != [used[-1]] * EACH or len(set(used)) <= len(leaving) - len(left_to_go):
                    continue
                if left_to_go:
                    left_to_go.pop(0)(*nodes[used[-1]])
                elif leaving:
                    break
            session.close()
            return tokens, len(set(used))

        found, num_used = answer(MAX_TOKENS, [terminate, drain])
        assert num_used == 3  # it moved twice
        wanted, _ = answer(len(found), [])
        assert found == wanted
        shown, _ = following[0].communicate(timeout=60)
        assert shown.splitlines()[-1] == "the node has left"
        assert following[0].returncode == 0
