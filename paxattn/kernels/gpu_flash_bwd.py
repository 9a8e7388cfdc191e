"""flash_attention backward on Hopper: dq, dk and dv in one kernel (FlashAttention-3, Shah et al. 2024).

A persistent block takes (batch, KV head, tile of keys) items and visits the query blocks of all heads of the group
that see the tile. Scores are computed transposed, S^T = K Q^T, so that P^T and dS^T are operands in registers of
dV += P^T dO and dK += dS^T Q; dS goes through shared memory once, for dQ = dS K. Two consumer warpgroups share the
work by keys or, where a head is wider than 128, by columns (`split_columns`). dQ is added to a float32 array by TMA:
a writer warp for each consumer waits its turn, where the sums must have a fixed order, so that consumers never do.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from paxattn.kernels import hopper, tiles
from paxattn.kernels.gpu_blocks import (
    ROWS,
    Problem,
    divide,
    extremes,
    in_range,
    iota,
    load_segments,
    may_meet,
    pad_segments,
    same_segment,
    span,
)
from paxattn.kernels.hopper import CHUNK, COL, ROW, WGMMA

WARPGROUPS = 2
BOTH = 128 * WARPGROUPS
MEET = hopper.FIRST_BARRIER
DQ_FULL = MEET + 1
DQ_EMPTY = DQ_FULL + WARPGROUPS
WITH_WRITER = 128 + 32
PIECE = 32  # float32 columns that TMA swizzles


@dataclass(frozen=True)
class Config:
    block_q: int = 64
    stages: int = 2
    split_columns: bool = False
    l2_bytes: int = 32 * 2**20  # queries, cotangents and dq sums that items running together may share in the L2 cache

    @property
    def block_kv(self) -> int:
        return ROWS if self.split_columns else ROWS * WARPGROUPS


def config_for(problem: Problem) -> Config:
    if problem.head_dim > 128:
        return Config(split_columns=True)
    return Config(block_q=128 if problem.head_dim <= 64 else 64)


def candidates(head_dim: int, v_dim: int) -> list[Config]:
    """The configs worth timing for a head; not all of them compile for every dtype and mask."""
    del v_dim
    if head_dim > 128:
        return [Config(split_columns=True, l2_bytes=size * 2**20) for size in (16, 32)]
    block_q = 128 if head_dim <= 64 else 64
    return [Config(block_q, stages, l2_bytes=size * 2**20) for stages in (2, 3) for size in (16, 32)]


def backward(problem: Problem, config: Config, num_sms: int, deterministic: bool, q, k, v, do, stats, q_seg, kv_seg):
    """q [B,T,H,D], k [B,S,K,D], v [B,S,K,Dv], do [B,T,H,Dv], stats float32 [B,H,blocks,2,block_q] ->
    dq float32 [B,T,H,D], dk, dv in k's dtype.

    stats holds lse in base 2, infinite for rows that saw nothing, and delta.
    """
    kv_tiles, q_blocks = tiles.cdiv(problem.kv_len, config.block_kv), tiles.cdiv(problem.q_len, config.block_q)
    inputs = [q, k, v, do, stats]
    if q_seg is not None:
        q_seg, kv_seg = pad_segments(q_seg, q_blocks * config.block_q), pad_segments(kv_seg, kv_tiles * config.block_kv)
        inputs += [q_seg, kv_seg, *segment_bounds(problem, config, q_seg, kv_seg)]
    ctas = min(num_sms, problem.batch * problem.kv_heads * kv_tiles)
    body = partial(_kernel, problem, config, ctas, deterministic, q_seg is not None)
    call = hopper.kernel(body, ctas, WARPGROUPS, _scratch(problem, config, q.dtype))

    def run(*inputs):
        results = [jnp.zeros(q.shape, jnp.float32), lax.empty(k.shape, k.dtype), lax.empty(v.shape, v.dtype)]
        if deterministic:
            results.append(jnp.zeros((problem.batch, problem.heads, q_blocks, WARPGROUPS), jnp.int32))
        return pl.run_state(lambda refs: call(*inputs, *refs))(tuple(results))[:3]

    return hopper.apart(run)(*inputs)


def _chunks(config: Config, dim: int) -> int:
    """Chunks of 64 columns of a tile; where the warpgroups split them, an even number."""
    chunks = tiles.cdiv(dim, CHUNK)
    return chunks + chunks % 2 if config.split_columns else chunks


def _scratch(problem: Problem, config: Config, dtype) -> dict:
    qk, vo = _chunks(config, problem.head_dim), _chunks(config, problem.v_dim)
    stages, block_q, block_kv = config.stages, config.block_q, config.block_kv
    return dict(
        k=hopper.tile(1, qk, block_kv, CHUNK, dtype=dtype),
        v=hopper.tile(1, vo, block_kv, CHUNK, dtype=dtype),
        q=hopper.tile(stages, qk, block_q, CHUNK, dtype=dtype),
        do=hopper.tile(stages, vo, block_q, CHUNK, dtype=dtype),
        ds=hopper.tile(2, block_q // CHUNK, block_kv, CHUNK, dtype=dtype),
        dq=hopper.tile(WARPGROUPS, 1 if config.split_columns else 2, ROWS, PIECE, dtype=jnp.float32),
        stats=plgpu.SMEM((stages, 2, block_q), jnp.float32),
        k_full=plgpu.Barrier(num_arrivals=qk),
        v_full=plgpu.Barrier(num_arrivals=vo),
        kv_free=plgpu.Barrier(num_arrivals=WARPGROUPS),
        q_full=plgpu.Barrier(num_arrivals=qk + 1, num_barriers=stages),
        q_free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        do_full=plgpu.Barrier(num_arrivals=vo, num_barriers=stages),
        do_free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
    )


def _kernel(problem: Problem, config: Config, ctas: int, deterministic: bool, has_segments: bool, *refs, **smem):
    q, k, v, do, stats, *rest = refs
    segments, results = (tuple(rest[:4]), rest[4:]) if has_segments else (None, rest)
    dq, dk, dv, *turns = results
    wg = lax.axis_index("wg")
    plan = Plan(problem, config, ctas, segments)

    def consume(which):
        plgpu.set_max_registers(240, action="increase")
        Consumer(plan, which, smem, dk, dv).run()

    # The code of either warpgroup apart: addresses that depend on which it is would be held in registers.
    for which in range(WARPGROUPS):
        pl.when(wg == which)(partial(consume, which))

    @pl.when(wg == WARPGROUPS)
    def _():
        plgpu.set_max_registers(24, action="decrease")

        @plgpu.warp_map
        def _(warp):
            pl.when(warp == 0)(lambda: produce(plan, smem, q, k, v, do, stats))
            for which in range(WARPGROUPS):
                pl.when(warp == 1 + which)(partial(write_dq, plan, which, smem, dq, *turns))


@dataclass(frozen=True)
class Item:
    """Traced: a tile of keys and the query blocks from lo on that it visits for every head of the group."""

    exists: Array
    batch: Array
    kv_head: Array
    tile: Array
    kv_start: Array
    lo: Array
    blocks: Array


@dataclass(frozen=True)
class Plan:
    """Which items a block takes, in which order.

    For a KV head the tiles come in ascending order, which is the order in which dq is summed. Some KV heads form a
    section and run side by side. Where tiles differ in work, by a causal mask, a section fills whole pairs of
    rounds, dealt to and fro; otherwise it is as large as the L2 cache, and items follow each other densely.
    """

    problem: Problem
    config: Config
    ctas: int
    segments: tuple | None

    @property
    def kv_tiles(self) -> int:
        return tiles.cdiv(self.problem.kv_len, self.config.block_kv)

    @property
    def group(self) -> int:
        return self.problem.heads // self.problem.kv_heads

    @property
    def pairs(self) -> int:
        return self.problem.batch * self.problem.kv_heads

    @property
    def uniform(self) -> bool:
        return self.problem.right is None or self.problem.left is not None or self.segments is not None

    @property
    def section(self) -> int:
        problem = self.problem
        if not self.uniform:
            return min(self.pairs, max(1, 2 * self.ctas // self.kv_tiles))
        streamed = self.group * problem.q_len * (2 * (problem.head_dim + problem.v_dim) + 4 * problem.head_dim)
        return min(self.pairs, max(1, self.config.l2_bytes // streamed))

    @property
    def rounds_in_section(self) -> int:
        return tiles.cdiv(self.section * self.kv_tiles, self.ctas)

    @property
    def rounds(self) -> int:
        if self.uniform:
            return tiles.cdiv(self.pairs * self.kv_tiles, self.ctas)
        return tiles.cdiv(self.pairs, self.section) * self.rounds_in_section

    def item(self, turn) -> Item:
        problem, section, cta = self.problem, self.section, lax.axis_index("cta")
        if self.uniform:
            which, rest = divide(turn * self.ctas + cta, section * self.kv_tiles)
        else:
            which, turn = divide(turn, self.rounds_in_section)
            rest = turn * self.ctas + jnp.where(turn % 2 == 0, cta, self.ctas - 1 - cta)
        width = jnp.minimum(section, self.pairs - which * section)
        exists = (width > 0) & (rest < width * self.kv_tiles)
        tile, pair = divide(jnp.where(exists, rest, 0), jnp.maximum(width, 1))
        batch, kv_head = divide(jnp.where(exists, which * section + pair, 0), problem.kv_heads)
        kv_start = tile * self.config.block_kv
        if self.segments is None:
            lo, hi = query_range(problem, self.config.block_q, kv_start, self.config.block_kv)
        else:
            lo, hi = (self.segments[2][batch, i, tile] for i in range(2))
        return Item(exists, batch, kv_head, tile, kv_start, lo, jnp.where(exists, hi - lo, 0))

    def turn(self, item: Item, block):
        """How many tiles add to the block's dq before this one."""
        problem = self.problem
        if self.segments is not None:
            return item.tile - self.segments[3][item.batch, block]
        if problem.left is None:
            return item.tile
        first = (block * self.config.block_q + problem.offset - problem.left) // self.config.block_kv
        return item.tile - jnp.maximum(first, 0)


def query_range(problem: Problem, block_q: int, kv_start, rows: int):
    """Query blocks [lo, hi) of which some query may see one of `rows` keys from kv_start on. Neither falls with it."""
    blocks = tiles.cdiv(problem.q_len, block_q)
    first = kv_start - problem.offset
    last = first + rows - 1
    lo = jnp.zeros_like(kv_start) if problem.right is None else (first - problem.right) // block_q
    hi = jnp.full_like(kv_start, blocks) if problem.left is None else (last + problem.left) // block_q + 1
    lo = jnp.clip(lo, 0, blocks)
    return lo, jnp.clip(hi, lo, blocks)


def segment_bounds(problem: Problem, config: Config, q_seg: Array, kv_seg: Array) -> tuple[Array, Array]:
    """int32 [B,4,tiles]: of each tile of keys the query blocks [0, 1) that it visits and those [2, 3) that are of one
    segment with all of it; and [B,blocks]: the first tile that visits a query block.

    The ranges are widened until neither end falls from one tile to the next: a block's tiles are then consecutive.
    """
    q_low, q_high = extremes(q_seg, config.block_q)
    kv_low, kv_high = extremes(kv_seg, config.block_kv)
    lo, hi = query_range(problem, config.block_q, jnp.arange(kv_low.shape[1]) * config.block_kv, config.block_kv)
    lo, hi = span(may_meet(kv_low, kv_high, q_low, q_high) & in_range(lo, hi, q_low.shape[1]))
    hi = lax.cummax(hi, axis=1)
    lo = jnp.minimum(lax.cummin(lo, axis=1, reverse=True), hi)
    bounds = [lo, hi, *same_segment(kv_low, kv_high, q_low, q_high)]
    first_tile = (hi[:, :, None] <= jnp.arange(q_low.shape[1])[None, None]).sum(axis=1)
    return jnp.stack(bounds, axis=1).astype(jnp.int32), first_tile.astype(jnp.int32)


def produce(plan: Plan, smem: dict, q, k, v, do, stats) -> None:
    """Load the keys and values of every item and stream its query blocks."""
    config = plan.config

    def one_item(turn, carry):
        count, loaded = carry
        item = plan.item(turn)

        def load_kv():
            pl.when(loaded > 0)(lambda: plgpu.barrier_wait(smem["kv_free"]))
            hopper.load_tile(k.at[item.batch, :, item.kv_head], item.kv_start, smem["k"][0].at[0], smem["k_full"])
            hopper.load_tile(v.at[item.batch, :, item.kv_head], item.kv_start, smem["v"][0].at[0], smem["v_full"])

        def one_step(j, g):
            step = count + j * plan.group + g
            slot = lax.rem(step, config.stages)
            head, block = item.kv_head * plan.group + g, item.lo + item.blocks - 1 - j
            start = block * config.block_q
            pl.when(step >= config.stages)(lambda: plgpu.barrier_wait(smem["q_free"].at[slot]))
            hopper.load_tile(q.at[item.batch, :, head], start, smem["q"][0].at[slot], smem["q_full"].at[slot])
            plgpu.copy_gmem_to_smem(stats.at[item.batch, head, block], smem["stats"].at[slot], smem["q_full"].at[slot])
            pl.when(step >= config.stages)(lambda: plgpu.barrier_wait(smem["do_free"].at[slot]))
            hopper.load_tile(do.at[item.batch, :, head], start, smem["do"][0].at[slot], smem["do_full"].at[slot])

        pl.when(item.exists)(load_kv)
        _each_step(plan, item, one_step)
        return count + plan.group * item.blocks, loaded + jnp.where(item.exists, 1, 0)

    lax.fori_loop(0, plan.rounds, one_item, (jnp.int32(0), jnp.int32(0)))


def _each_step(plan: Plan, item: Item, body) -> None:
    """The last query block first, where most items begin together, and each for one head after the other."""
    lax.fori_loop(0, item.blocks, lambda j, _: lax.fori_loop(0, plan.group, lambda g, _: body(j, g), None), None)


def write_dq(plan: Plan, which: int, smem: dict, dq, turns=None) -> None:
    """Add the parts of dq that a consumer leaves in shared memory; with `turns` tile after tile, in ascending order."""
    config = plan.config
    copied = smem["dq"][0].at[which]
    boxes = copied.shape[0]
    pieces = _chunks(config, plan.problem.head_dim) if config.split_columns else 1

    def one_step(item: Item, j, g):
        head, block = item.kv_head * plan.group + g, item.lo + item.blocks - 1 - j
        row, column = block * config.block_q, 0
        if config.split_columns or config.block_q == CHUNK:
            column = which * boxes * pieces * PIECE
        else:
            row += which * ROWS
        for piece in range(pieces):
            hopper.bar_sync(DQ_FULL + which, WITH_WRITER)
            if turns is not None and piece == 0:
                # The sums of the step before have long arrived: saying so only now costs this warp no wait.
                plgpu.wait_smem_to_gmem(0)
                pass_on(item, j, g)
                hopper.wait_for_count(turns.at[item.batch, head, block, which], plan.turn(item, block))
            for box in range(boxes):
                columns = pl.ds(column + (piece * boxes + box) * PIECE + 0 * row, PIECE)
                target = dq.at[item.batch, pl.ds(row, ROWS), head, columns]
                plgpu.copy_smem_to_gmem(copied.at[box], target, commit_group=False, reduction_op="add")
            plgpu.commit_smem_to_gmem_group()
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            hopper.bar_arrive(DQ_EMPTY + which, WITH_WRITER)

    def pass_on(item: Item, j, g):
        """Let the next tile add to what was added to before step (j, g)."""
        before, last = j * plan.group + g - 1, plan.group - 1
        j, g = jnp.where(g > 0, j, j - 1), jnp.where(g > 0, g - 1, last)
        head, block = item.kv_head * plan.group + g, item.lo + item.blocks - 1 - j
        mine = turns.at[item.batch, head, jnp.maximum(block, 0), which]
        pl.when(before >= 0)(lambda: hopper.set_count(mine, plan.turn(item, block) + 1))

    def skip():
        """What is handed over before an item's first step is nothing."""
        hopper.bar_sync(DQ_FULL + which, WITH_WRITER)
        hopper.bar_arrive(DQ_EMPTY + which, WITH_WRITER)

    def one_item(turn, _):
        item = plan.item(turn)
        if not config.split_columns:
            pl.when(item.exists)(skip)
        _each_step(plan, item, partial(one_step, item))
        if turns is not None:
            plgpu.wait_smem_to_gmem(0)
            pl.when(item.blocks > 0)(lambda: pass_on(item, item.blocks, jnp.int32(0)))

    hopper.bar_arrive(DQ_EMPTY + which, WITH_WRITER)
    lax.fori_loop(0, plan.rounds, one_item, None)


@dataclass(frozen=True)
class Consumer:
    """A warpgroup's share of every item."""

    plan: Plan
    which: int
    smem: dict
    dk: Any
    dv: Any

    @property
    def problem(self) -> Problem:
        return self.plan.problem

    @property
    def config(self) -> Config:
        return self.plan.config

    @property
    def first_key(self) -> int:
        """Of this warpgroup in the tile."""
        return 0 if self.config.split_columns else self.which * ROWS

    def run(self) -> None:
        def one_item(turn, count):
            item = self.plan.item(turn)
            pl.when(item.exists)(lambda: self.attend(item, count))
            return count + item.blocks * self.plan.group

        lax.fori_loop(0, self.plan.rounds, one_item, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def attend(self, item: Item, count) -> None:
        plgpu.barrier_wait(self.smem["k_full"])
        plgpu.barrier_wait(self.smem["v_full"])
        first, last = self.open_blocks(item)
        step = partial(self.step, item, count, lambda block: (block >= first) & (block < last))
        state = lax.fori_loop(0, item.blocks * self.plan.group, step, self.nothing())
        dk, dv, *dq = state
        if dq:
            self.hand_over(dq[0])
        self.store(item, dk, dv)

    def nothing(self) -> tuple[Array, ...]:
        """dk, dv and, where it is handed over a step later, dq."""
        split = WARPGROUPS if self.config.split_columns else 1
        widths = [_chunks(self.config, x) * CHUNK // split for x in (self.problem.head_dim, self.problem.v_dim)]
        if not self.config.split_columns:
            widths.append(CHUNK)
        return tuple(plgpu.layout_cast(jnp.zeros((ROWS, x), jnp.float32), WGMMA) for x in widths)

    def keys(self, tile):
        """The rows of a tile [chunks, keys, 64] whose scores this warpgroup computes."""
        return tile.at[:, pl.ds(self.first_key, ROWS)]

    def columns(self, tile):
        """The chunks of a tile whose gradients this warpgroup sums."""
        if not self.config.split_columns:
            return tile
        half = tile.shape[0] // WARPGROUPS
        return tile.at[pl.ds(self.which * half, half)]

    def edge_exists(self) -> bool:
        problem = self.problem
        bounded = problem.right is not None or problem.left is not None or self.plan.segments is not None
        return bounded or problem.kv_len % self.config.block_kv != 0

    def masks_all(self) -> bool:
        """Whether to mask open blocks, too: where one comparison does, that is cheaper than to move P past a branch."""
        if self.config.split_columns or self.plan.segments is not None or self.problem.left is not None:
            return False
        return self.edge_exists()

    def open_blocks(self, item: Item):
        """Of the query blocks visited those [first, last) that see every key scored here."""
        problem, block_q = self.problem, self.config.block_q
        first, last = item.lo, item.lo + item.blocks
        kv = item.kv_start + self.first_key
        if problem.right is not None:
            first = jnp.maximum(first, -((problem.right + problem.offset - kv - ROWS + 1) // block_q))
        if problem.left is not None:
            last = jnp.minimum(last, (kv + problem.left + 1 - problem.offset) // block_q)
        if self.plan.segments is not None:
            bounds = self.plan.segments[2]
            first = jnp.maximum(first, bounds[item.batch, 2, item.tile])
            last = jnp.minimum(last, bounds[item.batch, 3, item.tile])
        if problem.kv_len % self.config.block_kv != 0:
            first = jnp.where(kv + ROWS > problem.kv_len, last, first)
        return first, last

    def step(self, item: Item, count, is_open, i, state):
        """One query block of one head. Nothing is in flight between two steps; dq is handed over under the next."""
        dk, dv, *dq = state
        slot = lax.rem(count + i, self.config.stages)
        block = item.lo + item.blocks - 1 - (i if self.plan.group == 1 else lax.div(i, jnp.int32(self.plan.group)))
        q, do = self.smem["q"][1].at[slot], self.smem["do"][1].at[slot]
        k, v = (self.smem[name][1].at[hopper.zero()] for name in "kv")
        ds_tile = self.smem["ds"][1].at[self.which if self.config.split_columns else lax.rem(count + i, 2)]

        plgpu.barrier_wait(self.smem["q_full"].at[slot])
        plgpu.barrier_wait(self.smem["do_full"].at[slot])
        s, dp = hopper.products_t((self.keys(k), q), (self.keys(v), do))
        if dq:
            self.hand_over(dq[0])
        s = hopper.wait(1, s)
        p, slope = self.probabilities(s, self.statistic(0, slot, s.shape), item, block, is_open(block))
        dv, p16 = hopper.settle(dv, p.astype(self.dk.dtype))
        dv = hopper.accumulate(dv, p16, self.columns(do))
        dp = hopper.wait(1, dp)
        ds = p * (dp - self.statistic(1, slot, dp.shape))
        ds = ds if slope is None else ds * slope
        dk, ds = hopper.settle(dk, ds.astype(self.dk.dtype))
        dk = hopper.accumulate(dk, ds, self.columns(q))
        for c in range(self.config.block_q // CHUNK):
            self.keys(ds_tile).at[c][...] = ds[:, c * CHUNK : (c + 1) * CHUNK]
        hopper.fence()
        if self.config.split_columns:
            dk, dv = self.add_columns(ds_tile, k, dk, dv)
            dq = []
        else:
            hopper.bar_sync(MEET, BOTH)
            dq, dk, dv = self.add_half(ds_tile, k, dk, dv)
        plgpu.barrier_arrive(self.smem["q_free"].at[slot])
        plgpu.barrier_arrive(self.smem["do_free"].at[slot])
        return dk, dv, *dq

    def add_half(self, ds_tile, k, dk, dv):
        """Half of dS K over the keys of both: 64 columns or, if there are no more, 64 of 128 queries."""
        halves = (
            (ds_tile.at[0], k.at[self.which]) if self.config.block_q == CHUNK else (ds_tile.at[self.which], k.at[0])
        )
        dq = hopper.product_tn(*halves)
        dk, dv = hopper.wait(1, dk, dv)
        # ptxas takes a product's own registers for unfinished once the next step has begun, those of a multiply not.
        return [hopper.wait(0, dq) * self.problem.scale], dk, dv

    def add_columns(self, ds_tile, k, dk, dv):
        """Half of the columns of dS K, 64 at a time."""
        hopper.bar_sync(DQ_EMPTY + WARPGROUPS + self.which, 128)
        half = k.shape[0] // WARPGROUPS
        for c in range(half):
            dq = hopper.product_tn(ds_tile.at[0], k.at[self.which * half + c])
            if c == 0:
                dk, dv, dq = hopper.wait(0, dk, dv, dq)
            else:
                dq = hopper.wait(0, dq)
            for piece in range(CHUNK // PIECE):
                self.hand_over(dq[:, piece * PIECE : (piece + 1) * PIECE] * self.problem.scale)
        return dk, dv

    def probabilities(self, s, lse, item: Item, block, open_block):
        """P^T, and the slope of the cap where there is one."""
        problem, slope = self.problem, None
        if problem.shaped and problem.softcap is None:
            s = s * problem.scale
        elif problem.softcap is not None:
            s = jnp.tanh(s * (problem.scale / problem.softcap))
            slope = 1 - s * s
        p = jnp.exp2(s * problem.exponent - lse)
        if self.masks_all():
            p = self.masked(p, item, block)
        elif self.edge_exists():
            p = lax.cond(open_block, lambda: p, lambda: self.masked(p, item, block))
        return p, slope

    def statistic(self, which: int, slot, shape) -> Array:
        values = plgpu.load(self.smem["stats"].at[slot, which], layout=COL, optimized=False)
        return lax.broadcast_in_dim(values, shape, [1])

    def masked(self, p, item: Item, block):
        problem, shape = self.problem, p.shape
        kv_start, q_start = item.kv_start + self.first_key, block * self.config.block_q
        kv_pos = lax.broadcast_in_dim(iota(shape[0], ROW) + kv_start, shape, [0])
        q_pos = iota(shape[1], COL) + (q_start + problem.offset)
        if problem.right is None:
            seen = kv_pos < problem.kv_len
        else:
            last = jnp.minimum(q_pos + problem.right, problem.kv_len - 1)
            seen = kv_pos <= lax.broadcast_in_dim(last, shape, [1])
        if problem.left is not None:
            seen &= kv_pos + problem.left >= lax.broadcast_in_dim(q_pos, shape, [1])
        if self.plan.segments is not None:
            q_seg = load_segments(self.plan.segments[0], item.batch, q_start, shape[1], COL)
            kv_seg = load_segments(self.plan.segments[1], item.batch, kv_start, shape[0], ROW)
            seen &= lax.broadcast_in_dim(kv_seg, shape, [0]) == lax.broadcast_in_dim(q_seg, shape, [1])
        return jnp.where(seen, p, 0.0)

    def hand_over(self, dq) -> None:
        """Leave a part of dq to the writer."""
        hopper.bar_sync(DQ_EMPTY + self.which, WITH_WRITER)
        written = self.smem["dq"][1].at[self.which]
        for box in range(written.shape[0]):
            written[box] = dq[:, box * PIECE : (box + 1) * PIECE]
        hopper.fence()
        hopper.bar_arrive(DQ_FULL + self.which, WITH_WRITER)

    def store(self, item: Item, dk, dv) -> None:
        """dk and dv leave through the tiles of keys and values that they are gradients of."""
        hopper.bar_sync(MEET, BOTH)
        start = item.kv_start + self.first_key
        sums = (("k", dk * self.problem.scale, self.dk), ("v", dv, self.dv))
        for name, x, target in sums:
            written = self.keys(self.columns(self.smem[name][1].at[0]))
            for c in range(written.shape[0]):
                written[c] = x[:, c * CHUNK : (c + 1) * CHUNK].astype(target.dtype)
        plgpu.commit_smem()
        for name, _, target in sums:
            copied = self.keys(self.columns(self.smem[name][0].at[0]))
            base = self.which * copied.shape[0] if self.config.split_columns else 0
            for c in range(copied.shape[0]):
                if (base + c) * CHUNK < target.shape[-1]:
                    columns = hopper.columns(base + c, target.shape[-1], start)
                    rows = target.at[item.batch, pl.ds(start, ROWS), item.kv_head, columns]
                    plgpu.copy_smem_to_gmem(copied.at[c], rows, commit_group=False)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(self.smem["kv_free"])
