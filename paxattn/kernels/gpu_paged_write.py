"""write_pages on Hopper: the tokens of several arrays go to their slots in one launch, sixteen bytes a lane."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from paxattn.kernels import hopper, hopper_lanes, tiles
from paxattn.kernels.gpu_blocks import iota
from paxattn.kernels.hopper_lanes import LANES

WARPS = 4  # of a warpgroup, each with a token
WARPGROUPS = 4
VECTOR_BYTES = 16


def vector(width: int, itemsize: int) -> int:
    """How many numbers a lane takes at once: as many as divide the row, so that all rows begin where a vector may."""
    return next(size for size in (16, 8, 4, 2, 1) if size * itemsize <= VECTOR_BYTES and width % size == 0)


def padded(x: Any) -> int:
    """The numbers of a row [N, width] as a warp takes them, some lanes perhaps nothing."""
    whole = LANES * vector(x.shape[1], x.dtype.itemsize)
    return tiles.cdiv(x.shape[1], whole) * whole


def write(num_sms: int, pages: Sequence[Array], new: Sequence[Array], slots: Array) -> list[Array]:
    """pages [N,P,...], each with its new [T,...] of the same dtype at slots [T] = page * P + offset, but for slots that
    are in no page; in place."""
    slots_in = pages[0].shape[0] * pages[0].shape[1]
    flat = [x.reshape(slots_in, -1) for x in pages]
    rows = [x.reshape(len(slots), -1) for x in new]
    body = partial(_kernel, len(slots), slots_in, len(rows))
    blocks = min(num_sms, tiles.cdiv(len(slots), WARPS * WARPGROUPS))
    call = hopper.kernel(body, blocks, WARPGROUPS - 1, {})

    def run(slots, rows, flat):
        return pl.run_state(lambda refs: call(slots, *rows, *refs))(tuple(flat))

    written = hopper.apart(run)(slots, rows, flat)
    return [x.reshape(page.shape) for x, page in zip(written, pages, strict=True)]


def _layout(x: Any) -> Any:
    """Of [4, padded], a row a warp."""
    size = vector(x.shape[1], x.dtype.itemsize)
    return plgpu.Layout.TILED(plgpu.Tiling(((WARPS, LANES * size), (size,))), (-3,), (-2,), -1)


def _kernel(tokens: int, slots_in: int, count: int, slots, *refs):
    new, pages = refs[:count], refs[count:]
    worker = lax.axis_index("wg") * lax.axis_size("cta") + lax.axis_index("cta")
    workers = WARPGROUPS * lax.axis_size("cta")

    def four_tokens(i, _):
        layouts = [_layout(x) for x in new]
        token = iota(WARPS, layouts[0].reduce(1)) + (worker + i * workers) * WARPS
        token = jnp.where(token < tokens, token, -1)
        slot = hopper_lanes.load_rows(slots, token, layouts[0])
        slot = jnp.where((token >= 0) & (slot < slots_in), slot, -1)
        # All are on their way before the first is stored.
        loaded = [hopper_lanes.load_rows(x, token, layout, padded(x)) for x, layout in zip(new, layouts, strict=True)]
        for target, x, layout in zip(pages, loaded, layouts, strict=True):
            hopper_lanes.store_rows(target, slot, x, layout)

    turns = tiles.cdiv(tiles.cdiv(tokens, WARPS) - worker, workers)
    lax.fori_loop(0, turns, four_tokens, None)
