"""paged_attention on TPU: Pallas Mosaic TPU (PagedAttention, Kwon et al. 2023; online softmax, FlashAttention-2).

A kernel takes tiles of queries in turn (`tpu_paged_tile`), of rows of few and of rows of many (`tpu_paged_plan`), which
are computed in two ways (`tpu_paged_few`, `tpu_paged_many`).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paxattn.kernels import online_softmax, tpu_paged_tile
from paxattn.kernels.problem import LOG2E
from paxattn.kernels.tpu_paged_plan import LANES, Config, Problem, cut, few_config, gather, many_config, scatter
from paxattn.kernels.tpu_tiles import VMEM_BYTES

MOST_ENTRIES = 2**15  # of a row, two of which are in SMEM
MOST_RESIDENT = 2**16  # entries of a page table that is in SMEM as a whole
REGISTER = 16  # tokens of bfloat16


def paged_attention(
    q, pages, page_table, kv_lens, cu_q_lens, sinks, *, left, scale, softcap, max_q_len, shared_prefix_len
) -> tuple[Array, Array]:
    del shared_prefix_len  # a hint
    _decline(q, pages, page_table)
    (tokens, heads, _), (_, page_size, kv_heads, row) = q.shape, pages.k.shape
    rows, width = page_table.shape
    left = None if left is None else min(left, width * page_size)  # all there is
    longest = min(max_q_len or tokens, tokens)
    problem = Problem(tokens, heads, kv_heads, row, page_size, rows, width, longest, left, scale, softcap)
    arrays = q, pages, page_table, kv_lens, cu_q_lens, sinks
    q, pages, page_table, kv_lens, cu_q_lens, sinks = online_softmax.vary_like(arrays, *jax.tree.leaves(arrays))
    if page_table.size > MOST_RESIDENT:
        page_table = jnp.pad(page_table, ((0, 0), (0, -width % LANES))).reshape(rows, -1, LANES)
    q = _in_row(_scaled(q, scale, softcap), pages.heads_a_row, kv_heads)
    kv, scales = _as_they_lie(pages)
    parts = []
    for config in [few_config(problem)] + [many_config(problem, q.dtype.itemsize)] * (longest > problem.few):
        work = cut(problem, config, kv_lens, cu_q_lens)
        tiles_of_q = gather(problem, config, work, q)
        parts.append((config, work, _attend(problem, config, work, tiles_of_q, kv, scales, page_table, sinks)))
    out, lse = scatter(problem, parts, cu_q_lens)
    out = _of_row(out, pages.heads_a_row, kv_heads)
    exists = jnp.arange(tokens) < cu_q_lens[-1]
    return jnp.where(exists[:, None, None], out, 0), jnp.where(exists[:, None], lse[..., 0], -jnp.inf).T


def _decline(q: Array, pages: Any, page_table: Array) -> None:
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"dtype {q.dtype}: 'mosaic_tpu' serves bfloat16 and float32")
    if pages.k_scale is not None and not pages.scales_turned:
        shape = f"{pages.page_size} tokens, {pages.num_kv_heads} heads of {pages.head_dim}"
        raise NotImplementedError(f"compressed pages of {shape}, scales not turned: 'mosaic_tpu' serves turned ones")
    if pages.k_scale is None and pages.k.dtype != q.dtype:
        raise NotImplementedError(f"pages of {pages.k.dtype} for {q.dtype}: 'mosaic_tpu' serves pages of q's dtype")
    if jax.default_backend() == "tpu" and not _lie_together(pages):
        shape = f"{pages.page_size} tokens, {pages.num_kv_heads} heads of {pages.head_dim}"
        raise NotImplementedError(f"pages of {shape}: 'mosaic_tpu' would copy all of them, 'xla' does not")
    if page_table.shape[1] > MOST_ENTRIES:
        raise NotImplementedError(f"{page_table.shape[1]} pages a row: 'mosaic_tpu' serves up to {MOST_ENTRIES}")
    if 0 in q.shape or 0 in pages.k.shape or 0 in page_table.shape:
        raise NotImplementedError("an axis of nothing: 'mosaic_tpu' serves none, 'xla' does")


def _lie_together(pages: Any) -> bool:
    """Whether XLA keeps pages in the order in which a kernel is given them. Interpreted, others are served, too."""
    _, page_size, kv_heads, row = pages.k.shape
    return row % LANES == 0 and (kv_heads > 1 or pages.k.dtype != jnp.bfloat16 or page_size % REGISTER == 0)


def _in_row(q: Array, heads_a_row: int, rows: int) -> Array:
    """q [T,H,D] -> [T,H,h*D], each query at the place that its head of K has in a row, and zeros beside it.

    So a row is as a head to the kernel: what lies beside a head is multiplied with zeros, and reaches it if it is NaN.
    """
    tokens, heads, dim = q.shape
    split = q.reshape(tokens, rows, heads_a_row, -1, 1, dim)
    mine = jnp.eye(heads_a_row, dtype=bool).reshape(1, 1, heads_a_row, 1, heads_a_row, 1)
    return jnp.where(mine, split, 0).reshape(tokens, heads, -1)


def _of_row(out: Array, heads_a_row: int, rows: int) -> Array:
    """out [T,H,h*D] -> [T,H,D], of each query what its head of K has brought."""
    tokens, heads, width = out.shape
    split = out.reshape(tokens, rows, heads_a_row, -1, heads_a_row, width // heads_a_row)
    return jnp.stack([split[:, :, i, :, i] for i in range(heads_a_row)], axis=2).reshape(tokens, heads, -1)


def _as_they_lie(pages: Any) -> tuple[tuple[Array, Array], tuple[Array, Array] | None]:
    """k and v [N,P,K,D], or [N,P,D] of a single head: in XLA's order of such bfloat16 arrays tokens stand where heads
    do else; and their scales, in bits, as libtpu takes no float16.

    Given to the kernel as [N,P,1,D], all pages would be copied into another order. Of shorter pages, which are no whole
    registers, they are. Codes lie as in [N,P*K,D], rows that fill registers.
    """
    num_pages, page_size, kv_heads, row = pages.k.shape
    if pages.k_scale is not None:
        bits = partial(lax.bitcast_convert_type, new_dtype=jnp.int16)
        in_rows = lambda x: x.reshape(num_pages, page_size * kv_heads, row)
        return (in_rows(pages.k), in_rows(pages.v)), (bits(pages.k_scale), bits(pages.v_scale))
    turned = kv_heads == 1 and pages.k.dtype == jnp.bfloat16 and page_size % REGISTER == 0
    return (pages.k[:, :, 0], pages.v[:, :, 0]) if turned else (pages.k, pages.v), None


def _attend(problem: Problem, config: Config, work, q, kv, scales, table, sinks) -> tuple[Array, Array]:
    """Tiles q [W,A,Q,D] -> out [W,A,Q,D], lse float32 [W,A,Q,1]; arbitrary for tiles that are not there."""
    count, sets, queries, _ = q.shape
    heads = problem.kv_heads
    standing = lambda x: x if config.joint else x.swapaxes(-1, -2)
    labels = jax.tree.map(lambda x: x.astype(jnp.int32), tpu_paged_tile.way(config).labels(problem, config))
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
                jax.tree.map(lambda _: whole, labels),
                None if sinks is None else whole,
                hbm,
                hbm,
                jax.tree.map(lambda _: hbm, scales),
                None if resident else hbm,
            ),
            out_specs=(spec(q.shape[1:]), spec(state)),
            scratch_shapes=(
                *_blocks(problem, config, kv[0], scales, q.dtype),
                tpu_paged_tile.way(config).scratch(problem, config, q.dtype),
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
    )(*plan, q, labels, sinks, *kv, scales, None if resident else table)
    return out, standing(lse)


def _blocks(problem: Problem, config: Config, pages: Array, scales, dtype) -> tuple[Any, Any, Any]:
    """Room for blocks of pages and of their scales as they come, and for one that is expanded."""
    block = config.block(problem)
    if scales is None:
        return pltpu.VMEM((2, 2, block, *pages.shape[2:]), dtype), None, None
    row = problem.head_dim
    heads = () if problem.kv_heads == 1 else (problem.kv_heads,)
    return (
        pltpu.VMEM((2, 2, block * problem.kv_heads, row), pages.dtype),
        tuple(pltpu.VMEM((2, config.pages, *x.shape[1:]), x.dtype) for x in scales),
        pltpu.VMEM((2, block, *heads, row), dtype),
    )


def _kernel(problem: Problem, config: Config, *refs) -> None:
    tpu_paged_tile.Kernel(problem, config, tpu_paged_tile.Refs(*refs)).tile(pl.program_id(0))


def _scaled(q: Array, scale: float, softcap: float | None) -> Array:
    """For the kernel, so that its products are what exp2 sees or, with a soft cap, what tanh does."""
    factor = scale * LOG2E if softcap is None else scale / softcap
    return (q.astype(jnp.float32) * factor).astype(q.dtype)
