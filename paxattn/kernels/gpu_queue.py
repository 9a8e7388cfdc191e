"""Items that the blocks of a kernel take from a counter, each as soon as it is ready for one.

A block's first item has the block's own number. One of its warps takes the others and leaves what the rest needs to
know of them in a ring in shared memory, ahead of the warps that work on them.
"""

from functools import reduce
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from paxattn.kernels import hopper

SLOTS = 4


def scratch(readers: int, size: int = 1, rings: int = 1) -> dict:
    """Rings, of so many int32 an item, each for so many warpgroups or warps that all read all of its items."""
    return dict(
        taken=plgpu.SMEM((rings * SLOTS, size), jnp.int32),
        taken_full=plgpu.Barrier(num_barriers=rings * SLOTS),
        taken_free=plgpu.Barrier(num_arrivals=readers, num_barriers=rings * SLOTS),
    )


def _slot(turn, ring) -> Array:
    return lax.rem(turn, SLOTS) + ring * SLOTS


def take(counter: Any, blocks: int) -> Array:
    """The number of what one of so many blocks works on next."""
    return blocks + hopper.fetch_add(counter)


def leave(smem: dict, turn, *fields: Array, ring=0) -> None:
    """Leave what is worked on as number `turn` >= 1 in the ring."""
    slot = _slot(turn, ring)
    pl.when(turn > SLOTS)(lambda: plgpu.barrier_wait(smem["taken_free"].at[slot]))
    for i, field in enumerate(fields):
        hopper.store_scalar(smem["taken"].at[slot, i], field)
    plgpu.barrier_arrive(smem["taken_full"].at[slot])


def read(smem: dict, turn, ring=0) -> list[Array]:
    """What was left as number `turn` >= 1."""
    await_item(smem, turn, ring)
    fields = look(smem, turn, ring)
    # Always true, as no field is less than -1. But it makes the arrival wait for the loads, which nothing else does.
    loaded = reduce(lax.bitwise_or, fields) != jnp.iinfo(jnp.int32).min
    plgpu.barrier_arrive(smem["taken_free"].at[_slot(turn, ring)], predicate=loaded)
    return fields


def await_item(smem: dict, turn, ring=0) -> None:
    plgpu.barrier_wait(smem["taken_full"].at[_slot(turn, ring)])


def look(smem: dict, turn, ring=0) -> list[Array]:
    """What is there as number `turn`, between `await_item` and `free`."""
    return [smem["taken"][_slot(turn, ring), i] for i in range(smem["taken"].shape[1])]


def free(smem: dict, turn, ring=0) -> None:
    plgpu.barrier_arrive(smem["taken_free"].at[_slot(turn, ring)])


def on_demand() -> dict:
    """What `want` and `await_want` need besides."""
    return dict(taken_wanted=plgpu.Barrier())


def want(smem: dict) -> None:
    """Say that the next item will soon be needed."""
    plgpu.barrier_arrive(smem["taken_wanted"])


def await_want(smem: dict) -> None:
    plgpu.barrier_wait(smem["taken_wanted"])
