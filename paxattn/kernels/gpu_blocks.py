"""What the Hopper flash kernels share above tiles: index arithmetic, and which blocks segments join."""

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from paxattn.kernels import tiles

ROWS = 64  # rows of a product that one warpgroup computes


def divide(x, by):
    by = jnp.asarray(by, jnp.int32)
    return lax.div(x, by), lax.rem(x, by)


def iota(size: int, layout) -> Array:
    return plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout)


def load_segments(segments, batch, start, size: int, layout) -> Array:
    return plgpu.load(segments.at[batch, pl.ds(start, size)], layout=layout, optimized=False)


def pad_segments(segments: Array, length: int) -> Array:
    return jnp.pad(segments.astype(jnp.int32), ((0, 0), (0, length - segments.shape[1])), mode="edge")


def may_meet(low: Array, high: Array, other_low: Array, other_high: Array) -> Array:
    """[B,n] and [B,m] -> [B,n,m], whether two blocks may have a segment in common."""
    return (other_low[:, None] <= high[..., None]) & (other_high[:, None] >= low[..., None])


def in_range(lo: Array, hi: Array, size: int) -> Array:
    """[n] -> [1,n,size], whether an index is in [lo, hi)."""
    index = jnp.arange(size)[None, None]
    return (index >= lo[None, :, None]) & (index < hi[None, :, None])


def span(marked: Array) -> tuple[Array, Array]:
    """[B,n,m] -> the smallest [lo, hi) that holds every mark; lo is m where there is none."""
    index = jnp.arange(marked.shape[-1])[None, None]
    return jnp.where(marked, index, marked.shape[-1]).min(axis=-1), jnp.where(marked, index + 1, 0).max(axis=-1)


def same_segment(low: Array, high: Array, other_low: Array, other_high: Array) -> tuple[Array, Array]:
    """[B,n] and [B,m] -> the [lo, hi) of blocks that are of one segment with a block; empty if they are scattered."""
    one = (low == high)[..., None] & (other_low == other_high)[:, None] & (low[..., None] == other_low[:, None])
    lo, hi = span(one)
    return lo, jnp.where(one.sum(axis=-1) == hi - lo, hi, lo)


def run_of(low: Array, high: Array, ids: Array, size: int, lo: Array, hi: Array) -> tuple[Array, Array, Array]:
    """Of tiles whose ids are from low to high [B,n], which of the other side's ids [B,S] they meet in blocks [lo, hi).

    Returns a range [first, end) with all of them, and whether it has others or not all of the tile meets them. Where
    all is of one segment, only the first and the last block are looked into.
    """
    blocks, index = ids.reshape(ids.shape[0], -1, size), jnp.arange(size)[None, None]
    at_lo, at_end = (jnp.take_along_axis(blocks, x[..., None], axis=1) == low[..., None] for x in (lo, hi - 1))
    first = lo * size + jnp.where(at_lo, index, size).min(axis=-1)
    end = (hi - 1) * size + jnp.where(at_end, index + 1, 0).max(axis=-1)
    one_lo, one_hi = same_segment(low, high, *tiles.extremes(ids, size))
    between = jnp.maximum(hi - lo - 2, 0)
    same_between = (between == 0) | ((one_lo <= lo + 1) & (one_hi >= hi - 1))
    found = at_lo.sum(axis=-1) + jnp.where(hi - lo > 1, at_end.sum(axis=-1), 0) + between * size
    mixed = (low != high) | ~same_between | (found != end - first)
    return jnp.where(mixed, lo * size, first), jnp.where(mixed, hi * size, end), mixed
