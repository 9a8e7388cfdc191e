"""KVPages: the pages of one layer, plain or compressed. Their layout is known here and in the kernels alone."""

from dataclasses import dataclass, field, replace
from math import gcd, prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from paxattn import checks, dispatch
from paxattn.kernels import codes, xla_pages
from paxattn.kernels.codes import COMPRESSED

KEY_GROUP = 16
LANES = 128  # of a TPU's registers


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVPages:
    """Keys and values of one layer in pages of P tokens, plain or compressed. A pytree; replaced, never mutated.

    Compressed, D is cut into C equal groups, and each number stands for itself times its group's scale. Some channels
    are far larger than others, so all are stored rotated, which spreads them (QuaRot, Ashkboos et al. 2024; see
    `kernels.codes.rotate`). Attention is more sensitive to keys than to values (KIVI, Liu et al. 2024), so keys have
    more groups.

    Fields:
      k, v: [N,P,K,D], bfloat16, float16, float32, int8 or float8_e4m3fn; where h = heads_a_row is not 1, [N,P,K/h,h*D]
      k_scale, v_scale: float16 [N,P,K,C] where k and v are compressed (what is below about 1e-5 is lost, what is
        beyond 8e6 cut off), else None;
        C is D / 16 for keys (1 where that is not whole) and 1 for values; [N,P,K/h,h*C] beside [N,P,K/h,h*D], and
        [N,h*C,P*K/h] where scales_turned
      heads_a_row: static, how many heads lie side by side, as `init_pages` makes them on a TPU: arrays of rows shorter
        than a register XLA keeps there in an order in which a page lies nowhere together
      scales_turned: static, whether scales stand so, as `init_pages` makes them on a TPU for the same reason. XLA turns
        arrays of single rows, too, so that values have two groups where h is 1.
    """

    k: Array
    v: Array
    k_scale: Array | None = None
    v_scale: Array | None = None
    heads_a_row: int = field(default=1, kw_only=True, metadata=dict(static=True))
    scales_turned: bool = field(default=False, kw_only=True, metadata=dict(static=True))

    @property
    def num_pages(self) -> int:
        return self.k.shape[0]

    @property
    def page_size(self) -> int:
        return self.k.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.k.shape[2] * self.heads_a_row

    @property
    def head_dim(self) -> int:
        return self.k.shape[3] // self.heads_a_row

    def apart(self) -> "KVPages":
        """The same with each head in a row of its own, and its scales in another."""
        rows = (self.num_pages, self.page_size, self.num_kv_heads)
        turned = lambda x: x.swapaxes(1, 2) if x.ndim == 3 else x
        apart = jax.tree.map(lambda x: turned(x).reshape(*rows, x.size // prod(rows)), self)
        return replace(apart, heads_a_row=1, scales_turned=False)


def init_pages(num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: Any = jnp.bfloat16) -> KVPages:
    """Empty pages for one layer.

    Raises:
      ValueError: a size is not a positive int, or dtype is not bfloat16, float16, float32, int8 or float8_e4m3fn.
    """
    sizes = dict(num_pages=num_pages, page_size=page_size, num_kv_heads=num_kv_heads, head_dim=head_dim)
    for name, size in sizes.items():
        checks.check_positive_int(name, size)
    dtype = checks.check_dtype("dtype", dtype, (*checks.FLOATS, *COMPRESSED))
    together = _heads_a_row(num_kv_heads, head_dim)
    shape = (num_pages, page_size, num_kv_heads // together, together * head_dim)
    pages = KVPages(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), heads_a_row=together)
    if dtype.name not in COMPRESSED:
        return pages
    turned = _scales_turned(*shape[1:])
    key_groups = 1 if head_dim % KEY_GROUP else head_dim // KEY_GROUP
    groups = together * key_groups, max(2, together) if turned else together
    by_group = lambda count: (num_pages, count, page_size * shape[2]) if turned else (*shape[:3], count)
    k_scale, v_scale = (jnp.zeros(by_group(count), jnp.float16) for count in groups)
    return replace(pages, k_scale=k_scale, v_scale=v_scale, scales_turned=turned)


def check_pages(pages: Any) -> None:
    """Raise a ValueError unless they are KVPages whose arrays fit each other."""
    checks.require(isinstance(pages, KVPages), "pages", type(pages).__name__, "KVPages")
    arrays = pages.k, pages.v, pages.k_scale, pages.v_scale
    told = [None if x is None else f"{x.dtype}{list(x.shape)}" for x in arrays]
    checks.require(pages.k.ndim == 4 and told[0] == told[1], "pages", f"k {told[0]}, v {told[1]}", "alike, of 4 axes")
    scaled = [x is not None for x in arrays[2:]]
    must = "scales of k and v where they are of int8 or float8_e4m3fn, and none elsewhere"
    checks.require(scaled == [pages.k.dtype.name in COMPRESSED] * 2, "pages", f"k {told[0]}, scales {told[2:]}", must)


def _scales_turned(page_size: int, rows: int, width: int) -> bool:
    """Where a page's codes and scales both lie together on a TPU: rows fill registers, and scales their lanes."""
    whole = width == LANES and (rows in (1, 4) or rows % 8 == 0) and page_size * rows % LANES == 0
    return whole and dispatch.platform() == "tpu"


def _heads_a_row(num_kv_heads: int, head_dim: int) -> int:
    """On a TPU as many as fill whole registers of its lanes, where there are as many."""
    together = LANES // gcd(head_dim, LANES)
    return together if num_kv_heads % together == 0 and dispatch.platform() == "tpu" else 1


def write_pages(
    pages: KVPages,
    k: Float[Array, "T K D"],
    v: Float[Array, "T K D"],
    slots: Int[Array, "T"],
    *,
    implementation: str | None = None,
) -> KVPages:
    """Write T tokens; in place where `pages` is donated.

    Args:
      pages: one layer's.
      k, v: [T,K,D], real numbers of any dtype; cast to the pages' dtype or compressed.
      slots: [T] ints, page * P + offset; a negative slot is skipped. No slot stands twice.
      implementation: None (the best for the platform), "xla", "mosaic_gpu" or "mosaic_tpu".

    Raises:
      ValueError: an argument does not fit; the message names it.
      NotImplementedError: the implementation asked for cannot serve the call; the message names the feature.
    """
    check_pages(pages)
    head = pages.num_kv_heads, pages.head_dim
    checks.check_rank("k", k, "T K D")
    checks.check_shape("k", k, (k.shape[0], *head), "T K D")
    checks.check_shape("v", v, k.shape, "T K D")
    for name, x in (("k", k), ("v", v)):
        real = jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)
        checks.require(real, name, f"dtype {x.dtype}", "of real numbers")
    checks.check_ints("slots", slots, (k.shape[0],), "T")
    pages, k, v = jax.tree.map(jnp.asarray, (pages, k, v))
    if pages.k_scale is not None:
        return dispatch.call("write_compressed_pages", implementation, pages, k, v, checks.int32(slots))
    k, v = (codes.side_by_side(pages, x.astype(pages.k.dtype)) for x in (k, v))
    return dispatch.call("write_pages", implementation, pages, replace(pages, k=k, v=v), checks.int32(slots))


def lay_out(q: Array, k: Array, v: Array, implementation: str | None) -> tuple[Array, Array, Array]:
    """What a step brings, in memory as the kernels that will read it want it."""
    return dispatch.call("lay_out", implementation, q, k, v)


def copy_pages(pages: KVPages, src: Int[Array, "F"], dst: Int[Array, "F"]) -> KVPages:
    """Copy page src[i] onto page dst[i]; a negative dst is skipped. Every src is read before any dst is written.

    Raises:
      ValueError: src and dst are not int arrays of one length.
    """
    check_pages(pages)
    checks.check_rank("src", src, "F")
    checks.check_ints("src", src, src.shape, "F")
    checks.check_ints("dst", dst, src.shape, "F")
    pages, src = jax.tree.map(jnp.asarray, pages), jnp.maximum(checks.int32(src), 0)
    return put_pages(pages, checks.int32(dst), jax.tree.map(lambda x: x[src], pages))


def take_pages(pages: KVPages, ids: Array) -> KVPages:
    """Pages ids [F] as pages of their own; zeros for a negative one."""

    def take(x: Array) -> Array:
        there = (ids >= 0).reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.where(there, x[jnp.maximum(ids, 0)], jnp.zeros((), x.dtype))

    return jax.tree.map(take, pages)


def put_pages(pages: KVPages, ids: Array, new: KVPages) -> KVPages:
    """Write page i of `new` onto page ids[i], ids [F]; a negative one is skipped."""
    valid = (ids >= 0) & (ids < pages.num_pages)
    return jax.tree.map(lambda into, x: xla_pages.put(into, (ids,), valid, x), pages, new)


def clear_pages(pages: KVPages, ids: Array) -> KVPages:
    """Zero the pages ids [F]; a negative one is skipped."""
    return put_pages(pages, ids, take_pages(pages, jnp.full_like(ids, -1)))
