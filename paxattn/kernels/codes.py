"""Keys and values as codes of 8 bits and scales, in plain XLA; `KVPages` says what they stand for."""

from dataclasses import replace
from functools import cache, partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

COMPRESSED = {"int8": 127.0, "float8_e4m3fn": 448.0}  # the largest number that is used of each
TRIED_SCALES = 8
LARGEST_SCALE = 65504.0  # of float16; what it makes too small for the numbers of a group cuts them off
SMALLEST_UNIT = 1e-30  # Far below it the inverse overflows, and far above it a scale of float16 is 0.


def encode(pages: Any, k: Array, v: Array) -> Any:
    """k, v [T,K,D], rotated and compressed as `pages` hold them."""
    groups = lambda scale: scale.size * pages.head_dim // pages.k.size
    k, k_scale = compress(rotate(k), pages.k.dtype, groups(pages.k_scale))
    v, v_scale = compress(rotate(v), pages.v.dtype, groups(pages.v_scale))
    k, v, k_scale, v_scale = (side_by_side(pages, x) for x in (k, v, k_scale, v_scale))
    return replace(pages, k=k, v=v, k_scale=k_scale, v_scale=v_scale)


def side_by_side(pages: Any, x: Array) -> Array:
    """x [T,K,C] with as many heads a row as `pages` have."""
    return x.reshape(len(x), pages.k.shape[2], pages.heads_a_row * x.shape[-1])


def rotate(x: Array) -> Array:
    """x [...,D] times a Hadamard matrix, which is orthogonal and its own inverse, in float32.

    Of queries and keys both, it leaves q k as it is; of values, the output is rotated back. Where D is no power of
    two, by blocks of the largest one that divides it. Numbers may grow by the square root of a block.
    """
    dim = x.shape[-1]
    size = dim & -dim
    x = x if x.dtype in (jnp.bfloat16, jnp.float16) else x.astype(jnp.float32)
    # Signs are exact in every dtype, so that half precision is multiplied as what it is.
    signs = jnp.asarray(_hadamard(size), x.dtype)
    blocks = x.reshape(*x.shape[:-1], dim // size, size)
    how = dict(precision="highest", preferred_element_type=jnp.float32)
    return jnp.einsum("...i,ij->...j", blocks, signs, **how).reshape(x.shape) * jnp.float32(size**-0.5)


@cache
def _hadamard(size: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(1 - 2 * ((i & j).bit_count() % 2) for j in range(size)) for i in range(size))


@partial(jax.jit, static_argnums=(1, 2))
def compress(x: Array, dtype: Any, groups: int) -> tuple[Array, Array]:
    """x [T,K,D] as dtype, and its scales float16 [T,K,C].

    Of some scales, from the one that makes a group's largest number the dtype's to twice that, the one with the
    least squared error is taken: a float's error depends on where in a binade the numbers fall. What is stored is
    the best factor for the rounded numbers, so that little of the error lies along the vector itself.
    """
    most = COMPRESSED[dtype.name]
    split = x.astype(jnp.float32).reshape(*x.shape[:2], groups, x.shape[2] // groups)
    largest = jnp.max(jnp.abs(split), axis=-1)

    def rounded(unit: Array) -> Array:
        """x in that unit, float32 numbers that the dtype has."""
        scaled = jnp.clip(split * jnp.where(unit > SMALLEST_UNIT, 1 / unit, 0)[..., None], -most, most)
        step = 1 if dtype == jnp.int8 else _spacing(scaled)
        return jnp.round(scaled / step) * step

    def of_unit(unit: Array) -> tuple[Array, ...]:
        """The squared error but for what all have in common, the scale and the unit."""
        codes = rounded(unit)
        norm, product = jnp.sum(codes * codes, axis=-1), jnp.sum(codes * split, axis=-1)
        scale = jnp.minimum(product / jnp.where(norm > 0, norm, 1), LARGEST_SCALE).astype(jnp.float16)
        return scale.astype(jnp.float32) * (scale.astype(jnp.float32) * norm - 2 * product), scale, unit

    # One after another, so that of what is tried nothing of the size of x is kept.
    tried = (of_unit(largest * jnp.float32(2 ** (i / TRIED_SCALES) / most)) for i in range(TRIED_SCALES))

    def better(one: tuple[Array, ...], other: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(jnp.where(other[0] < one[0], y, x) for x, y in zip(one, other, strict=True))

    _, scale, unit = reduce(better, tried)
    return rounded(unit).astype(dtype).reshape(x.shape), scale


def _spacing(x: Array) -> Array:
    """From a number of float8_e4m3fn near x to the next one. To convert to that and back may round nothing: XLA may
    leave both out."""
    power = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7F800000, jnp.float32)
    return jnp.maximum(power, 2**-6) / 8
