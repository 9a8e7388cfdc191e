"""How the packed queries of a paged call are cut into tiles for the TPU kernel, and how its results are put back.

A tile holds queries of one row. Rows of few queries (decode) and rows of many (prefill) are cut apart, as the kernel
computes them in two ways: see `tpu_paged`. All of it is plain XLA over a few integers a row.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from paxattn.kernels import tiles

LANES = 128
MOST_JOINT_ROWS = 256
MOST_ROWS = 1024
TILE_ELEMENTS = 2**20
BLOCK = 512  # tokens of keys that many queries take in at once
BLOCK_BYTES = 2**22  # of such a block's keys, which is six times in VMEM
FEW_BLOCK = 1024  # and few
FEW_ELEMENTS = 2**21  # of such a block's keys, which is four times in VMEM


@dataclass(frozen=True)
class Problem:
    """What is static in a call."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    rows: int
    pages_a_row: int
    longest: int
    left: int | None
    scale: float
    softcap: float | None

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def few(self) -> int:
        """Up to how many queries a row is of few."""
        return self.longest if self.longest * self.heads <= MOST_JOINT_ROWS else 1

    def in_sight(self, key: Array, query: Array) -> Array:
        """Whether a query sees a key, by their places in the row."""
        seen = key <= query
        return seen if self.left is None else seen & (key >= query - self.left)


@dataclass(frozen=True)
class Config:
    """Sizes of a kernel.

    joint: a token's keys of all heads are multiplied with all queries, and what meets a foreign head is masked. It
      saves taking the heads apart, which is worth more than the wasted products while there are few queries.
    """

    tile: int  # queries
    pages: int  # in a block of keys
    joint: bool

    def sets(self, problem: Problem) -> int:
        """A: how many matrices the keys of a block make."""
        return 1 if self.joint else problem.kv_heads

    def queries(self, problem: Problem) -> int:
        """Q: rows of queries that a set has."""
        return self.tile * problem.heads // self.sets(problem)

    def block(self, problem: Problem) -> int:
        """S: room for the tokens of a block, in whole lanes."""
        return tiles.cdiv(self.pages * problem.page_size, LANES) * LANES


def few_config(problem: Problem) -> Config:
    most = FEW_ELEMENTS // (problem.kv_heads * problem.head_dim)
    return Config(problem.few, _pages(problem, max(LANES, min(FEW_BLOCK, most))), joint=True)


def many_config(problem: Problem, itemsize: int) -> Config:
    block = min(BLOCK, BLOCK_BYTES // (problem.kv_heads * problem.head_dim * itemsize))
    most = min(MOST_ROWS // problem.group, TILE_ELEMENTS // (problem.heads * problem.head_dim))
    tile = max(LANES, 1 << most.bit_length() - 1)
    return Config(min(tile, tiles.cdiv(problem.tokens, LANES) * LANES), _pages(problem, block), joint=False)


def _pages(problem: Problem, block: int) -> int:
    return max(1, min(block // problem.page_size, problem.pages_a_row))


class Tiles(NamedTuple):
    """W tiles, of which the first `total` are there. Traced."""

    row: Array  # [W]
    position: Array  # [W] place of the first query in the row's keys
    queries: Array  # [W]
    total: Array  # [1]
    token: Array  # [W] the first query in the packed ones
    first: Array  # [R] the first tile of each row


def cut(problem: Problem, config: Config, kv_lens: Array, cu_q_lens: Array) -> Tiles:
    """The rows of few queries where the config is joint, else those of many."""
    q_lens = jnp.diff(cu_q_lens)
    mine = (q_lens > 0) & (q_lens <= problem.few) if config.joint else q_lens > problem.few
    counts = jnp.where(mine, tiles.cdiv(q_lens, config.tile), 0)
    ends = jnp.cumsum(counts)
    index = jnp.arange(_most_tiles(problem, config))
    row = jnp.minimum(jnp.searchsorted(ends, index, side="right"), problem.rows - 1).astype(jnp.int32)
    offset = (index - (ends - counts)[row]) * config.tile
    return Tiles(
        row,
        (kv_lens - q_lens)[row] + offset,
        jnp.minimum(q_lens[row] - offset, config.tile),
        ends[-1:],
        cu_q_lens[row] + offset,
        ends - counts,
    )


def _most_tiles(problem: Problem, config: Config) -> int:
    if config.joint:
        return min(problem.rows, problem.tokens)
    rows = min(problem.rows, problem.tokens // (problem.few + 1))
    whole = min(problem.tokens, problem.rows * problem.longest) // config.tile
    return max(1, whole + rows)


def gather(problem: Problem, config: Config, work: Tiles, q: Array) -> Array:
    """q [T,H,D] as tiles [W,A,Q,D], in a set head by head of K, then token by token, then by member of the group."""
    token = jnp.minimum(work.token[:, None] + jnp.arange(config.tile)[None, :], problem.tokens - 1)
    x = q[token].reshape(*token.shape, problem.kv_heads, problem.group, problem.head_dim).transpose(0, 2, 1, 3, 4)
    return x.reshape(len(token), config.sets(problem), config.queries(problem), problem.head_dim)


def scatter(problem: Problem, parts: list[tuple[Config, Tiles, Any]], cu_q_lens: Array) -> Any:
    """Results [W,A,Q,...] of every part's tiles as [T,H,...]; arbitrary for tokens past cu_q_lens[-1]."""
    token = jnp.arange(problem.tokens)
    row = jnp.minimum(jnp.searchsorted(cu_q_lens[1:], token, side="right"), problem.rows - 1)
    offset = token - cu_q_lens[row]
    few = jnp.diff(cu_q_lens)[row] <= problem.few
    index = jnp.zeros_like(token)
    flat, before = [], 0
    for config, work, results in parts:
        place = work.first[row] * config.tile + offset + before
        index = jnp.where(few == config.joint, place, index)
        flat.append(jax.tree.map(lambda x, config=config: _by_token(problem, config, x), results))
        before += len(work.row) * config.tile
    return jax.tree.map(lambda *x: jnp.take(jnp.concatenate(x), index, axis=0, mode="clip"), *flat)


def _by_token(problem: Problem, config: Config, x: Array) -> Array:
    """[W,A,Q,...] as [W*tile,H,...]."""
    rest = x.shape[3:]
    x = x.reshape(len(x), problem.kv_heads, config.tile, problem.group, *rest)
    return jnp.moveaxis(x, 1, 2).reshape(-1, problem.heads, *rest)
