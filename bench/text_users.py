"""People who use a text model at once: a session and a thread for each, as the chat site has them."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from swarm_client.generation.text_session import SamplingParams, TextModel

MAX_LENGTH = 512
MOST_ID = 40_000
"""Of a prompt's tokens; every model that is measured knows more."""


@dataclass(slots=True)
class Together:
    """What some users got when they decoded at once: tokens/s of all, and the seconds that each token took."""

    tokens_per_s: float = 0.0
    token_s: list[float] = field(default_factory=list)


class User:
    """A session with a prompt of `prompt_tokens` tokens. Used by one thread at a time."""

    def __init__(self, model: TextModel, prompt_tokens: int, number: int) -> None:
        self.session = model.open_session(MAX_LENGTH)
        self._prompt = [1 + (7919 * (number + 1) * (at + 1)) % MOST_ID for at in range(prompt_tokens)]
        self.session.replace_tail(0, self._prompt)
        self.decode(1)

    def start_again(self) -> None:
        """Go back to the prompt, whose last token is all that has to be computed again."""
        self.session.replace_tail(len(self.session.token_ids) - len(self._prompt), [])

    def decode(self, num_tokens: int, until: Callable[[], bool] = lambda: False) -> list[float]:
        """Return the seconds that each token took; stops early when `until` says so."""
        times: list[float] = []
        last_s = time.perf_counter()
        for delta in self.session.generate(SamplingParams(num_tokens, stop_at_eos=False)):
            now_s = time.perf_counter()
            if delta.token_ids:
                times += [(now_s - last_s) / len(delta.token_ids)] * len(delta.token_ids)
                last_s = now_s
            if until():
                break
        return times


def decode_together(users: Sequence[User], num_tokens: int) -> Together:
    """Let all users decode at once, each in its thread."""
    found = Together()
    lock, start = threading.Lock(), threading.Barrier(len(users) + 1)

    def run(user: User) -> None:
        user.start_again()
        start.wait()
        times = user.decode(num_tokens)
        with lock:
            found.token_s += times

    threads = [threading.Thread(target=run, args=(user,)) for user in users]
    for thread in threads:
        thread.start()
    start.wait()
    started_s = time.perf_counter()
    for thread in threads:
        thread.join()
    found.tokens_per_s = len(users) * num_tokens / (time.perf_counter() - started_s)
    return found
