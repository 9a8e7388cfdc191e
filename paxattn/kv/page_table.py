"""PageTable: which row owns which page. Reserve, release and fork on the device, all rows at once.

Pages are reference-counted, as in vLLM's block manager (Kwon et al. 2023); free pages lie on a stack.
"""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax import Array, lax
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
      page_table: i32 [R,M]; row r's first ceil(lens[r] / P) entries are its pages, the others are unspecified.
      lens: i32 [R], tokens that each row holds.
      owners: i32 [N], rows that own each page.
      free: i32 [N]; the first num_free entries are the free pages, the next to be taken last.
      num_free: i32 []
      page_size: P, static.
    """

    page_table: Array
    lens: Array
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

    def reserve(self, lens: Int[Array, "R"]) -> "tuple[PageTable, Bool[Array, 'R']]":
        """Grow row r to hold lens[r] tokens; rows that hold as many already stay as they are.

        Rows are served in order, each wholly or not at all: ok[r] is False, and row r unchanged, where too few
        pages are left or the row would outgrow M pages. Later rows that fit are still served.
        """
        checks.check_ints("lens", lens, self.lens.shape, "R")
        want = jnp.maximum(lens.astype(jnp.int32), self.lens)
        have = self._pages(self.lens)
        need = self._pages(want) - have
        ok = _grant(need, want <= self.capacity, self.num_free)
        need = jnp.where(ok, need, 0)

        column = jnp.arange(self.page_table.shape[1])[None, :] - have[:, None]
        fresh = (column >= 0) & (column < need[:, None])
        order = (jnp.cumsum(need) - need)[:, None] + column
        taken = need.sum()
        table = replace(
            self,
            page_table=jnp.where(fresh, self._next_free(order), self.page_table),
            lens=jnp.where(ok, want, self.lens),
            owners=self.owners.at[self.free].add(self._is_next_free(taken)),
            num_free=self.num_free - taken,
        )
        return table, ok

    def release(self, mask: Bool[Array, "R"]) -> "PageTable":
        """Drop the rows where mask is True; a page goes back when its last owner lets go."""
        checks.check_shape("mask", mask, self.lens.shape, "R")
        checks.require(mask.dtype == bool, "mask", f"dtype {mask.dtype}", "bool")
        kept = self.owners - self._count(self.page_table, jnp.where(mask, self.lens, 0))
        return replace(self, lens=jnp.where(mask, 0, self.lens))._give_back(kept)

    def fork(self, src: Int[Array, "F"], dst: Int[Array, "F"]) -> tuple["PageTable", PageCopies]:
        """Make row dst[i] share the pages of row src[i]; what dst[i] held before is released.

        All pairs happen at once, from the rows as they were (a permutation of rows is one call, as beam search
        needs it). Full pages are shared. A partly filled last page would be written by both, so dst gets a page
        of its own for it, and `copies` says what to copy there. A pair with a negative dst is skipped; no dst
        may stand twice. Where no page is left, copies.ok is False and that dst stays as it was.
        """
        checks.check_rank("src", src, "F")
        checks.check_ints("src", src, src.shape, "F")
        checks.check_ints("dst", dst, src.shape, "F")
        moves = (dst >= 0) & (src != dst)
        lens = self.lens[src]
        pages = self._pages(lens)
        partial = moves & (lens % self.page_size != 0)
        ok = _grant(partial.astype(jnp.int32), jnp.ones_like(moves), self.num_free)
        moves, partial = moves & ok, partial & ok

        own = self._next_free(jnp.cumsum(partial) - 1)
        last = jnp.arange(self.page_table.shape[1])[None, :] == pages[:, None] - 1
        old = self.page_table[src]
        rows = jnp.where(last & partial[:, None], own[:, None], old)
        into = jnp.where(moves, dst, len(self.lens))
        owners = self.owners + self._count(rows, jnp.where(moves, lens, 0))
        dropped = self._count(self.page_table[dst], jnp.where(moves, self.lens[dst], 0))
        copied = jnp.take_along_axis(old, jnp.maximum(pages - 1, 0)[:, None], axis=1)[:, 0]
        table = replace(
            self,
            page_table=self.page_table.at[into].set(rows, mode="drop"),
            lens=self.lens.at[into].set(lens, mode="drop"),
            owners=owners,
            num_free=self.num_free - partial.sum(),
        )._give_back(owners - dropped)
        return table, PageCopies(jnp.where(partial, copied, -1), jnp.where(partial, own, -1), ok)

    def _pages(self, lens: Array) -> Array:
        return -(-lens // self.page_size)

    def _next_free(self, order: Array) -> Array:
        """The page that is taken as number `order` from now, 0 = the next one."""
        return self.free[jnp.clip(self.num_free - 1 - order, 0, self.num_pages - 1)]

    def _is_next_free(self, count: Array) -> Array:
        """i32 [N]: 1 for the places of the stack that the next `count` pages are taken from."""
        place = jnp.arange(self.num_pages)
        return ((place < self.num_free) & (place >= self.num_free - count)).astype(jnp.int32)

    def _count(self, rows: Array, lens: Array) -> Array:
        """i32 [N]: how often each page stands among the first ceil(lens / P) entries of its row."""
        reached = jnp.arange(rows.shape[1])[None, :] < self._pages(lens)[:, None]
        pages = jnp.where(reached, rows, self.num_pages)
        return jnp.zeros_like(self.owners).at[pages].add(1, mode="drop")

    def _give_back(self, owners: Array) -> "PageTable":
        """Set the owners' count and put the pages that lost their last owner on the stack."""
        freed = (self.owners > 0) & (owners == 0)
        place = jnp.where(freed, self.num_free + jnp.cumsum(freed) - 1, self.num_pages)
        ids = jnp.arange(self.num_pages, dtype=jnp.int32)
        return replace(
            self,
            owners=owners,
            free=self.free.at[place].set(ids, mode="drop"),
            num_free=self.num_free + freed.sum(),
        )


def _grant(need: Array, possible: Array, num_free: Array) -> Array:
    """Who gets what it needs where requests are served in order, each wholly or not at all: bool [R].

    One prefix sum says who fits while nobody is refused. From the first that does not fit, all that need more
    than is left then are refused, and the sum is taken again: one round where enough pages are free, and
    another for each time that what is left shrinks after a refusal.
    """

    def used(granted: Array) -> Array:
        return jnp.cumsum(jnp.where(granted, need, 0))

    def refuse(granted: Array) -> Array:
        total = used(granted)
        first = jnp.argmax(total > num_free)
        left = num_free - (total[first] - need[first])
        later = jnp.arange(need.shape[0]) >= first
        return granted & ~(later & (need > left))

    return lax.while_loop(lambda granted: used(granted)[-1] > num_free, refuse, possible)
