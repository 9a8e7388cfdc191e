"""The streaming softmax that the XLA kernels share (Milakov and Gimelshein 2018; Rabe and Staats 2021).

Queries are [B,K,G,T,D], keys [B,K,S,D], values [B,K,S,Dv]; B may be any batch of tiles. A state is (m, l, acc)
over the keys seen so far: the largest score [B,K,G,T], the sum of exp(score - m) [B,K,G,T], and the sum of
exp(score - m) * value [B,K,G,T,Dv], all float32; -inf, 0 and 0 where nothing was seen.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

State = tuple[Array, Array, Array]
SMALL = 1 << 17  # elements of keys or values


def scores(q: Array, k: Array, scale: float, softcap: float | None) -> Array:
    if _goes_by_member(q, k):
        s = _by_member(q, lambda q: jnp.einsum("bksd,bkd->bks", k, q, preferred_element_type=jnp.float32))
    elif q.shape[2] * q.shape[3] < k.shape[2]:
        # A CPU copies the second operand into another layout first, so the larger one is the first.
        s = jnp.einsum("bksd,bkgtd->bksgt", k, q, preferred_element_type=jnp.float32).transpose(0, 1, 3, 4, 2)
    else:
        s = jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=jnp.float32)
    s *= scale
    return s if softcap is None else softcap * jnp.tanh(s / softcap)


def weigh(p: Array, v: Array) -> Array:
    p = p.astype(v.dtype)
    if _goes_by_member(p, v):
        return _by_member(p, lambda p: jnp.einsum("bks,bksd->bkd", p, v, preferred_element_type=jnp.float32))
    return jnp.einsum("bkgts,bksd->bkgtd", p, v, preferred_element_type=jnp.float32)


def _goes_by_member(x: Array, y: Array) -> bool:
    """Whether to multiply a single query's group one by one.

    On a CPU, XLA runs G small matrix-vector products up to four times as fast as one small matrix product.
    """
    return x.shape[3] == 1 and y.size <= SMALL and jax.default_backend() == "cpu"


def _by_member(x: Array, product: Callable[[Array], Array]) -> Array:
    """A product of x [B,K,G,1,...] for each member of the group, one at a time."""
    return jnp.stack([product(x[:, :, g, 0]) for g in range(x.shape[2])], axis=2)[:, :, :, None]


def init(q: Array, v: Array) -> State:
    shape = q.shape[:-1]
    state = (
        jnp.full(shape, -jnp.inf, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, v.shape[-1]), jnp.float32),
    )
    return vary_like(state, q, v)


def vary_like(tree: Any, *arrays: Array) -> Any:
    """The leaves of `tree`, varying over all axes of shard_map that any of the arrays varies over.

    A loop's first carry must vary as its later ones will, and what a kernel returns as its operands do.
    """
    axes = frozenset().union(*(_varying(x) for x in arrays))

    def vary(x: Array) -> Array:
        missing = axes - _varying(x)
        return lax.pcast(x, tuple(missing), to="varying") if missing else x

    return jax.tree.map(vary, tree)


def _varying(x: Array) -> frozenset:
    return jax.typeof(x).manual_axis_type.varying


def update(state: State, s: Array, v: Array) -> State:
    """Take in a block of scores, -inf where masked, and its values."""
    m, l, acc = state
    m_new = jnp.maximum(m, s.max(axis=-1))
    base = finite(m_new)
    p = jnp.exp(s - base[..., None])
    fade = jnp.exp(m - base)
    return m_new, l * fade + p.sum(axis=-1), acc * fade[..., None] + weigh(p, v)


def finish(state: State, sinks: Array | None) -> tuple[Array, Array]:
    """Output and log-sum-exp; sinks broadcast against l. Where nothing was seen: 0 and -inf."""
    m, l, acc = state
    seen = l > 0
    if sinks is not None:
        m_all = jnp.maximum(m, sinks)
        fade = jnp.exp(m - m_all)
        m, l, acc = m_all, l * fade + jnp.exp(sinks - m_all), acc * fade[..., None]
    l = jnp.where(seen, l, 1.0)
    out = jnp.where(seen[..., None], acc / l[..., None], 0.0)
    return out, jnp.where(seen, m + jnp.log(l), -jnp.inf)


def finite(m: Array) -> Array:
    """-inf replaced by 0, so that exp(-inf - m) is 0 and not NaN."""
    return jnp.where(jnp.isneginf(m), 0.0, m)
