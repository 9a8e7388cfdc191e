"""The oracle: plain float32 attention with every score in memory, as a textbook has it.

It shares nothing with the kernels and is meant to be read, not to be fast.
"""

import jax
import jax.numpy as jnp

TOKENS_AT_ONCE = 8  # of paged attention: each has all its keys for itself


def flash_attention(q, k, v, sinks, q_segment_ids, kv_segment_ids, *, left, right, scale, softcap, deterministic):
    """[B,T,H,D], [B,S,K,D], [B,S,K,Dv] -> [B,T,H,Dv], lse [B,H,T]; arguments as in paxattn.flash_attention."""
    del deterministic
    batch, q_len, kv_len = q.shape[0], q.shape[1], k.shape[1]
    q_pos = jnp.arange(q_len) + kv_len - q_len
    seen = jnp.broadcast_to(_window(q_pos, jnp.arange(kv_len), left, right), (batch, q_len, kv_len))
    if q_segment_ids is not None:
        seen = seen & (q_segment_ids[:, :, None] == kv_segment_ids[:, None, :])
    one = jax.vmap(lambda q, k, v, seen: _attention(q, k, v, sinks, seen, scale, softcap))
    return one(q, k, v, seen)


def paged_attention(q, pages, page_table, kv_lens, cu_q_lens, sinks, *, left, scale, softcap, **hints):
    """[T,H,D] and pages [N,P,K,D] -> [T,H,D], lse [H,T]; arguments as in paxattn.paged_attention."""
    del hints
    if 0 in (*q.shape, *page_table.shape):
        return jnp.zeros_like(q), jnp.full(q.shape[1::-1], -jnp.inf, jnp.float32)
    pages = pages.apart()
    page_size = pages.k.shape[1]
    k_pages, v_pages = _decompressed(pages.k, pages.k_scale), _decompressed(pages.v, pages.v_scale)
    capacity = page_table.shape[1] * page_size
    slot = jnp.arange(capacity)

    def one_token(token):
        t, q = token
        row = jnp.searchsorted(cu_q_lens, t, side="right") - 1
        row = jnp.clip(row, 0, kv_lens.shape[0] - 1)
        position = kv_lens[row] - cu_q_lens[row + 1] + t
        valid = (slot < kv_lens[row]) & (t < cu_q_lens[-1])
        seen = valid & _window(position[None], slot, left, 0)[0]
        page = jnp.where(seen, page_table[row, slot // page_size], 0)
        k = jnp.where(seen[:, None, None], k_pages[page, slot % page_size], 0)
        v = jnp.where(seen[:, None, None], v_pages[page, slot % page_size], 0)
        out, lse = _attention(q[None], k, v, sinks, seen[None], scale, softcap)
        return out[0], lse[:, 0]

    out, lse = jax.lax.map(one_token, (jnp.arange(q.shape[0]), q), batch_size=TOKENS_AT_ONCE)
    return out, lse.T


def _decompressed(x, scale):
    if scale is None:
        return x
    groups = x.astype(jnp.float32).reshape(*scale.shape, -1)
    return (groups * scale.astype(jnp.float32)[..., None]).reshape(x.shape)


def _window(q_pos, kv_pos, left, right):
    distance = kv_pos[None, :] - q_pos[:, None]
    seen = jnp.ones(distance.shape, bool)
    if left is not None:
        seen = seen & (distance >= -left)
    if right is not None:
        seen = seen & (distance <= right)
    return seen


def _attention(q, k, v, sinks, seen, scale, softcap):
    """q [T,H,D], k [S,K,D], v [S,K,Dv], seen [T,S] -> out [T,H,Dv] in q's dtype, lse [H,T] float32."""
    f32 = jnp.float32
    group = q.shape[1] // k.shape[1]
    k = jnp.repeat(k.astype(f32), group, axis=1)
    v = jnp.repeat(v.astype(f32), group, axis=1)
    scores = jnp.einsum("thd,shd->hts", q.astype(f32), k, precision="highest") * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(seen, scores, -jnp.inf)
    anything = seen.any(axis=-1)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.astype(f32)[:, None, None], (*scores.shape[:2], 1))
        scores = jnp.concatenate([scores, sink], axis=-1)
    scores = jnp.where(anything[:, None], scores, 0.0)
    weights = jax.nn.softmax(scores, axis=-1)[..., : seen.shape[-1]]
    out = jnp.einsum("hts,shd->thd", jnp.where(seen, weights, 0.0), v, precision="highest")
    lse = jnp.where(anything, jax.nn.logsumexp(scores, axis=-1), -jnp.inf)
    return out.astype(q.dtype), lse
