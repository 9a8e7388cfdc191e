"""write_pages in plain XLA: a scatter for each array; runs anywhere."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from paxattn.kernels import codes


def lay_out(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """As they come."""
    return q, k, v


def write_pages(pages: Any, new: Any, slots: Array) -> Any:
    """Every array [N,P,...] of `pages` with the tokens [T,...] of `new` at slots [T], but for those in no page.

    Of turned scales [N,C,P*K] the tokens are [T,K,C].
    """
    num_pages, page_size = jax.tree.leaves(pages)[0].shape[:2]
    valid = (slots >= 0) & (slots < num_pages * page_size)
    at = (slots // page_size, slots % page_size)
    return jax.tree.map(lambda into, x: (put if into.ndim == 4 else _put_turned)(into, at, valid, x), pages, new)


def put(into: Array, at: tuple[Array, ...], valid: Array, x: Array) -> Array:
    """into[at] = x where valid, in place."""
    if len(x) != 1:
        at = tuple(i.astype(jnp.int32) for i in at)
        return into.at[(jnp.where(valid, at[0], len(into)), *at[1:])].set(x, mode="drop")
    # Of a scatter of one row XLA makes a select over all pages, and without the barrier it writes once a reader.
    first = tuple(jnp.where(valid[0], i[0], 0).astype(jnp.int32) for i in at)
    x = jnp.where(valid[0], x[0], into[first])
    rest = (jnp.int32(0),) * (into.ndim - len(at))
    return lax.optimization_barrier(lax.dynamic_update_slice(into, x[(None,) * len(at)], (*first, *rest)))


def _put_turned(into: Array, at: tuple[Array, Array], valid: Array, x: Array) -> Array:
    """x [T,K,C] at page and token, of into [N,C,P*K], where valid, in place.

    A token's page is written as a whole, with all new tokens that are in it: of a scatter of columns XLA makes a loop
    over tokens, or two copies of all pages.
    """
    (tokens, heads, groups), (num_pages, _, columns) = x.shape, into.shape
    page = jnp.where(valid, at[0], 0)
    nobody = jnp.full((num_pages, columns // heads), -1, jnp.int32)
    writer = nobody.at[jnp.where(valid, page, num_pages), at[1]].set(jnp.arange(tokens, dtype=jnp.int32), mode="drop")
    mine = writer[page]  # [T,P]
    new = x[jnp.maximum(mine, 0)].reshape(tokens, columns, groups).swapaxes(1, 2)
    written = jnp.repeat(mine >= 0, heads, axis=1)[:, None]
    return put(into, (page,), valid, jnp.where(written, new, into[page]))


def write_compressed_pages(pages: Any, k: Array, v: Array, slots: Array) -> Any:
    """`pages`, compressed, with k, v [T,K,D] at slots [T], but for those in no page."""
    return write_pages(pages, codes.encode(pages, k, v), slots)
