"""flash_attention on Hopper GPUs: what joins the forward and the backward kernel to JAX."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from paxattn.kernels import (
    block_sizes,
    flash_transforms,
    gpu_flash_bwd,
    gpu_flash_bwd_plan,
    gpu_flash_fwd,
    gpu_flash_fwd_plan,
    online_softmax,
    tiles,
)
from paxattn.kernels.problem import LOG2E, Problem


@dataclass(frozen=True)
class Options:
    """What is static in a call and not in its shapes; a config of None is the one for the problem."""

    left: int | None
    right: int | None
    scale: float
    softcap: float | None
    deterministic: bool
    multiprocessors: int
    forward: gpu_flash_fwd_plan.Config | None = None
    backward: gpu_flash_bwd_plan.Config | None = None


HEAD_DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (192, 128))


def flash_attention(
    q, k, v, sinks, q_segment_ids, kv_segment_ids, *, left, right, scale, softcap, deterministic
) -> tuple[Array, Array]:
    _decline(q, v, q_segment_ids)
    options = Options(left, right, scale, softcap, deterministic, multiprocessors())
    arrays = (*flash_transforms.reverse_mode(q, k, v, sinks), q_segment_ids, kv_segment_ids)
    return attend(options, *online_softmax.vary_like(arrays, *jax.tree.leaves(arrays)))


def _decline(q: Array, v: Array, q_segment_ids: Array | None) -> None:
    if not on_hopper():
        kind = jax.devices()[0].device_kind
        raise NotImplementedError(f"device {kind}: 'mosaic_gpu' needs a Hopper GPU (compute capability 9.0)")
    if q.dtype.name not in ("bfloat16", "float16"):
        raise NotImplementedError(f"dtype {q.dtype}: 'mosaic_gpu' serves bfloat16 and float16, 'xla' float32, too")
    if (dims := (q.shape[-1], v.shape[-1])) not in HEAD_DIMS:
        served = ", ".join(str(d) if d == dv else f"({d}, {dv})" for d, dv in HEAD_DIMS)
        raise NotImplementedError(f"head dims {dims}: 'mosaic_gpu' serves {served}")
    if q_segment_ids is not None and q_segment_ids.dtype.itemsize > 4:
        raise NotImplementedError(f"q_segment_ids of {q_segment_ids.dtype}: 'mosaic_gpu' serves 32 bits, 'xla' 64, too")


def on_hopper() -> bool:
    device = jax.devices()[0]
    return device.platform == "gpu" and device.compute_capability == "9.0"


def multiprocessors() -> int:
    """Of this process's GPU; an H100's where code is lowered on a machine without one."""
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else 132


def _config(plan: Any, problem: Problem, deterministic: bool | None) -> Any:
    """What was measured on this kind of GPU or, elsewhere, what the plan of the kernel takes for good."""
    fields = block_sizes.measured(jax.devices()[0].device_kind, problem, deterministic)
    return plan.Config(**fields) if fields else plan.config_for(problem)


@partial(jax.jit, static_argnums=0)
def _forward(options: Options, q, k, v, sinks, q_seg, kv_seg):
    def run(q, k, v, sinks, q_seg, kv_seg):
        problem = Problem.of(options, q, v)
        config = options.forward or _config(gpu_flash_fwd_plan, problem, None)
        return gpu_flash_fwd.forward(problem, config, options.multiprocessors, q, k, v, sinks, q_seg, kv_seg)

    if sinks is not None:
        sinks = jnp.broadcast_to(sinks.astype(jnp.float32), (q.shape[0], q.shape[2]))
    return online_softmax.vary_like(flash_transforms.folding(run)(q, k, v, sinks, q_seg, kv_seg), q, k, v)


@partial(jax.jit, static_argnums=0)
def _backward(options: Options, q, k, v, do, lse, delta, q_seg, kv_seg):
    def run(q, k, v, do, lse, delta, q_seg, kv_seg):
        problem = Problem.of(options, q, v)
        config = options.backward or _config(gpu_flash_bwd_plan, problem, options.deterministic)
        stats = _stats(lse, delta, config.block_q)
        plan = (problem, config, options.multiprocessors, options.deterministic)
        return gpu_flash_bwd.backward(*plan, q, k, v, do, stats, q_seg, kv_seg)

    once = flash_transforms.once(flash_transforms.folding(run))
    return online_softmax.vary_like(once(q, k, v, do, lse, delta, q_seg, kv_seg), q, k, v, do)


def _stats(lse: Array, delta: Array, block_q: int) -> Array:
    """[B,H,T] each -> [B,H,blocks,2,block_q]: lse in base 2, infinite where P must be 0, and delta."""
    length = lse.shape[-1]
    end = ((0, 0), (0, 0), (0, tiles.cdiv(length, block_q) * block_q - length))
    lse = jnp.pad(jnp.where(jnp.isneginf(lse), jnp.inf, lse * LOG2E), end, constant_values=jnp.inf)
    blocks = [x.reshape(*x.shape[:2], -1, block_q) for x in (lse, jnp.pad(delta, end))]
    return jnp.stack(blocks, axis=-2)


attend = flash_transforms.differentiable(_forward, _backward)
