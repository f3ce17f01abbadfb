"""A session's prompt in pages: what its tapes begin with, and what they leave for later sessions."""

from collections.abc import Sequence

from swarm_client.tape import Tape, TapeBudget
from swarm_protocol.messages import PAGE_TOKENS


class PromptPages:
    """The pages of one session that nodes may know, by the hashes that they have at each hop."""

    def __init__(self, tapes: TapeBudget, page_hashes: Sequence[tuple[bytes, ...]]) -> None:
        """`page_hashes` are those of each hop, as many at all of them."""
        self._prefixes = tapes.prefixes
        self._page_hashes = page_hashes
        self._num_kept = 0

    def begin(self, tapes: Sequence[Tape], cached: int) -> int:
        """Begin the tapes with what earlier sessions left, up to `cached` tokens; return how many tokens that are."""
        found = [self._prefixes.find(hashes[: cached // PAGE_TOKENS]) for hashes in self._page_hashes]
        self._num_kept = min(len(pages) for pages in found)
        for tape, pages in zip(tapes, found, strict=True):
            tape.begin_with(pages[: self._num_kept])
        return self._num_kept * PAGE_TOKENS

    def keep(self, tapes: Sequence[Tape], position: int) -> None:
        """Keep the pages that are complete, as the nodes do; the last step began at `position`.

        Behind a roll-back other tokens may come than those that were named, so nothing more is kept then.
        """
        if position < self._num_kept * PAGE_TOKENS:
            self._page_hashes = ()
        if not self._page_hashes or not all(tape.is_whole for tape in tapes):
            return
        length = min(tape.length for tape in tapes)
        while self._num_kept < len(self._page_hashes[0]) and (self._num_kept + 1) * PAGE_TOKENS <= length:
            start = self._num_kept * PAGE_TOKENS
            for tape, hashes in zip(tapes, self._page_hashes, strict=True):
                self._prefixes.keep(hashes[self._num_kept], tape.part(start, start + PAGE_TOKENS))
            self._num_kept += 1
