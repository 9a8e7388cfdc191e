"""Which blocks of keys each worker of the paged decode kernel reads, found in the kernel from the lengths.

Workers form teams, one worker a KV head: a token's heads are neighbours in memory, and a team reads them at the same
time, as a row of DRAM is dear to open. More heads than a team has members are several sets. All blocks of keys of all
rows stand in one line: row after row, in a row set after set. The line is cut into pieces (stream-K, Osama et al.
2023): first an equal share for each team, which are most of it, then small pieces. A member's part of a piece is a unit.
The worker of that number begins with it; the units of small pieces are for whoever is ready first, as memory does not
serve all multiprocessors equally. A worker so has parts of a few (row, head) items; those of which there are parts in
other pieces, too, are merged by whoever is the last to be done with one. Where the line is cut does not depend on who
reads a piece, so results have the same bits every time.
"""

from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from paxattn.kernels import hopper_lanes, tiles
from paxattn.kernels.gpu_blocks import ROWS, divide
from paxattn.kernels.hopper import CHUNK
from paxattn.kernels.hopper_lanes import LANES
from paxattn.kernels.problem import Scaled

SHARED_BYTES = 225 * 1024  # of a block, with room left for barriers
ROWS_A_LANE = 8  # whose lengths are on their way together


@dataclass(frozen=True)
class Problem(Scaled):
    """What is static in a call."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    max_q_len: int
    left: int | None
    scale: float
    softcap: float | None

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def packed(self) -> int:
        """Queries of a row that share a KV head, token after token: the rows of its tile."""
        return self.max_q_len * self.group

    @property
    def columns(self) -> int:
        """Of a tile in shared memory, which are whole chunks."""
        return tiles.cdiv(self.head_dim, CHUNK) * CHUNK

    def team(self, workers: int) -> int:
        """Workers that read a token's heads side by side."""
        return max(size for size in range(1, self.kv_heads + 1) if self.kv_heads % size == 0 == workers % size)


@dataclass(frozen=True)
class Config:
    block: int  # keys
    slots: int  # tiles of keys or values that a worker has in flight
    warpgroups: int = 2  # workers in a block of the grid
    late: int = 2  # sixteenths of all blocks that are in small pieces
    small: int = 2  # small pieces a team, at most


def config_for(problem: Problem) -> Config:
    """As much in flight as shared memory holds; a worker's step is long enough to hide what a step costs itself."""
    bytes_a_row = 2 * problem.columns
    warpgroups = 2 if problem.columns <= 128 else 1
    block = 128 if problem.columns < 128 else 64
    room = SHARED_BYTES // warpgroups - ROWS * bytes_a_row
    return Config(block, room // (block * bytes_a_row), warpgroups)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Item:
    """Traced: the blocks [block, block + blocks) of a row's keys for one KV head."""

    row: Array
    head: Array
    block: Array
    blocks: Array
    q_start: Array
    q_len: Array
    kv_len: Array
    begin: Array  # the first key that any query sees
    before: Array  # blocks in the line before the item's first
    total: Array  # blocks of the item, whoever reads them
    unread: Array  # blocks that are left of the piece, this item's included
    piece: Array
    share: Array  # blocks of a team's first piece, and of a small one
    few: Array

    @property
    def whole(self) -> Array:
        return self.blocks == self.total

    @property
    def ends_piece(self) -> Array:
        return self.unread <= self.blocks


FIELDS = len(fields(Item))


@dataclass(frozen=True)
class Plan:
    problem: Problem
    config: Config
    workers: int
    kv_lens: Any  # [R]
    cu_q_lens: Any  # [R+1]
    skipped: Any = None  # [1], how many of every row's first keys are left out

    @property
    def rows(self) -> int:
        return self.kv_lens.shape[0]

    @property
    def team(self) -> int:
        return self.problem.team(self.workers)

    @property
    def teams(self) -> int:
        return self.workers // self.team

    @property
    def units(self) -> int:
        """How many there are at most."""
        return self.workers * (1 + self.config.small)

    def start(self, unit: Array) -> Item:
        """The first item of a unit, of no blocks where there is none; all lanes of a warp find it together."""
        sets = self.problem.kv_heads // self.team
        piece, member = divide(unit, self.team)
        lines = min(ROWS_A_LANE, tiles.cdiv(self.rows, LANES))
        groups = tiles.cdiv(self.rows, LANES * lines)
        sums = self._sums(jnp.int32(0), lines)

        def sums_of(group):
            return sums if groups == 1 else self._sums(group, lines)

        total = _each(groups, lambda group, total: total + sum(n for _, n in sums_of(group)), jnp.int32(0)) * sets
        share = jnp.maximum(divide(lax.div(total, jnp.int32(16)) * (16 - self.config.late), self.teams)[0], 1)
        late = jnp.maximum(total - share * self.teams, 0)
        few = jnp.maximum(divide(late + (self.config.small * self.teams - 1), self.config.small * self.teams)[0], 1)

        def begin_of(piece):
            early = jnp.minimum(piece, self.teams)
            return jnp.minimum(early * share + (piece - early) * few, total)

        first = begin_of(piece)

        def find(group, found):
            before, line, before_line = found
            for start, n in sums_of(group):
                inside = (first >= before * sets) & (first < (before + n) * sets)
                line, before_line = jnp.where(inside, start, line), jnp.where(inside, before, before_line)
                before += n
            return before, line, before_line

        _, line, before_line = _each(groups, find, (jnp.int32(0),) * 3)
        mine = self._count(line + hopper_lanes.lane())
        at = before_line + hopper_lanes.warp_scan(mine) - mine
        inside = (first >= at * sets) & (first < (at + mine) * sets)
        row, before_row = (hopper_lanes.warp_sum(jnp.where(inside, x, 0)) for x in (line + hopper_lanes.lane(), at))
        *_, count = self._row(row)
        index, skipped = divide(jnp.maximum(first - before_row * sets, 0), jnp.maximum(count, 1))
        unread = begin_of(piece + 1) - first
        return self._item(row, index * self.team + member, skipped, first - skipped, unread, piece, share, few)

    def next(self, item: Item) -> Item:
        """What comes after `item` in its piece, which it does not end."""
        head = item.head + self.team
        same_row = head < self.problem.kv_heads
        row = lax.while_loop(
            lambda row: (row < self.rows - 1) & (self._row(row)[-1] == 0),
            lambda row: row + 1,
            jnp.where(same_row, item.row, jnp.minimum(item.row + 1, self.rows - 1)),
        )
        head = jnp.where(same_row, head, lax.rem(head, jnp.int32(self.team)))
        before, unread = item.before + item.total, item.unread - item.blocks
        return self._item(row, head, jnp.int32(0), before, unread, item.piece, item.share, item.few)

    def parts(self, item: Item) -> tuple[Array, Array]:
        """The first and the last of the pieces that have a part of the item."""
        return self._piece_of(item, item.before), self._piece_of(item, item.before + item.total - 1)

    def unit(self, piece: Array, item: Item) -> Array:
        """That of a piece in which the item's head is read."""
        return piece * self.team + lax.rem(item.head, jnp.int32(self.team))

    def _piece_of(self, item: Item, place: Array) -> Array:
        early = lax.div(place, item.share)
        late = self.teams + lax.div(jnp.maximum(place - item.share * self.teams, 0), item.few)
        return jnp.where(early < self.teams, early, late)

    def _item(self, row, head, skipped, before, unread, piece, share, few) -> Item:
        q_start, q_len, kv_len, begin, first, total = self._row(row)
        blocks = jnp.minimum(total - skipped, unread)
        place = row, head, first + skipped, blocks, q_start, q_len, kv_len, begin
        return Item(*place, before, total, unread, piece, share, few)

    def _sums(self, group, lines: int) -> list[tuple[Array, Array]]:
        """Of so many times 32 rows each the first, and how many blocks they have together."""
        starts = [(group * lines + i) * LANES for i in range(lines)]
        counts = [self._count(start + hopper_lanes.lane()) for start in starts]
        return [(start, hopper_lanes.warp_sum(n)) for start, n in zip(starts, counts, strict=True)]

    def _count(self, row) -> Array:
        """A row's number of blocks, 0 where there is no such row."""
        return jnp.where(row < self.rows, self._row(jnp.minimum(row, self.rows - 1))[-1], 0)

    def _row(self, row) -> tuple[Array, ...]:
        """A row's first query and number of queries, keys, first key seen, first block and number of blocks.

        A row of more queries than this kernel takes has no blocks; one that has queries and no keys has one.
        """
        block, left = self.config.block, self.problem.left
        q_start, kv_len = self.cu_q_lens[row], self.kv_lens[row]
        q_len = self.cu_q_lens[row + 1] - q_start
        begin = jnp.zeros_like(kv_len) if self.skipped is None else self.skipped[0]
        if left is not None:
            begin = jnp.maximum(begin, kv_len - q_len - left)
        first = lax.div(begin, jnp.asarray(block, jnp.int32))
        end = lax.div(kv_len + (block - 1), jnp.asarray(block, jnp.int32))
        served = (q_len > 0) & (q_len <= self.problem.max_q_len)
        return q_start, q_len, kv_len, begin, first, jnp.where(served, jnp.maximum(end - first, 1), 0)


def _each(count: int, body: Any, state: Any) -> Any:
    return body(jnp.int32(0), state) if count == 1 else lax.fori_loop(0, count, body, state)
