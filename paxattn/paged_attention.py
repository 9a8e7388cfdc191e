"""Public op: causal attention of packed new tokens over paged keys and values."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from paxattn import checks, dispatch
from paxattn.kernels.codes import rotate
from paxattn.kv.pages import KVPages, check_pages


def paged_attention(
    q: Float[Array, "T H D"],
    pages: KVPages,
    page_table: Int[Array, "R M"],
    kv_lens: Int[Array, "R"],
    cu_q_lens: Int[Array, "R+1"],
    *,
    scale: float | None = None,
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "H"] | None = None,
    max_q_len: int | None = None,
    shared_prefix_len: Int[Array, ""] | int | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Attention through a page table (PagedAttention, Kwon et al. 2023), for prefill and decode alike.

    Row r's new tokens are q[cu_q_lens[r]:cu_q_lens[r + 1]] and are the last of its kv_lens[r] tokens, whose keys
    and values are in the pages already. Prefill chunks and decode tokens mix freely. For inference: not
    differentiable.

    Args:
      q: [T,H,D], bfloat16, float16 or float32, the new tokens of all rows packed. Tokens past cu_q_lens[-1]
        give 0 (and lse -inf).
      pages: one layer's, plain or compressed; H is a multiple of its K.
      page_table: [R,M] ints; entries that kv_lens does not reach are never read.
      kv_lens: [R] ints, the tokens of each row, this step's included.
      cu_q_lens: [R+1] ints, 0 and then the running sum of the rows' new tokens.
      scale, window, softcap, sinks: as in `flash_attention`.
      max_q_len: no row has more new tokens than that, as the caller knows at trace time; 1 = pure decode.
      shared_prefix_len: a hint, which changes no result beyond rounding: how many tokens all rows with queries begin
        with in the same pages, none of them new in this step. Kernels that can read them once for all rows do.
      return_lse: return (out, lse), lse float32 [H,T].
      implementation: None (the best for the platform), "xla", "mosaic_gpu", "mosaic_tpu" or "reference".

    Returns:
      out [T,H,D] in q's dtype, or (out, lse).

    Raises:
      ValueError: an argument does not fit; the message names it.
      NotImplementedError: the implementation asked for cannot serve the call; the message names the feature.
    """
    _check(q, pages, page_table, kv_lens, cu_q_lens, sinks, max_q_len)
    checks.check_bool("return_lse", return_lse)
    q, pages = jnp.asarray(q), jax.tree.map(jnp.asarray, pages)
    if shared_prefix_len is not None:
        if checks.is_int(shared_prefix_len):
            shared_prefix_len = jnp.asarray(max(0, min(shared_prefix_len, jnp.iinfo(jnp.int32).max)), jnp.int32)
        checks.check_rank("shared_prefix_len", shared_prefix_len, "")
        checks.check_ints("shared_prefix_len", shared_prefix_len, (), "")
        shared_prefix_len = jnp.maximum(checks.int32(shared_prefix_len), 0)
    left, _ = checks.window_bounds(window, causal=True)
    compressed = pages.k_scale is not None
    out, lse = dispatch.call(
        "paged_attention",
        implementation,
        rotate(q).astype(q.dtype) if compressed else q,
        pages,
        checks.int32(page_table),
        checks.int32(kv_lens),
        checks.int32(cu_q_lens),
        sinks,
        left=left,
        scale=checks.static_scale(scale, q.shape[-1]),
        softcap=checks.static_softcap(softcap),
        max_q_len=max_q_len,
        shared_prefix_len=shared_prefix_len,
    )
    out = rotate(out).astype(q.dtype) if compressed else out
    return (out, lse) if return_lse else out


def _check(q: Any, pages: Any, page_table: Any, kv_lens: Any, cu_q_lens: Any, sinks: Any, max_q_len: Any) -> None:
    checks.check_rank("q", q, "T H D")
    checks.check_float("q", q)
    check_pages(pages)
    checks.check_shape("q", q, (*q.shape[:2], pages.head_dim), "T H D")
    checks.check_groups(q.shape[1], pages.num_kv_heads, "pages")
    checks.check_rank("page_table", page_table, "R M")
    rows = page_table.shape[0]
    checks.check_ints("page_table", page_table, page_table.shape, "R M")
    checks.check_ints("kv_lens", kv_lens, (rows,), "R")
    checks.check_ints("cu_q_lens", cu_q_lens, (rows + 1,), "R+1")
    checks.check_sinks(sinks, q.shape[1])
    if max_q_len is not None:
        checks.check_positive_int("max_q_len", max_q_len)
