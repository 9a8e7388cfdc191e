"""flash_attention on TPU: what joins the kernel to JAX."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from paxattn.kernels import online_softmax, tpu_flash_fwd, tpu_flash_fwd_plan, xla_flash
from paxattn.kernels.problem import LOG2E, Problem

MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Options:
    """What is static in a call and not in its shapes."""

    left: int | None
    right: int | None
    scale: float
    softcap: float | None


def flash_attention(
    q, k, v, sinks, q_segment_ids, kv_segment_ids, *, left, right, scale, softcap, deterministic
) -> tuple[Array, Array]:
    del deterministic  # every sum here has a fixed order
    _decline(q, v, q_segment_ids)
    arrays = (q, k, v, sinks, q_segment_ids, kv_segment_ids)
    return attend(Options(left, right, scale, softcap), *online_softmax.vary_like(arrays, *jax.tree.leaves(arrays)))


def _decline(q: Array, v: Array, q_segment_ids: Array | None) -> None:
    if q.dtype.name not in ("bfloat16", "float32"):
        raise NotImplementedError(f"dtype {q.dtype}: 'mosaic_tpu' serves bfloat16 and float32, 'xla' float16, too")
    if max(dims := (q.shape[-1], v.shape[-1])) > MAX_HEAD_DIM:
        raise NotImplementedError(f"head dims {dims}: 'mosaic_tpu' serves up to {MAX_HEAD_DIM}")
    if q_segment_ids is not None and q_segment_ids.dtype.itemsize > 4:
        raise NotImplementedError(f"q_segment_ids of {q_segment_ids.dtype}: 'mosaic_tpu' serves 32 bits, 'xla' 64, too")


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def attend(options: Options, q, k, v, sinks, q_seg, kv_seg) -> tuple[Array, Array]:
    return _forward(options, q, k, v, sinks, q_seg, kv_seg)


@attend.defjvp
def _attend_jvp(options, primals, tangents):
    """The derivative is the XLA implementation's, which computes its own out and lse: linear in memory."""
    xla = partial(
        xla_flash.flash_attention,
        left=options.left,
        right=options.right,
        scale=options.scale,
        softcap=options.softcap,
        deterministic=True,
    )
    return attend(options, *primals), jax.jvp(xla, primals, tangents)[1]


@partial(jax.jit, static_argnums=0)
@jax.enable_x64(False)
def _forward(options: Options, q, k, v, sinks, q_seg, kv_seg) -> tuple[Array, Array]:
    batch, q_len, heads, head_dim = q.shape
    _, kv_len, kv_heads, v_dim = v.shape
    shape = (batch, q_len, kv_len, heads, kv_heads, head_dim, v_dim)
    problem = Problem(*shape, options.left, options.right, options.scale, options.softcap)
    config = tpu_flash_fwd_plan.config_for(problem, q.dtype.itemsize)
    out, lse = tpu_flash_fwd.forward(
        problem,
        config,
        _whole_lanes(_scaled(problem, q).transpose(0, 2, 1, 3), axis=2),
        _whole_lanes(k.transpose(0, 2, 1, 3), axis=2),
        _whole_lanes(v.transpose(0, 2, 3, 1), axis=3),
        None if sinks is None else sinks.astype(jnp.float32),
        q_seg,
        kv_seg,
    )
    return out[:, :, :q_len].transpose(0, 2, 1, 3), lse[:, :, :q_len]


def _scaled(problem: Problem, q: Array) -> Array:
    """For the kernel, whose vector unit has no instruction to spare: rounds q once more, which XLA does in passing."""
    factor = problem.scale * LOG2E if problem.softcap is None else problem.scale / problem.softcap
    return (q.astype(jnp.float32) * factor).astype(q.dtype)


def _whole_lanes(x: Array, axis: int) -> Array:
    """Zeros up to a length that is `tpu_flash_fwd_plan.padded`."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, tpu_flash_fwd_plan.padded(x.shape[axis]) - x.shape[axis])
    return jnp.pad(x, padding)
