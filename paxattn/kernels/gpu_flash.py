"""flash_attention on Hopper GPUs: what joins the forward and the backward kernel to JAX."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from paxattn.kernels import gpu_flash_bwd, gpu_flash_fwd, online_softmax, tiles
from paxattn.kernels.gpu_flash_fwd import LOG2E, Problem

HEAD_DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (192, 128))


def flash_attention(
    q, k, v, sinks, q_segment_ids, kv_segment_ids, *, left, right, scale, softcap, deterministic
) -> tuple[Array, Array]:
    _decline(q, v)
    options = (left, right, scale, softcap, deterministic, streaming_multiprocessors())
    try:
        return attend(options, q, k, v, sinks, q_segment_ids, kv_segment_ids)
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        message = "forward-mode differentiation: 'mosaic_gpu' has a reverse mode only; implementation=\"xla\" has both"
        raise NotImplementedError(message) from error


def _decline(q: Array, v: Array) -> None:
    if q.dtype.name not in ("bfloat16", "float16"):
        raise NotImplementedError(f"dtype {q.dtype}: 'mosaic_gpu' serves bfloat16 and float16, 'xla' float32, too")
    if (dims := (q.shape[-1], v.shape[-1])) not in HEAD_DIMS:
        served = ", ".join(str(d) if d == dv else f"({d}, {dv})" for d, dv in HEAD_DIMS)
        raise NotImplementedError(f"head dims {dims}: 'mosaic_gpu' serves {served}")


def streaming_multiprocessors() -> int:
    """Of this process's GPU, which must be a Hopper."""
    device = jax.devices()[0]
    if device.platform != "gpu" or getattr(device, "compute_capability", None) != "9.0":
        raise NotImplementedError(f"device {device.device_kind}: 'mosaic_gpu' needs a Hopper GPU (sm_90)")
    return device.core_count


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(options: tuple, q, k, v, sinks, q_seg, kv_seg) -> tuple[Array, Array]:
    """`options` are left, right, scale, softcap, deterministic and the number of multiprocessors to use."""
    out, lse = _forward(options, q, k, v, sinks, q_seg, kv_seg)
    return out, lse[:, :, : q.shape[1]]


def _attend_fwd(options, q, k, v, sinks, q_seg, kv_seg):
    out, lse = attend(options, q, k, v, sinks, q_seg, kv_seg)
    return (out, lse), (q, k, v, sinks, q_seg, kv_seg, out, lse)


def _attend_bwd(options, saved, cotangents):
    q, k, v, sinks, q_seg, kv_seg, out, lse = saved
    do, dlse = cotangents
    # Without the barrier XLA may compute delta from a cotangent that it did not round yet, which the kernel never sees.
    do = lax.optimization_barrier(do)
    # And one after it, as XLA would fuse the sum into what reorders it, at a third of the speed.
    sums = lax.optimization_barrier((out.astype(jnp.float32) * do.astype(jnp.float32)).sum(axis=-1))
    delta = sums.swapaxes(1, 2) - jnp.where(jnp.isneginf(lse), 0.0, dlse)
    dq, dk, dv = _backward(options, q, k, v, do, lse, delta, q_seg, kv_seg)
    dsinks = None
    if sinks is not None:
        weights = jnp.where(jnp.isneginf(lse), 0.0, jnp.exp(sinks.astype(jnp.float32)[:, None] - lse))
        dsinks = -(weights * delta).sum(axis=(0, 2)).astype(sinks.dtype)
    return dq, dk, dv, dsinks, None, None


attend.defvjp(_attend_fwd, _attend_bwd)


def _problem(options, q, k, v) -> Problem:
    left, right, scale, softcap, _, _ = options
    batch, q_len, heads, head_dim = q.shape
    _, kv_len, kv_heads, v_dim = v.shape
    return Problem(batch, q_len, kv_len, heads, kv_heads, head_dim, v_dim, left, right, scale, softcap)


def _forward(options, q, k, v, sinks, q_seg, kv_seg):
    def run(q, k, v, sinks, q_seg, kv_seg):
        problem = _problem(options, q, k, v)
        config = gpu_flash_fwd.config_for(problem)
        return gpu_flash_fwd.forward(problem, config, options[-1], q, k, v, sinks, q_seg, kv_seg)

    if sinks is not None:
        sinks = jnp.broadcast_to(sinks.astype(jnp.float32), (q.shape[0], q.shape[2]))
    return online_softmax.vary_like(_folding(run)(q, k, v, sinks, q_seg, kv_seg), q, k, v)


def _backward(options, q, k, v, do, lse, delta, q_seg, kv_seg):
    def run(q, k, v, do, lse, delta, q_seg, kv_seg):
        problem = _problem(options, q, k, v)
        config = gpu_flash_bwd.config_for(problem)
        stats = _stats(lse, delta, config.block_q)
        deterministic, num_sms = options[-2:]
        dq, dk, dv = gpu_flash_bwd.backward(
            problem, config, num_sms, deterministic, q, k, v, do, stats, q_seg, kv_seg
        )
        return dq.astype(q.dtype), dk, dv

    return online_softmax.vary_like(_folding(run)(q, k, v, do, lse, delta, q_seg, kv_seg), q, k, v, do)


def _stats(lse: Array, delta: Array, block_q: int) -> Array:
    """[B,H,T] each -> [B,H,blocks,2,block_q]: lse in base 2, infinite where P must be 0, and delta."""
    length = lse.shape[-1]
    end = ((0, 0), (0, 0), (0, tiles.cdiv(length, block_q) * block_q - length))
    lse = jnp.pad(jnp.where(jnp.isneginf(lse), jnp.inf, lse * LOG2E), end, constant_values=jnp.inf)
    blocks = [x.reshape(*x.shape[:2], -1, block_q) for x in (lse, jnp.pad(delta, end))]
    return jnp.stack(blocks, axis=-2)


def _folding(run: Any) -> Any:
    """`run`, under vmap one call over a larger batch."""
    folded = jax.custom_batching.custom_vmap(run)

    @folded.def_vmap
    def rule(size, batched, *args):
        def fold(x, is_batched):
            x = x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        outs = _folding(run)(*jax.tree.map(fold, args, tuple(batched)))
        return jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), outs), jax.tree.map(lambda _: True, outs)

    return folded
