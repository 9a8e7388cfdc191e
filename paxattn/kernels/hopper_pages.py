"""Tiles of keys or values on Hopper that TMA fills page by page, for arrays whose rows come by eights.

A tile [R, D] lies in shared memory as boxes of 8 rows and 64 columns, each swizzled over 128 bytes; columns past D are
0. One copy fills all boxes of a page where D is whole boxes; else each box is a copy, in which TMA puts zeros past D.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import nvvm

from paxattn.kernels import hopper, tiles
from paxattn.kernels.hopper import CHUNK, WGMMA

BOX = 8  # rows
_SWIZZLE = plgpu.SwizzleTransform(128)  # type: ignore[abstract]
_TILED = plgpu.TilingTransform((BOX, CHUNK)), _SWIZZLE  # type: ignore[abstract]
TILE = plgpu.RefType(_TILED)


def tile(*shape: int, dtype: Any) -> plgpu.RefUnion:
    """Scratch [..., R, D] under two names: one for `copy_rows`, one for WGMMA, loads and stores."""
    *outer, rows, width = shape
    chunks = tiles.cdiv(width, CHUNK)
    return plgpu.RefUnion(
        plgpu.SMEM((*outer, rows // BOX, chunks, BOX, CHUNK), dtype, transforms=(_SWIZZLE,)),
        plgpu.SMEM((*outer, rows, chunks * CHUNK), dtype, transforms=_TILED),
    )


def copies(rows: int, width: int) -> int:
    """How often `copy_rows` arrives at its barrier."""
    return rows // BOX * tiles.cdiv(width, CHUNK) if width % CHUNK else 1


def copy_rows(source: Any, start: Array, head: Array, tile: Any, at: tuple, rows: Any, barrier: Any) -> None:
    """As many rows of a head of source [N,K,D], from `start` on, to `rows` of the tile that stands at `at`."""
    boxes, tiled = tile
    width = source.shape[-1]
    if not width % CHUNK:
        hopper.load_once(source.at[pl.ds(start, rows.size), head], tiled.at[(*at, rows)], barrier)
        return
    for row in range(0, rows.size, BOX):
        for chunk in range(tiles.cdiv(width, CHUNK)):
            box = pl.ds(start + row, BOX), head, hopper.columns(chunk, width, start)
            # Not `load_once`: boxes share lines of the cache with each other and with the next head's.
            plgpu.copy_gmem_to_smem(source.at[box], boxes.at[(*at, (rows.start + row) // BOX, chunk)], barrier)


def scores(a: Any, b: Any) -> Array:
    """a @ b.T of a [64, D], a tile or in registers, and a tile b [N, D]: float32 [64, N], in flight until `wait`."""

    @plgpu.inline_mgpu(
        arg_types=(WGMMA if isinstance(a, Array) else TILE, TILE),
        return_type=plgpu.ShapeDtypeStruct((a.shape[-2], b.shape[-2]), jnp.float32, WGMMA),
    )
    def issue(_, x, y):
        acc = mgpu.WGMMAAccumulator.zero(a.shape[-2], b.shape[-2])
        out = mgpu.wgmma(acc, x, mgpu.memref_transpose(y, (1, 0, 3, 2)))
        nvvm.wgmma_commit_group_sync_aligned()
        return out.value

    return issue(a, b)


def accumulate(acc: Array, p: Array, b: Any) -> Array:
    """acc + p @ b for p [64, N] in registers and a tile b [N, D]; in flight until `hopper.wait`."""

    @plgpu.inline_mgpu(
        arg_types=(WGMMA, WGMMA, TILE),
        return_type=plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, WGMMA),
    )
    def issue(_, acc, p, b):
        acc = mgpu.WGMMAAccumulator.from_registers(acc)
        out = mgpu.wgmma(acc, p, b)
        nvvm.wgmma_commit_group_sync_aligned()
        return out.value

    return issue(acc, p, b)
