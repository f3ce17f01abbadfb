"""A session's prompt in pages: what a tape of it begins with, and what it leaves for later sessions."""

from collections.abc import Sequence

from swarm_protocol.messages import PAGE_TOKENS
from swarm_protocol.prefix_tapes import PrefixTapes
from swarm_protocol.tape import Tape


class PromptPages:
    """The pages of one session that nodes may know, by their hashes."""

    def __init__(self, prefixes: PrefixTapes, page_hashes: Sequence[bytes]) -> None:
        self._prefixes = prefixes
        self._page_hashes = page_hashes
        self._num_kept = 0

    def begin(self, tape: Tape, cached: int) -> int:
        """Begin the tape with what earlier sessions left, up to `cached` tokens; return how many tokens that are."""
        found = self._prefixes.find(self._page_hashes[: cached // PAGE_TOKENS])
        tape.begin_with(found)
        self._num_kept = len(found)
        return self._num_kept * PAGE_TOKENS

    def writes(self, tape: Tape, position: int) -> None:
        """A step at `position` is about to be written to the tape.

        If it rolls back, other tokens may come than those that the pages behind were named for.
        """
        if position < tape.length:
            self._page_hashes = self._page_hashes[: position // PAGE_TOKENS]

    def keep(self, tape: Tape) -> None:
        """Keep the pages that are complete, as the nodes do."""
        while tape.is_whole and self._num_kept < min(len(self._page_hashes), tape.length // PAGE_TOKENS):
            start = self._num_kept * PAGE_TOKENS
            self._prefixes.keep(self._page_hashes[self._num_kept], tape.part(start, start + PAGE_TOKENS))
            self._num_kept += 1
