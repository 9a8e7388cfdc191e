"""How the TPU kernel of paged attention computes many queries: head by head, with scores as in `tpu_turned`."""

from functools import partial
from math import gcd
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paxattn.kernels import tiles, tpu_turned
from paxattn.kernels.problem import LOG2E
from paxattn.kernels.tpu_paged_plan import Config, Problem
from paxattn.kernels.tpu_tiles import NT, dot

HEADS_AT_ONCE = 4
TILE = 512  # scores, each way


class State(NamedTuple):
    k: Any  # [K,S,D] a block, head by head
    v: Any  # [K,D,S]
    columns: tpu_turned.States  # of each head a column for every TILE queries

    def init(self) -> None:
        self.columns.init()


def labels(problem: Problem, config: Config) -> Array:
    """[1,Q] the place of a query in its tile."""
    return jnp.arange(config.queries(problem))[None, :] // problem.group % config.tile


def scratch(problem: Problem, config: Config, dtype: Any) -> State:
    heads, dim, block, rows = problem.kv_heads, problem.head_dim, config.block(problem), config.queries(problem)
    return State(
        pltpu.VMEM((heads, block, dim), dtype),
        pltpu.VMEM((heads, dim, block), dtype),
        tpu_turned.States.scratch(heads * tiles.cdiv(rows, TILE), min(TILE, rows), dim),
    )


def take(problem: Problem, config: Config, refs: Any, kv: Any, position: Array, whole: Array) -> None:
    """Take keys and values [S,K,D] (or, of one head, [S,D]) into the states.

    position: of the first query in the block; whole: whether all queries see all keys.
    """
    k, v = (x if x.ndim == 3 else x[:, None] for x in (kv[0], kv[1]))
    refs.state.k[...] = k.swapaxes(0, 1)
    refs.state.v[...] = v.transpose(1, 2, 0)
    heads = gcd(problem.kv_heads, HEADS_AT_ONCE)
    for masked in (False, True):
        visit = partial(_visit, problem, config, refs, position if masked else None, heads)
        pl.when(whole != masked)(partial(pl.loop(0, problem.kv_heads, step=heads), visit))


class Tile(NamedTuple):
    head: int  # of those that are computed at once
    q: int
    kv: int


def _visit(problem: Problem, config: Config, refs: Any, position: Array | None, heads: int, first: Array) -> None:
    """Take a block of some heads, from `first` on; with a mask where a position is given."""
    room, rows = config.block(problem), config.queries(problem)
    found = [Tile(j, q, kv) for kv in range(0, room, TILE) for j in range(heads) for q in range(0, rows, TILE)]
    columns = tiles.cdiv(rows, TILE)
    queries_at = lambda tile: pl.ds(tile.q, min(TILE, rows - tile.q))
    keys_at = lambda tile: pl.ds(tile.kv, min(TILE, room - tile.kv))

    def scores(tile: Tile) -> Array:
        head = first + tile.head
        s = dot(refs.state.k[head, keys_at(tile)], refs.q[head, queries_at(tile)], NT)
        if problem.softcap is not None:
            s = jnp.tanh(s) * (problem.softcap * LOG2E)
        if position is None:
            return s
        key = lax.broadcasted_iota(jnp.int32, s.shape, 0) + tile.kv
        return jnp.where(problem.in_sight(key, position + refs.labels[:, queries_at(tile)]), s, -jnp.inf)

    tpu_turned.Visit(
        refs.state.columns,
        found,
        lambda tile: (tile.head * columns + tile.q // TILE, min(TILE, rows - tile.q)),
        scores,
        lambda tile: refs.state.v[first + tile.head, :, keys_at(tile)],
        refs.state.v.dtype,
        first * columns,
    ).take(bold=position is None)


def finish(problem: Problem, config: Config, refs: Any) -> None:
    rows = config.queries(problem)
    columns = tiles.cdiv(rows, TILE)

    @pl.loop(0, problem.kv_heads)
    def _head(j):
        for c in range(columns):
            width = min(TILE, rows - c * TILE)
            at = pl.ds(c * TILE, width)
            sink = None if refs.sinks is None else refs.sinks[j, :, at]
            out, lse = refs.state.columns.finish(j * columns + c, width, sink)
            refs.out[j, at] = out.T.astype(refs.out.dtype)
            refs.lse[j, :, at] = lse
