"""paged_attention on TPU: Pallas Mosaic TPU (PagedAttention, Kwon et al. 2023; online softmax, FlashAttention-2).

The kernel takes tiles of queries in turn, and each through the blocks of keys that it sees. While a block is computed,
the pages of the next are copied, be it of the same tile or of the next one; and as a page table may be larger than
SMEM, a tile's line of it is copied there one tile ahead. A page holds the heads of a token side by side, so that one
copy brings all heads. What lies in a block beyond the tile's keys is masked; values there are zeroed, for NaN times 0
is NaN.
"""

from functools import partial
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
    token: Any  # [Q,1] the place of a row of q in its tile, and its head of K
    head: Any  # [Q,1]
    key: Any  # [1,S] the place of a column of scores in its block, and its head of K; with a joint config [1,S*K]
    key_head: Any  # [1,S]
    sinks: Any  # [A,Q,1] or None
    k: Any  # [N,P,K,D] in HBM, as v and table
    v: Any  # [N,P,K,D]
    table: Any  # [R,C,128], where it is not resident
    # outputs
    out: Any  # [A,Q,D]
    lse: Any  # [A,Q,1]
    # scratch
    kv: Any  # [2,2,S,K,D] two blocks of keys and values
    apart: Any  # [2,K,S,D] one, head by head; None with a joint config
    m: Any  # [A,Q,1] the state of the softmax, in base 2
    l: Any  # [A,Q,1]
    acc: Any  # [A,Q,D]
    entries: Any  # [2,C,128] lines of the table, in SMEM, where it is not resident
    turn: Any  # [1] blocks computed, in SMEM
    arrived: Any  # [2] semaphores: pages, by block
    listed: Any  # [2] lines, by tile


def _attend(problem: Problem, config: Config, work, q, k, v, table, sinks) -> tuple[Array, Array]:
    """Tiles q [W,A,Q,D] -> out [W,A,Q,D], lse float32 [W,A,Q,1]; arbitrary for tiles that are not there."""
    count, sets, queries, dim = q.shape
    block, heads, width = config.block(problem), problem.kv_heads, problem.kv_heads // sets
    index = jnp.arange(queries)[:, None] // problem.group
    column = jnp.arange(block * width)[None, :]
    labels = index % config.tile, index // config.tile, column // width, column % width
    if sinks is not None:
        by_head = sinks.astype(jnp.float32).reshape(heads, 1, problem.group) * LOG2E
        sinks = jnp.broadcast_to(by_head, (heads, config.tile, problem.group)).reshape(sets, queries, 1)
    resident = table.ndim == 2
    plan = work.row, work.position, work.queries, work.total, table.reshape(-1) if resident else jnp.zeros(1, jnp.int32)
    whole = pl.BlockSpec(memory_space=pltpu.VMEM)
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    # Tiles that are not there stay on the last block, which is so copied once.
    spec = lambda size: pl.BlockSpec(
        (None, sets, queries, size),
        lambda i, row, position, queries, n, _: (jnp.maximum(jnp.minimum(i, n[0] - 1), 0), 0, 0, 0),
    )
    state = (sets, queries)
    shape = partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(q).manual_axis_type)
    return pl.pallas_call(
        partial(_kernel, problem, config),
        name="paged_attention_few" if config.joint else "paged_attention_many",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(plan),
            grid=(count,),
            in_specs=(spec(dim), *[whole] * 4, None if sinks is None else whole, hbm, hbm, None if resident else hbm),
            out_specs=(spec(dim), spec(1)),
            scratch_shapes=(
                pltpu.VMEM((2, 2, block, heads, dim), k.dtype),
                None if config.joint else pltpu.VMEM((2, heads, block, dim), k.dtype),
                pltpu.VMEM((*state, 1), jnp.float32),
                pltpu.VMEM((*state, 1), jnp.float32),
                pltpu.VMEM((*state, dim), jnp.float32),
                None if resident else pltpu.SMEM((2, *table.shape[1:]), jnp.int32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
            ),
        ),
        out_shape=(shape(q.shape, q.dtype), shape((count, *state, 1), jnp.float32)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES, disable_bounds_checks=True
        ),
    )(*plan, q, *(x.astype(jnp.int32) for x in labels), sinks, k, v, None if resident else table)


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
        refs.apart[0] = kv[0].swapaxes(0, 1)
        refs.apart[1] = kv[1].swapaxes(0, 1)
        seen = self._in_sight(refs.key[...], position + refs.token[...])
        pl.loop(0, self.problem.kv_heads)(lambda a: self._update(a, seen, refs.apart[0, a], refs.apart[1, a]))

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
            return jnp.where(seen, _scaled(self.problem, dot(q, flat(k, at), NT)), -jnp.inf)

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

    def _update(self, a, seen, k, v) -> None:
        """Take keys and values [S,D] into the state of a set; seen [Q,S]."""
        refs = self.refs
        s = jnp.where(seen, _scaled(self.problem, dot(refs.q[a], k, NT)), -jnp.inf)
        m = jnp.maximum(refs.m[a], s.max(axis=1, keepdims=True))
        p, fade = jnp.exp2(s - m), jnp.exp2(refs.m[a] - m)
        refs.m[a] = m
        refs.l[a] = refs.l[a] * fade + p.sum(axis=1, keepdims=True)
        refs.acc[a] = refs.acc[a] * fade + dot(p.astype(v.dtype), v, NN)

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
        refs.out[...] = (refs.acc[...] * weight).astype(refs.out.dtype)
        refs.lse[...] = jnp.where(seen, (m + jnp.log2(l)) / LOG2E, -jnp.inf)


def _scaled(problem: Problem, s: Array) -> Array:
    """What exp2 sees."""
    if problem.softcap is None:
        return s * (problem.scale * LOG2E)
    return jnp.tanh(s * (problem.scale / problem.softcap)) * (problem.softcap * LOG2E)
