"""PrefixIndex: which pages hold the beginning of a prompt. On the host; it knows token ids and page ids only.

Full pages are found again by a chain of hashes over their content, as in vLLM's automatic prefix caching (Kwon et
al. 2023), and stay in memory after their rows have ended until the room is needed, the least recently used first
and always from the end of a prefix, as in RadixAttention (Zheng et al. 2024).

The index is one owner of each page that it knows. A row's life with it is

    lease = index.match(tokens, salt)             adopt lease.pages as the row's first ones, compute the rest
    taken = index.insert(lease, tokens, pages)    hold `taken`; again whenever more pages have become full
    index.release(lease)                          with the release of the row

and where pages are short, `index.evict(count)` names those to let go.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import takewhile

import numpy as np
from numpy.typing import ArrayLike

from paxattn import checks


@dataclass(frozen=True, eq=False)
class Lease:
    """A row's claim on a prefix: none of its pages is evicted before the lease is released.

    Fields:
      pages: ids of the pages that `match` found, first to last. The lease grows with `insert`; they stay the same.
      root: the hash that stands for the salt.
    """

    pages: tuple[int, ...]
    root: bytes = field(repr=False)


@dataclass(slots=True, eq=False)
class _Node:
    """A known page; `key` is the hash of its tokens and all before them, `leases` counts those that cover it."""

    key: bytes
    page: int
    leases: int = 0


class PrefixIndex:
    """Full pages by content. All methods take time in the pages they are given or return, however many are known.

    Every page is known together with all pages before it: a lease covers a prefix from its first page on, and the
    pages that no lease covers are evicted from the end.

    Args:
      page_size: P, tokens of a page.

    Raises:
      ValueError: page_size is not a positive int.
    """

    def __init__(self, page_size: int):
        checks.check_positive_int("page_size", page_size)
        self.page_size = page_size
        self._nodes: dict[bytes, _Node] = {}
        self._pages: set[int] = set()
        self._chains: dict[Lease, list[_Node]] = {}
        # A page is covered by every lease that covers a longer prefix, and a chain is released from its end. So
        # each page stands behind all that continue it, and the first of all is always the end of a prefix.
        self._idle: OrderedDict[bytes, _Node] = OrderedDict()

    def __len__(self) -> int:
        """Pages that the index knows."""
        return len(self._nodes)

    @property
    def cached(self) -> int:
        """Pages that no lease covers, which is as many as `evict` can give up."""
        return len(self._idle)

    def match(self, tokens: ArrayLike, salt: str | bytes = "") -> Lease:
        """Find the longest known run of full pages that `tokens` begins with, and keep it until `release`.

        At most (len(tokens) - 1) // P pages, so that a token is left to compute logits from. A prompt of which
        nothing is known gets a lease of no pages; it is released like any other.

        Args:
          tokens: ids >= 0, [S], of any integer dtype.
          salt: only prompts of the same salt share pages; "a" and b"a" are two salts.

        Raises:
          ValueError: tokens or salt are not of this kind.
        """
        ids = _check_ids("tokens", tokens)
        root = _root(salt)
        keys = self._keys(root, ids, (len(ids) - 1) // self.page_size)
        chain = [self._nodes[key] for key in takewhile(self._nodes.__contains__, keys)]
        lease = Lease(tuple(node.page for node in chain), root)
        self._chains[lease] = []
        self._cover(lease, chain)
        return lease

    def insert(self, lease: Lease, tokens: ArrayLike, pages: ArrayLike) -> list[int]:
        """Make the full pages of a row known; what the lease covers grows with them.

        Content that is known under another page already stays there, and the row's own page is not taken. Pages
        behind it may be: the lease then covers all that stand before the last page of the row that is known.

        Args:
          lease: the row's, from `match`.
          tokens: [S], all of the row, from its first; those of the last, partly filled page are not looked at.
          pages: pages[i] holds tokens[i * P : (i + 1) * P]; what follows the S // P full pages is ignored.

        Returns:
          The pages that the index now owns, too.

        Raises:
          ValueError: an argument is not of this kind, the lease has been released, tokens do not continue what the
            lease covers, or a page is known already to hold something else. The index is as it was.
        """
        held = self._check_lease(lease)
        ids = _check_ids("tokens", tokens)
        count = len(ids) // self.page_size
        owned = self._check_pages(pages, count)
        fresh = [_Node(key, page) for key, page in zip(self._keys(lease.root, ids, count), owned, strict=True)]
        chain = [self._nodes.get(node.key, node) for node in fresh]
        checks.require(chain[: len(held)] == held, "tokens", "others", "those that the lease covers, and more")
        taken = [node for node, new in zip(chain, fresh, strict=True) if node is new]
        self._check_new([node.page for node in taken])

        self._nodes |= {node.key: node for node in taken}
        self._pages |= {node.page for node in taken}
        last = max((i for i, node in enumerate(chain, 1) if node.page == owned[i - 1]), default=0)
        self._cover(lease, chain[len(held) : last])
        return [node.page for node in taken]

    def covered(self, lease: Lease) -> int:
        """How many pages of the index a lease covers.

        Raises:
          ValueError: the lease has been released, or is another index's.
        """
        return len(self._check_lease(lease))

    def release(self, lease: Lease) -> None:
        """End a lease. Pages that no other lease covers may be evicted from now on, later than all others.

        Raises:
          ValueError: the lease has been released before, or is another index's.
        """
        for node in reversed(self._check_lease(lease)):
            node.leases -= 1
            if node.leases == 0:
                self._idle[node.key] = node
        del self._chains[lease]

    def evict(self, count: int) -> list[int]:
        """Forget min(count, cached) pages, those that were released first; the index owns them no longer.

        Of two pages of a prefix that were released together, the later in the prefix goes first.

        Raises:
          ValueError: count is not an int >= 0.
        """
        checks.require(isinstance(count, int | np.integer) and count >= 0, "count", repr(count), "an int >= 0")
        return [self._forget() for _ in range(min(count, self.cached))]

    def _forget(self) -> int:
        key, node = self._idle.popitem(last=False)
        del self._nodes[key]
        self._pages.remove(node.page)
        return node.page

    def _cover(self, lease: Lease, nodes: list[_Node]) -> None:
        self._chains[lease] += nodes
        for node in nodes:
            node.leases += 1
            self._idle.pop(node.key, None)

    def _keys(self, root: bytes, ids: np.ndarray, count: int) -> Iterator[bytes]:
        """The hashes of the first `count` pages, each over the hash before it and the page's tokens."""
        data, width = memoryview(ids.tobytes()), ids.itemsize * self.page_size
        key = root
        for start in range(0, count * width, width):
            page = blake2b(key, digest_size=32, person=b"page")
            page.update(data[start : start + width])
            key = page.digest()
            yield key

    def _check_lease(self, lease: Lease) -> list[_Node]:
        live = isinstance(lease, Lease) and lease in self._chains
        checks.require(live, "lease", repr(lease), "a result of this index's match, not yet released")
        return self._chains[lease]

    def _check_pages(self, pages: ArrayLike, count: int) -> list[int]:
        given = np.asarray(pages)
        enough = given.ndim == 1 and len(given) >= count
        checks.require(enough, "pages", f"shape {given.shape}", f"at least {count} ids, one for each full page")
        return _check_ids("pages", given[:count]).tolist()

    def _check_new(self, pages: list[int]) -> None:
        new = set(pages)
        checks.require(len(new) == len(pages), "pages", "a page that stands twice", "distinct ids")
        known = sorted(new & self._pages)
        checks.require(not known, "pages", f"{known}, known to hold other tokens", "pages of the row")


def _root(salt: str | bytes) -> bytes:
    """The hash that a salt's chains begin with. `person` keeps a salt from passing for the content of a page."""
    checks.require(isinstance(salt, str | bytes), "salt", type(salt).__name__, "a str or bytes")
    if isinstance(salt, str):
        return blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=32, person=b"salt str").digest()
    return blake2b(salt, digest_size=32, person=b"salt bytes").digest()


def _check_ids(name: str, ids: ArrayLike) -> np.ndarray:
    """As little-endian int64, so that equal ids give equal bytes on any machine."""
    given = np.asarray(ids)
    whole = given.ndim == 1 and (given.size == 0 or np.issubdtype(given.dtype, np.integer))
    checks.require(whole, name, f"shape {given.shape} of {given.dtype}", "one-dimensional, of ints")
    as_int64 = given.astype("<i8")
    checks.require(as_int64.min(initial=0) >= 0, name, as_int64.min(initial=0), "ids >= 0, below 2**63")
    return as_int64
