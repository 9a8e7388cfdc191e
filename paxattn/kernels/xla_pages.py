"""write_pages in plain XLA: a scatter for each array; runs anywhere."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


def write_pages(pages: Any, new: Any, slots: Array) -> Any:
    """Every array [N,P,...] of `pages` with the tokens [T,...] of `new` at slots [T], but for those in no page."""
    num_pages, page_size = jax.tree.leaves(pages)[0].shape[:2]
    valid = (slots >= 0) & (slots < num_pages * page_size)
    at = (slots // page_size, slots % page_size)
    return jax.tree.map(lambda into, x: put(into, at, valid, x), pages, new)


def put(into: Array, at: tuple[Array, ...], valid: Array, x: Array) -> Array:
    """into[at] = x where valid, in place."""
    if len(x) != 1:
        at = tuple(i.astype(jnp.int32) for i in at)
        return into.at[(jnp.where(valid, at[0], len(into)), *at[1:])].set(x, mode="drop")
    # Of a scatter of one row XLA makes a select over all pages, and without the barrier it writes once a reader.
    first = tuple(jnp.where(valid[0], i[0], 0) for i in at)
    x = jnp.where(valid[0], x[0], into[first])
    rest = (0,) * (into.ndim - len(at))
    return lax.optimization_barrier(lax.dynamic_update_slice(into, x[(None,) * len(at)], (*first, *rest)))


write_compressed_pages = write_pages
