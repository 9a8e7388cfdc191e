"""What the Hopper flash kernels share above tiles: the problem, index arithmetic, and which blocks segments join."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LOG2E = math.log2(math.e)
TINY = 1e-30
ROWS = 64  # rows of a product that one warpgroup computes


@dataclass(frozen=True)
class Problem:
    """What is static in a call."""

    batch: int
    q_len: int
    kv_len: int
    heads: int
    kv_heads: int
    head_dim: int
    v_dim: int
    left: int | None
    right: int | None
    scale: float
    softcap: float | None

    @property
    def offset(self) -> int:
        """Position of the first query."""
        return self.kv_len - self.q_len

    @property
    def shaped(self) -> bool:
        """Whether scores need more than a positive factor before exp2; one too small would lose the mask's infinity."""
        return self.softcap is not None or self.scale < TINY

    @property
    def exponent(self) -> float:
        """The factor that exp2 sees."""
        if self.softcap is not None:
            return self.softcap * LOG2E
        return LOG2E * (1.0 if self.scale < TINY else self.scale)


def divide(x, by):
    by = jnp.asarray(by, jnp.int32)
    return lax.div(x, by), lax.rem(x, by)


def iota(size: int, layout) -> Array:
    return plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout)


def load_segments(segments, batch, start, size: int, layout) -> Array:
    return plgpu.load(segments.at[batch, pl.ds(start, size)], layout=layout, optimized=False)


def pad_segments(segments: Array, length: int) -> Array:
    return jnp.pad(segments.astype(jnp.int32), ((0, 0), (0, length - segments.shape[1])), mode="edge")


def extremes(segments: Array, size: int) -> tuple[Array, Array]:
    blocks = segments.reshape(segments.shape[0], -1, size)
    return blocks.min(axis=-1), blocks.max(axis=-1)


def may_meet(low: Array, high: Array, other_low: Array, other_high: Array) -> Array:
    """[B,n] and [B,m] -> [B,n,m], whether two blocks may have a segment in common."""
    return (other_low[:, None] <= high[..., None]) & (other_high[:, None] >= low[..., None])


def in_range(lo: Array, hi: Array, size: int) -> Array:
    """[n] -> [1,n,size], whether an index is in [lo, hi)."""
    index = jnp.arange(size, dtype=jnp.int32)[None, None]
    return (index >= lo[None, :, None]) & (index < hi[None, :, None])


def span(marked: Array) -> tuple[Array, Array]:
    """[B,n,m] -> the smallest [lo, hi) that holds every mark; lo is m where there is none."""
    index = jnp.arange(marked.shape[-1], dtype=jnp.int32)[None, None]
    return jnp.where(marked, index, marked.shape[-1]).min(axis=-1), jnp.where(marked, index + 1, 0).max(axis=-1)


def same_segment(low: Array, high: Array, other_low: Array, other_high: Array) -> tuple[Array, Array]:
    """[B,n] and [B,m] -> the [lo, hi) of blocks that are of one segment with a block; empty if they are scattered."""
    one = (low == high)[..., None] & (other_low == other_high)[:, None] & (low[..., None] == other_low[:, None])
    lo, hi = span(one)
    return lo, jnp.where(one.sum(axis=-1) == hi - lo, hi, lo)


def run_of(low: Array, high: Array, ids: Array, lo: Array, hi: Array) -> tuple[Array, Array, Array]:
    """Of tiles whose ids are from low to high [B,n], what in [lo, hi) [n] of the other side's ids [B,S] they may meet.

    Returns the smallest [first, end) with all of it, and whether some of that is not of one segment with all the tile.
    One reduction: nothing of the size of tiles x S is in memory.
    """
    size = ids.shape[1]
    met = (ids[:, None] >= low[..., None]) & (ids[:, None] <= high[..., None]) & in_range(lo, hi, size)
    index = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), met.shape)
    of_each = jnp.where(met, index, size), jnp.where(met, index + 1, 0), met.astype(jnp.int32)
    first, end, count = lax.reduce(of_each, (jnp.int32(size), jnp.int32(0), jnp.int32(0)), _extremes_and_sum, (2,))
    return first, end, (low != high) | (count != end - first)


def _extremes_and_sum(a, b):
    return jnp.minimum(a[0], b[0]), jnp.maximum(a[1], b[1]), a[2] + b[2]
