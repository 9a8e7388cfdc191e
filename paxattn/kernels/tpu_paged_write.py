"""write_pages on TPU: asynchronous copies from the new tokens to their slots in HBM, many under way at once, in place.

A token's heads lie side by side in a page, so one copy brings an array's token; where consecutive tokens fill a page
in order, as in prefill, one brings all of it.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paxattn.kernels import online_softmax, tiles, tpu_paged_write_packed

LANES = 128
CHUNK = 1024  # tokens whose slots are in SMEM at a time


def write_pages(pages: Any, new: Any, slots: Array) -> Any:
    """As in `xla_pages`."""
    into, structure = jax.tree.flatten(pages)
    tokens = jax.tree.leaves(new)
    _decline(into, slots)
    given = *into, *tokens, slots
    into, tokens, slots = online_softmax.vary_like((into, tokens, slots), *given)
    if into[0].shape[2] == 1 and into[0].dtype == jnp.bfloat16:
        only = lambda arrays, axis: [x.squeeze(axis) for x in arrays]
        written = tpu_paged_write_packed.write(only(into, 2), only(tokens, 1), slots)
        return jax.tree.unflatten(structure, [x[:, :, None] for x in written])
    return jax.tree.unflatten(structure, _write(into, tokens, slots))


def _decline(pages: Sequence[Array], slots: Array) -> None:
    _, page_size, kv_heads, dim = pages[0].shape
    if pages[0].dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"pages of {pages[0].dtype}: 'mosaic_tpu' writes bfloat16 and float32, 'xla' any")
    # XLA keeps other pages in another order than a kernel is given, and would copy all of them for it.
    if dim % LANES:
        raise NotImplementedError(f"pages of {kv_heads} rows of {dim}: 'mosaic_tpu' writes rows of whole {LANES} lanes")
    if kv_heads == 1 and pages[0].dtype == jnp.bfloat16 and page_size % tpu_paged_write_packed.REGISTER:
        raise NotImplementedError(f"one row a token in pages of {page_size}: 'mosaic_tpu' writes pages of 16s")
    if 0 in pages[0].shape or not len(slots):
        raise NotImplementedError("an axis of nothing: 'mosaic_tpu' serves none, 'xla' does")


def _write(pages: Sequence[Array], new: Sequence[Array], slots: Array) -> list[Array]:
    """pages [N,P,...], each with its new [T,...] of the same dtype at slots [T], but for those that are in no page."""
    num_pages, page_size = pages[0].shape[:2]
    chunk = min(CHUNK, tiles.cdiv(len(slots), LANES) * LANES)
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    shape = partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(slots).manual_axis_type)
    plan = _plan(slots, num_pages, page_size, chunk)
    written = pl.pallas_call(
        partial(_kernel, page_size, len(pages)),
        name="write_pages",
        grid=(len(plan),),
        in_specs=(
            pl.BlockSpec((None, 2, chunk), lambda i: (i, 0, 0), memory_space=pltpu.SMEM),
            *[hbm] * (2 * len(pages)),
        ),
        out_specs=(hbm,) * len(pages),
        out_shape=tuple(shape(x.shape, x.dtype) for x in pages),
        scratch_shapes=(pltpu.SemaphoreType.DMA(()),),
        input_output_aliases={1 + len(pages) + i: i for i in range(len(pages))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
    )(plan, *new, *pages)
    return list(written)


def _plan(slots: Array, num_pages: int, page_size: int, chunk: int) -> Array:
    """int32 [chunks,2,chunk]: each token's slot, negative for none, and whether it begins a whole page."""
    slots = jnp.where(slots < num_pages * page_size, slots, -1)
    slots = jnp.pad(slots, (0, -len(slots) % chunk), constant_values=-1).reshape(-1, chunk)
    if not 1 < page_size <= chunk:
        return jnp.stack([slots, jnp.zeros_like(slots)], axis=1)
    follows = slots[:, 1:] == slots[:, :-1] + 1
    breaks = jnp.pad(jnp.cumsum(~follows, axis=1), ((0, 0), (1, 0)))
    unbroken = jnp.pad(breaks[:, page_size - 1 :] == breaks[:, : chunk - page_size + 1], ((0, 0), (0, page_size - 1)))
    whole = unbroken & (slots >= 0) & (slots % page_size == 0)
    return jnp.stack([slots, whole.astype(slots.dtype)], axis=1)


def _kernel(page_size: int, count: int, plan, *refs) -> None:
    """plan [2,C] in SMEM; new tokens [T,...], the pages as they come, the pages as they go, all in HBM."""
    new, pages, arrived = refs[:count], refs[2 * count : 3 * count], refs[-1]
    chunk = plan.shape[1]
    start = pl.program_id(0) * chunk

    def one(token, slot):
        for source, target in zip(new, pages, strict=True):
            place = target.at[lax.div(slot, page_size), lax.rem(slot, page_size)]
            pltpu.make_async_copy(source.at[start + token], place, arrived).start()

    def page(token, slot):
        for source, target in zip(new, pages, strict=True):
            tokens = source.at[pl.ds(start + token, page_size)]
            pltpu.make_async_copy(tokens, target.at[lax.div(slot, page_size)], arrived).start()

    def step(state):
        token, copied = state
        slot, whole = plan[0, token], plan[1, token] == 1
        pl.when(whole)(lambda: page(token, slot))
        pl.when(~whole & (slot >= 0))(lambda: one(token, slot))
        size = jnp.where(whole, page_size, 1)
        return token + size, copied + jnp.where(slot >= 0, size, 0)

    _, copied = lax.while_loop(lambda state: state[0] < chunk, step, (jnp.int32(0), jnp.int32(0)))

    @pl.loop(0, copied)
    def _wait(_):
        for target in pages:
            token = target.at[0, 0]
            pltpu.make_async_copy(token, token, arrived).wait()
