"""A client that uses a swarm at random for `bench.soak`, until it is killed; a process of its own.

    python -m bench.soak_client MADDR MODEL SEED

Three threads open sessions of random lengths, put random prompts and tokens through them, roll back, reorder rows, ask
for forward passes, cancel steps, let their streams drop, and close, or forget to. Every 2 s one line of JSON says what
came of it since the last one.
"""

import json
import random
import sys
import threading
import time
from collections import Counter

import torch

from swarm_client import AutoDistributedModelForCausalLM, ClientConfig, DistributedCausalLM, InferenceSession
from swarm_client.swarm_session import SwarmSession
from swarm_protocol.errors import SwarmError

_THREADS = 3
_REPORT_S = 2.0


class Counts:
    """What happened since the last report; shared by the threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counter: Counter[str] = Counter()

    def add(self, what: str, count: int = 1) -> None:
        """Count something."""
        with self._lock:
            self._counter[what] += count

    def take(self) -> dict[str, int]:
        """Return the counts and begin anew."""
        with self._lock:
            taken, self._counter = dict(self._counter), Counter()
            return taken


def _use(model: DistributedCausalLM, rng: random.Random, counts: Counts) -> None:
    while True:
        try:
            if rng.random() < 0.1:
                states = torch.randn(1, rng.randint(1, 200), model.config.hidden_size)
                with torch.inference_mode():
                    model.remote_blocks(states)
                counts.add("forwards")
            else:
                _one_session(model, rng, counts)
        except SwarmError as error:
            counts.add(f"error {error.code}")
            time.sleep(rng.random())


def _one_session(model: DistributedCausalLM, rng: random.Random, counts: Counts) -> None:
    rows, hidden_size = rng.choice([1, 1, 1, 2, 4]), model.config.hidden_size
    with model.inference_session(max_length=rng.randint(20, 600)) as session, torch.inference_mode():
        session.step(torch.randn(rows, rng.randint(1, session.max_length // 2), hidden_size))
        counts.add("sessions")
        for _ in range(rng.randint(1, 60)):
            if session.position >= session.max_length:
                break
            _one_step(session, rng, counts, rows, hidden_size)


def _one_step(session: InferenceSession, rng: random.Random, counts: Counts, rows: int, hidden_size: int) -> None:
    fate = rng.random()
    if fate < 0.03:
        session.position = rng.randint(0, session.position)
        counts.add("rollbacks")
    elif fate < 0.05:
        session.reorder(torch.randint(0, rows, (rows,)))
        counts.add("reorders")
    elif fate < 0.07:
        _drop_a_stream(session, rng)
        counts.add("dropped streams")
    timer = None
    if 0.07 <= fate < 0.09:
        timer = threading.Timer(rng.random() * 0.01, session.cancel)
        timer.start()
    try:
        session.step(torch.randn(rows, 1, hidden_size))
        counts.add("steps")
    finally:
        if timer is not None:
            timer.join()
    time.sleep(rng.random() * 0.005)


def _drop_a_stream(session: InferenceSession, rng: random.Random) -> None:
    swarm_session: SwarmSession = session._groups[0].session
    stream = rng.choice(swarm_session._hops)._stream
    if stream is not None:
        session._loop.run(stream.close())


def main(address: str, source: str, seed: int) -> None:
    """Use the swarm until this process is killed."""
    torch.set_num_threads(1)
    config = ClientConfig(host="127.0.0.1", relay=False, avoid_s=5.0, resume_s=3.0, step_s=30.0)
    model = AutoDistributedModelForCausalLM.from_pretrained(source, initial_peers=[address], config=config)
    counts = Counts()
    for number in range(_THREADS):
        rng = random.Random(seed * 100 + number)  # has to be reproducible, not secret
        threading.Thread(target=_use, args=(model, rng, counts), daemon=True).start()
    while True:
        time.sleep(_REPORT_S)
        sys.stdout.write(json.dumps(counts.take()) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
