"""KVPages: the pages of one layer. Their layout is known here and in the kernels alone."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
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
    beyond = num_pages * page_size
    slots = jnp.where(slots < 0, beyond, slots)

    def write(into: Array, x: Array) -> Array:
        flat = into.reshape(beyond, *head)
        return flat.at[slots].set(x.astype(into.dtype), mode="drop").reshape(into.shape)

    return KVPages(k=write(pages.k, k), v=write(pages.v, v))


def copy_pages(pages: KVPages, src: Int[Array, "F"], dst: Int[Array, "F"]) -> KVPages:
    """Copy page src[i] onto page dst[i]; a negative dst is skipped. Every src is read before any dst is written.

    Raises:
      ValueError: src and dst are not int arrays of one length.
    """
    checks.check_rank("src", src, "F")
    checks.check_ints("src", src, src.shape, "F")
    checks.check_ints("dst", dst, src.shape, "F")
    dst = jnp.where(dst < 0, pages.num_pages, dst)

    def copy(x: Array) -> Array:
        return x.at[dst].set(x[jnp.maximum(src, 0)], mode="drop")

    return KVPages(k=copy(pages.k), v=copy(pages.v))
