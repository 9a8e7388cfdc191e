"""How the TPU kernel of paged attention computes few queries: one product with the keys of all heads.

What meets a foreign head is masked. That saves taking the heads apart, which is worth more than the wasted products.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paxattn.kernels.problem import LOG2E
from paxattn.kernels.tpu_paged_plan import LANES, Config, Problem
from paxattn.kernels.tpu_tiles import NN, NT, dot, pipeline
from paxattn.kernels.tpu_turned import NEVER, settled

COLUMNS = 2048  # of scores, which are taken in at a time


class Labels(NamedTuple):
    token: Any  # [Q,1] the place of a row of q in its tile
    head: Any  # [Q,1] its head of K
    key: Any  # [1,S*K] the place of a column of scores in its block
    key_head: Any  # [1,S*K] its head of K


class State(NamedTuple):
    """Of the softmax, in base 2."""

    m: Any  # [1,Q,1]
    l: Any  # [1,Q,1]
    acc: Any  # [1,Q,D]

    def init(self) -> None:
        self.m[...] = jnp.full_like(self.m, NEVER)
        self.l[...] = jnp.zeros_like(self.l)
        self.acc[...] = jnp.zeros_like(self.acc)


def labels(problem: Problem, config: Config) -> Labels:
    row = jnp.arange(config.queries(problem))[:, None] // problem.group
    column = jnp.arange(config.block(problem) * problem.kv_heads)[None, :]
    return Labels(row % config.tile, row // config.tile, column // problem.kv_heads, column % problem.kv_heads)


def scratch(problem: Problem, config: Config, dtype: Any) -> State:
    del dtype
    queries = config.queries(problem)
    return State(*(pltpu.VMEM((1, queries, width), jnp.float32) for width in (1, 1, problem.head_dim)))


def take(problem: Problem, config: Config, refs: Any, kv: Any, position: Array, whole: Array) -> None:
    """Take keys and values [S,K,D] (or, of one head, [S,D]) into the state, some at a time: their stages overlap.

    position: of the first query in the block.
    """
    del whole  # heads are masked in any case
    k, v, labels, state = kv[0], kv[1], refs.labels, refs.state
    size = max(LANES, COLUMNS // problem.kv_heads)
    q, m, l, acc = (ref[0] for ref in (refs.q, *state))
    flat = lambda x, at: x[at : at + size].reshape(-1, problem.head_dim)

    def scores(at, _):
        columns = pl.ds(at * problem.kv_heads, min(size, len(k) - at) * problem.kv_heads)
        key, head = labels.key[:, columns], labels.key_head[:, columns]
        if config.tile == 1:  # all rows see the same keys
            seen = jnp.where(problem.in_sight(key, position), head, -1) == labels.head[...]
        else:
            seen = problem.in_sight(key, position + labels.token[...]) & (head == labels.head[...])
        s = dot(q, flat(k, at), NT)
        if problem.softcap is not None:
            s = jnp.tanh(s) * (problem.softcap * LOG2E)
        return jnp.where(seen, s, -jnp.inf)

    def softmax(_, s):
        nonlocal m, l
        old, m = m, jnp.maximum(m, s.max(axis=1, keepdims=True))
        p, fade = jnp.exp2(s - m), jnp.exp2(old - m)
        l = l * fade + p.sum(axis=1, keepdims=True)
        return p.astype(v.dtype), fade

    def accumulate(at, weights):
        nonlocal acc
        p, fade = weights
        acc = acc * fade + dot(p, flat(v, at), NN)

    pipeline(range(0, len(k), size), (scores, softmax, accumulate))
    state.m[0], state.l[0], state.acc[0] = m, l, acc


def finish(problem: Problem, config: Config, refs: Any) -> None:
    del problem, config
    m, l, acc = refs.state
    weight, lse = settled(m[...], l[...], None if refs.sinks is None else refs.sinks[...])
    refs.out[...] = (acc[...] * weight).astype(refs.out.dtype)
    refs.lse[...] = lse
