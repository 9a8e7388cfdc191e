"""What every block of the backward kernel works on, in which order, and in which order dq is summed.

The order is such that the tiles of keys which run together meet at no block of queries at the same time: each adds to
dq when its turn comes, and hardly ever waits for it (Qiang et al. 2026, DASH, order tiles to the same end).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from paxattn.kernels import tiles
from paxattn.kernels.gpu_blocks import ROWS, divide, in_range, may_meet, same_segment, span
from paxattn.kernels.problem import Problem

WARPGROUPS = 2  # that own dk and dv


@dataclass(frozen=True)
class Config:
    block_q: int = 64
    stages: int = 2
    split_columns: bool = False
    together: bool = False  # whether S and dP are in flight at once, which takes registers

    @property
    def block_kv(self) -> int:
        return ROWS if self.split_columns else ROWS * WARPGROUPS


def split_of(problem: Problem, config: Config, ctas: int) -> int:
    """Into how many parts the heads of a group are split so that small work has a block for every tile and part."""
    group, kv_tiles = problem.heads // problem.kv_heads, tiles.cdiv(problem.kv_len, config.block_kv)
    fitting = ctas // (problem.batch * problem.kv_heads * kv_tiles)
    return max((n for n in range(1, fitting + 1) if group % n == 0), default=1)


def config_for(problem: Problem) -> Config:
    return Config(split_columns=problem.head_dim > 128)


def candidates(head_dim: int, v_dim: int) -> list[Config]:
    """The configs worth timing for a head; not all of them compile for every dtype and mask."""
    del v_dim
    if head_dim > 128:
        return [Config(split_columns=True)]
    if head_dim > 64:
        return [Config(stages=2)]
    return [Config(128), *(Config(stages=stages, together=together) for stages in (2, 3) for together in (False, True))]


@dataclass(frozen=True)
class Item:
    """Traced: a tile of keys and the query blocks [lo, lo + blocks) that it visits for every head of the group."""

    exists: Array
    batch: Array
    kv_head: Array
    tile: Array
    kv_start: Array
    lo: Array
    blocks: Array
    first: Array  # the block visited first
    direction: Any  # 1 or -1
    together: tuple[Array, Array]  # the units [0, 1) of the KV head that run in the same round


@dataclass(frozen=True)
class Plan:
    """Which items a block takes.

    A unit of work is a tile or, where tiles differ in work by a causal mask, the n-th together with the n-th last:
    units then take equally long. Of an odd number of tiles the last, which few queries see, is the first unit's, too.
    Units follow each other densely, KV head after KV head, `ctas` in a round. With segments, whose tiles differ in
    work, there are no rounds: a block takes the next item when it is ready for one (`item_taken`).

    Under a causal mask, when dq is summed in order, the first tile of a unit visits its query blocks upwards from the
    diagonal and the second one downwards, so that no two tiles of a head are at the same block at the same time, and
    all are in step. In any order all go the other way and meet at each block, which is then in the L2 cache. Without
    any mask tile n starts where its keys are and wraps around. Windows and segments start on their diagonals.
    """

    problem: Problem
    config: Config
    ctas: int
    segments: tuple | None
    ordered: bool  # whether dq is summed in a fixed order

    @property
    def kv_tiles(self) -> int:
        return tiles.cdiv(self.problem.kv_len, self.config.block_kv)

    @property
    def q_blocks(self) -> int:
        return tiles.cdiv(self.problem.q_len, self.config.block_q)

    @property
    def group(self) -> int:
        return self.problem.heads // self.problem.kv_heads

    @property
    def pairs(self) -> int:
        return self.problem.batch * self.problem.kv_heads

    @property
    def banded(self) -> bool:
        """Whether the tiles that visit a block are some consecutive ones."""
        return self.problem.left is not None or self.segments is not None

    @property
    def rotates(self) -> bool:
        return self.problem.right is None and not self.banded

    @property
    def triangular(self) -> bool:
        return self.problem.right is not None and not self.banded

    @property
    def paired(self) -> bool:
        """Whether a unit is two tiles; not where there is a block for every tile."""
        return self.triangular and self.kv_tiles > 1 and self.pairs * self.kv_tiles > self.ctas

    @property
    def single(self) -> bool:
        """Whether there is a last tile that has none to be paired with."""
        return self.paired and self.kv_tiles % 2 == 1

    @property
    def units(self) -> int:
        """Of one KV head."""
        return self.kv_tiles // 2 if self.paired else self.kv_tiles

    @property
    def turns_of_unit(self) -> int:
        return 2 + self.single if self.paired else 1

    @property
    def rounds(self) -> int:
        """Of items, two or three times as many as of units where those are so many tiles."""
        return tiles.cdiv(self.pairs * self.units, self.ctas) * self.turns_of_unit

    @property
    def items(self) -> int:
        return self.pairs * self.kv_tiles

    @property
    def dealt(self) -> bool:
        """Whether items are dealt to the blocks; with segments blocks take them as they become ready."""
        return self.segments is None or self.items <= self.ctas

    def item(self, turn) -> Item:
        """What this block is dealt as number `turn`."""
        units = self.units
        which, part = divide(turn, self.turns_of_unit) if self.paired else (turn, 0)
        index = which * self.ctas + lax.axis_index("cta")
        exists = index < self.pairs * units
        pair, unit = divide(jnp.where(exists, index, 0), units)
        start = which * self.ctas - pair * units
        together = jnp.maximum(start, 0), jnp.minimum(start + self.ctas, units)
        tile, direction = unit, jnp.int32(1 if self.ordered or not self.triangular else -1)
        if self.paired:
            second = part == self.turns_of_unit - 1 if self.ordered else part == 1
            tile, direction = jnp.where(second, 2 * units - 1 - unit, unit), jnp.where(second, -direction, direction)
        if self.single:
            # First where dq has an order, and then first in that; last where it waits for the first tile, which is
            # of the same unit.
            single = part == (0 if self.ordered else 2)
            exists, tile = exists & (~single | (unit == 0)), jnp.where(single, self.kv_tiles - 1, tile)
        return self._item(exists, pair, tile, direction, together)

    def item_taken(self, index) -> Item:
        """The item that has this number, which exists if it is less than `items`: head after head the last tile first,
        which is ahead of the others; of the last few heads side by side, so that what is left in the end is short."""
        pairs, kv_tiles = self.pairs, self.kv_tiles
        last = min(pairs, tiles.cdiv(3 * self.ctas, kv_tiles))
        in_order = (pairs - last) * kv_tiles
        exists = index < self.items
        index = jnp.where(exists, index, 0)
        pair, rank = divide(index, kv_tiles)
        late_rank, late_pair = divide(jnp.maximum(index - in_order, 0), last)
        late = index >= in_order
        pair, rank = jnp.where(late, pairs - last + late_pair, pair), jnp.where(late, late_rank, rank)
        return self._item(exists, pair, kv_tiles - 1 - rank, jnp.int32(1), (jnp.int32(0), jnp.int32(kv_tiles)))

    def _item(self, exists, pair, tile, direction, together) -> Item:
        problem = self.problem
        batch, kv_head = divide(pair, problem.kv_heads)
        kv_start = tile * self.config.block_kv
        if self.segments is None:
            lo, hi = query_range(problem, self.config.block_q, kv_start, self.config.block_kv)
        else:
            lo, hi = (self.segments[2][batch, i, tile] for i in range(2))
        first = self.own_block(tile) if self.rotates else lo
        if self.triangular:
            first = jnp.where(direction > 0, lo, hi - 1)
        blocks = jnp.where(exists, hi - lo, 0)
        return Item(exists, batch, kv_head, tile, kv_start, lo, blocks, first, direction, together)

    def each_step(self, item: Item, body, state=None):
        """state = body(i, j, g, state) for the head g of the group and the j-th block it visits; one that falls goes
        through the heads backwards, too."""

        def one_head(n, state):
            g = jnp.where(item.direction > 0, n, self.group - 1 - n)
            return lax.fori_loop(0, item.blocks, lambda j, state: body(n * item.blocks + j, j, g, state), state)

        return lax.fori_loop(0, self.group, one_head, state)

    def block(self, item: Item, j):
        """The query block that an item visits as number j."""
        block = item.first + item.direction * j
        return jnp.where(block >= self.q_blocks, block - self.q_blocks, block) if self.rotates else block

    def own_block(self, tile):
        """Where a tile starts that visits all blocks."""
        return jnp.minimum(tile * (self.config.block_kv // self.config.block_q), self.q_blocks - 1)

    def covers(self) -> bool:
        """Whether some tile visits every query block."""
        return self.segments is None and (self.problem.right is None or self.problem.offset + self.problem.right >= 0)

    @property
    def takes_turns(self) -> bool:
        """In any order all tiles but the first wait for that one, so that it stores instead of adding to zeros; not
        where the first one is another tile for every block, nor where shorter tiles would be heads ahead of it."""
        return self.ordered or (self.covers() and self.triangular and self.group == 1)

    def turn(self, item: Item, g, block):
        """How many tiles must have added to the block's dq of head g before this one; 0 is one tile's alone."""
        if not self.ordered:
            return jnp.minimum(item.tile, 1)
        if self.rotates:
            return self.turn_of_rotation(item, block)
        if self.banded:
            return self.turn_in_band(item, block)
        return self.turn_of_pairs(item, g, block)

    def counts(self, turn):
        """Whether others wait for that turn."""
        return self.ordered | (turn == 0)

    def turn_of_rotation(self, item: Item, block):
        """The tiles of earlier rounds, then those that started at the block or below, the last first, then others."""
        start, end = item.together
        step = self.config.block_kv // self.config.block_q
        started = jnp.where(block == self.q_blocks - 1, end, jnp.clip(lax.div(block, jnp.int32(step)) + 1, start, end))
        wrapped = item.tile >= started
        return jnp.where(wrapped, started + end - 1 - item.tile, start + started - 1 - item.tile)

    def turn_in_band(self, item: Item, block):
        """The tiles of earlier rounds, then those of this one, the last first, which is ahead of the others."""
        start, end = item.together
        low, high = self.band(item.batch, block)
        return jnp.maximum(start, low) - low + jnp.minimum(end, high) - 1 - item.tile

    def band(self, batch, block):
        """The tiles [low, high) that visit a block."""
        problem, config = self.problem, self.config
        if self.segments is not None:
            return self.segments[3][batch, 0, block], self.segments[3][batch, 1, block]
        low = jnp.maximum((block * config.block_q + problem.offset - problem.left) // config.block_kv, 0)
        return low, self.tiles_from(block)

    def tiles_from(self, block):
        """How many tiles start to see at a block or before it."""
        problem, config = self.problem, self.config
        if problem.right is None:
            return jnp.full_like(block, self.kv_tiles)
        keys = (block + 1) * config.block_q + problem.offset + problem.right
        return jnp.where(block < 0, 0, jnp.clip(-(-keys // config.block_kv), 0, self.kv_tiles))

    def turn_of_pairs(self, item: Item, g, block):
        """The tiles of earlier rounds, then those of this one by the time at which they come, were all in step."""
        seen, low, n = self.tiles_from(block), item.lo, 2 * self.units
        if not self.paired:
            return seen - 1 - item.tile
        start, end = item.together
        falling = jnp.maximum(n - end, self.units), n - start
        before = jnp.minimum(start, seen) + jnp.maximum(seen - falling[1], 0)

        def count(below, tiles):
            """Of some tiles those that see their first query in a block less than `below`."""
            return jnp.clip(self.tiles_from(below - 1), *tiles) - tiles[0]

        # Rising tile t is there at the time g (q_blocks - lo(t)) + block - lo(t), a falling one so long before the end.
        # A falling one comes before a rising one if their lo together are below this.
        margin = 2 * g * self.q_blocks + 2 * block + 1 - self.group * self.unit_time
        meets = jnp.minimum(lax.div(jnp.maximum(margin, 0) + g, g + 1) - low, block + 1)
        rising_turn = jnp.minimum(seen, end) - 1 - item.tile + count(meets, falling)
        falling_turn = item.tile - falling[0] + count(block + 1, item.together) - count(meets, item.together)
        turn = before + jnp.where(item.direction < 0, falling_turn, rising_turn)
        return jnp.where(item.tile == n, 0, turn) if self.single else turn

    @cached_property
    def unit_time(self) -> int:
        """Visits of one head from the begin of a unit to its end, of the longest unit."""
        n, config, problem = 2 * self.units, self.config, self.problem
        ahead = problem.offset + (problem.right or 0)
        firsts = ((t * config.block_kv - ahead) // config.block_q for t in range(n))
        starts = [min(max(first, 0), self.q_blocks) for first in firsts]
        return 2 * self.q_blocks - min(starts[t] + starts[-1 - t] for t in range(n))


def query_range(problem: Problem, block_q: int, kv_start, rows: int):
    """Query blocks [lo, hi) of which some query may see one of `rows` keys from kv_start on. Neither falls with it."""
    blocks = tiles.cdiv(problem.q_len, block_q)
    first = kv_start - problem.offset
    last = first + rows - 1
    lo = jnp.zeros_like(kv_start) if problem.right is None else (first - problem.right) // block_q
    hi = jnp.full_like(kv_start, blocks) if problem.left is None else (last + problem.left) // block_q + 1
    lo = jnp.clip(lo, 0, blocks)
    return lo, jnp.clip(hi, lo, blocks)


@jax.enable_x64(False)
def segment_bounds(problem: Problem, config: Config, q_seg: Array, kv_seg: Array) -> tuple[Array, Array]:
    """int32 [B,4,tiles]: of each tile of keys the query blocks [0, 1) that it visits and those [2, 3) that are of one
    segment with all of it; and [B,2,blocks]: of each query block the tiles [0, 1) that visit it.

    The ranges are widened until neither end falls from one tile to the next: a block's tiles are then consecutive.
    """
    q_low, q_high = tiles.extremes(q_seg, config.block_q)
    kv_low, kv_high = tiles.extremes(kv_seg, config.block_kv)
    lo, hi = query_range(problem, config.block_q, jnp.arange(kv_low.shape[1]) * config.block_kv, config.block_kv)
    lo, hi = span(may_meet(kv_low, kv_high, q_low, q_high) & in_range(lo, hi, q_low.shape[1]))
    hi = lax.cummax(hi, axis=1)
    lo = jnp.minimum(lax.cummin(lo, axis=1, reverse=True), hi)
    bounds = [lo, hi, *same_segment(kv_low, kv_high, q_low, q_high)]
    block = jnp.arange(q_low.shape[1])[None, None]
    band = [(x[:, :, None] <= block).sum(axis=1) for x in (hi, lo)]
    return jnp.stack(bounds, axis=1).astype(jnp.int32), jnp.stack(band, axis=1).astype(jnp.int32)
