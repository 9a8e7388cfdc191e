"""Which tiles of packed queries the paged prefill kernel works on, and which blocks of keys each visits."""

from dataclasses import dataclass
from functools import reduce
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from paxattn.kernels import hopper_lanes, tiles
from paxattn.kernels.gpu_blocks import divide
from paxattn.kernels.gpu_flash_fwd_plan import Config, Item, Place
from paxattn.kernels.gpu_paged_plan import ROWS_A_LANE, each
from paxattn.kernels.hopper_lanes import LANES
from paxattn.kernels.problem import Problem

FIELDS = 10  # of an item


def most_tiles(tokens: int, rows: int, size: int) -> int:
    """How many tiles of `size` queries there may be, whatever the rows' lengths are."""
    return min(tokens, tiles.cdiv(tokens, size) + rows)


@dataclass(frozen=True)
class PagedPlan:
    """Items that blocks take as they become ready: row after row, in a row head after head, which share what they
    read, in a head the last tile first, which sees the most."""

    problem: Problem
    config: Config
    ctas: int
    few: int  # Rows of no more queries have no tiles.
    kv_lens: Any  # [R]
    cu_q_lens: Any  # [R+1]
    skipped: Any  # [1], how many of every row's first keys are left out; None for none of them

    @property
    def rows(self) -> int:
        return self.kv_lens.shape[0]

    def item(self, index) -> Item:
        """The item of that number, of no blocks where there is none; all lanes of a warp find it together."""
        heads, size, block_kv = self.problem.heads, self.config.block_q, self.config.block_kv
        row, first, row_tiles = self._find(lax.div(index, jnp.int32(heads)))
        exists = row_tiles > 0
        head, rank = divide(jnp.where(exists, index - first * heads, 0), jnp.maximum(row_tiles, 1))
        start = (row_tiles - 1 - rank) * size
        q_start, kv_len = self.cu_q_lens[row], self.kv_lens[row]
        q_len = self.cu_q_lens[row + 1] - q_start
        rows, position = jnp.minimum(q_len - start, size), kv_len - q_len + start
        stop = kv_len if self.problem.right is None else jnp.minimum(position + rows, kv_len)
        begin = jnp.int32(0) if self.skipped is None else self.skipped[0]
        if self.problem.left is not None:
            begin = jnp.maximum(begin, position - self.problem.left)
        hi = lax.div(jnp.maximum(stop, 1) + (block_kv - 1), jnp.int32(block_kv))
        lo = jnp.minimum(lax.div(begin, jnp.int32(block_kv)), hi - 1)
        place = Place(row, position, rows, begin, kv_len)
        return Item(jnp.int32(0), head, q_start + start, lo, jnp.where(exists, hi - lo, 0), place=place)

    def _find(self, tile) -> tuple[Array, Array, Array]:
        """The row that has the tile of that number, the row's first and how many it has; zeros where there is none."""
        lines = min(ROWS_A_LANE, tiles.cdiv(self.rows, LANES))

        def look(group, found):
            before, *its = found
            start = (group * LANES + hopper_lanes.lane()) * lines
            counts = [self._tiles(start + i) for i in range(lines)]
            mine = reduce(jnp.add, counts)
            first = before + hopper_lanes.warp_scan(mine) - mine
            for i, count in enumerate(counts):
                inside = (first <= tile) & (tile < first + count)
                here = start + i, first, count
                its = [jnp.where(inside, new, old) for new, old in zip(here, its, strict=True)]
                first += count
            return before + hopper_lanes.warp_sum(mine), *its

        none = jnp.int32(0)
        _, *its = each(tiles.cdiv(self.rows, LANES * lines), look, (none, none, none, none))
        row, first, count = map(hopper_lanes.warp_sum, its)  # Only one lane has found any.
        return row, first, count

    def _tiles(self, row) -> Array:
        """How many a row has; none where there is no such row."""
        start, end = (self.cu_q_lens[jnp.minimum(row + i, self.rows)] for i in range(2))
        q_len, size = end - start, self.config.block_q
        return jnp.where(q_len > self.few, lax.div(q_len + (size - 1), jnp.int32(size)), 0)

    def read(self, fields) -> Item:
        """An item from what it consists of."""
        batch, head, q_start, lo, blocks, *place = fields
        return Item(batch, head, q_start, lo, blocks, place=Place(*place))
