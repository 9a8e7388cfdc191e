"""flash_attention on TPU: what joins the forward and the backward kernel to JAX."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from paxattn.kernels import (
    flash_transforms,
    online_softmax,
    tpu_flash_bwd,
    tpu_flash_bwd_plan,
    tpu_flash_fwd,
    tpu_flash_fwd_plan,
)
from paxattn.kernels.problem import LOG2E, Problem
from paxattn.kernels.tpu_flash_fwd_plan import LANES

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
    arrays = (*flash_transforms.reverse_mode(q, k, v, sinks), q_segment_ids, kv_segment_ids)
    return attend(Options(left, right, scale, softcap), *online_softmax.vary_like(arrays, *jax.tree.leaves(arrays)))


def _decline(q: Array, v: Array, q_segment_ids: Array | None) -> None:
    if q.dtype.name not in ("bfloat16", "float32"):
        raise NotImplementedError(f"dtype {q.dtype}: 'mosaic_tpu' serves bfloat16 and float32, 'xla' float16, too")
    if max(dims := (q.shape[-1], v.shape[-1])) > MAX_HEAD_DIM:
        raise NotImplementedError(f"head dims {dims}: 'mosaic_tpu' serves up to {MAX_HEAD_DIM}")
    if q_segment_ids is not None and q_segment_ids.dtype.itemsize > 4:
        raise NotImplementedError(f"q_segment_ids of {q_segment_ids.dtype}: 'mosaic_tpu' serves 32 bits, 'xla' 64, too")


@partial(jax.jit, static_argnums=0)
@jax.enable_x64(False)
def _forward(options: Options, q, k, v, sinks, q_seg, kv_seg) -> tuple[Array, Array]:
    def run(q, k, v, sinks, q_seg, kv_seg):
        problem = Problem.of(options, q, v)
        config = tpu_flash_fwd_plan.fitted(tpu_flash_fwd_plan.config_for(problem, q.dtype.itemsize), problem)
        out, lse = tpu_flash_fwd.forward(
            problem,
            config,
            _whole(_scaled(problem, q).transpose(0, 2, 1, 3), axis=2),
            _whole(k.transpose(0, 2, 1, 3), axis=2),
            _whole(v.transpose(0, 2, 3, 1), axis=3),
            sinks,
            _whole_ids(q_seg, config.block_q),
            _whole_ids(kv_seg, config.block_kv),
        )
        return out[:, :, : problem.q_len].transpose(0, 2, 1, 3), lse[:, :, : problem.q_len]

    if sinks is not None:
        sinks = jnp.broadcast_to(sinks.astype(jnp.float32), (q.shape[0], q.shape[2]))
    return flash_transforms.folding(run)(q, k, v, sinks, q_seg, kv_seg)


@partial(jax.jit, static_argnums=0)
@jax.enable_x64(False)
def _backward(options: Options, q, k, v, do, lse, delta, q_seg, kv_seg) -> tuple[Array, Array, Array]:
    def run(q, k, v, do, lse, delta, q_seg, kv_seg):
        problem = Problem.of(options, q, v)
        config = tpu_flash_fwd_plan.fitted(tpu_flash_bwd_plan.config_for(q.dtype.itemsize), problem)
        heads_first = lambda x: _whole(x.transpose(0, 2, 1, 3), axis=2)
        lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse * LOG2E)  # a probability is exp2(score - lse)
        dq, dk, dv = tpu_flash_bwd.backward(
            problem,
            config,
            heads_first(_scaled(problem, q)),
            heads_first(k),
            heads_first(v),
            heads_first(do),
            jnp.stack([_whole(lse, 2, config.block_q, jnp.inf), _whole(delta, 2, config.block_q)], axis=2),
            _whole_ids(q_seg, config.block_q),
            _whole_ids(kv_seg, config.block_kv),
        )
        dq = (dq[:, :, : problem.q_len] * problem.scale).astype(q.dtype)
        keys_first = lambda x: x[..., : problem.kv_len].transpose(0, 3, 1, 2)
        return dq.transpose(0, 2, 1, 3), keys_first(dk), keys_first(dv)

    return flash_transforms.once(flash_transforms.folding(run))(q, k, v, do, lse, delta, q_seg, kv_seg)


def _scaled(problem: Problem, q: Array) -> Array:
    """For the kernel, whose vector unit has no instruction to spare: rounds q once more, which XLA does in passing."""
    factor = problem.scale * LOG2E if problem.softcap is None else problem.scale / problem.softcap
    return (q.astype(jnp.float32) * factor).astype(q.dtype)


def _whole(x: Array, axis: int, size: int = LANES, value: float = 0.0) -> Array:
    """Filled up with the value to a length that is a multiple of `size`."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % size)
    return jnp.pad(x, padding, constant_values=value)


def _whole_ids(segments: Array | None, size: int) -> Array | None:
    if segments is None:
        return None
    return jnp.pad(segments.astype(jnp.int32), ((0, 0), (0, -segments.shape[1] % size)), mode="edge")


attend = flash_transforms.differentiable(_forward, _backward)
