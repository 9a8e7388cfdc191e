"""Tiles of whole rows on Hopper, for arrays whose rows come by eights: TMA fills one, or eight rows of it and more, in
one copy.

A tile [R, D] lies in shared memory as boxes of 8 rows and as many columns as the widest swizzle that divides a row.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import nvvm

from paxattn.kernels.hopper import WGMMA


def _swizzle(width: int, dtype: Any) -> int:
    """In bytes."""
    size = width * jnp.dtype(dtype).itemsize
    return next(swizzle for swizzle in (128, 64, 32) if size % swizzle == 0)


def _transforms(width: int, dtype: Any) -> tuple[Any, Any]:
    swizzle = _swizzle(width, dtype)
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))  # type: ignore[abstract]
    return tiling, plgpu.SwizzleTransform(swizzle)  # type: ignore[abstract]


def tile(*shape: int, dtype: Any) -> Any:
    """Scratch [..., R, D]."""
    return plgpu.SMEM(shape, dtype, transforms=_transforms(shape[-1], dtype))


def scores(a: Any, b: Any) -> Array:
    """a @ b.T of the tiles a [64, D] and b [N, D]: float32 [64, N], in flight until `hopper.wait`."""
    width, dtype = b.shape[-1], b.dtype
    tiled = plgpu.RefType(_transforms(width, dtype))

    @plgpu.inline_mgpu(
        arg_types=(tiled, tiled),
        return_type=plgpu.ShapeDtypeStruct((a.shape[-2], b.shape[-2]), jnp.float32, WGMMA),
    )
    def issue(_, x, y):
        acc = mgpu.WGMMAAccumulator.zero(a.shape[-2], b.shape[-2])
        out = mgpu.wgmma(acc, x, mgpu.memref_transpose(y, (1, 0, 3, 2)), swizzle=_swizzle(width, dtype))
        nvvm.wgmma_commit_group_sync_aligned()
        return out.value

    return issue(a, b)


def accumulate(acc: Array, p: Array, b: Any) -> Array:
    """acc + p @ b for p [64, N] in registers and a tile b [N, D]; in flight until `hopper.wait`."""
    width, dtype = b.shape[-1], b.dtype

    @plgpu.inline_mgpu(
        arg_types=(WGMMA, WGMMA, plgpu.RefType(_transforms(width, dtype))),
        return_type=plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, WGMMA),
    )
    def issue(_, acc, p, b):
        acc = mgpu.WGMMAAccumulator.from_registers(acc)
        out = mgpu.wgmma(acc, p, b, swizzle=_swizzle(width, dtype))
        nvvm.wgmma_commit_group_sync_aligned()
        return out.value

    return issue(acc, p, b)
