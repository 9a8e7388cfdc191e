"""paged_attention on TPU: Pallas Mosaic TPU (PagedAttention, Kwon et al. 2023; online softmax, FlashAttention-2).

The kernel takes tiles of queries in turn, and each through the blocks of keys that it sees. While a block is computed,
the pages of the next are copied, be it of the same tile or of the next one; and as a page table may be larger than
SMEM, a tile's line of it is copied there one tile ahead. A page holds the heads of a token side by side, so that one
copy brings all heads. What lies in a block beyond the tile's keys is masked; values there are zeroed, for NaN times 0
is NaN.
"""

from functools import partial
from math import gcd
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paxattn.kernels import online_softmax
from paxattn.kernels.problem import LOG2E
from paxattn.kernels.tpu_paged_plan import LANES, Config, Problem, cut, few_config, gather, many_config, scatter
from paxattn.kernels.tpu_tiles import NN, NT, VMEM_BYTES, dot, pipeline

MOST_ENTRIES = 2**15  # of a row, two of which are in SMEM
MOST_RESIDENT = 2**16  # entries of a page table that is in SMEM as a whole
COPIES_AT_ONCE = 8
HEADS_AT_ONCE = 4  # of many queries
TILE = 512  # of their scores, each way
COLUMNS = 2048  # of scores, which few queries take in at a time
NEVER = float(jnp.finfo(jnp.float32).min)  # a maximum that nothing stays below; finite, so that differences are


def paged_attention(
    q, pages, page_table, kv_lens, cu_q_lens, sinks, *, left, scale, softcap, max_q_len, shared_prefix_len
) -> tuple[Array, Array]:
    del shared_prefix_len  # a hint
    _decline(q, pages, page_table)
    (tokens, heads, dim), (_, page_size, kv_heads, _) = q.shape, pages.k.shape
    rows, width = page_table.shape
    left = None if left is None else min(left, width * page_size)  # all there is
    longest = min(max_q_len or tokens, tokens)
    problem = Problem(tokens, heads, kv_heads, dim, page_size, rows, width, longest, left, scale, softcap)
    arrays = q, pages.k, pages.v, page_table, kv_lens, cu_q_lens, sinks
    q, k, v, page_table, kv_lens, cu_q_lens, sinks = online_softmax.vary_like(arrays, *jax.tree.leaves(arrays))
    if page_table.size > MOST_RESIDENT:
        page_table = jnp.pad(page_table, ((0, 0), (0, -width % LANES))).reshape(rows, -1, LANES)
    q = _scaled(q, scale, softcap)
    parts = []
    for config in [few_config(problem)] + [many_config(problem)] * (longest > problem.few):
        work = cut(problem, config, kv_lens, cu_q_lens)
        parts.append(
            (config, work, _attend(problem, config, work, gather(problem, config, work, q), k, v, page_table, sinks))
        )
    out, lse = scatter(problem, parts, cu_q_lens)
    exists = jnp.arange(tokens) < cu_q_lens[-1]
    return jnp.where(exists[:, None, None], out, 0), jnp.where(exists[:, None], lse[..., 0], -jnp.inf).T


def _decline(q: Array, pages: Any, page_table: Array) -> None:
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"dtype {q.dtype}: 'mosaic_tpu' serves bfloat16 and float32")
    if pages.k_scale is not None:
        raise NotImplementedError(f"compressed pages ({pages.k.dtype}): 'mosaic_tpu' serves none, 'xla' does")
    if pages.k.dtype != q.dtype:
        raise NotImplementedError(f"pages of {pages.k.dtype} for {q.dtype}: 'mosaic_tpu' serves pages of q's dtype")
    if page_table.shape[1] > MOST_ENTRIES:
        raise NotImplementedError(f"{page_table.shape[1]} pages a row: 'mosaic_tpu' serves up to {MOST_ENTRIES}")
    if 0 in q.shape or 0 in pages.k.shape or 0 in page_table.shape:
        raise NotImplementedError("an axis of nothing: 'mosaic_tpu' serves none, 'xla' does")


class Refs(NamedTuple):
    # prefetch, in SMEM
    row: Any  # [W]
    position: Any  # [W]
    queries: Any  # [W]
    total: Any  # [1]
    resident: Any  # [R*M] the page table, where it fits
    # inputs
    q: Any  # [A,Q,D]
    token: Any  # [Q,1] the place of a row of q in its tile; without a joint config all [Q,1] here are [1,Q]
    head: Any  # [Q,1] its head of K
    key: Any  # [1,S*K] the place of a column of joint scores in its block, and its head of K
    key_head: Any  # [1,S*K]
    sinks: Any  # [A,Q,1] or None
    k: Any  # [N,P,K,D] in HBM, as v and table
    v: Any  # [N,P,K,D]
    table: Any  # [R,C,128], where it is not resident
    # outputs
    out: Any  # [A,Q,D]
    lse: Any  # [A,Q,1]
    # scratch
    kv: Any  # [2,2,S,K,D] two blocks of keys and values
    k_apart: Any  # [K,S,D] one, head by head; None with a joint config, as v_apart
    v_apart: Any  # [K,D,S]
    m: Any  # [A,Q,1] the state of the softmax, in base 2
    l: Any  # [A,Q,1]
    acc: Any  # [A,Q,D], without a joint config [A,D,Q]
    entries: Any  # [2,C,128] lines of the table, in SMEM, where it is not resident
    turn: Any  # [1] blocks computed, in SMEM
    arrived: Any  # [2] semaphores: pages, by block
    listed: Any  # [2] lines, by tile


def _attend(problem: Problem, config: Config, work, q, k, v, table, sinks) -> tuple[Array, Array]:
    """Tiles q [W,A,Q,D] -> out [W,A,Q,D], lse float32 [W,A,Q,1]; arbitrary for tiles that are not there."""
    count, sets, queries, dim = q.shape
    block, heads = config.block(problem), problem.kv_heads
    standing = lambda x: x if config.joint else x.swapaxes(-1, -2)
    index = standing(jnp.arange(queries)[:, None] // problem.group)
    labels: tuple[Array | None, ...] = (index % config.tile, None, None, None)
    if config.joint:
        column = jnp.arange(block * heads)[None, :]
        labels = index % config.tile, index // config.tile, column // heads, column % heads
    if sinks is not None:
        by_head = sinks.astype(jnp.float32).reshape(heads, 1, problem.group) * LOG2E
        sinks = standing(jnp.broadcast_to(by_head, (heads, config.tile, problem.group)).reshape(sets, queries, 1))
    resident = table.ndim == 2
    plan = work.row, work.position, work.queries, work.total, table.reshape(-1) if resident else jnp.zeros(1, jnp.int32)
    whole = pl.BlockSpec(memory_space=pltpu.VMEM)
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    # Tiles that are not there stay on the last block, which is so copied once.
    spec = lambda shape: pl.BlockSpec(
        (None, *shape),
        lambda i, row, position, queries, n, _: (jnp.maximum(jnp.minimum(i, n[0] - 1), 0), *[0] * len(shape)),
    )
    state = (sets, queries, 1) if config.joint else (sets, 1, queries)
    shape = partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(q).manual_axis_type)
    out, lse = pl.pallas_call(
        partial(_kernel, problem, config),
        name="paged_attention_few" if config.joint else "paged_attention_many",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(plan),
            grid=(count,),
            in_specs=(
                spec(q.shape[1:]),
                *(None if x is None else whole for x in labels),
                None if sinks is None else whole,
                hbm,
                hbm,
                None if resident else hbm,
            ),
            out_specs=(spec(q.shape[1:]), spec(state)),
            scratch_shapes=(
                pltpu.VMEM((2, 2, block, heads, dim), k.dtype),
                None if config.joint else pltpu.VMEM((heads, block, dim), k.dtype),
                None if config.joint else pltpu.VMEM((heads, dim, block), k.dtype),
                pltpu.VMEM(state, jnp.float32),
                pltpu.VMEM(state, jnp.float32),
                pltpu.VMEM((sets, queries, dim) if config.joint else (sets, dim, queries), jnp.float32),
                None if resident else pltpu.SMEM((2, *table.shape[1:]), jnp.int32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
            ),
        ),
        out_shape=(shape(q.shape, q.dtype), shape((count, *state), jnp.float32)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES, disable_bounds_checks=True
        ),
    )(*plan, q, *(None if x is None else x.astype(jnp.int32) for x in labels), sinks, k, v, None if resident else table)
    return out, standing(lse)


def _kernel(problem: Problem, config: Config, *refs) -> None:
    Kernel(problem, config, Refs(*refs)).tile(pl.program_id(0))


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
            refs.m[...] = jnp.full_like(refs.m, NEVER)
            refs.l[...] = jnp.zeros_like(refs.l)
            refs.acc[...] = jnp.zeros_like(refs.acc)
            blocks = self._span(i).blocks
            pl.loop(0, blocks - 1)(lambda block: self._block(i, block, lambda: self._copy_pages(i, block + 1)))
            self._block(i, blocks - 1, lambda: self._look_ahead(i))
            self._finish()

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
        self._clear_values(i, block, slot)
        self._compute(i, block, slot)
        self.refs.turn[0] += 1

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
        refs, size = self.refs, self.problem.page_size
        first, count = self._pages(i, block)
        slot = 1 - self._slot() if slot is None else slot

        def copy(j):
            page = self._entry(i, first + j)
            for source, kind in ((refs.k, 0), (refs.v, 1)):
                place = refs.kv.at[slot, kind, pl.ds(j * size, size)]
                pltpu.make_async_copy(source.at[page], place, refs.arrived.at[slot]).start()

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
        count, size = self._pages(i, block)[1], self.problem.page_size

        def wait(pages):
            some = refs.kv.at[slot, :, pl.ds(0, pages * size)]  # as much of keys as of values
            pltpu.make_async_copy(some, some, refs.arrived.at[slot]).wait()

        pl.when(count == self.config.pages)(lambda: wait(self.config.pages))
        pl.when(count < self.config.pages)(lambda: pl.loop(0, count)(lambda _: wait(1)))

    def _seen(self, i, block) -> tuple[Array, Array]:
        """From which to which place of a block the tile sees keys."""
        span = self._span(i)
        start = self._pages(i, block)[0] * self.problem.page_size
        room = self.config.block(self.problem)
        return jnp.clip(span.begin - start, 0, room), jnp.clip(span.end - start, 0, room)

    def _clear_values(self, i, block, slot) -> None:
        """Zero the values that no query of the tile sees."""
        values = self.refs.kv.at[slot, 1]
        begin, end = self._seen(i, block)

        def clear(at):
            values[at] = jnp.zeros(values.shape[1:], values.dtype)

        pl.loop(0, begin)(clear)
        pl.loop(end, values.shape[0])(clear)

    def _compute(self, i, block, slot) -> None:
        refs = self.refs
        position = refs.position[i] - self._pages(i, block)[0] * self.problem.page_size
        kv = refs.kv.at[slot]
        if self.config.joint:
            self._update_jointly(position, kv[0], kv[1])
            return
        refs.k_apart[...] = kv[0].swapaxes(0, 1)
        refs.v_apart[...] = kv[1].transpose(1, 2, 0)
        whole = self._sees_all(i, block)
        heads = gcd(self.problem.kv_heads, HEADS_AT_ONCE)
        for masked in (False, True):
            visit = partial(self._update_apart, position if masked else None, heads)
            pl.when(whole != masked)(partial(pl.loop(0, self.problem.kv_heads, step=heads), visit))

    def _sees_all(self, i, block) -> Array:
        """Whether all queries of the tile see all keys of a block that has all its pages."""
        refs, problem, room = self.refs, self.problem, self.config.block(self.problem)
        first = refs.position[i] - self._pages(i, block)[0] * problem.page_size
        found = (self.config.pages * problem.page_size == room) & (first >= room - 1)
        if problem.left is not None:
            found &= first + self.config.tile - 1 - problem.left <= 0
        return found

    def _in_sight(self, key, query) -> Array:
        """Whether a query sees a key, by their places in the block."""
        seen = key <= query
        return seen if self.problem.left is None else seen & (key >= query - self.problem.left)

    def _update_jointly(self, position, k, v) -> None:
        """Take keys and values [S,K,D] into the only state, some at a time: what waits for one overlaps with others."""
        refs, size = self.refs, max(LANES, COLUMNS // self.problem.kv_heads)
        q, m, l, acc = (ref[0] for ref in (refs.q, refs.m, refs.l, refs.acc))
        flat = lambda x, at: x[at : at + size].reshape(-1, self.problem.head_dim)

        def scores(at, _):
            columns = pl.ds(at * self.problem.kv_heads, min(size, len(k) - at) * self.problem.kv_heads)
            key, head = refs.key[:, columns], refs.key_head[:, columns]
            if self.config.tile == 1:  # all rows see the same keys
                seen = jnp.where(self._in_sight(key, position), head, -1) == refs.head[...]
            else:
                seen = self._in_sight(key, position + refs.token[...]) & (head == refs.head[...])
            s = dot(q, flat(k, at), NT)
            if self.problem.softcap is not None:
                s = jnp.tanh(s) * (self.problem.softcap * LOG2E)
            return jnp.where(seen, s, -jnp.inf)

        def softmax(_, s):
            nonlocal m, l
            old, m = m, jnp.maximum(m, s.max(axis=1, keepdims=True))
            p, fade = jnp.exp2(s - m), jnp.exp2(old - m)
            l = l * fade + p.sum(axis=1, keepdims=True)
            return p.astype(v.dtype), fade

        def accumulate(at, weights):
            nonlocal acc
            p, fade = weights
            acc = acc * fade + dot(p, flat(v, at), NN)

        pipeline(range(0, len(k), size), (scores, softmax, accumulate))
        refs.m[0], refs.l[0], refs.acc[0] = m, l, acc

    def _update_apart(self, position, heads: int, first) -> None:
        """Take the keys of a block into the states of some heads, tile by tile, as in `tpu_flash_fwd`: S^T = K Q^T.

        position: of the first query in the block, where not all see all.
        """
        refs, softcap = self.refs, self.problem.softcap
        room, rows = self.config.block(self.problem), self.config.queries(self.problem)
        items = [(j, q, kv) for kv in range(0, room, TILE) for j in range(heads) for q in range(0, rows, TILE)]
        columns = {q: pl.ds(q, min(TILE, rows - q)) for q in range(0, rows, TILE)}
        keys = {kv: pl.ds(kv, min(TILE, room - kv)) for kv in range(0, room, TILE)}
        m = {(j, q): refs.m[first + j, :, columns[q]] for j, q, _ in items}
        l = {(j, q): refs.l[first + j, :, columns[q]] for j, q, _ in items}

        def scores(item, _):
            j, q, kv = item
            s = dot(refs.k_apart[first + j, keys[kv]], refs.q[first + j, columns[q]], NT)
            if softcap is not None:
                s = jnp.tanh(s) * (softcap * LOG2E)
            if position is None:
                return s
            key = lax.broadcasted_iota(jnp.int32, s.shape, 0) + kv
            return jnp.where(self._in_sight(key, position + refs.token[:, columns[q]]), s, -jnp.inf)

        def softmax(item, s):
            state = item[:2]
            old = m[state]
            m[state] = jnp.maximum(old, s.max(axis=0, keepdims=True))
            p, fade = jnp.exp2(s - m[state]), jnp.exp2(old - m[state])
            l[state] = l[state] * fade + p.sum(axis=0, keepdims=True)
            return p, fade

        def accumulate(item, weights):
            j, q, kv = item
            p, fade = weights
            at = first + j, slice(None), columns[q]
            refs.acc[at] = refs.acc[at] * fade + dot(refs.v_apart[first + j, :, keys[kv]], p, NN)

        pipeline(items, (scores, softmax, accumulate))
        for j, q in m:
            refs.m[first + j, :, columns[q]] = m[j, q]
            refs.l[first + j, :, columns[q]] = l[j, q]

    def _finish(self) -> None:
        """Write what the states have come to; 0 and -inf for queries that saw nothing."""
        refs = self.refs
        m, l = refs.m[...], refs.l[...]
        seen, fade = l > 0, jnp.ones_like(l)
        if refs.sinks is not None:
            top = jnp.maximum(m, refs.sinks[...])
            fade = jnp.exp2(m - top)
            m, l = top, l * fade + jnp.exp2(refs.sinks[...] - top)
        weight = jnp.where(seen, fade / jnp.where(seen, l, 1.0), 0.0)
        out = refs.acc[...] * weight
        refs.out[...] = (out if self.config.joint else out.swapaxes(1, 2)).astype(refs.out.dtype)
        refs.lse[...] = jnp.where(seen, (m + jnp.log2(l)) / LOG2E, -jnp.inf)


def _scaled(q: Array, scale: float, softcap: float | None) -> Array:
    """For the kernel, so that its products are what exp2 sees or, with a soft cap, what tanh does."""
    factor = scale * LOG2E if softcap is None else scale / softcap
    return (q.astype(jnp.float32) * factor).astype(q.dtype)
