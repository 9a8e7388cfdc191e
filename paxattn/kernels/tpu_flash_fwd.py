"""flash_attention forward on TPU: Pallas Mosaic TPU (FlashAttention-2, Dao 2023, turned on its side).

Scores are transposed, S^T = K Q^T: keys lie along sublanes, so that a query's maximum and sum are elementwise over
registers, and O^T = V^T P^T keeps P^T in the matrix unit while V^T, which is short, streams past it. The compiler
overlaps only what stands close together in the program: so the program issues QK of one tile, the softmax of the
tile before and PV of the one before that side by side.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paxattn.kernels import online_softmax, tiles
from paxattn.kernels.problem import LOG2E, Problem
from paxattn.kernels.tpu_flash_fwd_plan import LANES, Config, Kind, Steps, Tile, fitted, steps, steps_of_segments

VMEM_BYTES = 60 * 2**20  # of the 64 MiB that a core of tpu7x has; others have 128
NEVER = float(jnp.finfo(jnp.float32).min)  # a maximum that nothing stays below; finite, so that differences are
NT = (((1,), (1,)), ((), ()))
NN = (((1,), (0,)), ((), ()))


class Refs(NamedTuple):
    """Blocks in VMEM: of q and kv tokens, what stands after a comma lies along lanes."""

    q: Any  # [q,D]
    k: Any  # [kv,D]
    v: Any  # [Dv,kv]
    sinks: Any  # [H], in SMEM
    q_seg: Any  # [1,q]
    kv_seg: Any  # [1,kv]
    # outputs
    out: Any  # [q,Dv]
    lse: Any  # [1,q]
    # scratch: the state of the softmax, which lives from visit to visit, in base 2
    m: Any  # [1,q]
    l: Any  # [1,q]
    acc: Any  # [Dv,q]


def forward(problem: Problem, config: Config, q, k, v, sinks, q_seg, kv_seg) -> tuple[Array, Array]:
    """q [B,H,T,D], k [B,K,S,D], v [B,K,Dv,S], T and S padded to whole lanes -> out [B,H,T,Dv], lse float32 [B,H,T].

    q is scaled: its product with k is what exp2 sees or, with a soft cap, what tanh does.
    """
    config = fitted(config, problem)
    count: int | Array
    if q_seg is None:
        plan, kinds = steps(problem, config)
        count = len(plan.kind) - 1
    else:
        q_seg, kv_seg = _whole_blocks(q_seg, config.block_q), _whole_blocks(kv_seg, config.block_kv)
        plan, count, kinds = steps_of_segments(problem, config, q_seg, kv_seg)
        q_seg, kv_seg = q_seg[:, None], kv_seg[:, None]
    plan, sinks = online_softmax.vary_like((plan, sinks), q)
    batch, heads, q_len, _ = q.shape
    shape = partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(q).manual_axis_type)
    out, lse = pl.pallas_call(
        partial(_kernel, problem, kinds),
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


def _whole_blocks(segments: Array, size: int) -> Array:
    missing = -segments.shape[1] % size
    return jnp.pad(segments.astype(jnp.int32), ((0, 0), (0, missing)), mode="edge")


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
        scratch_shapes=(
            pltpu.VMEM((1, block_q), jnp.float32),
            pltpu.VMEM((1, block_q), jnp.float32),
            pltpu.VMEM((problem.v_dim, block_q), jnp.float32),
        ),
    )


def _kernel(problem: Problem, kinds: Sequence[Kind], *refs) -> None:
    """One step: take the keys of a block into the states of a block of queries."""
    plan, refs = Steps(*refs[: len(Steps._fields)]), Refs(*refs[len(Steps._fields) :])
    step = pl.program_id(1)
    head = pl.program_id(0)

    @pl.when(plan.first[step] == 1)
    def _init():
        refs.m[...] = jnp.full_like(refs.m, NEVER)
        refs.l[...] = jnp.zeros_like(refs.l)
        refs.acc[...] = jnp.zeros_like(refs.acc)

    for number, kind in enumerate(kinds):
        if kind:
            pl.when(plan.kind[step] == number)(partial(_visit, problem, kind, refs, False))
            if refs.q_seg is not None:
                pl.when(plan.kind[step] == number + len(kinds))(partial(_visit, problem, kind, refs, True))

    @pl.when(plan.first[step + 1] == 1)
    def _done():
        _finish(refs, None if refs.sinks is None else refs.sinks[head] * LOG2E)


def _visit(problem: Problem, kind: Kind, refs: Refs, by_segment: bool) -> None:
    """Take a block of keys into the states, tile by tile."""
    columns = {tile.q: pl.ds(tile.q, tile.q_end - tile.q) for tile in kind}
    m = {q: refs.m[:, at] for q, at in columns.items()}
    l = {q: refs.l[:, at] for q, at in columns.items()}

    def scores(tile: Tile, _) -> Array:
        q, k = refs.q[columns[tile.q]], refs.k[pl.ds(tile.kv, tile.kv_end - tile.kv)]
        s = _dot(k, q, NT)
        if problem.softcap is not None:
            s = jnp.tanh(s) * (problem.softcap * LOG2E)
        seen = _seen(problem, tile, refs if by_segment else None)
        return s if seen is None else jnp.where(seen, s, -jnp.inf)

    def softmax(tile: Tile, s: Array) -> tuple[Array, Array]:
        old = m[tile.q]
        m[tile.q] = jnp.maximum(old, s.max(axis=0, keepdims=True))
        p, fade = jnp.exp2(s - m[tile.q]), jnp.exp2(old - m[tile.q])
        l[tile.q] = l[tile.q] * fade + p.sum(axis=0, keepdims=True)
        return p, fade  # the matrix unit rounds p as it takes it in, which costs no instruction

    def accumulate(tile: Tile, weights: tuple[Array, Array]) -> None:
        p, fade = weights
        v = refs.v[:, pl.ds(tile.kv, tile.kv_end - tile.kv)]
        at = columns[tile.q]
        refs.acc[:, at] = refs.acc[:, at] * fade + _dot(v, p, NN)

    _pipeline(kind, (scores, softmax, accumulate))
    for q, at in columns.items():
        refs.m[:, at] = m[q]
        refs.l[:, at] = l[q]


def _pipeline(items: Sequence[Any], stages: Sequence[Callable[[Any, Any], Any]]) -> None:
    """Pass every item through the stages: each stage of one item beside the stage before of the next item."""
    values: dict[int, Any] = {}
    for turn in range(len(items) + len(stages) - 1):
        for lag, stage in enumerate(stages):
            if 0 <= (n := turn - lag) < len(items):
                values[n] = stage(items[n], values.get(n))


def _dot(a: Array, b: Array, dims) -> Array:
    """a in bf16 takes b as bf16, float32 keeps what it has."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _seen(problem: Problem, tile: Tile, segments: Refs | None) -> Array | None:
    """bool [kv,q], whether a query of the tile sees a key; None where all see all."""
    shape = (tile.kv_end - tile.kv, tile.q_end - tile.q)
    key = lax.broadcasted_iota(jnp.int32, shape, 0)
    found = []
    if tile.ahead is not None:
        query = lax.broadcasted_iota(jnp.int32, shape, 1) + tile.ahead
        found.append(tiles.in_window(query, key, problem.left, problem.right))
    if tile.keys is not None:
        found.append(key < tile.keys)
    if segments is not None:
        q_seg = segments.q_seg[:, pl.ds(tile.q, shape[1])]
        # Ids of keys, turned from lanes to sublanes; 128 alike lanes of them stand for any other.
        kv_seg = jnp.broadcast_to(segments.kv_seg[:, pl.ds(tile.kv, shape[0])], (LANES, shape[0])).T
        found.append(jnp.concatenate([kv_seg] * (shape[1] // LANES), axis=1) == q_seg)
    return reduce(jnp.logical_and, found) if found else None


def _finish(refs: Refs, sink: Array | None) -> None:
    """Write what the states have come to; 0 and -inf for queries that saw nothing."""
    m, l = refs.m[...], refs.l[...]
    seen, fade = l > 0, jnp.ones_like(l)
    if sink is not None:
        top = jnp.maximum(m, sink)
        fade = jnp.exp2(m - top)
        m, l = top, l * fade + jnp.exp2(sink - top)
    weight = jnp.where(seen, fade / jnp.where(seen, l, 1.0), 0.0)
    refs.out[...] = (refs.acc[...] * weight).T.astype(refs.out.dtype)
    refs.lse[...] = jnp.where(seen, (m + jnp.log2(l)) / LOG2E, -jnp.inf)
