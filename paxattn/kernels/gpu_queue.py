"""Items that the blocks of a kernel take from a counter, each as soon as it is ready for one.

A block's first item has the block's own number. One of its warps takes the others and leaves their numbers in a ring in
shared memory, ahead of the warps that work on them.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from paxattn.kernels import hopper

SLOTS = 4


def scratch(readers: int) -> dict:
    """The ring, for so many warpgroups or warps that each read every number."""
    return dict(
        taken=plgpu.SMEM((SLOTS,), jnp.int32),
        taken_full=plgpu.Barrier(num_barriers=SLOTS),
        taken_free=plgpu.Barrier(num_arrivals=readers, num_barriers=SLOTS),
    )


def take(smem: dict, turn, blocks: int, counter: Any) -> Array:
    """Take what one of so many blocks works on as number `turn` >= 1, and leave it in the ring."""
    slot = lax.rem(turn, SLOTS)
    index = blocks + hopper.fetch_add(counter)
    pl.when(turn > SLOTS)(lambda: plgpu.barrier_wait(smem["taken_free"].at[slot]))
    hopper.store_scalar(smem["taken"].at[slot], index)
    plgpu.barrier_arrive(smem["taken_full"].at[slot])
    return index


def read(smem: dict, turn) -> Array:
    """What was taken as number `turn` >= 1."""
    slot = lax.rem(turn, SLOTS)
    plgpu.barrier_wait(smem["taken_full"].at[slot])
    index = smem["taken"][slot]
    plgpu.barrier_arrive(smem["taken_free"].at[slot])
    return index
