"""flash_attention forward on TPU: Pallas Mosaic TPU (FlashAttention-2, Dao 2023), with scores as in `tpu_turned`.

A list of steps says which block of keys comes next for which block of queries; the state lives from step to step.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paxattn.kernels import online_softmax, tiles
from paxattn.kernels.problem import LOG2E, Problem
from paxattn.kernels.tpu_flash_fwd_plan import Config, Kind, Steps, Tile, steps, steps_of_segments
from paxattn.kernels.tpu_tiles import NT, VMEM_BYTES, dot, seen
from paxattn.kernels.tpu_turned import States, Visit


class Refs(NamedTuple):
    """Blocks in VMEM: of q and kv tokens, what stands after a comma lies along lanes."""

    q: Any  # [q,D]
    k: Any  # [kv,D]
    v: Any  # [Dv,kv]
    sinks: Any  # [B,H], in SMEM
    q_seg: Any  # [1,q]
    kv_seg: Any  # [1,kv]
    # outputs
    out: Any  # [q,Dv]
    lse: Any  # [1,q]
    # scratch
    states: States  # a column for every `tile_q` queries


def forward(problem: Problem, config: Config, q, k, v, sinks, q_seg, kv_seg) -> tuple[Array, Array]:
    """q [B,H,T,D], k [B,K,S,D], v [B,K,Dv,S], T and S in whole lanes, sinks [B,H], ids in whole blocks
    -> out [B,H,T,Dv], lse float32 [B,H,T].

    q is scaled: its product with k is what exp2 sees or, with a soft cap, what tanh does.
    """
    count: int | Array
    if q_seg is None:
        plan, kinds = steps(problem, config)
        count = len(plan.kind) - 1
    else:
        plan, count, kinds = steps_of_segments(problem, config, q_seg, kv_seg)
        q_seg, kv_seg = q_seg[:, None], kv_seg[:, None]
    plan, sinks = online_softmax.vary_like((plan, sinks), q)
    batch, heads, q_len, _ = q.shape
    shape = partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(q).manual_axis_type)
    out, lse = pl.pallas_call(
        partial(_kernel, problem, config, kinds),
        name="flash_attention_fwd",
        grid_spec=_grid(problem, config, (heads, count), sinks is not None, q_seg is not None),
        out_shape=(
            shape((batch, heads, q_len, problem.v_dim), q.dtype),
            shape((batch, heads, 1, q_len), jnp.float32),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
    )(*plan, q, k, v, sinks, q_seg, kv_seg)
    return out, lse[:, :, 0]


def _grid(problem: Problem, config: Config, grid, has_sinks: bool, has_segments: bool) -> pltpu.PrefetchScalarGridSpec:
    """For each head the steps of the plan, which say what to copy."""
    block_q, block_kv, group = config.block_q, config.block_kv, problem.heads // problem.kv_heads

    def spec(shape, place):
        """The block at `place` of the head, and the blocks of queries and keys of step n."""
        index = lambda h, n, *plan: (plan[0][n], *place(h, plan[1][n], plan[2][n]))
        return pl.BlockSpec((None, *shape), index)

    q_rows = lambda dim: spec((None, block_q, dim), lambda h, q, _: (h, q, 0))
    segments = (spec((1, block_q), lambda h, q, _: (0, q)), spec((1, block_kv), lambda h, _, kv: (0, kv)))
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(Steps._fields),
        grid=grid,
        in_specs=(
            q_rows(problem.head_dim),
            spec((None, block_kv, problem.head_dim), lambda h, _, kv: (lax.div(h, group), kv, 0)),
            spec((None, problem.v_dim, block_kv), lambda h, _, kv: (lax.div(h, group), 0, kv)),
            pl.BlockSpec(memory_space=pltpu.SMEM) if has_sinks else None,
            *(segments if has_segments else (None, None)),
        ),
        out_specs=(q_rows(problem.v_dim), spec((None, 1, block_q), lambda h, q, _: (h, 0, q))),
        scratch_shapes=(States.scratch(tiles.cdiv(block_q, config.tile_q), config.tile_q, problem.v_dim),),
    )


def _kernel(problem: Problem, config: Config, kinds: Sequence[Kind], *refs) -> None:
    """One step: take the keys of a block into the states of a block of queries."""
    plan, refs = Steps(*refs[: len(Steps._fields)]), Refs(*refs[len(Steps._fields) :])
    step = pl.program_id(1)
    head = pl.program_id(0)

    @pl.when(plan.first[step] == 1)
    def _init():
        refs.states.init()

    for number, kind in enumerate(kinds):
        if kind:
            pl.when(plan.kind[step] == number)(partial(_visit, problem, config, kind, refs, False))
            if refs.q_seg is not None:
                pl.when(plan.kind[step] == number + len(kinds))(partial(_visit, problem, config, kind, refs, True))

    @pl.when(plan.first[step + 1] == 1)
    def _done():
        _finish(config, refs, None if refs.sinks is None else refs.sinks[plan.batch[step], head] * LOG2E)


def _visit(problem: Problem, config: Config, kind: Kind, refs: Refs, by_segment: bool) -> None:
    """Take a block of keys into the states, tile by tile."""

    def scores(tile: Tile) -> Array:
        s = dot(refs.k[tile.keys_at], refs.q[tile.queries_at], NT)
        if problem.softcap is not None:
            s = jnp.tanh(s) * (problem.softcap * LOG2E)
        visible = seen(problem, tile, 0, (refs.q_seg, refs.kv_seg) if by_segment else None)
        return s if visible is None else jnp.where(visible, s, -jnp.inf)

    column = lambda tile: (tile.q // config.tile_q, tile.q_end - tile.q)
    values = lambda tile: refs.v[:, tile.keys_at]
    # Where there is a mask, another body of code would save less than it costs to compile.
    whole = not by_segment and all(tile.ahead is None and tile.keys is None for tile in kind)
    Visit(refs.states, kind, column, scores, values, refs.v.dtype).take(bold=whole)


def _finish(config: Config, refs: Refs, sink: Array | None) -> None:
    for c, q in enumerate(range(0, config.block_q, config.tile_q)):
        at = slice(q, min(q + config.tile_q, config.block_q))
        out, lse = refs.states.finish(c, at.stop - q, sink)
        refs.out[at] = out.T.astype(refs.out.dtype)
        refs.lse[:, at] = lse
