"""What the TPU kernels share: how a tile of scores is computed and, of flash attention, masked."""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from paxattn.kernels import tiles
from paxattn.kernels.problem import Problem
from paxattn.kernels.tpu_flash_fwd_plan import LANES, Tile

VMEM_BYTES = 60 * 2**20  # of the 64 MiB that a core of tpu7x has; others have 128
NT = (((1,), (1,)), ((), ()))
NN = (((1,), (0,)), ((), ()))


def pipeline(items: Sequence[Any], stages: Sequence[Callable[[Any, Any], Any]]) -> None:
    """Pass every item through the stages: each stage of one item beside the stage before of the next item.

    The compiler overlaps only what stands close together in the program.
    """
    values: dict[int, Any] = {}
    for turn in range(len(items) + len(stages) - 1):
        for lag, stage in enumerate(stages):
            if 0 <= (n := turn - lag) < len(items):
                values[n] = stage(items[n], values.get(n))


def dot(a: Array, b: Array, dims) -> Array:
    """a in bf16 takes b as bf16, float32 keeps what it has."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def upright(x: Array) -> Array:
    """x [1,n], turned from lanes to sublanes: [n,128], all lanes alike."""
    return jnp.broadcast_to(x, (LANES, x.shape[1])).T


def widened(x: Array, width: int) -> Array:
    """Lanes of x [n,128], all alike, repeated: [n,width]."""
    return jnp.concatenate([x] * (width // LANES), axis=1)


def seen(problem: Problem, tile: Tile, key_axis: int, segments: tuple[Any, Any] | None) -> Array | None:
    """bool [kv,q], or [q,kv] where the key axis is 1, whether a query of the tile sees a key; None where all see all.

    segments: refs [1,q] and [1,kv] of the block.
    """
    q_len, kv_len = tile.q_end - tile.q, tile.kv_end - tile.kv
    shape = (kv_len, q_len) if key_axis == 0 else (q_len, kv_len)
    key = lax.broadcasted_iota(jnp.int32, shape, key_axis)
    found = []
    if tile.ahead is not None:
        query = lax.broadcasted_iota(jnp.int32, shape, 1 - key_axis) + tile.ahead
        found.append(tiles.in_window(query, key, problem.left, problem.right))
    if tile.keys is not None:
        found.append(key < tile.keys)
    if segments is not None:
        across, down = segments[0][:, tile.queries_at], segments[1][:, tile.keys_at]
        if key_axis == 1:
            across, down = down, across
        found.append(widened(upright(down), shape[1]) == across)
    return reduce(jnp.logical_and, found) if found else None
