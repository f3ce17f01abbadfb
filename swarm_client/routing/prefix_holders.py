"""Pure: which nodes hold which prompts of this client."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from swarm_protocol.ids import PeerId
from swarm_protocol.messages import PAGE_TOKENS

_MAX_PAGES = 4096
"""Of prompts, remembered by their hashes: 262,144 tokens in about 2 MB."""


class PrefixHolders:
    """Remembers through which nodes prompts went. A node may have dropped one since; then it computes it again."""

    def __init__(self) -> None:
        self._holders: OrderedDict[bytes, frozenset[PeerId]] = OrderedDict()

    def remember(self, pages: Iterable[bytes], peers: Iterable[PeerId]) -> None:
        """A prompt, given by hashes of its pages that each cover all before it, went through `peers`."""
        through = frozenset(peers)
        for page in pages:
            self._holders[page] = self._holders.get(page, frozenset()) | through
            self._holders.move_to_end(page)
        while len(self._holders) > _MAX_PAGES:
            self._holders.popitem(last=False)

    def forget(self, peer_id: PeerId) -> None:
        """A peer is not to be counted on."""
        self._holders = OrderedDict((page, holders - {peer_id}) for page, holders in self._holders.items())

    def affinity(self, pages: Sequence[bytes]) -> dict[PeerId, int]:
        """Return how many of a prompt's first tokens each peer holds, as far as is remembered."""
        tokens: dict[PeerId, int] = {}
        for number, page in enumerate(pages, 1):
            holders = self._holders.get(page)
            if holders is None:
                break
            tokens.update(dict.fromkeys(holders, number * PAGE_TOKENS))
        return tokens
