"""Which blocks the forward kernel visits, and which tiles of a block it computes; all that is static, in Python.

What a block of queries sees of a block of keys depends on how far the one is ahead of the other alone. So few blocks
of a call differ: for each kind the kernel has code of its own, without the tiles that nobody sees and with a mask on
those alone that some queries see in part.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from paxattn.kernels import tiles
from paxattn.kernels.problem import Problem

LANES = 128


@dataclass(frozen=True)
class Config:
    """Tokens of a block, which is copied at once, and of the tiles in it, whose products are computed at once."""

    block_q: int = 2048
    block_kv: int = 2048
    tile_q: int = 512
    tile_kv: int = 512


def config_for(problem: Problem, itemsize: int) -> Config:
    del problem
    return Config() if itemsize == 2 else Config(block_q=1024, block_kv=1024, tile_q=256, tile_kv=256)


def fitted(config: Config, problem: Problem) -> Config:
    """Blocks no larger than the arrays, in whole lanes."""
    block_q = min(config.block_q, padded(problem.q_len))
    block_kv = min(config.block_kv, padded(problem.kv_len))
    return Config(block_q, block_kv, min(config.tile_q, block_q), min(config.tile_kv, block_kv))


def padded(length: int) -> int:
    return tiles.cdiv(length, LANES) * LANES


class Tile(NamedTuple):
    """Queries [q, q_end) and keys [kv, kv_end) of a block, and what masks them, None where nothing does."""

    q: int
    q_end: int
    kv: int
    kv_end: int
    ahead: int | None  # the position of query q less that of key kv, where windows matter
    keys: int | None  # how many of the keys there are, where not all

    @property
    def queries_at(self) -> slice:
        return slice(self.q, self.q_end)

    @property
    def keys_at(self) -> slice:
        return slice(self.kv, self.kv_end)


Kind = tuple[Tile, ...]


class Visit(NamedTuple):
    """A block of queries that visits a block of keys."""

    q_block: int
    kv_block: int
    kind: Kind
    first: bool  # whether no visit of the block of queries comes before it


def visits(problem: Problem, config: Config) -> list[Visit]:
    """In the order of the queries; each block of queries has one at least, as somebody must write its output."""
    found = []
    for i in range(tiles.cdiv(problem.q_len, config.block_q)):
        row: list[Visit] = []
        for j in range(tiles.cdiv(problem.kv_len, config.block_kv)):
            if kind := kind_of(problem, config, i, j):
                row.append(Visit(i, j, kind, not row))
        found += row or [Visit(i, 0, (), True)]
    return found


def kind_of(problem: Problem, config: Config, i: int, j: int) -> Kind:
    """What queries of block i compute with keys of block j."""
    rows = min(config.block_q, problem.q_len - i * config.block_q)
    keys = min(config.block_kv, problem.kv_len - j * config.block_kv)
    return _kind(problem, config, i * config.block_q + problem.offset - j * config.block_kv, rows, keys)


@lru_cache(4096)
def _kind(problem: Problem, config: Config, ahead: int, rows: int, keys: int) -> Kind:
    """Chunks of keys outside, so that neighbours have softmax states of their own and may run at the same time."""
    found = [
        _tile(problem, ahead, keys, q, min(q + config.tile_q, padded(rows)), kv, min(kv + config.tile_kv, padded(keys)))
        for kv in range(0, keys, config.tile_kv)
        for q in range(0, rows, config.tile_q)
    ]
    return tuple(tile for tile in found if tile)


def _tile(problem: Problem, ahead: int, keys: int, q: int, q_end: int, kv: int, kv_end: int) -> Tile | None:
    left, right = problem.left, problem.right
    ahead, keys = ahead + q - kv, min(keys - kv, kv_end - kv)
    first, last = ahead, ahead + q_end - q - 1  # positions of queries, counted from the tile's first key
    if (right is not None and last + right < 0) or (left is not None and first - left >= keys):
        return None
    whole = (right is None or first + right >= keys - 1) and (left is None or last - left <= 0)
    return Tile(q, q_end, kv, kv_end, None if whole else ahead, None if keys == kv_end - kv else keys)


class Steps(NamedTuple):
    """int32 [n + 1] each: what the kernel does in turn for every head, then the first step again: each looks ahead."""

    batch: Array
    q_block: Array
    kv_block: Array
    kind: Array
    first: Array


def steps(problem: Problem, config: Config) -> tuple[Steps, list[Kind]]:
    """Every visit of every batch, and the kinds that its `kind` counts."""
    found = visits(problem, config)
    kinds = list(dict.fromkeys(visit.kind for visit in found))
    number = {kind: i for i, kind in enumerate(kinds)}
    rows = [(b, v.q_block, v.kv_block, number[v.kind], v.first) for b in range(problem.batch) for v in found]
    columns = zip(*rows, rows[0], strict=True)
    return Steps(*(jnp.asarray(column, jnp.int32) for column in columns)), kinds


def steps_of_segments(problem: Problem, config: Config, q_seg: Array, kv_seg: Array) -> tuple[Steps, Array, list[Kind]]:
    """The steps of blocks that may have a segment in common, how many there are, and the kinds.

    The ids are padded to whole blocks.
    """
    every, kinds = steps(problem, config)
    meet, kind, kinds = meetings(every, config, kinds, q_seg, kv_seg)
    taken = (meet | (every.first > 0))[:-1]
    (index,) = jnp.nonzero(taken, size=taken.size + 1, fill_value=0)
    return Steps(*(x[index] for x in every._replace(kind=kind))), taken.sum(dtype=jnp.int32), kinds


def meetings(
    every: Any, config: Config, kinds: list[Kind], q_seg: Array, kv_seg: Array
) -> tuple[Array, Array, list[Kind]]:
    """Whether the blocks of a step may have a segment in common, and the step's kind.

    `kind` counts the kinds twice, the second time for two blocks that are not of one segment altogether.
    """
    kinds = [*kinds, ()]
    q_low, q_high = (x[every.batch, every.q_block] for x in tiles.extremes(q_seg, config.block_q))
    kv_low, kv_high = (x[every.batch, every.kv_block] for x in tiles.extremes(kv_seg, config.block_kv))
    meet = (kv_low <= q_high) & (kv_high >= q_low)
    mixed = (q_low != q_high) | (kv_low != kv_high)
    return meet, jnp.where(meet, every.kind + jnp.where(mixed, len(kinds), 0), len(kinds) - 1), kinds
