"""Which blocks of keys each worker of the paged decode kernel reads, found in the kernel from the lengths.

Workers form teams, one worker a KV head: a token's heads are neighbours in memory, and a team reads them at the same
time, as a row of DRAM is dear to open. More heads than a team has members are several sets. All blocks of keys of all
rows stand in one line: row after row, in a row set after set. The line is cut into as many equal shares as there are
teams (stream-K, Osama et al. 2023). A worker so has parts of a few (row, head) items; those that other teams have parts
of, too, are merged by the last of them.
"""

from dataclasses import dataclass, fields, replace
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
    abreast: int = 1  # KV heads that are read as one, which is so many times as wide as they are

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


def abreast(problem: Problem) -> Problem:
    """Pairs of heads of 64 columns as one of 128: 128 bytes a token are less than memory likes to be read by."""
    if problem.head_dim != CHUNK or problem.kv_heads % 2 or 2 * problem.packed > ROWS:
        return problem
    return replace(problem, kv_heads=problem.kv_heads // 2, head_dim=2 * CHUNK, abreast=2)


def blocks(multiprocessors: int) -> int:
    """Of the grid: a power of two where few multiprocessors are left over, so that rows of equal lengths, often a power
    of two themselves, are not cut. Fewer readers do not read less, as memory is what is slow."""
    power = 1 << (multiprocessors.bit_length() - 1)
    return power if 16 * power >= 15 * multiprocessors else multiprocessors


def config_for(problem: Problem) -> Config:
    """What is in flight covers the latency of memory; of more, memory makes less."""
    if problem.columns > 128 or problem.abreast > 1:
        return Config(64, 4, 1)
    return Config(128 if problem.columns < 128 else 64, 3)


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
    unread: Array  # blocks that the team has left, this item's included
    share: Array  # blocks of every team, and how many teams have one more
    extra: Array

    @property
    def whole(self) -> Array:
        return self.blocks == self.total


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

    def start(self, worker: Array) -> Item:
        """The first item of a worker; all lanes of a warp find it together."""
        sets = self.problem.kv_heads // self.team
        team, member = divide(worker, self.team)
        lines = min(ROWS_A_LANE, tiles.cdiv(self.rows, LANES))
        groups = tiles.cdiv(self.rows, LANES * lines)
        sums = self._sums(jnp.int32(0), lines)

        def sums_of(group):
            return sums if groups == 1 else self._sums(group, lines)

        total = each(groups, lambda group, total: total + sum(n for _, n in sums_of(group)), jnp.int32(0))
        share, extra = divide(total * sets, self.teams)
        first = team * share + jnp.minimum(team, extra)

        def find(group, found):
            before, line, before_line = found
            for start, n in sums_of(group):
                inside = (first >= before * sets) & (first < (before + n) * sets)
                line, before_line = jnp.where(inside, start, line), jnp.where(inside, before, before_line)
                before += n
            return before, line, before_line

        _, line, before_line = each(groups, find, (jnp.int32(0),) * 3)
        mine = self._count(line + hopper_lanes.lane())
        at = before_line + hopper_lanes.warp_scan(mine) - mine
        inside = (first >= at * sets) & (first < (at + mine) * sets)
        row, before_row = (hopper_lanes.warp_sum(jnp.where(inside, x, 0)) for x in (line + hopper_lanes.lane(), at))
        *_, count = self._row(row)
        index, skipped = divide(jnp.maximum(first - before_row * sets, 0), jnp.maximum(count, 1))
        unread = share + jnp.where(team < extra, 1, 0)
        return self._item(row, index * self.team + member, skipped, first - skipped, unread, share, extra)

    def next(self, item: Item) -> Item:
        """What the worker reads after `item`; of no blocks where it has read its share."""
        head = item.head + self.team
        same_row = head < self.problem.kv_heads
        before, unread = item.before + item.total, item.unread - item.blocks
        row = lax.while_loop(
            lambda row: (unread > 0) & (row < self.rows - 1) & (self._row(row)[-1] == 0),
            lambda row: row + 1,
            jnp.where(same_row, item.row, jnp.minimum(item.row + 1, self.rows - 1)),
        )
        head = jnp.where(same_row, head, lax.rem(head, jnp.int32(self.team)))
        return self._item(row, head, jnp.int32(0), before, unread, item.share, item.extra)

    def parts(self, item: Item) -> tuple[Array, Array]:
        """The first and the last of the teams that have a part of the item."""
        return self._team_of(item, item.before), self._team_of(item, item.before + item.total - 1)

    def worker(self, team: Array, item: Item) -> Array:
        """Who of a team reads the item's head."""
        return team * self.team + lax.rem(item.head, jnp.int32(self.team))

    def _team_of(self, item: Item, unit: Array) -> Array:
        longer = item.extra * (item.share + 1)
        late = item.extra + lax.div(jnp.maximum(unit - longer, 0), jnp.maximum(item.share, 1))
        return jnp.where(unit < longer, lax.div(unit, item.share + 1), late)

    def _item(self, row, head, skipped, before, unread, share, extra) -> Item:
        q_start, q_len, kv_len, begin, first, total = self._row(row)
        blocks = jnp.minimum(total - skipped, unread)
        place = row, head, first + skipped, blocks, q_start, q_len, kv_len, begin
        return Item(*place, before, total, unread, share, extra)

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


def each(count: int, body: Any, state: Any) -> Any:
    """A fori_loop, or its body where it is done once."""
    return body(jnp.int32(0), state) if count == 1 else lax.fori_loop(0, count, body, state)
