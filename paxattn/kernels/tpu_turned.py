"""The softmax of the TPU kernels for many queries, turned on its side: S^T = K Q^T (FlashAttention-2, Dao 2023).

Keys lie along sublanes, so that a query's maximum and sum are elementwise over registers, and O^T = V^T P^T keeps P^T
in the matrix unit while V^T, which is short, streams past it. Queries come in columns, each with a state of its own.

Tiles of scores are taken in exactly, as the online softmax does, where a tile's exp2 waits for the tile's maximum; or
boldly, which subtracts a maximum that earlier tiles had, so that nothing waits and nothing fades. Probabilities may
then exceed 1, which is as exact in float32 until they overflow. So the sums of a bold visit go to a second place, and
count only where all stayed small; else the visit is done again, exactly, from the sums that it left alone.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paxattn.kernels.problem import LOG2E
from paxattn.kernels.tpu_tiles import NN, dot, pipeline

NEVER = float(jnp.finfo(jnp.float32).min)  # a maximum that nothing stays below; finite, so that differences are
BOLDEST = 2.0**32  # a sum that is taken for small: with it values up to 2^95 do not overflow


class States(NamedTuple):
    """Of C columns of Q queries, in base 2: scores less m are what exp2 sees."""

    m: Any  # [C,1,Q]
    l: Any  # [2,C,1,Q] the sum of exp2, in two places
    acc: Any  # [2,C,Dv,Q] and that of exp2 times a value
    place: Any  # [C] in SMEM: which of the two counts
    known: Any  # [C] in SMEM: whether each query of the column saw a key
    again: Any  # [1] in SMEM: whether the visit is to be done exactly

    @classmethod
    def scratch(cls, columns: int, queries: int, v_dim: int) -> "States":
        return cls(
            pltpu.VMEM((columns, 1, queries), jnp.float32),
            pltpu.VMEM((2, columns, 1, queries), jnp.float32),
            pltpu.VMEM((2, columns, v_dim, queries), jnp.float32),
            pltpu.SMEM((columns,), jnp.int32),
            pltpu.SMEM((columns,), jnp.int32),
            pltpu.SMEM((1,), jnp.int32),
        )

    def init(self) -> None:
        columns = self.m.shape[0]
        for c in range(columns):
            self.place[c] = self.known[c] = jnp.int32(0)
        self.m[...] = jnp.full_like(self.m, NEVER)
        self.l[0] = jnp.zeros_like(self.l.at[0])
        self.acc[0] = jnp.zeros_like(self.acc.at[0])

    def finish(self, c: Any, width: int, sink: Array | None) -> tuple[Array, Array]:
        """What the first queries of a column have come to: out^T [Dv,width] and lse [1,width]."""
        place = self.place[c]
        weight, lse = settled(self.m[c, :, :width], self.l[place, c, :, :width], sink)
        return self.acc[place, c, :, :width] * weight, lse


def settled(m: Array, l: Array, sink: Array | None) -> tuple[Array, Array]:
    """What to multiply a sum of values with, and lse; 0 and -inf for queries that saw nothing."""
    seen, fade = l > 0, jnp.ones_like(l)
    if sink is not None:
        top = jnp.maximum(m, sink)
        fade = jnp.exp2(m - top)
        m, l = top, l * fade + jnp.exp2(sink - top)
    weight = jnp.where(seen, fade / jnp.where(seen, l, 1.0), 0.0)
    return weight, jnp.where(seen, (m + jnp.log2(l)) / LOG2E, -jnp.inf)


class Visit(NamedTuple):
    """Tiles of scores, and how to come by them.

    column: of a tile, which it is and how many queries it has; counted from `first` on.
    """

    states: States
    tiles: Sequence[Any]
    column: Callable[[Any], tuple[int, int]]
    scores: Callable[[Any], Array]  # [keys,queries], in base 2, -inf where masked
    values: Callable[[Any], Array]  # [Dv,keys]
    dtype: Any  # of the values
    first: Any = 0

    def take(self, bold: bool) -> None:
        """Take the tiles into the states."""
        if not bold:
            self._exactly()
            return
        states = self.states
        known = reduce(jnp.logical_and, (states.known[self.first + c] == 1 for c, _ in self._columns()))
        states.again[0] = jnp.where(known, 0, 1)

        @pl.when(known)
        def _try():
            states.again[0] = jnp.where(self._boldly(), 0, 1)

        pl.when(states.again[0] == 1)(self._exactly)

    def _columns(self) -> list[tuple[int, int]]:
        return list(dict.fromkeys(map(self.column, self.tiles)))

    def _boldly(self) -> Array:
        """Whether all went well."""
        states, columns = self.states, self._columns()
        place = {c: states.place[self.first + c] for c, _ in columns}
        m = {c: states.m[self.first + c, :, :width] for c, width in columns}
        l = {c: states.l[place[c], self.first + c, :, :width] for c, width in columns}
        begun = set()

        def weights(tile: Any, _) -> Array:
            c, _ = self.column(tile)
            p = jnp.exp2(self.scores(tile) - m[c])
            l[c] += p.sum(axis=0, keepdims=True)
            return p.astype(self.dtype)  # for v6e and v5e, which else keep it as float32 in VMEM

        def accumulate(tile: Any, p: Array) -> None:
            c, width = self.column(tile)
            at = self.first + c, slice(None), slice(width)
            source = 1 - place[c] if c in begun else place[c]
            begun.add(c)
            states.acc[1 - place[c], *at] = states.acc[source, *at] + dot(self.values(tile), p, NN)

        pipeline(self.tiles, (weights, accumulate))
        for c, width in columns:
            states.l[1 - place[c], self.first + c, :, :width] = l[c]
        fine = _all(jnp.concatenate(list(l.values()), axis=1) <= BOLDEST)

        @pl.when(fine)
        def _count():
            for c, _ in columns:
                states.place[self.first + c] = 1 - place[c]

        return fine

    def _exactly(self) -> None:
        states, columns = self.states, self._columns()
        place = {c: states.place[self.first + c] for c, _ in columns}
        m = {c: states.m[self.first + c, :, :width] for c, width in columns}
        l = {c: states.l[place[c], self.first + c, :, :width] for c, width in columns}

        def softmax(tile: Any, s: Array) -> tuple[Array, Array]:
            c, _ = self.column(tile)
            old = m[c]
            m[c] = jnp.maximum(old, s.max(axis=0, keepdims=True))
            p, fade = jnp.exp2(s - m[c]), jnp.exp2(old - m[c])
            l[c] = l[c] * fade + p.sum(axis=0, keepdims=True)
            return p, fade  # the matrix unit rounds p as it takes it in; here a cast would cost more

        def accumulate(tile: Any, weights: tuple[Array, Array]) -> None:
            c, width = self.column(tile)
            p, fade = weights
            at = place[c], self.first + c, slice(None), slice(width)
            states.acc[at] = states.acc[at] * fade + dot(self.values(tile), p, NN)

        pipeline(self.tiles, (lambda tile, _: self.scores(tile), softmax, accumulate))
        known = _all(jnp.concatenate(list(m.values()), axis=1) > NEVER)
        for c, width in columns:
            states.m[self.first + c, :, :width] = m[c]
            states.l[place[c], self.first + c, :, :width] = l[c]
            states.known[self.first + c] = jnp.where(known, 1, 0)


def _all(x: Array) -> Array:
    return jnp.max(jnp.where(x, 0.0, 1.0)) == 0
