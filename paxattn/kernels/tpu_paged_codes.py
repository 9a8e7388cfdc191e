"""How the TPU kernel of paged attention makes numbers of the codes of compressed pages.

A page's scales come as [C,P*K], and its codes as [P*K,D]. A product with ones and zeros both turns scales and repeats
them over the lanes of their group, exactly: a float16 is the sum of two bfloat16.
"""

from collections.abc import Sequence
from math import gcd
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from paxattn.kernels import tiles
from paxattn.kernels.tpu_paged_plan import Problem

ROWS = 2048  # of codes that are expanded at a time: their stages overlap
TN = (((0,), (0,)), ((), ()))


def expand(problem: Problem, count: Array, codes: Any, scales: Any, into: Any) -> None:
    """codes [2,S*K,D] and scales [M,C,P*K] of keys and of values -> into [2,S,K,D], of `count` pages or a few more."""
    heads, rows = problem.kv_heads, problem.page_size * problem.kv_heads
    step = min(rows, max(1, ROWS // heads) * heads)

    def page(j):
        for start in range(0, rows, step):
            size = min(step, rows - start)
            at = pl.multiple_of(j * rows + start, size)
            tokens = pl.ds(j * problem.page_size + start // heads, size // heads)
            wide = _spread([x[j, :, pl.ds(start, size)] for x in scales], problem.head_dim)
            for kind in range(2):
                numbers = codes[kind, pl.ds(at, size)].astype(jnp.float32) * wide[kind]
                into[kind, tokens] = numbers.astype(into.dtype).reshape(size // heads, *into.shape[2:])

    together = gcd(scales[0].shape[0], max(1, ROWS // step))

    @pl.loop(0, tiles.cdiv(count, together))
    def _some(group):
        for j in range(together):
            page(group * together + j)


def _spread(scales: Sequence[Array], dim: int) -> list[Array]:
    """float32 [n,D] of each of scales [C,n], which go through one product."""
    parts, places = [], []
    for kind, bits in enumerate(scales):
        scale = _float32(bits)
        high = scale.astype(jnp.bfloat16).astype(jnp.float32)
        parts += [high, scale - high]
        places += [_places(len(bits), kind, dim, len(scales))] * 2
    join = lambda x: jnp.concatenate(x).astype(jnp.bfloat16)
    wide = lax.dot_general(join(parts), join(places), TN, preferred_element_type=jnp.float32)
    return [wide[:, i * dim : (i + 1) * dim] for i in range(len(scales))]


def _places(groups: int, kind: int, dim: int, kinds: int) -> Array:
    """[C,kinds*D] which lanes are of a group of the kind."""
    group, lane = (lax.broadcasted_iota(jnp.int32, (groups, kinds * dim), axis) for axis in range(2))
    return (lane // (dim // groups) == group + kind * groups).astype(jnp.float32)


def _float32(bits: Array) -> Array:
    """Of a float16 that is not negative, as scales are."""
    bits = bits.astype(jnp.int32) & 0x7FFF
    below = bits.astype(jnp.float32) * 2.0**-24  # without a leading one
    exponent = jnp.where(bits >= 0x7C00, 224, 112) << 23  # the former of infinity and NaN
    return jnp.where(bits < 0x400, below, lax.bitcast_convert_type((bits << 13) + exponent, jnp.float32))
