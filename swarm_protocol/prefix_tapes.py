"""What went into the hops for prompts that begin alike, so that sessions that share them at nodes have whole tapes."""

from collections import OrderedDict
from collections.abc import Sequence

from swarm_protocol.messages import WireTensor


class PrefixTapes:
    """Pages (1, PAGE_TOKENS, hidden) of hops' inputs by the hashes under which nodes know them; the least recently used
    go first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self._pages: OrderedDict[bytes, WireTensor] = OrderedDict()

    def keep(self, page_hash: bytes, page: WireTensor) -> None:
        """Keep a page, and drop others for it if need be."""
        if page_hash in self._pages:
            return
        self._pages[page_hash] = page
        self.used_bytes += memoryview(page.data).nbytes
        while self.used_bytes > self.max_bytes:
            _, dropped = self._pages.popitem(last=False)
            self.used_bytes -= memoryview(dropped.data).nbytes

    def find(self, page_hashes: Sequence[bytes]) -> list[WireTensor]:
        """Return the pages of the first hashes, up to one that is not known."""
        found = []
        for page_hash in page_hashes:
            page = self._pages.get(page_hash)
            if page is None:
                break
            found.append(page)
        # The end of a prefix is to go before its beginning.
        for page_hash in reversed(page_hashes[: len(found)]):
            self._pages.move_to_end(page_hash)
        return found
