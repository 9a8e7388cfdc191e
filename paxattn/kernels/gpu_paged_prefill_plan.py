"""Which tiles of packed queries the paged prefill kernel works on, and which blocks of keys each visits."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from paxattn.kernels import tiles
from paxattn.kernels.gpu_blocks import divide
from paxattn.kernels.gpu_flash_fwd_plan import Config, Item, Place
from paxattn.kernels.problem import Problem

FIELDS = 10  # of an item


def most_tiles(tokens: int, rows: int, size: int) -> int:
    """How many tiles of `size` queries there may be, whatever the rows' lengths are."""
    return min(tokens, tiles.cdiv(tokens, size) + rows)


@jax.enable_x64(False)
def tiles_of(cu_q_lens: Array, tokens: int, size: int, longest_left_out: int) -> tuple[Array, Array]:
    """int32 [W,3], of each tile its row, the row's first tile and the number of the row's tiles, and [1], how many
    tiles there are. Rows of no more than `longest_left_out` queries have none."""
    q_lens = jnp.diff(cu_q_lens)
    counts = jnp.where(q_lens > longest_left_out, tiles.cdiv(q_lens, size), 0)
    rows = jnp.arange(len(q_lens))
    # XLA's cumulative sum takes longer than all of this.
    ends = jnp.where(rows[:, None] >= rows[None, :], counts[None, :], 0).sum(axis=1)
    index = jnp.arange(most_tiles(tokens, len(q_lens), size))
    row = jnp.minimum((ends[None, :] <= index[:, None]).sum(axis=1), len(q_lens) - 1)
    table = jnp.stack([row, (ends - counts)[row], counts[row]], axis=1)
    return table.astype(jnp.int32), ends[-1:].astype(jnp.int32)


def tiles_of_equals(rows: int, tokens: int, size: int) -> tuple[Array, Array]:
    """`tiles_of` so many rows of so many queries each, which are constants."""
    each = tiles.cdiv(tokens, size)
    table = [(row, row * each, each) for row in range(rows) for _ in range(each)]
    return jnp.asarray(table, jnp.int32), jnp.asarray([rows * each], jnp.int32)


@dataclass(frozen=True)
class PagedPlan:
    """Items that blocks take as they become ready: row after row, in a row head after head, which share what they
    read, in a head the last tile first, which sees the most."""

    problem: Problem
    config: Config
    ctas: int
    table: Any  # what `tiles_of` gives
    count: Any
    kv_lens: Any  # [R]
    cu_q_lens: Any  # [R+1]
    skipped: Any  # [1], how many of every row's first keys are left out; None for none of them

    def item(self, index) -> Item:
        """The item of that number; of no blocks where there is none."""
        heads, size, block_kv = self.problem.heads, self.config.block_q, self.config.block_kv
        exists = index < self.count[0] * heads
        index = jnp.where(exists, index, 0)
        tile = lax.div(index, jnp.int32(heads))
        row, first, row_tiles = (self.table[tile, i] for i in range(3))
        head, rank = divide(index - first * heads, jnp.maximum(row_tiles, 1))
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

    def read(self, fields) -> Item:
        """An item from what it consists of."""
        batch, head, q_start, lo, blocks, *place = fields
        return Item(batch, head, q_start, lo, blocks, place=Place(*place))
