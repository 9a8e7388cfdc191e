"""flash_attention in plain XLA: memory linear in T and S, forward and backward; runs anywhere.

Memory-efficient attention (Rabe and Staats 2021) with FlashAttention's backward. The derivative is written
once, as the tangent of a block given lse, and the backward is its transpose: XLA keeps q, k, v, out and lse
and computes the probabilities again, block by block. So forward-mode and higher derivatives work, too.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from paxattn.kernels import online_softmax, tiles

BLOCK = 256


@dataclass(frozen=True)
class Config:
    """What is static in a call; q_len, kv_len are T and S before padding, blocks are in tokens."""

    q_len: int
    kv_len: int
    q_block: int
    kv_block: int
    left: int | None
    right: int | None
    scale: float
    softcap: float | None


def flash_attention(
    q, k, v, sinks, q_segment_ids, kv_segment_ids, *, left, right, scale, softcap, deterministic
) -> tuple[Array, Array]:
    del deterministic  # every sum here has a fixed order
    batch, q_len, heads, _ = q.shape
    _, kv_len, kv_heads, v_dim = v.shape
    config = Config(q_len, kv_len, min(BLOCK, q_len), min(BLOCK, kv_len), left, right, scale, softcap)
    q = q.reshape(batch, q_len, kv_heads, heads // kv_heads, -1)
    out, lse = _attend(
        config,
        _blocks(q.transpose(0, 2, 3, 1, 4), config.q_block, axis=3),
        _blocks(k.transpose(0, 2, 1, 3), config.kv_block, axis=2),
        _blocks(v.transpose(0, 2, 1, 3), config.kv_block, axis=2),
        None if sinks is None else sinks.astype(jnp.float32).reshape(1, kv_heads, -1, 1),
        None if q_segment_ids is None else _blocks(q_segment_ids, config.q_block, axis=1),
        None if kv_segment_ids is None else _blocks(kv_segment_ids, config.kv_block, axis=1),
    )
    out = jnp.moveaxis(out, 0, 3).reshape(batch, heads, -1, v_dim)[:, :, :q_len]
    lse = jnp.moveaxis(lse, 0, 3).reshape(batch, heads, -1)[:, :, :q_len]
    return out.swapaxes(1, 2).astype(q.dtype), lse


def _blocks(x: Array, size: int, axis: int) -> Array:
    """Pad `axis` to whole blocks, split it, and bring the block index to the front."""
    count = tiles.cdiv(x.shape[axis], max(size, 1))
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, count * size - x.shape[axis])
    x = jnp.pad(x, padding)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(config, q, k, v, sinks, q_seg, kv_seg):
    """Blocks q [nq,B,K,G,T,D], k [nk,B,K,S,D], v [nk,B,K,S,Dv] -> out, lse [nq,B,K,G,T], both float32."""

    def q_block(block):
        i, q, q_seg = block

        def kv_block(state, block):
            j, k, v, kv_seg = block
            mask = _mask(config, i, j, q_seg, kv_seg)
            return online_softmax.update(state, jnp.where(mask, _scores(config, q, k), -jnp.inf), v)

        state = online_softmax.init(q, v)
        state = _scan_live(config, kv_block, state, i, (k, v, kv_seg))
        return online_softmax.finish(state, sinks)

    return lax.map(q_block, (jnp.arange(q.shape[0]), q, q_seg))


@_attend.defjvp
def _attend_jvp(config, primals, tangents):
    """With P = exp(S - lse): d lse = sum(P dS) and d out = sum(P dS v + P dv) - d lse * out."""
    q, k, v, sinks, q_seg, kv_seg = primals
    dq, dk, dv, dsinks, *_ = tangents
    out, lse = _attend(config, *primals)

    @partial(jax.checkpoint, prevent_cse=False)
    def q_block(block):
        i, q, dq, q_seg, out, lse = block
        base = online_softmax.finite(lse)[..., None]

        @partial(jax.checkpoint, prevent_cse=False)
        def kv_block(sums, block):
            j, k, dk, v, dv, kv_seg = block
            dlse, dout = sums
            s, ds = jax.jvp(partial(_scores, config), (q, k), (dq, dk))
            p = jnp.where(_mask(config, i, j, q_seg, kv_seg), jnp.exp(s - base), 0.0)
            pds = p * ds
            return dlse + pds.sum(axis=-1), dout + online_softmax.weigh(pds, v) + online_softmax.weigh(p, dv)

        sums = online_softmax.vary_like((jnp.zeros_like(lse), jnp.zeros_like(out)), q, k, v, dq, dk, dv)
        dlse, dout = _scan_live(config, kv_block, sums, i, (k, dk, v, dv, kv_seg))
        if sinks is not None:
            dlse += jnp.where(jnp.isneginf(lse), 0.0, jnp.exp(sinks - base[..., 0])) * dsinks
        return dout - dlse[..., None] * out, dlse

    dout, dlse = lax.map(q_block, (jnp.arange(q.shape[0]), q, dq, q_seg, out, lse))
    return (out, lse), (dout, dlse)


def _scan_live(config: Config, kv_block, carry, i, blocks):
    """Run kv_block over the KV blocks that query block i can see anything of."""
    q_lo = i * config.q_block + config.kv_len - config.q_len

    def visit(carry, block):
        kv_lo = block[0] * config.kv_block
        live = tiles.block_in_window(
            q_lo, q_lo + config.q_block, kv_lo, kv_lo + config.kv_block, config.left, config.right
        )
        return lax.cond(live, kv_block, lambda carry, _: carry, carry, block), None

    indices = jnp.arange(blocks[0].shape[0])
    return lax.scan(visit, carry, (indices, *blocks))[0]


def _scores(config: Config, q: Array, k: Array) -> Array:
    return online_softmax.scores(q, k, config.scale, config.softcap)


def _mask(config: Config, i: Array, j: Array, q_seg: Array | None, kv_seg: Array | None) -> Array:
    """[1,1,1,T,S], or [B,1,1,T,S] with segments."""
    q_pos = i * config.q_block + jnp.arange(config.q_block) + config.kv_len - config.q_len
    kv_pos = j * config.kv_block + jnp.arange(config.kv_block)
    mask = tiles.in_window(q_pos[:, None], kv_pos[None, :], config.left, config.right)
    mask = (mask & (kv_pos < config.kv_len)[None, :])[None, None, None]
    if q_seg is None or kv_seg is None:
        return mask
    return mask & (q_seg[:, None, None, :, None] == kv_seg[:, None, None, None, :])
