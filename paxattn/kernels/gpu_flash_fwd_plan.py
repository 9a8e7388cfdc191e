"""What every block of the forward kernel works on, in which order, and which blocks of keys a query tile visits."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from paxattn.kernels import tiles
from paxattn.kernels.gpu_blocks import ROWS, divide, in_range, may_meet, run_of, span
from paxattn.kernels.problem import Problem

L2_BYTES = 16 * 2**20  # keys and values that stay in the L2 cache beside all that passes through it


@dataclass(frozen=True)
class Config:
    block_kv: int = 128
    stages: int = 2
    warpgroups: int = 2
    q_in_registers: bool = False
    keys_ahead: bool = False  # whether a block's keys are loaded before the values of the one before it

    @property
    def block_q(self) -> int:
        return ROWS * self.warpgroups


def config_for(problem: Problem) -> Config:
    if problem.head_dim > 192:
        return Config(block_kv=64, stages=2, keys_ahead=True)
    if problem.head_dim > 128:
        return Config()
    if problem.head_dim > 64:
        return Config(q_in_registers=True)
    if problem.right is None:
        return Config(stages=3, warpgroups=3)
    return Config(stages=4, q_in_registers=True)


def candidates(head_dim: int, v_dim: int) -> list[Config]:
    """The configs worth timing for a head; not all of them compile for every dtype and mask."""
    wide = head_dim > 128
    shapes = [(64, 2, 2)] if wide and v_dim > 128 else [(128, 2, 2), (64, 3, 2), (64, 2, 2)]
    if head_dim <= 64:
        shapes += [(128, 4, 2), (128, 3, 3), (128, 2, 3)]
    registers = [False] if wide else [False, True]
    return [
        Config(block_kv, stages, warpgroups, in_registers, keys_ahead)
        for block_kv, stages, warpgroups in shapes
        for in_registers in (registers if warpgroups == 2 else [False])
        for keys_ahead in ([False, True] if wide else [False])
    ]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Place:
    """Where the tile of a row of packed queries stands, whose keys are in pages."""

    row: Array
    position: Array  # of the first query among the row's keys
    rows: Array  # how many of the tile's queries are the row's
    begin: Array  # the first key that any of them sees
    end: Array  # how many keys the row has


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Item:
    """Traced: a query tile and the KV blocks from lo on that it visits, the last one first."""

    batch: Array
    head: Array
    q_start: Array
    lo: Array
    blocks: Array
    run: tuple[Array, Array, Array] | None = None  # with segments: the keys [0, 1) seen, and whether not by all queries
    place: Place | None = None


@dataclass(frozen=True)
class Plan:
    """Which items a block takes, in which order.

    Heads that share KV run side by side, in sections whose K and V fit the L2 cache. In a section the tiles are in
    the order of their work, longest first in the last section, shortest first in the one before it, and so on, and
    are dealt to the blocks to and fro: what the blocks get differs by little, and the last items are short. With
    segments they are in the order of `_packed_item`, and blocks take them as they become ready.
    """

    problem: Problem
    config: Config
    ctas: int
    bounds: Any

    @property
    def q_tiles(self) -> int:
        return tiles.cdiv(self.problem.q_len, self.config.block_q)

    @property
    def items(self) -> int:
        return self.problem.batch * self.problem.heads * self.q_tiles

    @property
    def dealt(self) -> bool:
        """Whether blocks take items in a fixed order; with segments, as soon as they are ready for one."""
        return self.bounds is None or self.items <= self.ctas

    def index(self, turn):
        """The item that this block works on as number `turn`, none if it is no less than `items`; to and fro."""
        cta = lax.axis_index("cta")
        return turn * self.ctas + jnp.where(turn % 2 == 0, cta, self.ctas - 1 - cta)

    def count(self) -> Array:
        """How many items this block is dealt; at least one."""
        rounds = tiles.cdiv(self.items, self.ctas)
        return jnp.where(self.index(rounds - 1) < self.items, rounds, rounds - 1)

    def item(self, index) -> Item:
        index = jnp.minimum(index, self.items - 1)
        return self._dense_item(index) if self.bounds is None else self._packed_item(index)

    def _dense_item(self, index) -> Item:
        problem, q_tiles = self.problem, self.q_tiles
        pairs = problem.batch * problem.heads
        section = section_size(problem, self.config, self.ctas)
        which, rest = divide(index, section * q_tiles)
        rank, pair = divide(rest, jnp.minimum(section, pairs - which * section))
        batch, head = divide(which * section + pair, problem.heads)
        rising = (tiles.cdiv(pairs, section) - 1 - which) % 2 == 1
        rank = jnp.where(rising, q_tiles - 1 - rank, rank)
        tile = q_tiles - 1 - rank if problem.right is not None else rank
        q_start = tile * self.config.block_q
        lo, hi = block_range(problem, self.config.block_kv, q_start, self.config.block_q)
        return Item(batch, head, q_start, lo, hi - lo)

    def _packed_item(self, index) -> Item:
        """Head after head the tiles as they lie, which share keys; of the last few heads the longest items first."""
        problem, q_tiles = self.problem, self.q_tiles
        pairs = problem.batch * problem.heads
        last = min(pairs, tiles.cdiv(3 * self.ctas, q_tiles))
        in_order = (pairs - last) * q_tiles
        pair, rank = divide(index, q_tiles)
        late_rank, late_pair = divide(jnp.maximum(index - in_order, 0), last)
        late = index >= in_order
        batch, head = divide(jnp.where(late, pairs - last + late_pair, pair), problem.heads)
        tile = jnp.where(late, self.bounds[batch, jnp.where(late, late_rank, 0), 5], q_tiles - 1 - rank)
        lo, hi, *run = (self.bounds[batch, tile, i] for i in range(5))
        return Item(batch, head, tile * self.config.block_q, lo, hi - lo, tuple(run))


@lru_cache
def section_size(problem: Problem, config: Config, ctas: int) -> int:
    """How many query heads a section has: the largest size that leaves the busiest block least to do.

    Where at least eight blocks work on a head, they share what they load as it comes, and the cache may be overrun.
    """
    group, kv_pairs = problem.heads // problem.kv_heads, problem.batch * problem.kv_heads
    sharing = max(1, ctas // (8 * group))
    if problem.left is not None:
        return group * min(kv_pairs, sharing)
    if problem.right is None:
        return group
    fit = L2_BYTES // (2 * problem.kv_len * (problem.head_dim + problem.v_dim))
    most = min(kv_pairs, max(1, fit, min(2 * fit, sharing)))
    busiest = {size * group: _busiest(problem, config, ctas, size * group) for size in range(1, most + 1)}
    least = min(busiest.values())
    return max(size for size, work in busiest.items() if work <= 1.005 * least)


def _busiest(problem: Problem, config: Config, ctas: int, section: int) -> int:
    """The most blocks of keys that a block of the grid visits under a causal mask, each item costing one more."""
    pairs, q_tiles = problem.batch * problem.heads, tiles.cdiv(problem.q_len, config.block_q)
    kv_blocks = tiles.cdiv(problem.kv_len, config.block_kv)
    ahead = problem.offset + (problem.right or 0)
    ends = ((tile + 1) * config.block_q + ahead for tile in range(q_tiles))
    work = [1 + min(max(tiles.cdiv(end, config.block_kv), 1), kv_blocks) for end in ends]
    dealt: list[int] = []
    for start in range(0, pairs, section):
        rising = (tiles.cdiv(pairs, section) - 1 - start // section) % 2 == 1
        dealt += (x for x in (work if rising else work[::-1]) for _ in range(min(section, pairs - start)))
    rounds = [dealt[i : i + ctas] for i in range(0, len(dealt), ctas)]
    rounds[-1] += [0] * (ctas - len(rounds[-1]))
    return max(map(sum, zip(*(one[:: 1 if i % 2 == 0 else -1] for i, one in enumerate(rounds)), strict=True)))


def block_range(problem: Problem, block_kv: int, q_start, rows: int):
    """KV blocks [lo, hi) that some of `rows` queries from q_start on may see; never empty."""
    blocks = tiles.cdiv(problem.kv_len, block_kv)
    first = q_start + problem.offset
    last = first + rows - 1
    lo = jnp.zeros_like(q_start) if problem.left is None else (first - problem.left) // block_kv
    hi = jnp.full_like(q_start, blocks) if problem.right is None else (last + problem.right) // block_kv + 1
    lo = jnp.clip(lo, 0, blocks - 1)
    return lo, jnp.clip(hi, lo + 1, blocks)


def open_range(problem: Problem, block_kv: int, position, rows: int, end):
    """KV blocks [lo, hi) that all of `rows` queries see every key of, the first one at `position`; may be empty."""
    last = position + rows - 1
    lo = jnp.zeros_like(position) if problem.left is None else -((problem.left - last) // block_kv)
    hi = jnp.full_like(position, end // block_kv)
    if problem.right is not None:
        hi = jnp.minimum(hi, (position + problem.right + 1) // block_kv)
    return lo, hi


@jax.enable_x64(False)
def segment_bounds(problem: Problem, config: Config, q_seg: Array, kv_seg: Array) -> tuple[Array, Array]:
    """int32 [B,tiles,6], of each query tile: the KV blocks [0, 1) that it visits, the keys [2, 3) that it may see,
    whether not every query of it sees all of them but for causality and windows, and the tile that has its rank in
    the order of work, longest first; and [B,blocks,2], of each KV block the lowest and the highest id."""
    block_kv, low, high = config.block_kv, *tiles.extremes(q_seg, config.block_q)
    kv_low, kv_high = tiles.extremes(kv_seg, block_kv)
    lo, hi = block_range(problem, block_kv, jnp.arange(low.shape[1]) * config.block_q, config.block_q)
    lo, hi = span(may_meet(low, high, kv_low, kv_high) & in_range(lo, hi, kv_low.shape[1]))
    lo = jnp.minimum(lo, kv_low.shape[1] - 1)
    hi = jnp.maximum(hi, lo + 1)
    first, end, mixed = run_of(low, high, kv_seg, block_kv, lo, hi)
    order = jnp.argsort(lo - hi, axis=1, stable=True)
    bounds = lo, hi, first, jnp.minimum(end, problem.kv_len), mixed, order
    return jnp.stack([x.astype(jnp.int32) for x in bounds], axis=2), jnp.stack([kv_low, kv_high], axis=2)
