"""Beam search: the likeliest continuations, not sampled ones. Beams share pages through the store's `fork`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from paxattn import checks
from paxattn.engine.generate import Model, Stopping, bucket, last_hidden, pack, require_fork, stopping


@dataclass(frozen=True)
class Beam:
    """One hypothesis.

    Fields:
      ids: the new tokens; a stop token is the last of them.
      score: its log-probability over its length to the power of length_penalty.
    """

    ids: list[int]
    score: float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Hypotheses:
    """B prompts x W beams: ids i32 [B,W,most], -1 behind the last; score f32 [B,W], -inf where there is none."""

    ids: Array
    score: Array

    @classmethod
    def none(cls, prompts: int, beams: int, most: int) -> "_Hypotheses":
        return cls(jnp.full((prompts, beams, most), -1, jnp.int32), jnp.full((prompts, beams), -jnp.inf))

    def best(self, count: int) -> "_Hypotheses":
        score, which = lax.top_k(self.score, count)
        return _Hypotheses(jnp.take_along_axis(self.ids, which[:, :, None], axis=1), score)

    def merge(self, others: "_Hypotheses") -> "_Hypotheses":
        """The best of both, as many as in self."""
        both = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), self, others)
        return both.best(self.score.shape[1])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _State:
    """Beam w of prompt b is the store's row b * W + w, in no order. `alive` scores are plain log-probabilities."""

    kv: Any
    alive: _Hypotheses
    done: _Hypotheses
    count: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Rule:
    """When hypotheses end, and how they are scored."""

    stopping: Stopping
    penalty: Array

    def score(self, log_probability: Array, length: Array) -> Array:
        return log_probability / length.astype(jnp.float32) ** self.penalty


def beam_search(
    model: Model,
    params: Any,
    kv: Any,
    prompts: Sequence[Sequence[int]],
    *,
    num_beams: int,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    length_penalty: float = 1.0,
) -> list[list[Beam]]:
    """The best continuations of each prompt that a beam of `num_beams` finds; the whole loop runs on the device.

    A hypothesis ends with a stop token or at max_new_tokens. A beam that finds no page left ends without a result.

    Args:
      model, params: see `Model`.
      kv: an empty store that can fork, with num_beams rows a prompt. It is consumed (donated).
      prompts: token ids; not empty.
      num_beams: W
      max_new_tokens: at least 1.
      stop_ids: tokens that end a hypothesis.
      length_penalty: score = log-probability / length ** length_penalty, from 0 to 10; 0 prefers short ones.

    Returns:
      For each prompt up to num_beams Beams, the best first.

    Raises:
      ValueError: an argument does not fit; the message names it.
      NotImplementedError: the store cannot fork.
    """
    checks.check_positive_int("num_beams", num_beams)
    checks.check_positive_int("max_new_tokens", max_new_tokens)
    penalty = checks.static_float("length_penalty", length_penalty)
    checks.require(0 <= penalty <= 10, "length_penalty", length_penalty, "from 0 to 10")
    require_fork(kv, "beam_search")
    tokens, q_lens = pack(model, params, kv, prompts, max_new_tokens, num_beams)
    lens = np.zeros(kv.max_seqs, np.int32)
    lens[: len(prompts) * num_beams : num_beams] = np.asarray(q_lens)[: len(prompts)]
    rule = _Rule(stopping(stop_ids, max_new_tokens), jnp.float32(penalty))
    sizes = len(prompts), num_beams, bucket(max_new_tokens)
    _, done = _search(model, params, kv, tokens, jnp.asarray(lens), rule, sizes)
    return [_beams(np.asarray(done.ids[i]), np.asarray(done.score[i])) for i in range(len(prompts))]


def _beams(ids: np.ndarray, score: np.ndarray) -> list[Beam]:
    return [Beam([int(i) for i in x if i >= 0], float(s)) for x, s in zip(ids, score, strict=True) if s > -np.inf]


@partial(jax.jit, static_argnames=("model", "sizes"), donate_argnames=("kv",))
def _search(model, params, kv, tokens, q_lens, rule, sizes) -> tuple[Any, _Hypotheses]:
    prompts, beams, most = sizes
    advance = partial(_advance, model, params, rule)
    kv, ok = kv.extend(q_lens, num_tokens=tokens.shape[0])
    alive = _Hypotheses.none(prompts, beams, most)
    alive = replace(alive, score=alive.score.at[:, 0].set(0.0))
    first = _State(kv, alive, _Hypotheses.none(prompts, beams, most), jnp.int32(0))

    def body(state):
        going = jnp.zeros(state.kv.max_seqs, jnp.int32)
        going = going.at[: prompts * beams].set((state.alive.score > -jnp.inf).reshape(-1).astype(jnp.int32))
        kv, ok = state.kv.extend(going, num_tokens=len(going), max_q_len=1)
        newest = jnp.zeros_like(going).at[: prompts * beams].set(state.alive.ids[:, :, state.count - 1].reshape(-1))
        return advance(replace(state, kv=kv), jnp.maximum(newest, 0)[kv.batch.rows], ok)

    state = lax.while_loop(lambda state: jnp.any(state.alive.score > -jnp.inf), body, advance(first, tokens, ok))
    return state.kv, state.done


def _advance(model, params, rule, state: _State, tokens: Array, ok: Array) -> _State:
    """Run the store's batch and go on with the best of all beams' next tokens."""
    prompts, beams, _ = state.alive.ids.shape
    last, kv = last_hidden(model, params, tokens, state.kv)
    last = last[: prompts * beams]
    score = jnp.where(ok[: prompts * beams].reshape(prompts, beams), state.alive.score, -jnp.inf)
    chances = jax.nn.log_softmax(model.logits(params, last), axis=-1).reshape(prompts, beams, -1)
    # Twice as many as beams, so that enough are left to go on from where some of them stop.
    total, which = lax.top_k((score[:, :, None] + chances).reshape(prompts, -1), 2 * beams)
    parent, token = which // chances.shape[-1], (which % chances.shape[-1]).astype(jnp.int32)
    ids = jnp.take_along_axis(state.alive.ids, parent[:, :, None], axis=1).at[:, :, state.count].set(token)

    count, limit = state.count + 1, rule.stopping.max_new_tokens
    ends = jnp.isin(token, rule.stopping.stop_ids) | (count >= limit)
    done = state.done.merge(_Hypotheses(ids, jnp.where(ends, rule.score(total, count), -jnp.inf)))
    # A beam that could not enter the results any more, however likely its further tokens, ends here.
    hopeless = rule.score(total, limit) <= done.score[:, -1:]
    going, order = lax.top_k(jnp.where(ends | hopeless, -jnp.inf, total), beams)
    alive = _Hypotheses(jnp.take_along_axis(ids, order[:, :, None], axis=1), going)
    kv, alive = _fork(kv, alive, jnp.take_along_axis(parent, order, axis=1))
    return _State(kv, alive, done, count)


def _fork(kv: Any, alive: _Hypotheses, parent: Array) -> tuple[Any, _Hypotheses]:
    """Give each beam a row that goes on from its beam parent[b,w].

    A parent's first child stays in its row, the others take rows that no beam goes on from. Those make room first,
    so that a step of beams never needs more pages than it had.
    """
    prompts, beams = parent.shape
    going = alive.score > -jnp.inf
    row = jnp.arange(beams)
    twins = (parent[:, :, None] == parent[:, None, :]) & going[:, None, :]
    stays = going & ~jnp.any(twins & (row[None, :, None] > row[None, None]), axis=2)
    taken = jnp.any(stays[:, :, None] & (parent[:, :, None] == row[None, None]), axis=1)
    others = jnp.argsort(taken, axis=1, stable=True)
    rank = jnp.cumsum(~stays, axis=1) - 1
    place = jnp.where(stays, parent, jnp.take_along_axis(others, jnp.maximum(rank, 0), axis=1))

    back = jnp.argsort(place, axis=1)
    alive = _Hypotheses(
        jnp.take_along_axis(alive.ids, back[:, :, None], axis=1), jnp.take_along_axis(alive.score, back, axis=1)
    )
    src = jnp.take_along_axis(parent, back, axis=1) + beams * jnp.arange(prompts)[:, None]
    dst = jnp.where(alive.score > -jnp.inf, jnp.arange(prompts * beams).reshape(prompts, beams), -1)
    parents = jnp.zeros(kv.max_seqs, bool).at[: prompts * beams].set(taken.reshape(-1))
    kv, ok = kv.release(~parents).fork(src.reshape(-1), dst.reshape(-1))
    return kv, replace(alive, score=jnp.where(ok.reshape(prompts, beams), alive.score, -jnp.inf))
