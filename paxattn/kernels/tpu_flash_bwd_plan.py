"""Which blocks the backward kernel visits, in which order, and when it may read what was summed for dq before.

Blocks of keys are outside, as dk and dv stay with them. dq comes by and goes: see `tpu_flash_bwd`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from paxattn.kernels import tiles
from paxattn.kernels.problem import Problem
from paxattn.kernels.tpu_flash_fwd_plan import Config, Kind, kind_of, meetings

SLOTS = 3  # of dq's blocks in VMEM: one is read, one is computed, one is written

# How a step comes by its block's sum:
FRESH = 0  # it is the first of the block: there is none
EARLY = 1  # it is read while the step before is computed
LATE = 2  # one of the two steps before may still have to write it


def config_for(itemsize: int) -> Config:
    return Config(1024, 1024, 256, 256) if itemsize == 2 else Config(512, 512, 256, 256)


class Visit(NamedTuple):
    """A block of keys that visits a block of queries."""

    q_block: int
    kv_block: int
    kind: Kind
    first: bool  # whether no visit of the block of keys comes before it
    fresh: bool  # whether no visit of the block of queries does


def visits(problem: Problem, config: Config) -> list[Visit]:
    """In the order of the keys; each block of either has one at least, as somebody must write its gradient."""
    blocks = range(tiles.cdiv(problem.q_len, config.block_q))
    kv_blocks = range(tiles.cdiv(problem.kv_len, config.block_kv))
    rows = [[(i, kind) for i in blocks if (kind := kind_of(problem, config, i, j))] or [(0, ())] for j in kv_blocks]
    visited = {i for row in rows for i, _ in row}
    rows[0] += [(i, ()) for i in blocks if i not in visited]
    found: list[Visit] = []
    met: set[int] = set()
    for j, row in enumerate(rows):
        for n, (i, kind) in enumerate(row):
            found.append(Visit(i, j, kind, n == 0, i not in met))
            met.add(i)
    return found


class Steps(NamedTuple):
    """int32 [n + 1] each: what the kernel does in turn for every KV head, then the first step again.

    Each step is done once for every head of the group.
    """

    batch: Array
    q_block: Array
    kv_block: Array
    kind: Array
    first: Array
    read: Array


def steps(
    problem: Problem, config: Config, q_seg: Array | None, kv_seg: Array | None
) -> tuple[Steps, int | Array, list[Kind]]:
    """The steps, how many there are, and the kinds, as `tpu_flash_fwd_plan.meetings` counts them where ids are given.

    The ids are padded to whole blocks.
    """
    found = visits(problem, config)
    kinds = list(dict.fromkeys(visit.kind for visit in found))
    number = {kind: i for i, kind in enumerate(kinds)}
    rows = [
        (b, v.q_block, v.kv_block, number[v.kind], v.first, not v.fresh) for b in range(problem.batch) for v in found
    ]
    every = Steps(*(jnp.asarray(column, jnp.int32) for column in zip(*rows, rows[0], strict=True)))
    count: int | Array = len(rows)
    if q_seg is not None and kv_seg is not None:
        meet, kind, kinds = meetings(every, config, kinds, q_seg, kv_seg)
        taken = (meet | (every.first > 0) | (every.read == FRESH))[:-1]
        (index,) = jnp.nonzero(taken, size=taken.size + 1, fill_value=0)
        every = Steps(*(x[index] for x in every._replace(kind=kind)))
        count = taken.sum(dtype=jnp.int32)
    return every._replace(read=_reads(problem, every)), count, kinds


def _reads(problem: Problem, steps: Steps) -> Array:
    """The heads of a group come between two steps of a block: from three on, all can be read early."""
    late = jnp.zeros(steps.read.shape, bool)
    group = problem.heads // problem.kv_heads
    for before in range(1, SLOTS):
        if before * group < SLOTS:
            late |= _same(steps.q_block, before) & _same(steps.batch, before)
    return jnp.where((steps.read != FRESH) & late, LATE, steps.read)


def _same(x: Array, before: int) -> Array:
    """Whether x is what it was so many steps before."""
    start = jnp.full(min(before, len(x)), -1, x.dtype)
    return x == jnp.concatenate([start, x[:-before]])
