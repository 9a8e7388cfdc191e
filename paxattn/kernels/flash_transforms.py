"""What the flash kernels of GPU and TPU need to join JAX's transformations: derivatives of first order, and vmap."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

FORWARD_MODE = 'forward-mode differentiation: the kernel has a reverse mode alone; implementation="xla" has both'
SECOND = 'second derivatives: the kernel has first ones alone; implementation="xla" has any'


def _refuse(message: str, *_: Any, **__: Any) -> Any:
    raise NotImplementedError(message)


# The identity of a tangent, which is transposed in reverse mode and would be computed in forward mode only.
_tangent_p = Primitive("reverse_mode_only")
_tangent_p.def_abstract_eval(lambda x: x)
_tangent_p.def_impl(partial(_refuse, FORWARD_MODE))
mlir.register_lowering(_tangent_p, partial(_refuse, FORWARD_MODE))
ad.deflinear2(_tangent_p, lambda cotangent, _: [cotangent])
batching.defvectorized(_tangent_p)


@jax.custom_jvp
def reverse_mode(*arrays: Array | None) -> tuple[Array | None, ...]:
    """`arrays`, with an error of our own where they are differentiated in forward mode."""
    return arrays


@reverse_mode.defjvp
def _reverse_mode_jvp(primals, tangents):
    return primals, jax.tree.map(_tangent_p.bind, tangents)


def once(run: Any) -> Any:
    """`run`, which is a first derivative, with an error of our own where it is differentiated again."""
    run = jax.custom_jvp(run)
    run.defjvp(partial(_refuse, SECOND))
    return run


def folding(run: Any) -> Any:
    """`run`, under vmap one call over a larger batch."""
    folded = jax.custom_batching.custom_vmap(run)

    @folded.def_vmap
    def rule(size, batched, *args):
        def fold(x, is_batched):
            x = x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        if size == 0:
            one = jax.tree.map(lambda x, b: jnp.zeros(x.shape[1:] if b else x.shape, x.dtype), args, tuple(batched))
            outs = jax.tree.map(lambda x: jnp.zeros((0, *x.shape), x.dtype), jax.eval_shape(run, *one))
            return outs, jax.tree.map(lambda _: True, outs)
        outs = folding(run)(*jax.tree.map(fold, args, tuple(batched)))
        return jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), outs), jax.tree.map(lambda _: True, outs)

    return folded


def differentiable(forward: Any, backward: Any) -> Any:
    """attend(options, q, k, v, sinks, q_segment_ids, kv_segment_ids) -> (out, lse), with a derivative in reverse mode.

    forward gives out [B,T,H,Dv] and lse [B,H,>=T]; backward(options, q, k, v, do, lse, delta, q_segment_ids,
    kv_segment_ids) gives dq, dk, dv.
    """

    @partial(jax.custom_vjp, nondiff_argnums=(0,))
    def attend(options, q, *others):
        out, lse = forward(options, q, *others)
        return out, lse[:, :, : q.shape[1]]

    def attend_fwd(options, *arrays):
        out, lse = attend(options, *arrays)
        return (out, lse), (*arrays, out, lse)

    def attend_bwd(options, saved, cotangents):
        q, k, v, sinks, q_seg, kv_seg, out, lse = saved
        do, dlse = cotangents
        # Without the barrier XLA may compute delta from a cotangent that it did not round yet, which no kernel sees.
        do = lax.optimization_barrier(do)
        sums = delta(out, do, lse, dlse)
        dq, dk, dv = backward(options, q, k, v, do, lse, sums, q_seg, kv_seg)
        return dq, dk, dv, dsinks(sinks, lse, sums), None, None

    attend.defvjp(attend_fwd, attend_bwd)
    return attend


def delta(out: Array, do: Array, lse: Array, dlse: Array) -> Array:
    """What FlashAttention's backward takes off dP: out, do [B,T,H,Dv], lse, dlse [B,H,T] -> float32 [B,H,T]."""
    # XLA would fuse the sum into what reorders it, at a third of the speed.
    sums = lax.optimization_barrier((out.astype(jnp.float32) * do.astype(jnp.float32)).sum(axis=-1))
    return sums.swapaxes(1, 2) - jnp.where(jnp.isneginf(lse), 0.0, dlse)


def dsinks(sinks: Array | None, lse: Array, delta: Array) -> Array | None:
    """The gradient of sinks [H]; lse, delta [B,H,T]."""
    if sinks is None:
        return None
    weights = jnp.where(jnp.isneginf(lse), 0.0, jnp.exp(sinks.astype(jnp.float32)[None, :, None] - lse))
    return -(weights * delta).sum(axis=(0, 2)).astype(sinks.dtype)
