"""write_pages on TPU where a token has one row of bfloat16: it shares a register with the tokens before and after it.

A register of 16 tokens is the least that can be copied. So the new tokens are sorted by slot, and each register that
some of them are in is fetched, gets all of its new tokens at once, and goes back; two batches of registers are under
way.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paxattn.kernels import tiles

LANES = 128
REGISTER = 16  # tokens
CHUNK = 512  # tokens at a time
BATCH = 16  # registers


class Plan(NamedTuple):
    """Of each chunk of C tokens in the order of their slots, which registers change."""

    counts: Array  # [chunks] of registers
    work: Array  # [chunks,3,C] the slots, and the first token of each register and the one after its last


def write(pages: Sequence[Array], new: Sequence[Array], slots: Array) -> list[Array]:
    """pages [N,P,D], each with its new [T,D] at slots [T], but for those that are in no page. P in whole registers."""
    num_pages, page_size, dim = pages[0].shape
    chunk = min(CHUNK, tiles.cdiv(len(slots), LANES) * LANES)
    slots = jnp.where((slots >= 0) & (slots < num_pages * page_size), slots, jnp.iinfo(slots.dtype).max)
    order = jnp.argsort(slots)
    plan = _plan(slots[order], chunk, num_pages * page_size)
    # In float32, as a row is then a sublane, of which any can be read.
    rows = [jnp.pad(x[order].astype(jnp.float32), ((0, -len(slots) % chunk), (0, 0))) for x in new]
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    shape = partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(slots).manual_axis_type)
    written = pl.pallas_call(
        partial(_kernel, page_size, len(pages)),
        name="write_pages",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=plan.counts.shape,
            in_specs=(
                pl.BlockSpec((None, 3, chunk), lambda i, _: (i, 0, 0), memory_space=pltpu.SMEM),
                *[pl.BlockSpec((chunk, dim), lambda i, _: (i, 0))] * len(pages),
                *[hbm] * len(pages),
            ),
            out_specs=(hbm,) * len(pages),
            scratch_shapes=(
                pltpu.VMEM((2, len(pages), BATCH, REGISTER, dim), pages[0].dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
            ),
        ),
        out_shape=tuple(shape(x.shape, x.dtype) for x in pages),
        input_output_aliases={2 + len(pages) + i: i for i in range(len(pages))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
    )(*plan, *rows, *pages)
    return list(written)


def _plan(slots: Array, chunk: int, room: int) -> Plan:
    """Of ascending slots, those from `room` on being none."""
    slots = jnp.pad(slots, (0, -len(slots) % chunk), constant_values=room).reshape(-1, chunk)
    there = slots < room
    end = there.sum(axis=1, keepdims=True, dtype=jnp.int32)
    register = slots // REGISTER
    first = there & jnp.pad(register[:, 1:] != register[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    starts = jnp.sort(jnp.where(first, jnp.arange(chunk, dtype=jnp.int32)[None], end), axis=1)
    ends = jnp.concatenate([starts[:, 1:], end], axis=1)
    return Plan(first.sum(axis=1, dtype=jnp.int32), jnp.stack([slots, starts, ends], axis=1))


def _kernel(page_size: int, kinds: int, counts, work, *refs) -> None:
    """work [3,C] in SMEM; new tokens [C,D]; the pages as they come, the pages as they go, in HBM; scratch."""
    new, pages, (tiles_of, fetched, written) = refs[:kinds], refs[2 * kinds : 3 * kinds], refs[3 * kinds :]
    count = counts[pl.program_id(0)]

    def copies(batch, j, out: bool) -> list[Any]:
        slot = work[0, work[1, batch * BATCH + j]]
        first = pl.multiple_of(lax.rem(slot, page_size) // REGISTER * REGISTER, REGISTER)
        place = lax.rem(batch, 2)
        both = [
            (x.at[lax.div(slot, page_size), pl.ds(first, REGISTER)], tiles_of.at[place, kind, j])
            for kind, x in enumerate(pages)
        ]
        arrived = (written if out else fetched).at[place]
        return [pltpu.make_async_copy(*(pair[::-1] if out else pair), arrived) for pair in both]

    def each(batch, do) -> None:
        pl.loop(0, jnp.clip(count - batch * BATCH, 0, BATCH))(do)

    def start(batch, out: bool) -> None:
        @partial(each, batch)
        def _start(j):
            for copy in copies(batch, j, out):
                copy.start()

    def wait(batch, out: bool) -> None:
        @partial(each, batch)
        def _wait(j):
            for copy in copies(batch, j, out):
                copy.wait()

    def change(batch, j) -> None:
        place, register = lax.rem(batch, 2), batch * BATCH + j
        old = [tiles_of[place, kind, j].astype(jnp.float32) for kind in range(kinds)]
        sublane = lax.broadcasted_iota(jnp.int32, old[0].shape, 0)

        def put(token, values):
            mine = sublane == lax.rem(work[0, token], REGISTER)
            return [jnp.where(mine, x[pl.ds(token, 1)], value) for x, value in zip(new, values, strict=True)]

        values = lax.fori_loop(work[1, register], work[2, register], put, old)
        for kind, value in enumerate(values):
            tiles_of[place, kind, j] = value.astype(tiles_of.dtype)

    batches = tiles.cdiv(count, BATCH)
    start(jnp.int32(0), False)

    @pl.loop(0, batches)
    def _some(batch):
        pl.when(batch > 0)(lambda: wait(batch - 1, True))
        start(batch + 1, False)
        wait(batch, False)
        each(batch, lambda j: change(batch, j))
        start(batch, True)

    # A register may go on in the next chunk.
    pl.when(batches > 0)(lambda: wait(batches - 1, True))
