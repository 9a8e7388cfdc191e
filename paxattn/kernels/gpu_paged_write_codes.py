"""write_pages of compressed pages on Hopper: tokens are rotated, rounded and stored by one launch, in place.

A thread has a unit of sixteen numbers from its load to its codes, so that nothing but what a head's lanes exchange ever
leaves its registers. `codes.compress` is what it does, in another order.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from paxattn.kernels import hopper, hopper_lanes, hopper_units, tiles
from paxattn.kernels.codes import COMPRESSED, LARGEST_SCALE, SMALLEST_UNIT, TRIED_SCALES
from paxattn.kernels.gpu_blocks import divide, iota
from paxattn.kernels.hopper_units import EACH, ROWS, UNIT, UNITS

WARPGROUPS = 4
BLOCKS_A_SM = 2  # As many as registers allow: while some wait for what they load, others compute.


def lanes_a_head(head_dim: int) -> int:
    """A power of two, so that no head is in two warps; some may have nothing."""
    return 1 << (head_dim // UNIT - 1).bit_length()


def write(num_sms: int, pages: list[Array], k: Array, v: Array, slots: Array) -> list[Array]:
    """pages: codes [N,P,K,D] of keys and of values and their scales [N,P,K,D/16] and [N,P,K,1], with k, v [T,K,D] at
    slots [T] = page * P + offset, but for slots that are in no page; in place."""
    tokens, heads, dim = k.shape
    slots_in = pages[0].shape[0] * pages[0].shape[1]
    flat = [x.reshape(-1, UNIT) for x in pages[:2]] + [x.reshape(-1) for x in pages[2:]]
    new = [x.reshape(-1, UNIT) for x in (k, v)]
    of_each = tiles.cdiv(tokens * heads * lanes_a_head(dim), ROWS)
    body = partial(_kernel, (tokens, heads, dim), slots_in)
    call = hopper.kernel(body, min(BLOCKS_A_SM * num_sms, 2 * of_each), WARPGROUPS - 1, {})

    def run(slots, new, flat):
        return pl.run_state(lambda refs: call(slots, *new, *refs))(tuple(flat))

    written = hopper.apart(run)(slots, new, flat)
    return [x.reshape(page.shape) for x, page in zip(written, pages, strict=True)]


def _kernel(shape: tuple[int, int, int], slots_in: int, slots, k, v, k_codes, v_codes, k_scales, v_scales):
    tokens, heads, dim = shape
    of_each = tiles.cdiv(tokens * heads * lanes_a_head(dim), ROWS)
    worker = lax.axis_index("wg") * lax.axis_size("cta") + lax.axis_index("cta")
    workers = WARPGROUPS * lax.axis_size("cta")

    def one_tile(i, _):
        tile = worker + i * workers

        # Values follow all keys: they take a little longer, and so every worker has as many of them.
        @pl.when(tile < of_each)
        def keys():
            _write_tile(shape, slots_in, tile, False, slots, k, k_codes, k_scales)

        @pl.when(tile >= of_each)
        def values():
            _write_tile(shape, slots_in, tile - of_each, True, slots, v, v_codes, v_scales)

    lax.fori_loop(0, tiles.cdiv(2 * of_each - worker, workers), one_tile, None)


def _write_tile(shape: tuple[int, int, int], slots_in: int, tile, one_scale: bool, slots, source, codes, scales):
    """The tile's units, of which those of a head have a scale together or one each."""
    tokens, heads, dim = shape
    lanes, units = lanes_a_head(dim), dim // UNIT
    row, unit = divide(iota(ROWS, EACH) + tile * ROWS, lanes)
    token, head = divide(row, heads)
    there = (row < tokens * heads) & (unit < units)
    slot = hopper_lanes.load_rows(slots, jnp.where(there, token, -1), UNITS)
    x = hopper_lanes.load_rows(source, jnp.where(there, row * units + unit, -1), UNITS).astype(jnp.float32)
    if units < lanes:
        x = jnp.where(hopper_lanes.along(unit < units, (ROWS, UNIT), UNITS), x, 0.0)
    block = dim & -dim
    x = hopper_units.turn(x, block) * jnp.float32(block**-0.5)
    inverse, scale = _fit(x, codes.dtype, lanes if one_scale else 1)
    stored = there & (slot >= 0) & (slot < slots_in)
    to_row = slot * heads + head
    to = jnp.where(stored, to_row * units + unit, -1)
    hopper_lanes.store_rows(codes, to, hopper_units.codes(x, inverse, codes.dtype), UNITS)
    to = jnp.where(stored & (unit == 0), to_row, -1) if one_scale else to
    hopper_lanes.store_rows(scales, to, scale, UNITS)


def _fit(x: Array, dtype: Any, lanes: int) -> tuple[Array, Array]:
    """Of units x [128, 16], those of so many lanes together, what to multiply by before rounding, and the scale."""
    most = COMPRESSED[dtype.name]
    top = hopper_units.over_lanes_max(hopper_units.largest(x), lanes)
    first = jnp.where(top * jnp.float32(1 / most) > SMALLEST_UNIT, most / top, 0.0)

    def of_factor(inverse):
        """The squared error but for what all have in common, the factor and the scale."""
        norm, product = (hopper_units.over_lanes_sum(s, lanes) for s in hopper_units.sums(x, inverse, dtype))
        scale = jnp.minimum(product / jnp.where(norm > 0, norm, 1.0), LARGEST_SCALE).astype(jnp.float16)
        wide = scale.astype(jnp.float32)
        return wide * (wide * norm - 2 * product), inverse, scale

    def one_more(_, state):
        inverse, *best = state
        inverse = inverse * jnp.float32(2 ** (-1 / TRIED_SCALES))
        new = of_factor(inverse)
        return inverse, *(jnp.where(new[0] < best[0], a, b) for a, b in zip(new, best, strict=True))

    _, _, inverse, scale = lax.fori_loop(1, TRIED_SCALES, one_more, (first, *of_factor(first)))
    return inverse, scale
