"""paged_attention and write_pages on Hopper GPUs: what joins the kernels to JAX, and what they decline."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from paxattn.kernels import (
    gpu_flash_fwd_plan,
    gpu_paged_codes,
    gpu_paged_decode,
    gpu_paged_plan,
    gpu_paged_prefill,
    gpu_paged_write,
    hopper,
    online_softmax,
)
from paxattn.kernels.gpu_blocks import ROWS
from paxattn.kernels.gpu_flash import multiprocessors, on_hopper
from paxattn.kernels.problem import Problem

HEAD_DIMS = (64, 80, 96, 128, 256)
PAGE_SIZES = (8, 16, 32, 64, 128, 256)


def paged_attention(
    q, pages, page_table, kv_lens, cu_q_lens, sinks, *, left, scale, softcap, max_q_len, shared_prefix_len
) -> tuple[Array, Array]:
    _decline(q, pages)
    tokens, heads, head_dim = q.shape
    _, page_size, kv_heads, _ = pages.k.shape
    longest, few = min(max_q_len or tokens, tokens), ROWS * kv_heads // heads
    left = None if left is None else min(left, page_table.shape[1] * page_size)  # all there is
    shape = tokens, heads, kv_heads, head_dim, page_size, min(longest, few)
    problem = gpu_paged_plan.Problem(*shape, left, scale, softcap)
    sinks = None if sinks is None else sinks.astype(jnp.float32)
    compressed = pages.k_scale is not None
    if compressed and longest > few:
        raise NotImplementedError(f"{longest} queries a row: 'mosaic_gpu' serves {few} where pages are compressed")
    # Of a window the prefix may be no part, and what reads a prefix reads no compressed pages.
    shared = shared_prefix_len is not None and left is None and not compressed
    skipped = _before_all(shared_prefix_len, kv_lens, cu_q_lens)[None] if shared else None
    arrays = q, jax.tree.leaves(pages), page_table, kv_lens, cu_q_lens, skipped, sinks
    given = jax.tree.leaves(arrays)
    arrays = online_softmax.vary_like(arrays, *given)
    results = _rows(problem, compressed, longest > few, *arrays)
    if shared:
        results = _merge(results, _prefix(problem, *arrays[:-1]))
    return online_softmax.vary_like(results, *given)


def _before_all(prefix_len: Array, kv_lens: Array, cu_q_lens: Array) -> Array:
    """prefix_len, or less where new tokens of some row would be in the prefix, of which every query sees all."""
    q_lens = jnp.diff(cu_q_lens)
    old = jnp.where(q_lens > 0, kv_lens - q_lens, jnp.iinfo(jnp.int32).max)
    return jnp.clip(prefix_len, 0, jnp.maximum(old.min(), 0))


def _rows(problem: gpu_paged_plan.Problem, compressed: bool, some_are_long: bool, *arrays: Any) -> tuple[Array, Array]:
    """Every row by itself: those of few queries in one kernel, those of many in another."""
    if compressed:
        kind, read_as, config = gpu_paged_codes.CODES, problem, gpu_paged_codes.config_for(problem)
    else:
        read_as = gpu_paged_plan.abreast(problem)
        kind, config = gpu_paged_decode.PLAIN, gpu_paged_plan.config_for(read_as)
    results = gpu_paged_decode.decode(kind, read_as, config, multiprocessors(), *arrays)
    if not some_are_long:
        return results
    few, page_table = ROWS // problem.group, arrays[2]
    return _prefill(_dense(problem, page_table, causal=True), problem.page_size, few, arrays, results)


def _prefix(problem: gpu_paged_plan.Problem, q, pages, page_table, kv_lens, cu_q_lens, prefix_len):
    """All queries over the keys that all rows begin with, as one row that sees all (cascade, Ye et al. 2024)."""
    row = jnp.argmax(jnp.diff(cu_q_lens) > 0)
    table = jnp.take(page_table, row[None], axis=0, mode="clip")
    ends = jnp.stack([jnp.zeros_like(cu_q_lens[-1]), cu_q_lens[-1]])
    nothing = jnp.zeros_like(q), jnp.full((problem.heads, problem.tokens), -jnp.inf, jnp.float32)
    dense = _dense(problem, page_table, causal=False)
    return _prefill(dense, problem.page_size, 0, (q, pages, table, prefix_len, ends, None, None), nothing)


def _dense(problem: gpu_paged_plan.Problem, page_table: Array, causal: bool) -> Problem:
    """The same as the forward of flash attention knows it."""
    most_keys, dim = page_table.shape[1] * problem.page_size, problem.head_dim
    shape = 1, problem.tokens, most_keys, problem.heads, problem.kv_heads, dim, dim
    return Problem(*shape, problem.left, 0 if causal else None, problem.scale, problem.softcap)


def _prefill(
    problem: Problem, page_size: int, few: int, arrays: tuple, results: tuple[Array, Array]
) -> tuple[Array, Array]:
    """`results`, with those of all rows of more than `few` queries."""
    q, pages, page_table, kv_lens, cu_q_lens, skipped, sinks = arrays
    config = gpu_flash_fwd_plan.config_for(problem)
    inputs = q[None], *pages, page_table, kv_lens, cu_q_lens
    sinks = None if sinks is None else sinks[None]

    def run(inputs, skipped, sinks, results):
        fixed = problem, config, multiprocessors(), few, page_size
        state = *(x[None] for x in results), jnp.zeros(1, jnp.int32)
        return pl.run_state(lambda refs: gpu_paged_prefill.prefill(*fixed, inputs, skipped, sinks, refs))(state)

    out, lse, _ = lax.optimization_barrier(hopper.apart(run)(inputs, skipped, sinks, results))
    return out[0], lse[0]


def _merge(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
    """Attention over two sets of keys from that over each: out [T,H,D] and lse [H,T]."""
    (out, lse), (more, more_lse) = one, other
    whole = jnp.logaddexp(lse, more_lse)
    shift = jnp.where(jnp.isneginf(whole), 0.0, whole)
    weights = (jnp.exp(x - shift).T[..., None] for x in (lse, more_lse))
    own, others = (w * x.astype(jnp.float32) for w, x in zip(weights, (out, more), strict=True))
    return (own + others).astype(out.dtype), whole


def write_pages(pages: Any, new: Any, slots: Array) -> Any:
    """As in `xla_pages`."""
    _need_hopper()
    into, structure = jax.tree.flatten(pages)
    tokens = jax.tree.leaves(new)
    if 0 in into[0].shape or not len(slots):
        raise NotImplementedError("an axis of nothing: 'mosaic_gpu' serves none, 'xla' does")
    given = *into, *tokens, slots
    arrays = online_softmax.vary_like((into, tokens, slots), *given)
    written = gpu_paged_write.write(multiprocessors(), *arrays)
    return jax.tree.unflatten(structure, online_softmax.vary_like(written, *given))


def _need_hopper() -> None:
    if not on_hopper():
        kind = jax.devices()[0].device_kind
        raise NotImplementedError(f"device {kind}: 'mosaic_gpu' needs a Hopper GPU (compute capability 9.0)")


def _decline(q: Array, pages: Any) -> None:
    _need_hopper()
    if q.dtype.name not in ("bfloat16", "float16"):
        raise NotImplementedError(f"dtype {q.dtype}: 'mosaic_gpu' serves bfloat16 and float16, 'xla' float32, too")
    if pages.k.dtype != q.dtype and pages.k_scale is None:
        raise NotImplementedError(f"pages of {pages.k.dtype} for {q.dtype}: 'mosaic_gpu' serves pages of q's dtype")
    if pages.k_scale is not None and not gpu_paged_codes.serves(pages):
        scales = f"{pages.k_scale.shape[-1]} and {pages.v_scale.shape[-1]} a head"
        raise NotImplementedError(f"scales of {pages.k.dtype}, {scales}: 'mosaic_gpu' serves what `init_pages` makes")
    if q.shape[-1] not in HEAD_DIMS:
        raise NotImplementedError(f"head dim {q.shape[-1]}: 'mosaic_gpu' serves {', '.join(map(str, HEAD_DIMS))}")
    if pages.k.shape[1] not in PAGE_SIZES:
        served = ", ".join(map(str, PAGE_SIZES))
        raise NotImplementedError(f"page size {pages.k.shape[1]}: 'mosaic_gpu' serves {served}")
    if q.shape[1] > ROWS * pages.k.shape[2]:
        raise NotImplementedError(f"groups of {q.shape[1] // pages.k.shape[2]} heads: 'mosaic_gpu' serves up to {ROWS}")
    if 0 in q.shape or 0 in pages.k.shape:
        raise NotImplementedError("an axis of nothing: 'mosaic_gpu' serves none, 'xla' does")
