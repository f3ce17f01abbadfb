"""Real nodes are killed, frozen and held up for a moment at positions all over two answers, which stay what they are.

The model is tiny: starting the nodes, all at once, is what takes time. A frozen node goes on after the first answer;
the second one's client has not met it.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, StoppingCriteriaList

from bench.node_processes import NodeProcess
from swarm_client import AutoDistributedModelForCausalLM, ClientConfig
from tests.tiny_models import NUM_BLOCKS, save_tiny_model

pytestmark = [pytest.mark.p2p, pytest.mark.timeout(300)]

NUM_TOKENS = 40
CUT = 2
CONFIG = ClientConfig(host="127.0.0.1", relay=False, max_wait_s=30.0)
PROMPT = torch.tensor([[1, 50, 35, 28, 46, 31]])
HOLDUP_S = 0.3
"""Less than it takes a client to give a node up."""

FIRST, LAST = 0, -1
STRIKES: tuple[Mapping[int, tuple[tuple[int, str], ...]], ...] = (
    {1: ((LAST, "freeze"),), 6: ((LAST, "kill"),), 14: ((FIRST, "freeze"),), 25: ((LAST, "hold up"),)},
    {2: ((FIRST, "hold up"),), 9: ((FIRST, "freeze"), (LAST, "kill")), 24: ((LAST, "kill"),)},
)
"""For each answer, by the number of its tokens that are there: which hop of the route, and what happens to its node."""


@dataclass(frozen=True, slots=True)
class Struck:
    """Two nodes with the first blocks, four with the last ones, by peer id, and the model in one process."""

    source: str
    local: PreTrainedModel
    address: str
    nodes: Mapping[str, NodeProcess]

    def strike(self, peer_id: str, what: str) -> None:
        """Do it to a node."""
        pid = self.nodes[peer_id].pid
        os.kill(pid, signal.SIGKILL if what == "kill" else signal.SIGSTOP)
        if what == "hold up":
            threading.Timer(HOLDUP_S, os.kill, (pid, signal.SIGCONT)).start()


@pytest.fixture(scope="module")
def struck(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Struck]:
    folder: Path = tmp_path_factory.mktemp("tiny")
    local = save_tiny_model("llama", folder)
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(NodeProcess(str(folder), f"0:{CUT}")).wait_until_online()
        blocks = (f"0:{CUT}", *(f"{CUT}:{NUM_BLOCKS}" for _ in range(4)))
        others = [stack.enter_context(NodeProcess(str(folder), each, [first.address])) for each in blocks]
        nodes = {node.wait_until_online().address.rsplit("/", 1)[-1]: node for node in (first, *others)}
        yield Struck(str(folder), local.eval(), first.address, nodes)


@pytest.mark.parametrize("strikes", STRIKES, ids=["one node at a time", "two at once"])
def test_an_answer_is_the_same_wherever_its_nodes_are_struck(
    struck: Struck, strikes: Mapping[int, tuple[tuple[int, str], ...]]
) -> None:
    wanted = struck.local.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    frozen: list[int] = []
    left = dict(strikes)
    with contextlib.ExitStack() as stack:
        remote = AutoDistributedModelForCausalLM.from_pretrained(
            struck.source, initial_peers=[struck.address], config=CONFIG
        )
        stack.callback(remote.close)
        session = stack.enter_context(remote.inference_session(max_length=PROMPT.shape[1] + NUM_TOKENS))

        def strike(tokens: torch.Tensor, *_: object) -> torch.Tensor:
            route = [line.split()[-1] for line in session.route]
            for hop, what in left.pop(tokens.shape[1] - PROMPT.shape[1], ()):
                struck.strike(route[hop], what)
                if what == "freeze":
                    frozen.append(struck.nodes[route[hop]].pid)
            return torch.zeros(1, dtype=torch.bool)

        found = remote.generate(
            PROMPT, max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=0,
            session=session, stopping_criteria=StoppingCriteriaList([strike]),
        )  # fmt: skip
        assert found.tolist() == wanted.tolist()
        assert not left
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
