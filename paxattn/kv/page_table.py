"""PageTable: which row owns which page. All of it happens on the device, for all rows at once.

Pages are reference-counted, as in vLLM's block manager (Kwon et al. 2023); free pages lie on a stack. Where a page
goes is found by prefix sums and binary search, so that the cost does not depend on how many pages a row takes.
"""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

from paxattn import checks


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PageCopies:
    """What `fork` asks for: copy page src[i] onto page dst[i] before the next write; -1 = nothing to copy.

    Fields:
      src, dst: i32 [F]
      ok: bool [F], False where no page was left: that pair changed nothing.
    """

    src: Array
    dst: Array
    ok: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PageTable:
    """Pages of R rows. A pytree; every operation is pure, jit-able and free of host round trips.

    num_free plus the number of pages with an owner is always N, and the last page of a row, where it is only
    partly filled, has no other owner, so that a row may always be written past its end.

    Fields:
      page_table: i32 [R,M]; of row r, the entries from dropped[r] to ceil(lens[r] / P) are its pages, the others
        are unspecified.
      lens: i32 [R], tokens of each row, those on dropped pages included.
      dropped: i32 [R], pages that each row has given back at its front, behind a sliding window.
      owners: i32 [N], how many own each page: rows, and a prefix cache (`hold`).
      free: i32 [N]; the first num_free entries are the free pages, the next to be taken last.
      num_free: i32 []
      page_size: P, static.
    """

    page_table: Array
    lens: Array
    dropped: Array
    owners: Array
    free: Array
    num_free: Array
    page_size: int = field(metadata=dict(static=True))

    @classmethod
    def create(cls, num_pages: int, page_size: int, max_seqs: int, max_pages_per_seq: int) -> "PageTable":
        """An empty table: N pages of P tokens, R rows of at most M pages.

        Raises:
          ValueError: a size is not a positive int.
        """
        sizes = dict(
            num_pages=num_pages,
            page_size=page_size,
            max_seqs=max_seqs,
            max_pages_per_seq=max_pages_per_seq,
        )
        for name, size in sizes.items():
            checks.check_positive_int(name, size)
        return cls(
            page_table=jnp.zeros((max_seqs, max_pages_per_seq), jnp.int32),
            lens=jnp.zeros(max_seqs, jnp.int32),
            dropped=jnp.zeros(max_seqs, jnp.int32),
            owners=jnp.zeros(num_pages, jnp.int32),
            free=jnp.arange(num_pages, dtype=jnp.int32)[::-1],
            num_free=jnp.asarray(num_pages, jnp.int32),
            page_size=page_size,
        )

    @property
    def num_pages(self) -> int:
        return self.owners.shape[0]

    @property
    def capacity(self) -> int:
        """Tokens that one row can hold at most."""
        return self.page_table.shape[1] * self.page_size

    def reserve(self, lens: Int[Array, "R"], each: int | None = None) -> "tuple[PageTable, Bool[Array, 'R']]":
        """Grow row r to hold lens[r] tokens; rows that hold as many already stay as they are.

        Rows are served in order, each wholly or not at all: ok[r] is False, and row r unchanged, where too few
        pages are left or the row would outgrow M pages. Later rows that fit are still served, up to some number of
        refusals (see `_grant`).

        Args:
          lens: i32 [R], tokens.
          each: pages that a row needs at most, where that is known: less to do; a row that needs more is refused.
        """
        checks.check_ints("lens", lens, self.lens.shape, "R")
        if each is not None:
            checks.check_positive_int("each", each)
        want = jnp.maximum(checks.int32(lens), self.lens)
        have = self._pages(self.lens)
        need = self._pages(want) - have
        rows, width = self.page_table.shape
        each = width if each is None else min(each, width)
        possible = (want <= self.capacity) & (need <= each)
        ok = _grant(need, possible, self.num_free, rounds=0 if each == 1 else 4)
        ends = jnp.cumsum(jnp.where(ok, need, 0), dtype=jnp.int32)

        order = jnp.arange(min(self.num_pages, rows * each), dtype=jnp.int32)
        taken = order < ends[-1]
        row = jnp.searchsorted(ends, order, side="right", method="scan_unrolled")
        at = jnp.where(taken, row, len(ends))
        column = (have - ends + jnp.where(ok, need, 0))[jnp.minimum(row, len(ends) - 1)] + order
        page = self._next_free(order)
        table = replace(
            self,
            page_table=self.page_table.at[at, column].set(page, mode="drop", unique_indices=True),
            lens=jnp.where(ok, want, self.lens),
            owners=self.owners.at[jnp.where(taken, page, self.num_pages)].set(1, mode="drop"),
            num_free=self.num_free - ends[-1],
        )
        return table, ok

    def release(self, mask: Bool[Array, "R"]) -> "PageTable":
        """Drop the rows where mask is True; a page goes back when its last owner lets go."""
        checks.check_mask("mask", mask, len(self.lens))
        gone = self._count(self.page_table, self.dropped, jnp.where(mask, self._pages(self.lens), 0))
        kept = jnp.where(mask, 0, self.lens)
        return replace(self, lens=kept, dropped=jnp.where(mask, 0, self.dropped))._let_go(gone)

    def release_before(self, positions: Int[Array, "R"]) -> "PageTable":
        """Give back row r's pages that lie wholly before positions[r], as a sliding window leaves them behind.

        lens and the places of the other pages stay; nothing may read the dropped ones any more.
        """
        checks.check_ints("positions", positions, self.lens.shape, "R")
        whole = jnp.clip(checks.int32(positions), 0, self.lens) // self.page_size
        dropped = jnp.maximum(self.dropped, whole)
        gone = self._count(self.page_table, self.dropped, dropped)
        return replace(self, dropped=dropped)._let_go(gone)

    def truncate(self, lens: Int[Array, "R"]) -> "PageTable":
        """Cut row r to lens[r] tokens, where it has more; pages that hold none of them go back.

        Only what the row has reserved since it was last forked or its pages were held may be cut, as its last page
        must have no other owner: guesses that were not right.
        """
        checks.check_ints("lens", lens, self.lens.shape, "R")
        kept = jnp.clip(checks.int32(lens), self.dropped * self.page_size, self.lens)
        gone = self._count(self.page_table, self._pages(kept), self._pages(self.lens))
        return replace(self, lens=kept)._let_go(gone)

    def fork(self, src: Int[Array, "F"], dst: Int[Array, "F"]) -> tuple["PageTable", PageCopies]:
        """Make row dst[i] share the pages of row src[i]; what dst[i] held before is released.

        All pairs happen at once, from the rows as they were (a permutation of rows is one call, as beam search
        needs it). Full pages are shared. A partly filled last page would be written by both, so dst gets a page
        of its own for it, and `copies` says what to copy there. A pair with a negative dst is skipped; no dst
        may stand twice. Where no page is left, or there is no such row, copies.ok is False and nothing changes.
        """
        checks.check_rank("src", src, "F")
        checks.check_ints("src", src, src.shape, "F")
        checks.check_ints("dst", dst, src.shape, "F")
        src, dst = checks.int32(src), checks.int32(dst)
        known = (src >= 0) & (src < len(self.lens)) & (dst < len(self.lens))
        moves = (dst >= 0) & (src != dst) & known
        lens, dropped = self.lens[src], self.dropped[src]
        pages = self._pages(lens)
        partial = moves & (lens % self.page_size != 0)
        ok = _grant(partial.astype(jnp.int32), known | (dst < 0), self.num_free, rounds=0)
        moves, partial = moves & ok, partial & ok

        own = self._next_free(jnp.cumsum(partial, dtype=jnp.int32) - 1)
        last = jnp.arange(self.page_table.shape[1])[None, :] == pages[:, None] - 1
        old = self.page_table[src]
        rows = jnp.where(last & partial[:, None], own[:, None], old)
        into = jnp.where(moves, dst, len(self.lens))
        gained = self._count(rows, dropped, jnp.where(moves, pages, 0))
        gone = self._count(self.page_table[dst], self.dropped[dst], jnp.where(moves, self._pages(self.lens[dst]), 0))
        copied = jnp.take_along_axis(old, jnp.maximum(pages - 1, 0)[:, None], axis=1)[:, 0]
        table = replace(
            self,
            page_table=self.page_table.at[into].set(rows, mode="drop"),
            lens=self.lens.at[into].set(lens, mode="drop"),
            dropped=self.dropped.at[into].set(dropped, mode="drop"),
            owners=self.owners + gained,
            num_free=self.num_free - partial.sum(dtype=jnp.int32),
        )._let_go(gone)
        return table, PageCopies(jnp.where(partial, copied, -1), jnp.where(partial, own, -1), ok)

    def adopt(
        self, rows: Int[Array, "F"], pages: Int[Array, "F C"], counts: Int[Array, "F"]
    ) -> "tuple[PageTable, Bool[Array, 'F']]":
        """Give the empty row rows[i] the first counts[i] of pages[i] as its own, full, shared with their owners.

        As a prefix cache finds them again. A negative row is skipped; no row may stand twice. ok[i] is False,
        and nothing changes, where the row is not there or not empty, where counts[i] is no number of pages that
        are given and fit a row, or where a page has no owner.
        """
        checks.check_rank("rows", rows, "F")
        checks.check_ints("rows", rows, rows.shape, "F")
        checks.check_rank("pages", pages, "F C")
        checks.check_ints("pages", pages, (len(rows), pages.shape[1]), "F C")
        checks.check_ints("counts", counts, rows.shape, "F")
        rows, pages, counts = (checks.int32(x) for x in (rows, pages, counts))
        width = self.page_table.shape[1]
        short = max(0, width - pages.shape[1])
        pages = jnp.pad(pages, ((0, 0), (0, short)), constant_values=-1)[:, :width]
        given = jnp.arange(width)[None, :] < counts[:, None]
        known = (pages >= 0) & (pages < self.num_pages) & (self.owners[pages] > 0)
        fits = (rows < len(self.lens)) & (counts >= 0) & (counts <= width)
        ok = (rows < 0) | (fits & (self.lens[rows] == 0) & jnp.all(known | ~given, axis=1))
        into = jnp.where(ok & (rows >= 0), rows, len(self.lens))
        counts = jnp.where(ok & (rows >= 0), counts, 0)
        table = replace(
            self,
            page_table=self.page_table.at[into].set(pages, mode="drop"),
            lens=self.lens.at[into].set(counts * self.page_size, mode="drop"),
            owners=self.owners + self._count(pages, jnp.zeros_like(counts), counts),
        )
        return table, ok

    def hold(self, pages: Int[Array, "X"]) -> "PageTable":
        """One owner more for each of these full pages, which outlive their rows so. Free and negative: skipped."""
        checks.check_rank("pages", pages, "X")
        checks.check_ints("pages", pages, pages.shape, "X")
        held = self._tally(checks.int32(pages))
        return replace(self, owners=self.owners + jnp.where(self.owners > 0, held, 0))

    def let_go(self, pages: Int[Array, "X"]) -> "PageTable":
        """Undo `hold`: a page goes back when its last owner lets go; a negative page is skipped."""
        checks.check_rank("pages", pages, "X")
        checks.check_ints("pages", pages, pages.shape, "X")
        return self._let_go(jnp.minimum(self._tally(checks.int32(pages)), self.owners))

    def _pages(self, lens: Array) -> Array:
        return -(-lens // self.page_size)

    def _next_free(self, order: Array) -> Array:
        """The page that is taken as number `order` from now, 0 = the next one."""
        return self.free[jnp.clip(self.num_free - 1 - order, 0, self.num_pages - 1)]

    def _count(self, rows: Array, begin: Array, end: Array) -> Array:
        """i32 [N]: how often each page stands in its row from entry begin to before entry end."""
        column = jnp.arange(rows.shape[1])[None, :]
        return self._tally(jnp.where((column >= begin[:, None]) & (column < end[:, None]), rows, -1))

    def _tally(self, pages: Array) -> Array:
        """i32 [N]: how often each page stands in pages; negative ones do not count."""
        pages = jnp.where(pages < 0, self.num_pages, pages)
        return jnp.zeros_like(self.owners).at[pages].add(1, mode="drop")

    def _let_go(self, gone: Array) -> "PageTable":
        """Take gone[n] owners from page n, and put the pages that lost their last one on the stack."""
        owners = self.owners - gone
        freed = (self.owners > 0) & (owners == 0)
        place = self.num_free + jnp.cumsum(freed, dtype=jnp.int32)
        ids = jnp.arange(self.num_pages, dtype=jnp.int32)
        free = self.free.at[jnp.where(freed, place - 1, self.num_pages)].set(ids, mode="drop", unique_indices=True)
        return replace(self, owners=owners, free=free, num_free=place[-1])


def _grant(need: Array, possible: Array, num_free: Array, rounds: int) -> Array:
    """Who gets what it needs where requests are served in order, each wholly or not at all: bool [R].

    A round refuses, from the first request on that does not fit behind those before it, all that need more than
    is left there. `rounds` refusals at different fillings are told apart so, without a loop on the device whose end
    the host would have to look at; behind that many, a request is refused that does not fit behind all before it.
    Exact where each needs one page at most, without any round.
    """

    def used(granted: Array) -> Array:
        return jnp.cumsum(jnp.where(granted, need, 0), dtype=jnp.int32)

    granted = possible & (need <= num_free)
    for _ in range(rounds):
        total = used(granted)
        over = total > num_free
        left = num_free - jnp.max(jnp.where(over, 0, total), initial=0)
        granted &= ~(over & (need > left))
    return granted & ((need == 0) | (used(granted) <= num_free))
