"""A tile of queries in the TPU kernel of paged attention: the pages that it sees come block by block.

While a block is computed, the pages of the next are copied, be it of the same tile or of the next one; and as a page
table may be larger than SMEM, a tile's line of it is copied there one tile ahead. A page holds the heads of a token
side by side, so that one copy brings all heads. What lies in a block beyond the tile's keys is masked; values there
are zeroed, for NaN times 0 is NaN.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paxattn.kernels import tiles, tpu_paged_codes, tpu_paged_few, tpu_paged_many
from paxattn.kernels.tpu_paged_plan import LANES, Config, Problem

COPIES_AT_ONCE = 8
CLEARED_AT_ONCE = 16  # tokens, which are whole registers


class Refs(NamedTuple):
    # prefetch, in SMEM
    row: Any  # [W]
    position: Any  # [W]
    queries: Any  # [W]
    total: Any  # [1]
    resident: Any  # [R*M] the page table, where it fits
    # inputs
    q: Any  # [A,Q,D]
    labels: Any  # of the way to compute
    sinks: Any  # [A,Q,1] or None; without a joint config all [Q,1] here are [1,Q]
    k: Any  # [N,P,K,D] or, of one head, [N,P,D]; [N,P*K,D] where compressed; in HBM, as v, scales and table
    v: Any  # [N,P,K,D]
    scales: Any  # of k and v [N,C,P*K], float16 as bits, where compressed
    table: Any  # [R,C,128], where it is not resident
    # outputs
    out: Any  # [A,Q,D]
    lse: Any  # [A,Q,1]
    # scratch
    kv: Any  # [2,2,S,K,D] or [2,2,S,D]: two blocks of keys and values; where compressed [2,2,S*K,D]
    kv_scales: Any  # of k and v [2,M,C,P*K], where compressed
    expanded: Any  # [2,S,K,D] or [2,S,D]: keys and values of a block that was compressed
    state: Any  # of the way to compute
    entries: Any  # [2,C,128] lines of the table, in SMEM, where it is not resident
    turn: Any  # [1] blocks computed, in SMEM
    arrived: Any  # [2] semaphores: pages, by block
    listed: Any  # [2] lines, by tile


def way(config: Config) -> Any:
    """The module that computes: what its tiles need, and how a block is taken into their state."""
    return tpu_paged_few if config.joint else tpu_paged_many


class Span(NamedTuple):
    """Which keys a tile sees, and in which pages they are."""

    begin: Array
    end: Array
    first_page: Array
    end_page: Array
    blocks: Array  # one at least, as somebody must write the tile's output


class Kernel(NamedTuple):
    problem: Problem
    config: Config
    refs: Refs

    def tile(self, i: Array) -> None:
        """All of a tile."""
        refs = self.refs
        count = refs.total[0]

        @pl.when((i == 0) & (count > 0))
        def _start():
            refs.turn[0] = jnp.int32(0)
            if refs.table is not None:
                self._line(0).start()
                self._line(0).wait()
                pl.when(count > 1)(lambda: self._line(1).start())
            self._copy_pages(jnp.int32(0), 0, 0)

        @pl.when(i < count)
        def _run():
            refs.state.init()
            blocks = self._span(i).blocks
            pl.loop(0, blocks - 1)(lambda block: self._block(i, block, lambda: self._copy_pages(i, block + 1)))
            self._block(i, blocks - 1, lambda: self._look_ahead(i))
            self._way().finish(self.problem, self.config, refs)

    def _look_ahead(self, i) -> None:
        """Ask for the next tile's first block, and for the line of the one after, into the place of this one's."""

        streamed = self.refs.table is not None

        @pl.when(i + 1 < self.refs.total[0])
        def _next():
            if streamed:
                self._line(i + 1).wait()
            self._copy_pages(i + 1, 0)

        if streamed:
            pl.when(i + 2 < self.refs.total[0])(lambda: self._line(i + 2).start())

    def _block(self, i, block, ask_for_next) -> None:
        """Take the keys of a block into the state."""
        slot = self._slot()
        ask_for_next()
        self._wait_for_pages(i, block, slot)
        kv = self._numbers(i, block, slot)
        self._clear_values(i, block, kv.at[1])
        self._compute(i, block, kv)
        self.refs.turn[0] += 1

    def _numbers(self, i, block, slot) -> Any:
        """The keys and values of a block."""
        refs = self.refs
        if refs.scales is None:
            return refs.kv.at[slot]
        count, scales = self._pages(i, block)[1], [x.at[slot] for x in refs.kv_scales]
        tpu_paged_codes.expand(self.problem, count, refs.kv.at[slot], scales, refs.expanded)
        return refs.expanded

    def _slot(self):
        return lax.rem(self.refs.turn[0], 2)

    def _span(self, i) -> Span:
        problem, refs = self.problem, self.refs
        size, pages = problem.page_size, self.config.pages
        end = jnp.clip(refs.position[i] + refs.queries[i], 0, problem.pages_a_row * problem.page_size)
        begin = jnp.zeros_like(end) if problem.left is None else jnp.maximum(refs.position[i] - problem.left, 0)
        first_page, end_page = lax.div(begin, size), lax.div(end + (size - 1), size)
        blocks = lax.div(end_page - first_page + (pages - 1), pages)
        return Span(begin, end, first_page, end_page, jnp.maximum(blocks, 1))

    def _line(self, i) -> Any:
        """The copy of a tile's line of the page table."""
        refs, place = self.refs, i % 2
        return pltpu.make_async_copy(refs.table.at[refs.row[i]], refs.entries.at[place], refs.listed.at[place])

    def _pages(self, i, block) -> tuple[Array, Array]:
        """The first page of a block, as the row counts, and how many it has."""
        span = self._span(i)
        first = span.first_page + block * self.config.pages
        return first, jnp.clip(span.end_page - first, 0, self.config.pages)

    def _copy_pages(self, i, block, slot=None) -> None:
        """Start the copies of a block, into the place that is not being computed."""
        refs, size = self.refs, self.refs.k.shape[1]
        first, count = self._pages(i, block)
        slot = 1 - self._slot() if slot is None else slot

        def copy(j):
            page = self._entry(i, first + j)
            for source, kind in ((refs.k, 0), (refs.v, 1)):
                place = refs.kv.at[slot, kind, pl.ds(pl.multiple_of(j * size, size), size)]
                pltpu.make_async_copy(source.at[page], place, refs.arrived.at[slot]).start()
            for source, into in zip(refs.scales or (), refs.kv_scales or (), strict=True):
                pltpu.make_async_copy(source.at[page], into.at[slot, j], refs.arrived.at[slot]).start()

        several = lax.div(count, COPIES_AT_ONCE)

        @pl.loop(0, several)
        def _copy_several(group):
            for j in range(COPIES_AT_ONCE):
                copy(group * COPIES_AT_ONCE + j)

        pl.loop(several * COPIES_AT_ONCE, count)(copy)

    def _entry(self, i, at) -> Array:
        """Of the page table, of tile i's row."""
        refs = self.refs
        if refs.table is None:
            return refs.resident[refs.row[i] * self.problem.pages_a_row + at]
        return refs.entries[i % 2, at // LANES, at % LANES]

    def _wait_for_pages(self, i, block, slot) -> None:
        refs = self.refs
        count, size = self._pages(i, block)[1], refs.k.shape[1]

        def wait(pages):
            codes = refs.kv.at[slot, :, pl.ds(0, pages * size)]  # as much of keys as of values
            for some in (codes, *(x.at[slot, pl.ds(0, pages)] for x in refs.kv_scales or ())):
                pltpu.make_async_copy(some, some, refs.arrived.at[slot]).wait()

        pl.when(count == self.config.pages)(lambda: wait(self.config.pages))
        pl.when(count < self.config.pages)(lambda: pl.loop(0, count)(lambda _: wait(1)))

    def _seen(self, i, block) -> tuple[Array, Array]:
        """From which to which place of a block the tile sees keys."""
        span = self._span(i)
        start = self._pages(i, block)[0] * self.problem.page_size
        room = self.config.block(self.problem)
        return jnp.clip(span.begin - start, 0, room), jnp.clip(span.end - start, 0, room)

    def _clear_values(self, i, block, values) -> None:
        """Zero the values that no query of the tile sees."""
        begin, end = self._seen(i, block)

        def clear(group):
            first = pl.multiple_of(group * CLEARED_AT_ONCE, CLEARED_AT_ONCE)
            some = values.at[pl.ds(first, CLEARED_AT_ONCE)]
            token = lax.broadcasted_iota(jnp.int32, some.shape, 0) + first
            kept = jnp.where((token >= begin) & (token < end), some[...].astype(jnp.float32), 0.0)
            some[...] = kept.astype(values.dtype)

        pl.loop(0, tiles.cdiv(begin, CLEARED_AT_ONCE))(clear)
        pl.loop(lax.div(end, CLEARED_AT_ONCE), values.shape[0] // CLEARED_AT_ONCE)(clear)

    def _compute(self, i, block, kv) -> None:
        refs = self.refs
        position = refs.position[i] - self._pages(i, block)[0] * self.problem.page_size
        whole = self._sees_all(i, block)
        self._way().take(self.problem, self.config, refs, kv, position, whole)

    def _way(self) -> Any:
        return way(self.config)

    def _sees_all(self, i, block) -> Array:
        """Whether all queries of the tile see all keys of a block that has all its pages."""
        refs, problem, room = self.refs, self.problem, self.config.block(self.problem)
        first = refs.position[i] - self._pages(i, block)[0] * problem.page_size
        found = (self.config.pages * problem.page_size == room) & (first >= room - 1)
        if problem.left is not None:
            found &= first + self.config.tile - 1 - problem.left <= 0
        return found
