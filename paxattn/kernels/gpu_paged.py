"""paged_attention and write_pages on Hopper GPUs: what joins the kernels to JAX, and what they decline."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from paxattn.kernels import gpu_paged_codes, gpu_paged_decode, gpu_paged_plan, gpu_paged_write, online_softmax
from paxattn.kernels.gpu_blocks import ROWS
from paxattn.kernels.gpu_flash import multiprocessors, on_hopper

HEAD_DIMS = (64, 80, 96, 128, 256)
PAGE_SIZES = (8, 16, 32, 64, 128, 256)


def paged_attention(
    q, pages, page_table, kv_lens, cu_q_lens, sinks, *, left, scale, softcap, max_q_len
) -> tuple[Array, Array]:
    _decline(q, pages)
    tokens, heads, head_dim = q.shape
    _, page_size, kv_heads, _ = pages.k.shape
    shape = tokens, heads, kv_heads, head_dim, page_size, min(max_q_len or tokens, tokens)
    left = None if left is None else min(left, page_table.shape[1] * page_size)  # all there is
    problem = gpu_paged_plan.Problem(*shape, left, scale, softcap)
    if problem.packed > ROWS:
        packed = f"{problem.max_q_len} queries a row in groups of {problem.group}"
        raise NotImplementedError(f"{packed}: 'mosaic_gpu' serves {ROWS} together; max_q_len says how many there are")
    sinks = None if sinks is None else sinks.astype(jnp.float32)
    compressed = pages.k_scale is not None
    kind = gpu_paged_codes.CODES if compressed else gpu_paged_decode.PLAIN
    config = gpu_paged_codes.config_for(problem) if compressed else gpu_paged_plan.config_for(problem)
    arrays = q, jax.tree.leaves(pages), page_table, kv_lens, cu_q_lens, sinks
    given = jax.tree.leaves(arrays)
    arrays = online_softmax.vary_like(arrays, *given)
    results = gpu_paged_decode.decode(kind, problem, config, multiprocessors(), *arrays)
    return online_softmax.vary_like(results, *given)


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
    if 0 in q.shape or 0 in pages.k.shape:
        raise NotImplementedError("an axis of nothing: 'mosaic_gpu' serves none, 'xla' does")
