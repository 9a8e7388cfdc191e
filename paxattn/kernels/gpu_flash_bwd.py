"""flash_attention backward on Hopper: dq, dk and dv in one kernel (FlashAttention-3, Shah et al. 2024).

A persistent block takes items, a tile of keys each, and visits the query blocks of all heads of the group that see
the tile. Scores are computed transposed, S^T = K Q^T, so that P^T and dS^T are operands in registers of
dV += P^T dO and dK += dS^T Q. Two consumer warpgroups share that by keys or, where a head is wider than 128, by columns
(`split_columns`); they leave dS to a third one, which computes dQ = dS K behind them, so that none waits for another.
Two warps add dQ to a float32 array by TMA and, where the sums must have a fixed order, wait for their turn.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from paxattn.kernels import gpu_queue, hopper, tiles
from paxattn.kernels.gpu_blocks import ROWS, iota, load_segments, pad_segments
from paxattn.kernels.gpu_flash_bwd_plan import WARPGROUPS, Config, Item, Plan, segment_bounds, split_of
from paxattn.kernels.hopper import CHUNK, COL, ROW, WGMMA
from paxattn.kernels.problem import Problem

DS_FULL = hopper.FIRST_BARRIER
DS_EMPTY = DS_FULL + 2
DQ_FULL = DS_EMPTY + 2 * WARPGROUPS
DQ_EMPTY = DQ_FULL + 2
WITH_WRITER = 128 + 32
PIECE = 32  # float32 columns that TMA swizzles


def backward(problem: Problem, config: Config, num_sms: int, deterministic: bool, q, k, v, do, stats, q_seg, kv_seg):
    """q [B,T,H,D], k [B,S,K,D], v [B,S,K,Dv], do [B,T,H,Dv], stats float32 [B,H,blocks,2,block_q] -> dq, dk, dv.

    stats holds lse in base 2, infinite for rows that saw nothing, and delta.
    """
    kv_tiles, q_blocks = tiles.cdiv(problem.kv_len, config.block_kv), tiles.cdiv(problem.q_len, config.block_q)
    inputs, segments = [q, k, v, do, stats], None
    if q_seg is not None:
        q_seg, kv_seg = pad_segments(q_seg, q_blocks * config.block_q), pad_segments(kv_seg, kv_tiles * config.block_kv)
        segments = q_seg, kv_seg, *segment_bounds(problem, config, q_seg, kv_seg)
        inputs += segments
    split = split_of(problem, config, num_sms)
    problem = replace(problem, kv_heads=problem.kv_heads * split)
    ctas = min(num_sms, problem.batch * problem.kv_heads * kv_tiles)
    plan = Plan(problem, config, ctas, segments, deterministic)
    scratch = _scratch(problem, config, q.dtype) | ({} if plan.dealt else gpu_queue.scratch(WARPGROUPS + 3))
    call = hopper.kernel(partial(_kernel, plan), ctas, WARPGROUPS + 1, scratch)

    def run(*inputs):
        sums = lax.empty if plan.takes_turns and plan.covers() else jnp.zeros
        parts = [lax.empty((*x.shape[:2], problem.kv_heads, x.shape[3]), x.dtype) for x in (k, v)]
        results = [*parts, sums(q.shape, jnp.float32)]
        if plan.takes_turns:
            results.append(jnp.zeros((problem.batch, problem.heads, q_blocks, 2), jnp.int32))
        if not plan.dealt:
            results.append(jnp.zeros(1, jnp.int32))
        return pl.run_state(lambda refs: call(*inputs, *refs))(tuple(results))

    # In a scan XLA would have the kernel write to a slice of a larger array, and loses what it wrote in place.
    dk, dv, dq, *_ = lax.optimization_barrier(hopper.apart(run)(*inputs))
    if split > 1:
        dk, dv = (_sum_of_parts(x, split) for x in (dk, dv))
    return (dq * problem.scale).astype(q.dtype), dk, dv


def _sum_of_parts(x: Array, split: int) -> Array:
    """[B,S,K*split,D] -> [B,S,K,D], in float32 between."""
    return x.reshape(*x.shape[:2], -1, split, x.shape[3]).astype(jnp.float32).sum(axis=3).astype(x.dtype)


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
        dq=hopper.tile(2, 1 if config.split_columns else 2, ROWS, PIECE, dtype=jnp.float32),
        stats=plgpu.SMEM((stages, 2, block_q), jnp.float32),
        k_full=plgpu.Barrier(num_arrivals=qk),
        v_full=plgpu.Barrier(num_arrivals=vo),
        kv_free=plgpu.Barrier(num_arrivals=WARPGROUPS + 1),
        full=plgpu.Barrier(num_arrivals=qk + vo + 1, num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
    )


def _kernel(plan: Plan, *refs, **smem):
    q, k, v, do, stats, *rest = refs
    if plan.segments is not None:
        plan, rest = replace(plan, segments=tuple(rest[:4])), rest[4:]
    dk, dv, dq, *rest = rest
    turns, counter = rest.pop(0) if plan.takes_turns else None, None if plan.dealt else rest.pop()
    wg = lax.axis_index("wg")

    def consume(which):
        plgpu.set_max_registers(208, action="increase")
        Consumer(plan, which, smem, dk, dv).run()

    # The code of either warpgroup apart: addresses that depend on which it is would be held in registers.
    for which in range(WARPGROUPS):
        pl.when(wg == which)(partial(consume, which))

    @pl.when(wg == WARPGROUPS)
    def _():
        plgpu.set_max_registers(72, action="decrease")
        compute_dq(plan, smem)

    @pl.when(wg == WARPGROUPS + 1)
    def _():
        plgpu.set_max_registers(24, action="decrease")

        @plgpu.warp_map
        def _(warp):
            pl.when(warp == 0)(lambda: produce(plan, smem, q, k, v, do, stats, counter))
            for which in range(2):
                pl.when(warp == 1 + which)(partial(write_dq, plan, which, smem, dq, turns))


def each_item(plan: Plan, smem: dict, body, state=None, counter=None):
    """state = body(item, state) for every item of this block. With a counter, this warp takes them for the others."""
    if plan.dealt:
        # Of unknown number: were the compiler to know that every item exists, it would hold too much in registers, and
        # ptxas would let no products overlap.
        rounds = plan.rounds + hopper.zero()
        return lax.fori_loop(0, rounds, lambda turn, state: body(plan.item(turn), state), state)

    def one_item(carry):
        turn, index, state = carry
        state = body(plan.item_taken(index + hopper.zero()), state)
        if counter is None:
            (index,) = gpu_queue.read(smem, turn + 1)
        else:
            index = gpu_queue.take(counter, plan.ctas)
            gpu_queue.leave(smem, turn + 1, index)
        return turn + 1, index, state

    start = jnp.int32(0), lax.axis_index("cta"), state
    return lax.while_loop(lambda carry: carry[1] < plan.items, one_item, start)[2]


def produce(plan: Plan, smem: dict, q, k, v, do, stats, counter) -> None:
    """Load the keys and values of every item and stream its query blocks."""
    config = plan.config
    split = plan.problem.kv_heads // k.shape[2]

    def one_item(item: Item, carry):
        count, loaded = carry

        def load_kv():
            pl.when(loaded > 0)(lambda: plgpu.barrier_wait(smem["kv_free"]))
            kv_head = lax.div(item.kv_head, jnp.int32(split))
            hopper.load_tile(k.at[item.batch, :, kv_head], item.kv_start, smem["k"][0].at[0], smem["k_full"])
            hopper.load_tile(v.at[item.batch, :, kv_head], item.kv_start, smem["v"][0].at[0], smem["v_full"])

        def one_step(i, j, g, _):
            step = count + i
            slot = lax.rem(step, config.stages)
            head, block = item.kv_head * plan.group + g, plan.block(item, j)
            start = block * config.block_q
            full = smem["full"].at[slot]
            pl.when(step >= config.stages)(lambda: plgpu.barrier_wait(smem["free"].at[slot]))
            hopper.load_tile(q.at[item.batch, :, head], start, smem["q"][0].at[slot], full)
            hopper.load_tile(do.at[item.batch, :, head], start, smem["do"][0].at[slot], full)
            plgpu.copy_gmem_to_smem(stats.at[item.batch, head, block], smem["stats"].at[slot], full)

        pl.when(item.exists)(load_kv)
        plan.each_step(item, one_step)
        return count + plan.group * item.blocks, loaded + jnp.where(item.exists, 1, 0)

    each_item(plan, smem, one_item, (jnp.int32(0), jnp.int32(0)), counter)


def compute_dq(plan: Plan, smem: dict) -> None:
    """dQ = dS K of every step, 64 x 64 at a time, left to the writers in turn."""
    config, parts = plan.config, _dq_parts(plan)
    participants = 128 * (2 if config.split_columns else 1 + WARPGROUPS)

    def one_step(i, _):
        slot = lax.rem(i, jnp.int32(2))
        ds, k = smem["ds"][1].at[slot], smem["k"][1].at[hopper.zero()]
        hopper.bar_sync(DS_FULL + slot, participants)
        for part in range(parts):
            halves = (ds.at[0], k.at[part]) if config.block_q == CHUNK else (ds.at[part], k.at[0])
            dq = hopper.wait(0, hopper.product_tn(*halves))
            if part == parts - 1:
                for which in range(WARPGROUPS):
                    owner = pl.when(slot == which) if config.split_columns else lambda release: release()
                    owner(partial(hopper.bar_arrive, DS_EMPTY + 2 * which + slot, 2 * 128))
            if config.split_columns:
                for piece in range(2):
                    _hand_over(smem, piece, dq[:, piece * PIECE : (piece + 1) * PIECE])
            else:
                _hand_over(smem, slot if parts == 1 else part, dq)

    def one_item(item: Item, _):
        pl.when(item.exists)(lambda: plgpu.barrier_wait(smem["k_full"]))
        lax.fori_loop(0, item.blocks * plan.group, one_step, None)
        pl.when(item.exists)(lambda: plgpu.barrier_arrive(smem["kv_free"]))

    each_item(plan, smem, one_item)


def _dq_parts(plan: Plan) -> int:
    """Products of 64 x 64 in the dq of a step; where it is one, the writers take every other step."""
    return max(plan.config.block_q // CHUNK, tiles.cdiv(plan.problem.head_dim, CHUNK))


def _hand_over(smem: dict, writer: Any, dq) -> None:
    hopper.bar_sync(DQ_EMPTY + writer, WITH_WRITER)
    written = smem["dq"][1].at[writer]
    for box in range(written.shape[0]):
        written[box] = dq[:, box * PIECE : (box + 1) * PIECE]
    hopper.fence()
    hopper.bar_arrive(DQ_FULL + writer, WITH_WRITER)


def write_dq(plan: Plan, which: int, smem: dict, dq, turns) -> None:
    """Add every other part of dq that is left in shared memory, by the plan's turns where there are `turns`: of each
    part how many tiles have added to it or, in any order, whether the first one has."""
    config, parts = plan.config, _dq_parts(plan)
    copied = smem["dq"][0].at[which]

    def send(place, reduction):
        batch, row, head, column = place
        for box in range(copied.shape[0]):
            # Pallas must not see that the columns may end beyond the array; TMA drops those.
            columns = pl.ds(column + box * PIECE + 0 * row, PIECE)
            target = dq.at[batch, pl.ds(row, ROWS), head, columns]
            plgpu.copy_smem_to_gmem(copied.at[box], target, commit_group=False, reduction_op=reduction)

    def send_in_turn(place, turn):
        pl.when(turn == 0)(partial(send, place, None))
        pl.when(turn > 0)(partial(send, place, "add"))

    def one_step(item: Item, i, j, g, _):
        if parts > 1:
            write(item, j, g)
        else:
            pl.when(lax.rem(i, jnp.int32(2)) == which)(partial(write, item, j, g))

    def write(item: Item, j, g):
        head, block = item.kv_head * plan.group + g, plan.block(item, j)
        if turns is not None:
            turn = plan.turn(item, g, block)
            counter = turns.at[item.batch, head, block, which if parts > 1 else 0]
            # Before the part is there: to read the counter takes as long as to compute a quarter of it.
            hopper.wait_for_count(counter, turn)
        for piece in range(parts if config.split_columns else 1):
            row, column = place(block, piece)
            hopper.bar_sync(DQ_FULL + which, WITH_WRITER)
            send_one = partial(send, reduction="add") if turns is None else partial(send_in_turn, turn=turn)
            send_one((item.batch, row, head, column))
            plgpu.commit_smem_to_gmem_group()
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            hopper.bar_arrive(DQ_EMPTY + which, WITH_WRITER)
        if turns is not None:
            pl.when(plan.counts(turn))(partial(tell, counter, turn))

    def place(block, piece: int):
        """The row and the column of dq where a part of it begins."""
        row = block * config.block_q
        if config.split_columns:
            return row, (2 * piece + which) * PIECE
        if parts == 1:
            return row, 0
        return (row, which * CHUNK) if config.block_q == CHUNK else (row + which * ROWS, 0)

    def tell(counter, turn):
        plgpu.wait_smem_to_gmem(0)
        hopper.set_count(counter, turn + 1)

    hopper.bar_arrive(DQ_EMPTY + which, WITH_WRITER)
    each_item(plan, smem, lambda item, _: plan.each_step(item, partial(one_step, item)))


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
        def one_item(item: Item, count):
            pl.when(item.exists)(lambda: self.attend(item, count))
            return count + item.blocks * self.plan.group

        each_item(self.plan, self.smem, one_item, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def attend(self, item: Item, count) -> None:
        steps = item.blocks * self.plan.group
        first, last = self.open_blocks(item)
        # What was stored of the item before has left the tiles of dS.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_wait(self.smem["k_full"])
        plgpu.barrier_wait(self.smem["v_full"])
        is_open = lambda block: (block >= first) & (block < last)
        dk, dv = self.plan.each_step(item, partial(self.step, item, count, is_open), self.nothing())
        plgpu.barrier_arrive(self.smem["kv_free"])
        for slot in [self.which] if self.config.split_columns else range(2):
            pl.when(steps > slot)(partial(self.wait_for_ds, slot))
        self.store(item, dk, dv)

    def nothing(self) -> tuple[Array, Array]:
        """dk and dv."""
        split = WARPGROUPS if self.config.split_columns else 1
        widths = [_chunks(self.config, x) * CHUNK // split for x in (self.problem.head_dim, self.problem.v_dim)]
        dk, dv = (plgpu.layout_cast(jnp.zeros((ROWS, x), jnp.float32), WGMMA) for x in widths)
        return dk, dv

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

    def step(self, item: Item, count, is_open, i, j, g, sums):
        """One query block of one head. Nothing is in flight between two steps."""
        dk, dv = sums
        slot, ds_slot = lax.rem(count + i, self.config.stages), lax.rem(i, jnp.int32(2))
        block = self.plan.block(item, j)
        q, do = self.smem["q"][1].at[slot], self.smem["do"][1].at[slot]
        k, v = (self.smem[name][1].at[hopper.zero()] for name in "kv")

        plgpu.barrier_wait(self.smem["full"].at[slot])
        scores, values = (self.keys(k), q), (self.keys(v), do)
        s, *more = hopper.products_t(scores, values) if self.config.together else hopper.products_t(scores)
        s = hopper.wait(len(more), s)
        p, weights = self.probabilities(s, self.statistic(0, slot, s.shape), item, block, is_open(block))
        (dp,) = more or hopper.products_t(values)
        dp = hopper.wait(0, dp)
        ds = weights * (dp - self.statistic(1, slot, dp.shape))
        dk, dv, p, ds = hopper.settle(dk, dv, p.astype(self.dk.dtype), ds.astype(self.dk.dtype))
        dv = hopper.accumulate(dv, p, self.columns(do))
        dk = hopper.accumulate(dk, ds, self.columns(q))
        self.hand_over(ds, i, ds_slot)
        dk, dv = hopper.wait(0, dk, dv)
        plgpu.barrier_arrive(self.smem["free"].at[slot])
        return dk, dv

    def hand_over(self, ds, i, slot) -> None:
        """Leave dS to the warpgroup that computes dq; where both compute all of it, each does every other time."""

        def write():
            pl.when(i >= 2)(partial(self.wait_for_ds, slot))
            written = self.keys(self.smem["ds"][1].at[slot])
            for c in range(written.shape[0]):
                written.at[c][...] = ds[:, c * CHUNK : (c + 1) * CHUNK]
            hopper.fence()
            hopper.bar_arrive(DS_FULL + slot, 128 * (2 if self.config.split_columns else 1 + WARPGROUPS))

        if self.config.split_columns:
            pl.when(slot == self.which)(write)
        else:
            write()

    def wait_for_ds(self, slot) -> None:
        """Until dq no longer needs what was left there."""
        hopper.bar_sync(DS_EMPTY + 2 * self.which + slot, 2 * 128)

    def probabilities(self, s, lse, item: Item, block, open_block):
        """P^T, and that times the slope of the cap; with a cap P^T is rounded, as both do not fit the registers."""
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
        if slope is None:
            return p, p
        return p.astype(self.dk.dtype), p * slope

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

    def store(self, item: Item, dk, dv) -> None:
        """dv and dk leave through this warpgroup's share of dS, the stores run under the next item."""
        start = item.kv_start + self.first_key
        copied, written = (self.staging(name) for name in self.smem["ds"])
        slots, sent = len(written), 0
        for x, target in ((dv, self.dv), (dk * self.problem.scale, self.dk)):
            base = self.which * (x.shape[1] // CHUNK) if self.config.split_columns else 0
            for c in range(x.shape[1] // CHUNK):
                if (base + c) * CHUNK >= target.shape[-1]:
                    continue
                if sent >= slots:
                    plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
                written[sent % slots][...] = x[:, c * CHUNK : (c + 1) * CHUNK].astype(target.dtype)
                plgpu.commit_smem()
                columns = hopper.columns(base + c, target.shape[-1], start)
                rows = target.at[item.batch, pl.ds(start, ROWS), item.kv_head, columns]
                plgpu.copy_smem_to_gmem(copied[sent % slots], rows)
                sent += 1

    def staging(self, tile) -> list:
        """This warpgroup's chunks [64, 64] of dS."""
        if self.config.split_columns:
            return [tile.at[self.which, 0]]
        return [self.keys(tile.at[slot]).at[c] for slot in range(2) for c in range(tile.shape[1])]
