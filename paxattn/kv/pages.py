"""KVPages: the pages of one layer. Their layout is known here and in the kernels alone."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from paxattn import checks


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVPages:
    """Keys and values of one layer in pages of P tokens. A pytree; replaced, never mutated.

    Fields:
      k, v: [N,P,K,D]
    """

    k: Array
    v: Array

    @property
    def num_pages(self) -> int:
        return self.k.shape[0]

    @property
    def page_size(self) -> int:
        return self.k.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        return self.k.shape[3]


def init_pages(num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: Any = jnp.bfloat16) -> KVPages:
    """Empty pages for one layer.

    Raises:
      ValueError: a size is not a positive int, or dtype is not bfloat16, float16 or float32.
    """
    sizes = dict(num_pages=num_pages, page_size=page_size, num_kv_heads=num_kv_heads, head_dim=head_dim)
    for name, size in sizes.items():
        checks.check_positive_int(name, size)
    dtype = jnp.dtype(dtype)
    checks.require(dtype.name in checks.FLOATS, "dtype", dtype, f"one of {', '.join(checks.FLOATS)}")
    shape = tuple(sizes.values())
    return KVPages(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))


def write_pages(pages: KVPages, k: Float[Array, "T K D"], v: Float[Array, "T K D"], slots: Int[Array, "T"]) -> KVPages:
    """Write T tokens; in place where `pages` is donated.

    Args:
      pages: one layer's.
      k, v: [T,K,D], cast to the pages' dtype.
      slots: [T] ints, page * P + offset; a negative slot is skipped. No slot stands twice.

    Raises:
      ValueError: an argument does not fit; the message names it.
    """
    num_pages, page_size, *head = pages.k.shape
    checks.check_rank("k", k, "T K D")
    checks.check_shape("k", k, (k.shape[0], *head), "T K D")
    checks.check_shape("v", v, k.shape, "T K D")
    checks.check_ints("slots", slots, (k.shape[0],), "T")
    valid = (slots >= 0) & (slots < num_pages * page_size)
    at = (slots // page_size, slots % page_size)
    return KVPages(k=_put(pages.k, at, valid, k), v=_put(pages.v, at, valid, v))


def copy_pages(pages: KVPages, src: Int[Array, "F"], dst: Int[Array, "F"]) -> KVPages:
    """Copy page src[i] onto page dst[i]; a negative dst is skipped. Every src is read before any dst is written.

    Raises:
      ValueError: src and dst are not int arrays of one length.
    """
    checks.check_rank("src", src, "F")
    checks.check_ints("src", src, src.shape, "F")
    checks.check_ints("dst", dst, src.shape, "F")
    valid = (dst >= 0) & (dst < pages.num_pages)
    src = jnp.maximum(src, 0)
    return KVPages(k=_put(pages.k, (dst,), valid, pages.k[src]), v=_put(pages.v, (dst,), valid, pages.v[src]))


def _put(into: Array, at: tuple[Array, ...], valid: Array, x: Array) -> Array:
    """into[at] = x where valid, in place."""
    x = x.astype(into.dtype)
    if len(x) > 1:
        return into.at[(jnp.where(valid, at[0], len(into)), *at[1:])].set(x, mode="drop")
    # Of a scatter of one row XLA makes a select over all pages, and without the barrier it writes once a reader.
    first = tuple(jnp.where(valid[0], i[0], 0) for i in at)
    x = jnp.where(valid[0], x[0], into[first])
    rest = (0,) * (into.ndim - len(at))
    return lax.optimization_barrier(lax.dynamic_update_slice(into, x[(None,) * len(at)], (*first, *rest)))
