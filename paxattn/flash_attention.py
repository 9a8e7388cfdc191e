"""Public op: attention over dense arrays, blockwise, differentiable."""

from typing import Any

from jax import Array
from jaxtyping import Float, Int

from paxattn import checks, dispatch


def flash_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "H"] | None = None,
    q_segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    deterministic: bool = True,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Softmax attention whose memory is linear in T and S (FlashAttention, Dao et al. 2022).

    Query i stands at key position i + S - T (bottom-right alignment: the last query sees the last key).
    A query with nothing to see gives output 0, lse -inf and zero gradients.

    Args:
      q: [B,T,H,D], bfloat16, float16 or float32.
      k: [B,S,K,D] in q's dtype; H is a multiple of K, and query head h reads KV head h // (H // K).
      v: [B,S,K,Dv] in q's dtype.
      causal: a query sees no key after its own position.
      scale: multiplies q k^T; D ** -0.5 by default.
      window: an int w: the query's own key and the w - 1 before it (the right side is left to `causal`);
        or (left, right): so many keys before and after its own, None = unbounded.
      softcap: scores become softcap * tanh(scores / softcap) (Gemma 2).
      sinks: [H], a logit a head that takes part in the softmax and has no value (gpt-oss). Neither scaled
        nor capped. Counted in lse.
      q_segment_ids: [B,T] ints; a query sees only keys of its own segment. Goes with kv_segment_ids.
      kv_segment_ids: [B,S] ints.
      deterministic: the same inputs give the same bits, backward too. False allows faster kernels.
      return_lse: return (out, lse), lse float32 [B,H,T], the natural log of the softmax's denominator.
      implementation: None (the best for the platform), "xla", "mosaic_gpu", "mosaic_tpu" or "reference".

    Returns:
      out [B,T,H,Dv] in q's dtype, or (out, lse). Differentiable in q, k, v and sinks.

    Raises:
      ValueError: an argument does not fit; the message names it.
      NotImplementedError: the implementation asked for cannot serve the call; the message names the feature.
    """
    _check(q, k, v, sinks, q_segment_ids, kv_segment_ids)
    if q_segment_ids is not None:
        q_segment_ids, kv_segment_ids = checks.segment_ids(q_segment_ids, kv_segment_ids)
    for name, x in (("causal", causal), ("deterministic", deterministic), ("return_lse", return_lse)):
        checks.check_bool(name, x)
    left, right = checks.window_bounds(window, causal)
    out, lse = dispatch.call(
        "flash_attention",
        implementation,
        q,
        k,
        v,
        sinks,
        q_segment_ids,
        kv_segment_ids,
        left=left,
        right=right,
        scale=checks.static_scale(scale, q.shape[-1]),
        softcap=checks.static_softcap(softcap),
        deterministic=deterministic,
    )
    return (out, lse) if return_lse else out


def _check(q: Any, k: Any, v: Any, sinks: Any, q_segment_ids: Any, kv_segment_ids: Any) -> None:
    for name, x, dims in (("q", q, "B T H D"), ("k", k, "B S K D"), ("v", v, "B S K Dv")):
        checks.check_rank(name, x, dims)
        checks.check_float(name, x)
        checks.require(x.dtype == q.dtype, name, f"dtype {x.dtype}", f"of q's dtype {q.dtype}")
        checks.require(all(n > 0 for n in x.shape), name, f"shape {x.shape}", f"[{dims}] with no axis of size 0")
    b, t, h, d = q.shape
    s, kv_heads = k.shape[1:3]
    checks.check_shape("k", k, (b, s, kv_heads, d), "B S K D")
    checks.check_shape("v", v, (b, s, kv_heads, v.shape[-1]), "B S K Dv")
    checks.check_groups(h, kv_heads, "k")
    checks.check_sinks(sinks, h)
    if q_segment_ids is None and kv_segment_ids is None:
        return
    checks.require(q_segment_ids is not None, "q_segment_ids", None, "given where kv_segment_ids is")
    checks.require(kv_segment_ids is not None, "kv_segment_ids", None, "given where q_segment_ids is")
    checks.check_ints("q_segment_ids", q_segment_ids, (b, t), "B T")
    checks.check_ints("kv_segment_ids", kv_segment_ids, (b, s), "B S")
