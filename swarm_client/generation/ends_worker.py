"""The thread in which final norm, head and sampling of all sessions of a process run, batched.

A session's own thread hands in the states that left the last block and waits for the token. While nothing waits the
thread sleeps, and after a while it ends; the next row starts another. There is one worker for all models of a process,
as there is one device: heads that ran at the same time would only take the cores from each other.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate

import torch

from swarm_client.generation.ends_batches import EndsBatches, Row
from swarm_client.generation.sampling import TokenChooser, choose_together, token_logprobs
from swarm_client.generation.speculation import num_accepted
from swarm_client.generation.text_session import TokenLogprobs
from swarm_protocol.errors import SessionClosedError, SwarmError
from swarm_protocol.model.parts import EndsModule

IDLE_S = 10.0
"""After so long without a row the thread ends. To start another takes 0.1 ms."""


@dataclass(frozen=True, slots=True, eq=False)
class EndsRow:
    """What a session needs a token for.

    `hidden_states` (1, 1, hidden) left the last block at the end of `token_ids`, which must not change meanwhile.
    With a draft of n tokens they are (1, 1 + n, hidden). `is_last` says that the token will not be put through the
    blocks, so that it need not be embedded.
    """

    ends: EndsModule
    chooser: TokenChooser
    hidden_states: torch.Tensor
    token_ids: Sequence[int]
    is_last: bool = False
    draft: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ChosenToken:
    """The token, and its states (1, 1, hidden) as they enter the first block; None where they were not made.

    `logprobs` where the row's chooser wants them. `before` are those of the draft that were right; they come first.
    """

    token_id: int
    embedded: torch.Tensor | None
    logprobs: TokenLogprobs | None = None
    before: tuple["ChosenToken", ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class _Ticket:
    work: EndsRow
    row: Row
    future: "Future[ChosenToken]"


class EndsWorker:
    """Any thread may call it."""

    def __init__(self, idle_s: float = IDLE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._idle_s = idle_s
        self._clock = clock
        self._batches = EndsBatches()
        # Guarded by the condition: what waits, and whether a thread looks after it.
        self._changed = threading.Condition()
        self._waiting: list[_Ticket] = []
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def submit(self, work: EndsRow) -> "Future[ChosenToken]":
        """Return a future of the token; cancelling it takes the row back as long as it waits.

        Raises SessionClosedError after `close`.
        """
        row = Row(id(work.chooser), id(work.ends), self._clock())
        ticket = _Ticket(work, row, Future())
        with self._changed:
            if self._is_closed:
                raise SessionClosedError("the worker of the model's ends is closed")
            self._waiting.append(ticket)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="umbel-ends", daemon=True)
                self._thread.start()
            self._changed.notify()
        return ticket.future

    def close(self) -> None:
        """Cancel what waits and end the thread after what runs. Idempotent."""
        with self._changed:
            self._is_closed = True
            waiting, self._waiting = self._waiting, []
            thread = self._thread
            self._changed.notify()
        for ticket in waiting:
            ticket.future.cancel()
        if thread is not None:
            thread.join()

    # the thread

    def _work(self) -> None:
        taken: list[_Ticket] = []
        try:
            while taken := self._take():
                self._run([ticket for ticket in taken if ticket.future.set_running_or_notify_cancel()])
        except BaseException as error:
            # A bug of ours. Nobody shall wait for a thread that is gone.
            with self._changed:
                stranded, self._waiting, self._thread = taken + self._waiting, [], None
            for ticket in stranded:
                with suppress(Exception):  # those that are through, or cancelled
                    ticket.future.set_exception(error)
            raise

    def _take(self) -> list[_Ticket]:
        """Return what runs next, once it is here; empty when the thread is to end."""
        with self._changed:
            while True:
                if not self._waiting and (self._is_closed or not self._changed.wait(self._idle_s)):
                    if self._waiting:
                        continue
                    self._thread = None
                    return []
                self._waiting = [ticket for ticket in self._waiting if not ticket.future.cancelled()]
                if not self._waiting:
                    continue
                rows = [ticket.row for ticket in self._waiting]
                left_s = self._batches.hold_until_s(rows) - self._clock()
                if left_s > 0 and not self._is_closed:
                    self._changed.wait(left_s)
                    continue
                chosen = set(self._batches.choose(rows))
                taken = [ticket for index, ticket in enumerate(self._waiting) if index in chosen]
                self._waiting = [ticket for index, ticket in enumerate(self._waiting) if index not in chosen]
                return taken

    def _run(self, tickets: Sequence[_Ticket]) -> None:
        if not tickets:
            return
        started_s = self._clock()
        results = run_rows([ticket.work for ticket in tickets])
        ended_s = self._clock()
        self._batches.ran([ticket.row.session for ticket in tickets], ended_s - started_s, ended_s)
        for ticket, result in zip(tickets, results, strict=True):
            if isinstance(result, ChosenToken):
                ticket.future.set_result(result)
            else:
                ticket.future.set_exception(result)


def run_rows(rows: Sequence[EndsRow]) -> Sequence[ChosenToken | Exception]:
    """Return the tokens of `rows`, which are of one model, computed together; a row that fails fails alone."""
    try:
        return _run_together(rows)
    except Exception as error:
        if len(rows) == 1:
            return [error]
    # Which row it was shows when each runs by itself.
    return [result for row in rows for result in run_rows([row])]


@torch.inference_mode()
def _run_together(rows: Sequence[EndsRow]) -> list[ChosenToken | Exception]:
    ends = rows[0].ends
    columns = [row.hidden_states.transpose(0, 1) for row in rows]  # each column is a row of the head
    logits = ends.logits(columns[0] if len(columns) == 1 else torch.cat(columns))[:, -1]
    choosers = [row.chooser for row in rows for _ in range(1 + len(row.draft))]
    contexts = [[*row.token_ids, *row.draft[:end]] for row in rows for end in range(1 + len(row.draft))]
    chosen = choose_together(logits, choosers, contexts)
    starts = list(accumulate((1 + len(row.draft) for row in rows), initial=0))
    counts = [num_accepted(row.draft, chosen[start:]) for row, start in zip(rows, starts, strict=False)]
    lasts = [start + count for start, count in zip(starts, counts, strict=False)]
    embedded: dict[int, torch.Tensor] = {}
    going_on = [last for row, last in zip(rows, lasts, strict=True) if not row.is_last]
    if going_on:
        device = logits.device
        ids = torch.tensor([[chosen[last]] for last in going_on], device=device)
        positions = torch.tensor([[len(contexts[last])] for last in going_on], device=device)
        # Where it cannot be done, the session is told so when it tries by itself.
        with suppress(SwarmError):
            embedded = dict(zip(going_on, ends.embed(ids, positions)[:, None], strict=True))

    def token(index: int, before: tuple[ChosenToken, ...] = ()) -> ChosenToken:
        logprobs = _logprobs(choosers[index], logits[index], chosen[index])
        return ChosenToken(chosen[index], embedded.get(index), logprobs, before)

    return [
        token(last, tuple(token(index) for index in range(start, last)))
        for start, last in zip(starts, lasts, strict=False)
    ]


def _logprobs(chooser: TokenChooser, logits: torch.Tensor, token_id: int) -> TokenLogprobs | None:
    return None if chooser.num_logprobs is None else token_logprobs(logits, token_id, chooser.num_logprobs)


ENDS_WORKER = EndsWorker()
"""The one of this process; its thread starts with the first row."""
