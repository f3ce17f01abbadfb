"""Pages of keys and values that are kept when their session is over, for sessions that begin with the same tokens.

A page is named by who owns it, the blocks, and a keyed hash of all tokens up to its end that the owner's client made. A
node cannot check that hidden states belong to a hash, so pages are found only by sessions of the peer that filled them:
who lies, lies to himself. Weights and numerics are those of this node, which serves no others. Kept pages are copies:
sessions go on writing to theirs. The least recently used ones go first, and of one prefix its end before its beginning,
since a page is worth nothing without those before it.
"""

from collections import Counter, OrderedDict
from collections.abc import Sequence

from server_node.compute.kv_cache import KVCache, Page, PageKey
from swarm_protocol.ids import PeerId
from swarm_protocol.messages import PAGE_TOKENS

OWNER_SHARE = 0.5
"""Of the store, that one peer's pages may take."""


class PrefixStore:
    """Kept pages of at most `max_bytes`. Only the compute thread may use it."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.size_bytes = 0
        self._pages: OrderedDict[PageKey, Page] = OrderedDict()
        self._owner_bytes: Counter[PeerId] = Counter()

    def __len__(self) -> int:
        return len(self._pages)

    def fill(self, cache: KVCache, owner: PeerId, prefix: Sequence[bytes]) -> None:
        """Let an empty cache begin with the pages of `prefix` that are here, and remember what the others will be."""
        if not self.max_bytes:
            return
        cache.page_keys = tuple(PageKey(owner, cache.blocks, page_hash) for page_hash in prefix)
        found = []
        for key in cache.page_keys[: cache.max_tokens // PAGE_TOKENS]:
            page = self._pages.get(key)
            if page is None:
                break
            found.append(page)
        for key in reversed(cache.page_keys[: len(found)]):
            self._pages.move_to_end(key)
        if found:
            cache.write_pages(found)

    def keep(self, cache: KVCache) -> None:
        """Keep copies of those pages of a cache's prefix that are full by now and not here yet."""
        num_full = min(len(cache.page_keys), cache.position // PAGE_TOKENS)
        added = []
        for index in range(num_full):
            key = cache.page_keys[index]
            if key not in self._pages:
                page = cache.read_page(index)
                if not self._make_room(key.owner, page.size_bytes, keep=cache.page_keys[:index]):
                    break
                self._add(key, page)
                added.append(key)
        for key in reversed(added):
            self._pages.move_to_end(key)

    def _make_room(self, owner: PeerId, size_bytes: int, keep: Sequence[PageKey]) -> bool:
        """Remove old pages until one more of `owner` fits; False if only those in `keep` could go."""
        spared = set(keep)
        limits = ((owner, int(OWNER_SHARE * self.max_bytes)), (None, self.max_bytes))
        for whose, limit in limits:
            taken = self.size_bytes if whose is None else self._owner_bytes[whose]
            for key in list(self._pages) if taken + size_bytes > limit else ():
                if taken + size_bytes <= limit:
                    break
                if key not in spared and whose in (None, key.owner):
                    taken -= self._remove(key)
            if taken + size_bytes > limit:
                return False
        return True

    def _add(self, key: PageKey, page: Page) -> None:
        self._pages[key] = page
        self.size_bytes += page.size_bytes
        self._owner_bytes[key.owner] += page.size_bytes

    def _remove(self, key: PageKey) -> int:
        size_bytes = self._pages.pop(key).size_bytes
        self.size_bytes -= size_bytes
        self._owner_bytes[key.owner] -= size_bytes
        if not self._owner_bytes[key.owner]:
            del self._owner_bytes[key.owner]
        return size_bytes
