"""KVPages: the pages of one layer, plain or compressed. Their layout is known here and in the kernels alone."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from paxattn import checks

COMPRESSED = {"int8": 127.0, "float8_e4m3fn": 448.0}  # the largest number that is used of each


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVPages:
    """Keys and values of one layer in pages of P tokens, plain or compressed. A pytree; replaced, never mutated.

    Compressed, a token's key or value of one head is k * k_scale or v * v_scale.

    Fields:
      k, v: [N,P,K,D], bfloat16, float16, float32, int8 or float8_e4m3fn
      k_scale, v_scale: bfloat16 [N,P,K] where k and v are compressed, else None
    """

    k: Array
    v: Array
    k_scale: Array | None = None
    v_scale: Array | None = None

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
      ValueError: a size is not a positive int, or dtype is not bfloat16, float16, float32, int8 or float8_e4m3fn.
    """
    sizes = dict(num_pages=num_pages, page_size=page_size, num_kv_heads=num_kv_heads, head_dim=head_dim)
    for name, size in sizes.items():
        checks.check_positive_int(name, size)
    dtype = jnp.dtype(dtype)
    known = (*checks.FLOATS, *COMPRESSED)
    checks.require(dtype.name in known, "dtype", dtype, f"one of {', '.join(known)}")
    shape = tuple(sizes.values())
    pages = KVPages(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))
    if dtype.name not in COMPRESSED:
        return pages
    return replace(pages, k_scale=jnp.zeros(shape[:3], jnp.bfloat16), v_scale=jnp.zeros(shape[:3], jnp.bfloat16))


def write_pages(pages: KVPages, k: Float[Array, "T K D"], v: Float[Array, "T K D"], slots: Int[Array, "T"]) -> KVPages:
    """Write T tokens; in place where `pages` is donated.

    Args:
      pages: one layer's.
      k, v: [T,K,D], cast to the pages' dtype, or compressed by a token's and head's own scale.
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
    return jax.tree.map(lambda into, x: _put(into, at, valid, x), pages, _encode(pages, k, v))


def _encode(pages: KVPages, k: Array, v: Array) -> KVPages:
    """[T,K,D] as the pages hold them."""
    if pages.k_scale is None:
        return KVPages(k.astype(pages.k.dtype), v.astype(pages.v.dtype))
    (k, k_scale), (v, v_scale) = _compress(k, pages.k.dtype), _compress(v, pages.v.dtype)
    return KVPages(k, v, k_scale, v_scale)


def _compress(x: Array, dtype: Any) -> tuple[Array, Array]:
    """x [T,K,D] as dtype, and its scale bfloat16 [T,K]: the largest number of D becomes the dtype's."""
    most = COMPRESSED[dtype.name]
    x = x.astype(jnp.float32)
    # Divided by what is stored, so that the scale's own rounding costs no precision.
    scale = (jnp.max(jnp.abs(x), axis=-1) / most).astype(jnp.bfloat16)
    x = x / jnp.where(scale > 0, scale, 1).astype(jnp.float32)[..., None]
    x = jnp.clip(jnp.round(x) if dtype == jnp.int8 else x, -most, most)
    return x.astype(dtype), scale


def copy_pages(pages: KVPages, src: Int[Array, "F"], dst: Int[Array, "F"]) -> KVPages:
    """Copy page src[i] onto page dst[i]; a negative dst is skipped. Every src is read before any dst is written.

    Raises:
      ValueError: src and dst are not int arrays of one length.
    """
    checks.check_rank("src", src, "F")
    checks.check_ints("src", src, src.shape, "F")
    checks.check_ints("dst", dst, src.shape, "F")
    return put_pages(pages, dst, jax.tree.map(lambda x: x[jnp.maximum(src, 0)], pages))


def take_pages(pages: KVPages, ids: Array) -> KVPages:
    """Pages ids [F] as pages of their own; zeros for a negative one."""

    def take(x: Array) -> Array:
        there = (ids >= 0).reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.where(there, x[jnp.maximum(ids, 0)], jnp.zeros((), x.dtype))

    return jax.tree.map(take, pages)


def put_pages(pages: KVPages, ids: Array, new: KVPages) -> KVPages:
    """Write page i of `new` onto page ids[i], ids [F]; a negative one is skipped."""
    valid = (ids >= 0) & (ids < pages.num_pages)
    return jax.tree.map(lambda into, x: _put(into, (ids,), valid, x), pages, new)


def clear_pages(pages: KVPages, ids: Array) -> KVPages:
    """Zero the pages ids [F]; a negative one is skipped."""
    return put_pages(pages, ids, take_pages(pages, jnp.full_like(ids, -1)))


def _put(into: Array, at: tuple[Array, ...], valid: Array, x: Array) -> Array:
    """into[at] = x where valid, in place."""
    if len(x) > 1:
        return into.at[(jnp.where(valid, at[0], len(into)), *at[1:])].set(x, mode="drop")
    # Of a scatter of one row XLA makes a select over all pages, and without the barrier it writes once a reader.
    first = tuple(jnp.where(valid[0], i[0], 0) for i in at)
    x = jnp.where(valid[0], x[0], into[first])
    rest = (0,) * (into.ndim - len(at))
    return lax.optimization_barrier(lax.dynamic_update_slice(into, x[(None,) * len(at)], (*first, *rest)))
