"""flash_attention backward on Hopper: dq, dk and dv in one kernel (FlashAttention-3, Shah et al. 2024).

A block owns 128 keys of a KV head, two consumer warpgroups 64 each, and visits the query blocks of all heads of the
group that see them. Scores are computed transposed, S^T = K Q^T, so that P^T and dS^T are operands in registers of
dV += P^T dO and dK += dS^T Q. dS^T goes through shared memory once for dQ += dS K, of which either warpgroup
forms a half; it is added to a float32 array in global memory by TMA.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from paxattn.kernels import hopper, tiles
from paxattn.kernels.gpu_flash_fwd import LOG2E, ROWS, Problem, _divide, _iota, _segments
from paxattn.kernels.hopper import CHUNK, COL, ROW, WGMMA

WARPGROUPS = 2
BLOCK_KV = WARPGROUPS * ROWS
BOTH = 128 * WARPGROUPS
MEET = hopper.FIRST_BARRIER


@dataclass(frozen=True)
class Config:
    block_q: int = 64
    stages: int = 2
    code_for_each: bool = True  # of the warpgroups: addresses that depend on which it is would be held in registers
    l2_bytes: int = 32 * 2**20  # queries, cotangents and dq sums that items running together may share in the L2 cache


def config_for(problem: Problem) -> Config:
    if problem.head_dim <= 64:
        return Config(block_q=128, code_for_each=False)
    return Config()


def backward(problem: Problem, config: Config, num_sms: int, q, k, v, do, stats, q_seg, kv_seg):
    """q [B,T,H,D], k [B,S,K,D], v [B,S,K,Dv], do [B,T,H,Dv], stats float32 [B,H,blocks,2,block_q] ->
    dq float32 [B,T,H,D], dk, dv in k's dtype.

    stats holds lse in base 2, infinite for rows that saw nothing, and delta.
    """
    items = problem.batch * problem.kv_heads * tiles.cdiv(problem.kv_len, BLOCK_KV)
    ctas = min(num_sms, items)
    call = plgpu.kernel(
        partial(_kernel, problem, config, ctas),
        out_type=(),
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        scratch_types=_scratch(problem, config, q.dtype),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )
    empty = (jnp.zeros(q.shape, jnp.float32), lax.empty(k.shape, k.dtype), lax.empty(v.shape, v.dtype))

    def run(refs):
        call(q, k, v, do, stats, *refs)

    return pl.run_state(run)(empty)


def _scratch(problem: Problem, config: Config, dtype) -> dict:
    qk, vo = tiles.cdiv(problem.head_dim, CHUNK), tiles.cdiv(problem.v_dim, CHUNK)
    stages, block_q = config.stages, config.block_q
    f32 = dict(tiling=plgpu.TilingTransform((8, 32)), swizzle=plgpu.SwizzleTransform(128))
    return dict(
        k=hopper.tile(1, qk, BLOCK_KV, CHUNK, dtype=dtype),
        v=hopper.tile(1, vo, BLOCK_KV, CHUNK, dtype=dtype),
        q=hopper.tile(stages, qk, block_q, CHUNK, dtype=dtype),
        do=hopper.tile(stages, vo, block_q, CHUNK, dtype=dtype),
        ds=hopper.tile(2, block_q // CHUNK, BLOCK_KV, CHUNK, dtype=dtype),
        dq=plgpu.RefUnion(
            plgpu.SMEM((WARPGROUPS, 2, ROWS, 32), jnp.float32, transforms=(f32["swizzle"],)),
            plgpu.SMEM((WARPGROUPS, 2, ROWS, 32), jnp.float32, transforms=(f32["tiling"], f32["swizzle"])),
        ),
        stats=plgpu.SMEM((stages, 2, block_q), jnp.float32),
        k_full=plgpu.Barrier(num_arrivals=qk),
        v_full=plgpu.Barrier(num_arrivals=vo),
        kv_free=plgpu.Barrier(num_arrivals=WARPGROUPS),
        q_full=plgpu.Barrier(num_arrivals=qk + 1, num_barriers=stages),
        q_free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        do_full=plgpu.Barrier(num_arrivals=vo, num_barriers=stages),
        do_free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
    )


def _kernel(problem: Problem, config: Config, ctas: int, *refs, **smem):
    q, k, v, do, stats, dq, dk, dv = refs
    wg = lax.axis_index("wg")
    plan = Plan(problem, config, ctas)

    def consume(which):
        plgpu.set_max_registers(240, action="increase")
        Consumer(problem, config, which, smem, dq, dk, dv).run(plan)

    if config.code_for_each:
        for which in range(WARPGROUPS):
            pl.when(wg == which)(partial(consume, which))
    else:
        pl.when(wg < WARPGROUPS)(partial(consume, wg))

    @pl.when(wg == WARPGROUPS)
    def _producer():
        plgpu.set_max_registers(24, action="decrease")

        @plgpu.warp_map
        def _(warp):
            pl.when(warp == 0)(lambda: produce(plan, smem, q, k, v, do, stats))


@dataclass(frozen=True)
class Item:
    """Traced: a KV tile and the query blocks from lo on that it visits for every head of the group."""

    batch: Array
    kv_head: Array
    tile: Array
    kv_start: Array
    lo: Array
    blocks: Array


@dataclass(frozen=True)
class Plan:
    """Which items a block takes, in which order: sections of heads that fit the L2 cache, in each the tiles by rank,
    the heads inside, dealt to the blocks to and fro. A section fills whole rounds."""

    problem: Problem
    config: Config
    ctas: int

    @property
    def kv_tiles(self) -> int:
        return tiles.cdiv(self.problem.kv_len, BLOCK_KV)

    @property
    def section(self) -> int:
        problem = self.problem
        group = problem.heads // problem.kv_heads
        size = group * problem.q_len * (4 * problem.head_dim + 4 * problem.head_dim)
        fit = max(self.config.l2_bytes // size, tiles.cdiv(2 * self.ctas, self.kv_tiles))
        return min(problem.batch * problem.kv_heads, fit)

    @property
    def rounds_in_section(self) -> int:
        return tiles.cdiv(self.section * self.kv_tiles, self.ctas)

    @property
    def rounds(self) -> int:
        pairs = self.problem.batch * self.problem.kv_heads
        return tiles.cdiv(pairs, self.section) * self.rounds_in_section

    def item(self, turn) -> tuple[Array, Item]:
        """The item of a round, and whether there is one."""
        problem = self.problem
        pairs = problem.batch * problem.kv_heads
        cta = lax.axis_index("cta")
        which, turn = _divide(turn, self.rounds_in_section)
        index = turn * self.ctas + jnp.where(turn % 2 == 0, cta, self.ctas - 1 - cta)
        width = jnp.minimum(self.section, pairs - which * self.section)
        valid = index < width * self.kv_tiles
        tile, pair = _divide(index, width)
        batch, kv_head = _divide(which * self.section + pair, problem.kv_heads)
        lo, hi = query_range(problem, self.config.block_q, tile * BLOCK_KV, BLOCK_KV)
        return valid, Item(batch, kv_head, tile, tile * BLOCK_KV, lo, jnp.where(valid, hi - lo, 0))


def query_range(problem: Problem, block_q: int, kv_start, rows: int):
    """Query blocks [lo, hi) of which some query may see one of `rows` keys from kv_start on."""
    blocks = tiles.cdiv(problem.q_len, block_q)
    first = kv_start - problem.offset
    last = first + rows - 1
    lo = jnp.zeros_like(kv_start) if problem.right is None else (first - problem.right) // block_q
    hi = jnp.full_like(kv_start, blocks) if problem.left is None else (last + problem.left) // block_q + 1
    lo = jnp.clip(lo, 0, blocks)
    return lo, jnp.clip(hi, lo, blocks)


def produce(plan: Plan, smem: dict, q, k, v, do, stats) -> None:
    problem, config = plan.problem, plan.config
    group = problem.heads // problem.kv_heads

    def one_item(turn, carry):
        count, loaded = carry
        valid, item = plan.item(turn)
        steps = item.blocks * group

        def load_kv():
            pl.when(loaded > 0)(lambda: plgpu.barrier_wait(smem["kv_free"]))
            hopper.load_tile(k.at[item.batch, :, item.kv_head], item.kv_start, smem["k"][0].at[0], smem["k_full"])
            hopper.load_tile(v.at[item.batch, :, item.kv_head], item.kv_start, smem["v"][0].at[0], smem["v_full"])

        def one_step(i, _):
            slot = lax.rem(count + i, config.stages)
            refill = count + i >= config.stages
            head, block = _head_and_block(item, group, i)
            start = block * config.block_q
            pl.when(refill)(lambda: plgpu.barrier_wait(smem["q_free"].at[slot]))
            hopper.load_tile(q.at[item.batch, :, head], start, smem["q"][0].at[slot], smem["q_full"].at[slot])
            plgpu.copy_gmem_to_smem(stats.at[item.batch, head, block], smem["stats"].at[slot], smem["q_full"].at[slot])
            pl.when(refill)(lambda: plgpu.barrier_wait(smem["do_free"].at[slot]))
            hopper.load_tile(do.at[item.batch, :, head], start, smem["do"][0].at[slot], smem["do_full"].at[slot])

        busy = steps > 0
        pl.when(busy)(load_kv)
        lax.fori_loop(0, steps, one_step, None)
        return count + steps, loaded + jnp.where(busy, 1, 0)

    lax.fori_loop(0, plan.rounds, one_item, (jnp.int32(0), jnp.int32(0)))


def _head_and_block(item: Item, group: int, i):
    """The query head and block of step i: head after head, the last block first, where most items begin together."""
    g, j = (0, i) if group == 1 else _divide(i, item.blocks)
    return item.kv_head * group + g, item.lo + item.blocks - 1 - j


@dataclass(frozen=True)
class Consumer:
    """A warpgroup's work on its 64 keys of every item."""

    problem: Problem
    config: Config
    wg: int | Array
    smem: dict
    dq: object
    dk: object
    dv: object

    @property
    def group(self) -> int:
        return self.problem.heads // self.problem.kv_heads

    def run(self, plan: Plan) -> None:
        def one_item(turn, count):
            valid, item = plan.item(turn)
            steps = item.blocks * self.group
            pl.when(steps > 0)(lambda: self.attend(item, steps, count))
            pl.when(valid & (steps == 0))(lambda: self.store(item, *self.nothing()))
            return count + steps

        lax.fori_loop(0, plan.rounds, one_item, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def attend(self, item: Item, steps, count) -> None:
        plgpu.barrier_wait(self.smem["k_full"])
        plgpu.barrier_wait(self.smem["v_full"])
        dq = plgpu.layout_cast(jnp.zeros((ROWS, CHUNK), jnp.float32), WGMMA)
        state = (*self.nothing(), dq)
        first, last = self.open_blocks(item)

        def one_head(g, state):
            """The last block first: those on the left edge of the window, the open ones, those on the right edge."""
            run = partial(self.step, item, count, g * item.blocks)
            if self.problem.left is not None:
                state = lax.fori_loop(0, item.blocks - last, partial(run, True), state)
            state = lax.fori_loop(item.blocks - last, item.blocks - first, partial(run, False), state)
            if self.starts_masked():
                state = lax.fori_loop(item.blocks - first, item.blocks, partial(run, True), state)
            return state

        state = one_head(jnp.int32(0), state) if self.group == 1 else lax.fori_loop(0, self.group, one_head, state)
        dk, dv, dq = state
        self.add_dq(item, steps - 1, dq)
        self.store(item, dk, dv)

    def nothing(self) -> tuple[Array, Array]:
        widths = (tiles.cdiv(x, CHUNK) * CHUNK for x in (self.problem.head_dim, self.problem.v_dim))
        return tuple(plgpu.layout_cast(jnp.zeros((ROWS, x), jnp.float32), WGMMA) for x in widths)

    def own(self, tile):
        """This warpgroup's rows of a tile [chunks, 128, 64]."""
        return tile.at[:, pl.ds(self.wg * ROWS, ROWS)]

    def starts_masked(self) -> bool:
        problem = self.problem
        return problem.right is not None or problem.left is not None or problem.kv_len % BLOCK_KV != 0

    def open_blocks(self, item: Item):
        """Of the query blocks visited, those [first, last) that see every key of this warpgroup."""
        problem, block_q = self.problem, self.config.block_q
        first, last = jnp.int32(0), item.blocks
        kv = item.kv_start + self.wg * ROWS - problem.offset
        if problem.right is not None:
            first = -((problem.right - kv - ROWS + 1) // block_q) - item.lo
        if problem.left is not None:
            last = jnp.minimum(last, (kv + problem.left + 1) // block_q - item.lo)
        if problem.kv_len % BLOCK_KV != 0:
            first = jnp.where(item.kv_start + (self.wg + 1) * ROWS > problem.kv_len, item.blocks, first)
        first = jnp.clip(first, 0, item.blocks)
        return first, jnp.clip(last, first, item.blocks)

    def step(self, item: Item, count, before, masked, j, state):
        """One query block of one head. Nothing is in flight between two steps; dq of a step leaves under the next."""
        dk, dv, dq = state
        i = before + j
        slot = lax.rem(count + i, self.config.stages)
        _, block = _head_and_block(item, self.group, i)
        q, do = self.smem["q"][1].at[slot], self.smem["do"][1].at[slot]
        k, v = (self.smem[name][1].at[hopper.zero()] for name in "kv")
        ds_tile = self.smem["ds"][1].at[lax.rem(count + i, 2)]

        plgpu.barrier_wait(self.smem["q_full"].at[slot])
        s = hopper.product_t(self.own(k), q)
        # Before the first step there is nothing to add: zeros to its own block.
        self.add_dq(item, jnp.maximum(i - 1, 0), dq)
        plgpu.barrier_wait(self.smem["do_full"].at[slot])
        dp = hopper.product_t(self.own(v), do)
        p, slope = self.probabilities(hopper.wait(1, s), item, block, slot, masked)
        dv, p16 = hopper.settle(dv, p.astype(self.dk.dtype))
        dv = hopper.accumulate(dv, p16, do)
        dp = hopper.wait(1, dp)
        ds = p * (dp - self.statistic(1, slot, dp.shape))
        ds = ds if slope is None else ds * slope
        dk, ds = hopper.settle(dk, ds.astype(self.dk.dtype))
        dk = hopper.accumulate(dk, ds, q)
        for j in range(self.config.block_q // CHUNK):
            ds_tile.at[j, pl.ds(self.wg * ROWS, ROWS)][...] = ds[:, j * CHUNK : (j + 1) * CHUNK]
        plgpu.commit_smem()
        hopper.bar_sync(MEET, BOTH)
        dq = self.dq_part(ds_tile, k)
        dk, dv = hopper.wait(1, dk, dv)
        plgpu.barrier_arrive(self.smem["q_free"].at[slot])
        plgpu.barrier_arrive(self.smem["do_free"].at[slot])
        # ptxas takes a product's own registers for unfinished once the next step has begun, those of a multiply not.
        return dk, dv, hopper.wait(0, dq) * self.problem.scale

    def probabilities(self, s, item: Item, block, slot, masked):
        """P^T, and the slope of the cap where there is one."""
        problem, slope = self.problem, None
        if problem.shaped and problem.softcap is None:
            s = s * problem.scale
        elif problem.softcap is not None:
            s = jnp.tanh(s * (problem.scale / problem.softcap))
            slope = 1 - s * s
        p = jnp.exp2(s * problem.exponent - self.statistic(0, slot, s.shape))
        return self.masked(p, item, block) if masked else p, slope

    def statistic(self, which: int, slot, shape) -> Array:
        values = plgpu.load(self.smem["stats"].at[slot, which], layout=COL, optimized=False)
        return lax.broadcast_in_dim(values, shape, [1])

    def masked(self, p, item: Item, block):
        problem, shape = self.problem, p.shape
        kv_pos = lax.broadcast_in_dim(_iota(shape[0], ROW) + (item.kv_start + self.wg * ROWS), shape, [0])
        q_pos = _iota(shape[1], COL) + (block * self.config.block_q + problem.offset)
        if problem.right is None:
            seen = kv_pos < problem.kv_len
        else:
            last = jnp.minimum(q_pos + problem.right, problem.kv_len - 1)
            seen = kv_pos <= lax.broadcast_in_dim(last, shape, [1])
        if problem.left is not None:
            seen &= kv_pos >= lax.broadcast_in_dim(q_pos - problem.left, shape, [1])
        return jnp.where(seen, p, 0.0)

    def dq_part(self, ds_tile, k) -> Array:
        """This warpgroup's half of dS K: 64 of the head's columns or, if there are no more, 64 of 128 queries."""
        if self.config.block_q == CHUNK:
            return hopper.product_tn(ds_tile.at[0], k.at[self.wg])
        return hopper.product_tn(ds_tile.at[self.wg], k.at[0])

    def add_dq(self, item: Item, i, dq) -> None:
        head, block = _head_and_block(item, self.group, i)
        copied, written = (x.at[self.wg] for x in self.smem["dq"])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        row = block * self.config.block_q
        column = 0
        if self.config.block_q == CHUNK:
            column = self.wg * CHUNK + 0 * row
        else:
            row += self.wg * ROWS
        for j in range(2):
            written[j] = dq[:, j * 32 : (j + 1) * 32]
        plgpu.commit_smem()
        for j in range(2):
            target = self.dq.at[item.batch, pl.ds(row, ROWS), head, pl.ds(column + j * 32, 32)]
            plgpu.copy_smem_to_gmem(copied.at[j], target, commit_group=False, reduction_op="add")
        plgpu.commit_smem_to_gmem_group()

    def store(self, item: Item, dk, dv) -> None:
        """dk and dv leave through this warpgroup's rows of the key and value tiles."""
        hopper.bar_sync(MEET, BOTH)
        start = item.kv_start + self.wg * ROWS
        for name, x, target in (("k", dk * self.problem.scale, self.dk), ("v", dv, self.dv)):
            written = self.own(self.smem[name][1].at[0])
            for j in range(x.shape[1] // CHUNK):
                written[j] = x[:, j * CHUNK : (j + 1) * CHUNK].astype(target.dtype)
        plgpu.commit_smem()
        for name, target in (("k", self.dk), ("v", self.dv)):
            copied = self.smem[name][0].at[0]
            for j in range(copied.shape[0]):
                columns = hopper.columns(j, target.shape[-1], start)
                rows = target.at[item.batch, pl.ds(start, ROWS), item.kv_head, columns]
                plgpu.copy_smem_to_gmem(copied.at[j, pl.ds(self.wg * ROWS, ROWS)], rows, commit_group=False)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(self.smem["kv_free"])
