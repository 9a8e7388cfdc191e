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
from paxattn.kernels.tpu_paged_plan import LANES, Config, Problem, cut, few_config, gather, many_config, scatter

LOG2E = 1.4426950408889634
VMEM_BYTES = 60 * 2**20  # of the 64 MiB that a core of tpu7x has; others have 128
MOST_ENTRIES = 2**15  # of a row, two of which are in SMEM
NEVER = float(jnp.finfo(jnp.float32).min)  # a maximum that nothing stays below; finite, so that differences are
NT = (((1,), (1,)), ((), ()))
NN = (((1,), (0,)), ((), ()))


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
    table = jnp.pad(page_table, ((0, 0), (0, -width % LANES))).reshape(rows, -1, LANES)
    parts = []
    for config in [few_config(problem)] + [many_config(problem)] * (longest > problem.few):
        work = cut(problem, config, kv_lens, cu_q_lens)
        parts.append(
            (config, work, _attend(problem, config, work, gather(problem, config, work, q), k, v, table, sinks))
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
    # inputs
    q: Any  # [A,Q,D]
    token: Any  # [Q,1] the place of a row of q in its tile, and its head of K
    head: Any  # [Q,1]
    key: Any  # [1,S] the place of a column of scores in its block, and its head of K; with a joint config [1,S*K]
    key_head: Any  # [1,S]
    sinks: Any  # [A,Q,1] or None
    k: Any  # [N,P,K,D] in HBM, as v and table
    v: Any  # [N,P,K,D]
    table: Any  # [R,C,128]
    # outputs
    out: Any  # [A,Q,D]
    lse: Any  # [A,Q,1]
    # scratch
    kv: Any  # [2,2,S,K,D] two blocks of keys and values
    apart: Any  # [2,K,S,D] one, head by head; None with a joint config
    m: Any  # [A,Q,1] the state of the softmax, in base 2
    l: Any  # [A,Q,1]
    acc: Any  # [A,Q,D]
    entries: Any  # [2,C,128] lines of the table, in SMEM
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
    plan = work.row, work.position, work.queries, work.total
    whole = pl.BlockSpec(memory_space=pltpu.VMEM)
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    # Tiles that are not there stay on the last block, which is so copied once.
    spec = lambda size: pl.BlockSpec(
        (None, sets, queries, size),
        lambda i, row, position, queries, n: (jnp.maximum(jnp.minimum(i, n[0] - 1), 0), 0, 0, 0),
    )
    state = (sets, queries)
    lines = table.shape[1]
    shape = partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(q).manual_axis_type)
    return pl.pallas_call(
        partial(_kernel, problem, config),
        name="paged_attention_few" if config.joint else "paged_attention_many",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(plan),
            grid=(count,),
            in_specs=(spec(dim), *[whole] * 4, None if sinks is None else whole, hbm, hbm, hbm),
            out_specs=(spec(dim), spec(1)),
            scratch_shapes=(
                pltpu.VMEM((2, 2, block, heads, dim), k.dtype),
                None if config.joint else pltpu.VMEM((2, heads, block, dim), k.dtype),
                pltpu.VMEM((*state, 1), jnp.float32),
                pltpu.VMEM((*state, 1), jnp.float32),
                pltpu.VMEM((*state, dim), jnp.float32),
                pltpu.SMEM((2, lines, LANES), jnp.int32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
            ),
        ),
        out_shape=(shape(q.shape, q.dtype), shape((count, *state, 1), jnp.float32)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES),
    )(*plan, q, *(x.astype(jnp.int32) for x in labels), sinks, k, v, table)


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
            self._line(0).start()
            self._line(0).wait()
            self._copy_pages(jnp.int32(0), 0, 0)
            pl.when(count > 1)(lambda: self._line(1).start())

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

        @pl.when(i + 1 < self.refs.total[0])
        def _next():
            self._line(i + 1).wait()
            self._copy_pages(i + 1, 0)

        @pl.when(i + 2 < self.refs.total[0])
        def _after_next():
            self._line(i + 2).start()

    def _block(self, i, block, ask_for_next) -> None:
        """Take the keys of a block into the state."""
        slot = self._slot()
        ask_for_next()
        self._wait_for_pages(i, block, slot)
        self._clear_values(i, block, slot)
        self._compute(i, block, slot)
        self.refs.turn[0] += 1

    def _slot(self):
        return lax.rem(self.refs.turn[0], jnp.int32(2))

    def _span(self, i) -> Span:
        problem, refs = self.problem, self.refs
        size, pages = jnp.int32(problem.page_size), jnp.int32(self.config.pages)
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

        @pl.loop(0, count)
        def _copy(j):
            at = first + j
            page = refs.entries[i % 2, at // LANES, at % LANES]
            for source, kind in ((refs.k, 0), (refs.v, 1)):
                place = refs.kv.at[slot, kind, pl.ds(j * size, size)]
                pltpu.make_async_copy(source.at[page], place, refs.arrived.at[slot]).start()

    def _wait_for_pages(self, i, block, slot) -> None:
        refs = self.refs
        one = refs.kv.at[slot, :, pl.ds(0, self.problem.page_size)]  # a page of keys and one of values
        wait = pltpu.make_async_copy(one, one, refs.arrived.at[slot]).wait
        pl.loop(0, self._pages(i, block)[1])(lambda _: wait())

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
        start = self._pages(i, block)[0] * self.problem.page_size
        query = refs.position[i] + refs.token[...] - start
        seen = refs.key[...] <= query
        if self.problem.left is not None:
            seen &= refs.key[...] >= query - self.problem.left
        kv = refs.kv.at[slot]
        if self.config.joint:
            seen &= refs.key_head[...] == refs.head[...]
            flat = (-1, self.problem.head_dim)
            self._update(0, seen, kv[0].reshape(flat), kv[1].reshape(flat))
            return
        refs.apart[0] = kv[0].swapaxes(0, 1)
        refs.apart[1] = kv[1].swapaxes(0, 1)
        pl.loop(0, self.problem.kv_heads)(lambda a: self._update(a, seen, refs.apart[0, a], refs.apart[1, a]))

    def _update(self, a, seen, k, v) -> None:
        """Take keys and values [S,D] into the state of a set; seen [Q,S]."""
        refs = self.refs
        s = jnp.where(seen, _scaled(self.problem, _dot(refs.q[a], k, NT)), -jnp.inf)
        m = jnp.maximum(refs.m[a], s.max(axis=1, keepdims=True))
        p, fade = jnp.exp2(s - m), jnp.exp2(refs.m[a] - m)
        refs.m[a] = m
        refs.l[a] = refs.l[a] * fade + p.sum(axis=1, keepdims=True)
        refs.acc[a] = refs.acc[a] * fade + _dot(p.astype(v.dtype), v, NN)

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


def _dot(a: Array, b: Array, dims) -> Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _scaled(problem: Problem, s: Array) -> Array:
    """What exp2 sees."""
    if problem.softcap is None:
        return s * (problem.scale * LOG2E)
    return jnp.tanh(s * (problem.scale / problem.softcap)) * (problem.softcap * LOG2E)
