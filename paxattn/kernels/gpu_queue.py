"""Items that the blocks of a kernel take from a counter, each as soon as it is ready for one.

A block's first item has the block's own number. One of its warps takes the others and leaves what the rest needs to
know of them in a ring in shared memory, ahead of the warps that work on them.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from paxattn.kernels import hopper

SLOTS = 4


def scratch(readers: int, size: int = 1) -> dict:
    """The ring, of so many int32 an item, for so many warpgroups or warps that each read all of them."""
    return dict(
        taken=plgpu.SMEM((SLOTS, size), jnp.int32),
        taken_full=plgpu.Barrier(num_barriers=SLOTS),
        taken_free=plgpu.Barrier(num_arrivals=readers, num_barriers=SLOTS),
    )


def take(counter: Any, blocks: int) -> Array:
    """The number of what one of so many blocks works on next."""
    return blocks + hopper.fetch_add(counter)


def leave(smem: dict, turn, *fields: Array) -> None:
    """Leave what is worked on as number `turn` >= 1 in the ring."""
    slot = lax.rem(turn, SLOTS)
    pl.when(turn > SLOTS)(lambda: plgpu.barrier_wait(smem["taken_free"].at[slot]))
    for i, field in enumerate(fields):
        hopper.store_scalar(smem["taken"].at[slot, i], field)
    plgpu.barrier_arrive(smem["taken_full"].at[slot])


def read(smem: dict, turn) -> list[Array]:
    """What was left as number `turn` >= 1."""
    await_item(smem, turn)
    fields = look(smem, turn)
    free(smem, turn)
    return fields


def await_item(smem: dict, turn) -> None:
    plgpu.barrier_wait(smem["taken_full"].at[lax.rem(turn, SLOTS)])


def look(smem: dict, turn) -> list[Array]:
    """What is there as number `turn`, between `await_item` and `free`."""
    return [smem["taken"][lax.rem(turn, SLOTS), i] for i in range(smem["taken"].shape[1])]


def free(smem: dict, turn) -> None:
    plgpu.barrier_arrive(smem["taken_free"].at[lax.rem(turn, SLOTS)])


def on_demand() -> dict:
    """What `want` and `await_want` need besides."""
    return dict(taken_wanted=plgpu.Barrier())


def want(smem: dict) -> None:
    """Say that the next item will soon be needed."""
    plgpu.barrier_arrive(smem["taken_wanted"])


def await_want(smem: dict) -> None:
    plgpu.barrier_wait(smem["taken_wanted"])
