"""Answers while nodes are killed again and again and others join: `python -m bench.failover --chaos MINUTES`.

SmolLM2 through three spans, each held by several nodes. Every two seconds a random node that is online gets SIGKILL,
and a new one of the same span is started at once, which is online some seconds later; `--spare` lets the last one of a
span live. Only the first peer, which serves nothing, lives on. A client generates one answer after the other
meanwhile; each is compared with the answer to the same prompt before the first kill. A stall is what a token took more
than usual: more than the median one, or, of the first token, than that of the same prompt before; those over 0.3 s
count.
"""

import contextlib
import random
import statistics
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from app.demo import find_model
from bench.answers import CACHE, MOST_ID, SETTLE_S
from bench.forked_nodes import ForkedNode, NodeNursery
from swarm_client import ClientConfig, SamplingParams, Swarm, SwarmError, open_text_model
from swarm_client.generation.text_model import DistributedTextModel

SPANS = ("0:10", "10:20", "20:30")
NUM_HOLDERS = 3
NUM_PROMPTS = 6
LEAST_TOKENS, MOST_TOKENS = 100, 400
STALL_S = 0.3


@dataclass(slots=True)
class Answer:
    """What came; `times` are the seconds that each token took, `error` the code of what ended it, empty if nothing."""

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    error: str = ""
    took_s: float = 0.0


class Pool:
    """The nodes, and the thread that kills them."""

    def __init__(self, nursery: NodeNursery, model: str, peer: str) -> None:
        self._nursery = nursery
        self._start_with = (model, peer)
        self._nodes = [self._start(span) for span in SPANS for _ in range(NUM_HOLDERS)]
        self._stop = threading.Event()
        self.num_kills = 0
        self.num_uncovered = 0

    def wait_until_online(self) -> None:
        """Return when all are."""
        for node in self._nodes:
            node.wait_until_online()

    def run(self, every_s: float, is_sparing: bool) -> None:
        """Kill one every so many seconds until `stop`; count how often a span had no node left then."""
        rng = random.Random(0)
        while not self._stop.wait(every_s):
            online = [node for node in self._nodes if node.address]
            holders = Counter(node.blocks for node in online)
            if chosen := [node for node in online if not is_sparing or holders[node.blocks] > 1]:
                node = rng.choice(chosen)
                node.kill()
                self._nodes[self._nodes.index(node)] = self._start(node.blocks)
                self.num_kills += 1
                self.num_uncovered += holders[node.blocks] == 1

    def stop(self) -> None:
        """End `run`."""
        self._stop.set()

    def _start(self, span: str) -> ForkedNode:
        model, peer = self._start_with
        return self._nursery.start(model, span, peer, *CACHE)


def measure(duration_s: float, every_s: float, is_sparing: bool, num_tokens: int) -> None:
    """Measure and print the table."""
    with contextlib.ExitStack() as stack:
        folder, source = Path(stack.enter_context(tempfile.TemporaryDirectory())), str(find_model())
        nursery = stack.enter_context(NodeNursery(folder))
        bootstrap = nursery.bootstrap().address
        pool = Pool(nursery, source, bootstrap)
        pool.wait_until_online()
        swarm = Swarm.connect(ClientConfig((bootstrap,), host="127.0.0.1", relay=False, reuse_prefixes=False))
        stack.callback(swarm.close)
        model, rng = open_text_model(source, swarm=swarm), random.Random(1)
        time.sleep(SETTLE_S)
        lengths = [rng.randint(LEAST_TOKENS, MOST_TOKENS) for _ in range(NUM_PROMPTS)]
        prompts = [[1 + rng.randrange(MOST_ID) for _ in range(length)] for length in lengths]
        _answer(model, prompts[0], num_tokens)
        wanted = [_answer(model, prompt, num_tokens) for prompt in prompts]
        killer = threading.Thread(target=pool.run, args=(every_s, is_sparing))
        killer.start()
        try:
            found = _answers_until(time.monotonic() + duration_s, model, prompts, wanted, num_tokens)
        finally:
            pool.stop()
            killer.join()
        print(f"\n{pool.num_kills} kills, {pool.num_uncovered} of them of the last online node of a span\n")
        _print(wanted, found)


def _answers_until(
    deadline_s: float, model: DistributedTextModel, prompts: list[list[int]], wanted: list[Answer], num_tokens: int
) -> list[Answer]:
    found: list[Answer] = []
    while time.monotonic() < deadline_s:
        which = len(found) % len(prompts)
        found.append(now := _answer(model, prompts[which], num_tokens))
        state = now.error or ("equal" if now.tokens == wanted[which].tokens else "DIFFERENT")
        print(f"answer {len(found)}: {state}, {len(now.tokens)} tokens, {now.took_s:.1f} s", flush=True)
    return found


def _answer(model: DistributedTextModel, prompt: list[int], num_tokens: int) -> Answer:
    result = Answer()
    session = model.open_session(len(prompt) + num_tokens)
    began_s = last_s = time.perf_counter()
    try:
        session.replace_tail(0, prompt)
        for delta in session.generate(SamplingParams(num_tokens, stop_at_eos=False)):
            if delta.token_ids:
                now_s = time.perf_counter()
                result.times += [(now_s - last_s) / len(delta.token_ids)] * len(delta.token_ids)
                result.tokens += delta.token_ids
                last_s = now_s
    except SwarmError as error:
        result.error = error.code
    finally:
        result.took_s = time.perf_counter() - began_s
        session.close()
    return result


def _print(wanted: list[Answer], found: list[Answer]) -> None:
    usual_s = statistics.median(second for one in wanted for second in one.times[1:])
    stalls: list[float] = []
    num_equal = 0
    for number, one in enumerate(found):
        before = wanted[number % len(wanted)]
        num_equal += one.tokens == before.tokens
        usual = [before.times[0], *[usual_s] * len(before.times)]
        stalls += [took - usual[at] for at, took in enumerate(one.times) if took - usual[at] > STALL_S]
    rates = [sum(len(one.tokens) for one in some) / sum(one.took_s for one in some) for some in (found, wanted)]
    errors = Counter(one.error for one in found if one.error)
    middle, longest = statistics.median(stalls or [0.0]), max(stalls, default=0.0)
    high = statistics.quantiles(stalls, n=10, method="inclusive")[-1] if len(stalls) > 1 else longest
    print("| answers | same tokens | tokens | tokens/s | undisturbed | stalls | median, s | 90 % | longest | errors |")
    print("|---" * 10 + "|")
    print(
        f"| {len(found)} | {num_equal} | {sum(len(one.tokens) for one in found)} | {rates[0]:.1f} | {rates[1]:.1f} "
        f"| {len(stalls)} | {middle:.2f} | {high:.2f} | {longest:.2f} "
        f"| {', '.join(f'{count} {code}' for code, count in errors.items()) or '–'} |"
    )
