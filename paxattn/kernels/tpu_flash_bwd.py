"""flash_attention backward on TPU: Pallas Mosaic TPU (FlashAttention-2, Dao 2023; dq, dk and dv in one kernel).

dV^T = dO^T P and dK^T = Q^T dS keep P and dS in the matrix unit, and the transposed operands, which are short, stream
past them: so dk and dv are summed transposed. They stay in VMEM while a block of keys visits what it is seen by. dq's
sums are float32 in HBM: each visit reads its block's, adds, and writes it back, one block ahead and one behind what is
computed. The order of all sums is fixed.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paxattn.kernels import online_softmax
from paxattn.kernels.problem import LOG2E, Problem
from paxattn.kernels.tpu_flash_bwd_plan import EARLY, FRESH, LATE, SLOTS, Steps, steps
from paxattn.kernels.tpu_flash_fwd_plan import LANES, Config, Kind, Tile
from paxattn.kernels.tpu_tiles import NN, NT, VMEM_BYTES, dot, pipeline, seen, upright, widened


class Refs(NamedTuple):
    """Blocks in VMEM: of q and kv tokens, what stands after a comma lies along lanes."""

    q: Any  # [q,D]
    qt: Any  # [D,q]
    do: Any  # [q,Dv]
    dot: Any  # [Dv,q]
    k: Any  # [kv,D]
    v: Any  # [kv,Dv]
    stats: Any  # [2,q] lse in base 2, and delta
    q_seg: Any  # [1,q]
    kv_seg: Any  # [1,kv]
    # outputs
    dq: Any  # [B,H,T,D] in HBM
    dk: Any  # [D,kv]
    dv: Any  # [Dv,kv]
    # scratch
    dq_sum: Any  # [3,q,D]
    dk_sum: Any  # [D,kv]
    dv_sum: Any  # [Dv,kv]
    lse: Any  # [q,128], all lanes alike, as delta
    delta: Any  # [q,128]
    writing: Any  # [3] whether a slot of dq_sum is being written, in SMEM
    read: Any  # [3] semaphores, by slot, as written
    written: Any  # [3]


def backward(problem: Problem, config: Config, q, k, v, do, stats, q_seg, kv_seg) -> tuple[Array, Array, Array]:
    """q [B,H,T,D], k [B,K,S,D], v [B,K,S,Dv], do [B,H,T,Dv], T and S in whole lanes, stats float32 [B,H,2,T] and ids in
    whole blocks -> dq float32 [B,H,T,D] in whole blocks, dk [B,K,D,S], dv [B,K,Dv,S].

    q is scaled as for `tpu_flash_fwd.forward`. dq is the scores' gradient times k, before any scale.
    """
    plan, count, kinds = steps(problem, config, q_seg, kv_seg)
    if q_seg is not None:
        q_seg, kv_seg = q_seg[:, None], kv_seg[:, None]
    (plan,) = online_softmax.vary_like((plan,), q, do)
    batch, heads, _, head_dim = q.shape
    kv_heads, kv_len, v_dim = v.shape[1:]
    shape = partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(q).manual_axis_type)
    return pl.pallas_call(
        partial(_kernel, problem, config, kinds),
        name="flash_attention_bwd",
        grid_spec=_grid(problem, config, count, q.dtype, q_seg is not None),
        out_shape=(
            shape((batch, heads, stats.shape[-1], head_dim), jnp.float32),
            shape((batch, kv_heads, head_dim, kv_len), k.dtype),
            shape((batch, kv_heads, v_dim, kv_len), v.dtype),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
    )(*plan, q, q.swapaxes(2, 3), do, do.swapaxes(2, 3), k, v, stats, q_seg, kv_seg)


def _grid(problem: Problem, config: Config, count, dtype, has_segments: bool) -> pltpu.PrefetchScalarGridSpec:
    """For each KV head the steps of the plan, each for every head of its group."""
    block_q, block_kv, group = config.block_q, config.block_kv, problem.heads // problem.kv_heads
    head_dim, v_dim = problem.head_dim, problem.v_dim

    def spec(shape, place):
        """The block at `place` of the KV head and the member of its group, and the blocks of queries and keys."""
        index = lambda h, n, g, *plan: (plan[0][n], *place(h, h * group + g, plan[1][n], plan[2][n]))
        return pl.BlockSpec((None, *shape), index)

    queries = lambda dim: spec((None, block_q, dim), lambda _, h, q, __: (h, q, 0))
    queries_along = lambda dim: spec((None, dim, block_q), lambda _, h, q, __: (h, 0, q))
    keys = lambda dim: spec((None, block_kv, dim), lambda h, _, __, kv: (h, kv, 0))
    keys_along = lambda dim: spec((None, dim, block_kv), lambda h, _, __, kv: (h, 0, kv))
    segments = (
        spec((1, block_q), lambda _, __, q, ___: (0, q)),
        spec((1, block_kv), lambda _, __, ___, kv: (0, kv)),
    )
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(Steps._fields),
        grid=(problem.kv_heads, count, group),
        in_specs=(
            *(queries(head_dim), queries_along(head_dim), queries(v_dim), queries_along(v_dim)),
            *(keys(head_dim), keys(v_dim), queries_along(2)),
            *(segments if has_segments else (None, None)),
        ),
        out_specs=(pl.BlockSpec(memory_space=pl.ANY), keys_along(head_dim), keys_along(v_dim)),
        scratch_shapes=(
            pltpu.VMEM((SLOTS, block_q, head_dim), jnp.float32),
            pltpu.VMEM((head_dim, block_kv), jnp.float32),
            pltpu.VMEM((v_dim, block_kv), jnp.float32),
            pltpu.VMEM((block_q, LANES), jnp.float32),
            pltpu.VMEM((block_q, LANES), jnp.float32),
            pltpu.SMEM((SLOTS,), jnp.int32),
            pltpu.SemaphoreType.DMA((SLOTS,)),
            pltpu.SemaphoreType.DMA((SLOTS,)),
        ),
    )


def _kernel(problem: Problem, config: Config, kinds: Sequence[Kind], *refs) -> None:
    """One step: take the gradients of a block's scores into dq, dk and dv."""
    plan, refs = Steps(*refs[: len(Steps._fields)]), Refs(*refs[len(Steps._fields) :])
    step, member = pl.program_id(1), pl.program_id(2)
    last_member = member == pl.num_programs(2) - 1
    sums = Sums(problem, config, plan, refs)
    slot = sums.begin(step, member)

    @pl.when((plan.first[step] == 1) & (member == 0))
    def _init():
        refs.dk_sum[...] = jnp.zeros_like(refs.dk_sum)
        refs.dv_sum[...] = jnp.zeros_like(refs.dv_sum)

    refs.lse[...] = upright(refs.stats[0:1])
    refs.delta[...] = upright(refs.stats[1:2])
    for number, kind in enumerate(kinds):
        if kind:
            pl.when(plan.kind[step] == number)(partial(_visit, problem, kind, refs, slot, False))
            if refs.q_seg is not None:
                visit = partial(_visit, problem, kind, refs, slot, True)
                pl.when(plan.kind[step] == number + len(kinds))(visit)

    @pl.when((plan.first[step + 1] == 1) & last_member)
    def _done():
        # What scaled q has too much: scores are its product with k in base 2 or, with a soft cap, before tanh.
        factor = 1 / LOG2E if problem.softcap is None else problem.softcap
        refs.dk[...] = (refs.dk_sum[...] * factor).astype(refs.dk.dtype)
        refs.dv[...] = refs.dv_sum[...].astype(refs.dv.dtype)

    sums.end(step, member, slot)
    pl.when((step == pl.num_programs(1) - 1) & last_member)(sums.settle_all)


class Sums(NamedTuple):
    """dq's blocks, on their way between HBM and three slots in VMEM, which the steps of a KV head take in turn."""

    problem: Problem
    config: Config
    plan: Steps
    refs: Refs

    def begin(self, step: Array, member: Array) -> Array:
        """The slot that holds the sum to add to. The next step's is asked for."""
        plan, refs, group = self.plan, self.refs, pl.num_programs(2)
        turn = step * group + member
        slot, next_slot, last_slot = (lax.rem(turn + n, jnp.int32(SLOTS)) for n in (0, 1, 2))

        @pl.when(turn == 0)
        def _start():
            for n in range(SLOTS):
                refs.writing[n] = 0

        self._settle(next_slot)
        next_member = jnp.where(member == group - 1, 0, member + 1)
        next_step = step + (next_member == 0).astype(jnp.int32)
        pl.when(plan.read[next_step] == EARLY)(lambda: self._read(next_step, next_member, next_slot).start())

        @pl.when(plan.read[step] == LATE)
        def _late():
            self._settle(last_slot)
            self._read(step, member, slot).start()

        @pl.when(plan.read[step] == FRESH)
        def _fresh():
            refs.dq_sum[slot] = jnp.zeros(refs.dq_sum.shape[1:], jnp.float32)

        pl.when(plan.read[step] != FRESH)(self._read(step, member, slot).wait)
        return slot

    def end(self, step: Array, member: Array, slot: Array) -> None:
        """Write the slot's sum, which takes until two steps later at most."""
        self.refs.writing[slot] = 1
        self._write(step, member, slot).start()

    def settle_all(self) -> None:
        for slot in range(SLOTS):
            self._settle(slot)

    def _settle(self, slot) -> None:
        """Wait until the slot is written, if it is being written."""

        @pl.when(self.refs.writing[slot] == 1)
        def _wait():
            self._write(0, 0, slot).wait()
            self.refs.writing[slot] = 0

    def _block(self, step, member) -> Any:
        head = pl.program_id(0) * (self.problem.heads // self.problem.kv_heads) + member
        start = pl.multiple_of(self.plan.q_block[step] * self.config.block_q, self.config.block_q)
        return self.refs.dq.at[self.plan.batch[step], head, pl.ds(start, self.config.block_q)]

    def _read(self, step, member, slot) -> Any:
        return pltpu.make_async_copy(self._block(step, member), self.refs.dq_sum.at[slot], self.refs.read.at[slot])

    def _write(self, step, member, slot) -> Any:
        return pltpu.make_async_copy(self.refs.dq_sum.at[slot], self._block(step, member), self.refs.written.at[slot])


def _visit(problem: Problem, kind: Kind, refs: Refs, slot: Array, by_segment: bool) -> None:
    """Take a block of queries into the sums, tile by tile."""
    dtype = refs.q.dtype

    def products(tile: Tile, _) -> tuple[Array, Array]:
        at, keys = tile.queries_at, tile.keys_at
        return dot(refs.q[at], refs.k[keys], NT), dot(refs.do[at], refs.v[keys], NT)

    def gradients(tile: Tile, values: tuple[Array, Array]) -> tuple[Array, Array]:
        s, dp = values
        slope = None
        if problem.softcap is not None:
            t = jnp.tanh(s)
            s, slope = t * (problem.softcap * LOG2E), 1 - t * t
        visible = seen(problem, tile, 1, (refs.q_seg, refs.kv_seg) if by_segment else None)
        if visible is not None:
            s = jnp.where(visible, s, -jnp.inf)
        lse, delta = (widened(x[tile.queries_at], s.shape[1]) for x in (refs.lse, refs.delta))
        p = jnp.exp2(s - lse)
        ds = p * (dp - delta)
        return p.astype(dtype), (ds if slope is None else ds * slope).astype(dtype)

    def accumulate(tile: Tile, values: tuple[Array, Array]) -> None:
        p, ds = values
        at, keys = tile.queries_at, tile.keys_at
        refs.dv_sum[:, keys] += dot(refs.dot[:, at], p, NN)
        refs.dk_sum[:, keys] += dot(refs.qt[:, at], ds, NN)
        refs.dq_sum[slot, at] += dot(ds, refs.k[keys], NN)

    pipeline(kind, (products, gradients, accumulate))
