"""Block ranges and mask arithmetic, pure: what a window lets a query see, in positions.

`left` and `right` are how many keys before and after its own position a query sees; None = all.
"""

import jax.numpy as jnp
from jax import Array


def in_window(q_pos: Array, kv_pos: Array, left: int | None, right: int | None) -> Array:
    """Whether the query at q_pos sees the key at kv_pos; the two broadcast."""
    seen = jnp.broadcast_to(jnp.asarray(True), jnp.broadcast_shapes(q_pos.shape, kv_pos.shape))
    if left is not None:
        seen &= kv_pos >= q_pos - left
    if right is not None:
        seen &= kv_pos <= q_pos + right
    return seen


def block_in_window(q_lo: Array, q_hi: Array, kv_lo: Array, kv_hi: Array, left: int | None, right: int | None):
    """Whether any query of [q_lo, q_hi) sees any key of [kv_lo, kv_hi)."""
    live = jnp.asarray(True)
    if left is not None:
        live &= kv_hi > q_lo - left
    if right is not None:
        live &= kv_lo < q_hi + right
    return live


def cdiv(a, b):
    return -(-a // b)


def extremes(segments: Array, size: int) -> tuple[Array, Array]:
    """Of segments [B,n] in blocks of `size`: the lowest and the highest id of each, [B,n / size]."""
    blocks = segments.reshape(segments.shape[0], -1, size)
    return blocks.min(axis=-1), blocks.max(axis=-1)
