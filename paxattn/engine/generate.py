"""Generate: one pass over the prompts, then one pure step a token.

`step` is what both ways of running share: `generate` runs it in one jitted while_loop that stops on the device,
`stream` jits it alone and hands out each token as it comes. Packed sizes are rounded up to a few buckets, so that
other prompts of similar length compile nothing anew.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from paxattn import checks
from paxattn.engine.sampling import Sampling, sample

RUNNING, STOP, LENGTH, NO_ROOM = np.arange(4, dtype=np.int32)
REASONS = ("running", "stop", "length", "no_room")


class Model(Protocol):
    """A decoder as a pure function of its parameters; hashable, as it is static under jit."""

    def __call__(self, params: Any, tokens: Array, positions: Array, kv: Any) -> tuple[Array, Any]:
        """Packed tokens and positions i32 [T] and a store -> hidden states [T,E], and the store written to."""

    def logits(self, params: Any, hidden: Array) -> Array:
        """[...,E] -> float32 [...,V]"""

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class Generation:
    """One prompt's continuation.

    Fields:
      ids: the new tokens; a stop token is the last of them.
      reason: "stop" (a stop token), "length" (max_new_tokens), or "no_room" (the store had no page left).
    """

    ids: list[int]
    reason: str


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """A generation under way.

    Fields:
      kv: the store; it holds all tokens but the newest.
      tokens: i32 [R], what the last step drew; -1 for rows that it drew nothing for.
      reason: i32 [R], RUNNING or why the row ended.
      count: i32 [], tokens drawn by rows that are still running.
    """

    kv: Any
    tokens: Array
    reason: Array
    count: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stopping:
    """When rows end: stop_ids i32 [any], -1 = unused; max_new_tokens i32 []."""

    stop_ids: Array
    max_new_tokens: Array


def generate(
    model: Model,
    params: Any,
    kv: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] = (),
) -> list[Generation]:
    """Continue every prompt; the whole loop runs on the device.

    Args:
      model, params: see `Model`.
      kv: an empty store with at least as many rows as prompts. It is consumed (donated).
      prompts: token ids; not empty.
      max_new_tokens: at least 1.
      sampling: greedy by default.
      stop_ids: tokens that end a row.

    Returns:
      A Generation for each prompt, in order.

    Raises:
      ValueError: an argument does not fit; the message names it.
    """
    tokens, q_lens, sampling, rule = _prepare(kv, prompts, max_new_tokens, sampling, stop_ids)
    state, *_ = _prefill(model, params, sampling, rule, kv, tokens, q_lens)
    out, state = _loop(model, params, sampling, rule, state, _bucket(max_new_tokens))
    out, reason = np.asarray(out), np.asarray(state.reason)
    return [Generation(_valid(out[r]), REASONS[reason[r]]) for r in range(len(prompts))]


def stream(
    model: Model,
    params: Any,
    kv: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] = (),
) -> Iterator[list[int | None]]:
    """Like `generate`, but yields each step's tokens as they come: one a prompt, None for a row that has ended.

    The device works on the next step while the caller has this one's tokens.
    """
    tokens, q_lens, sampling, rule = _prepare(kv, prompts, max_new_tokens, sampling, stop_ids)
    return _stream(model, params, sampling, rule, kv, tokens, q_lens, len(prompts))


def _stream(model, params, sampling, rule, kv, tokens, q_lens, rows) -> Iterator[list[int | None]]:
    state, drawn, running = _prefill(model, params, sampling, rule, kv, tokens, q_lens)
    while True:
        state, next_drawn, next_running = _step(model, params, sampling, rule, state)
        ids = np.asarray(drawn)[:rows].tolist()
        if max(ids) >= 0:
            yield [i if i >= 0 else None for i in ids]
        if not running:
            return
        drawn, running = next_drawn, next_running


def warmup(
    model: Model,
    params: Any,
    kv: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] = (),
) -> None:
    """Compile what `stream` needs for arguments of these sizes; nothing runs and kv stays usable."""
    tokens, q_lens, sampling, rule = _prepare(kv, prompts, max_new_tokens, sampling, stop_ids)
    lowered = _prefill.lower(model, params, sampling, rule, kv, tokens, q_lens)
    lowered.compile()
    _step.lower(model, params, sampling, rule, lowered.out_info[0]).compile()


def step(model: Model, params: Any, sampling: Sampling, rule: Stopping, state: State) -> State:
    """Feed each running row its newest token and draw the next."""
    running = state.reason == RUNNING
    kv, ok = state.kv.extend(running.astype(jnp.int32), num_tokens=running.shape[0], max_q_len=1)
    return _advance(model, params, sampling, rule, replace(state, kv=kv), state.tokens[kv.batch.rows], ok)


def _advance(model, params, sampling, rule, state: State, tokens: Array, ok: Array) -> State:
    """Run the store's batch of packed tokens and draw a token for each running row."""
    kv = state.kv
    hidden, kv = model(params, tokens, kv.batch.positions, kv)
    last = hidden[jnp.maximum(kv.batch.cu_q_lens[1:] - 1, 0)]
    drawn = sample(model.logits(params, last), sampling, state.count)
    running = state.reason == RUNNING
    count = state.count + 1
    reason = jnp.where(count >= rule.max_new_tokens, LENGTH, RUNNING)
    reason = jnp.where(jnp.isin(drawn, rule.stop_ids), STOP, reason)
    reason = jnp.where(ok, reason, NO_ROOM)
    return State(
        kv=kv.end_step(),
        tokens=jnp.where(running & ok, drawn, -1),
        reason=jnp.where(running, reason, state.reason),
        count=count,
    )


@partial(jax.jit, static_argnames=("model",), donate_argnames=("kv",))
def _prefill(model, params, sampling, rule, kv, tokens, q_lens):
    """The first step, over whole prompts; returns what `_step` does."""
    kv, ok = kv.extend(q_lens, num_tokens=tokens.shape[0])
    reason = jnp.where(q_lens > 0, RUNNING, LENGTH)
    state = State(kv, jnp.full_like(q_lens, -1), reason, jnp.int32(0))
    return _with_news(_advance(model, params, sampling, rule, state, tokens, ok))


@partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def _step(model, params, sampling, rule, state):
    return _with_news(step(model, params, sampling, rule, state))


def _with_news(state: State) -> tuple[State, Array, Array]:
    """Also what was drawn and whether any row runs on, outside the state, which the next call takes away."""
    return state, jnp.copy(state.tokens), jnp.any(state.reason == RUNNING)


@partial(jax.jit, static_argnames=("model", "most"), donate_argnames=("state",))
def _loop(model, params, sampling, rule, state, most):
    """Step until every row has ended: out i32 [R, most], -1 past a row's end."""
    out = jnp.full((len(state.tokens), most), -1, jnp.int32).at[:, 0].set(state.tokens)

    def body(carry):
        out, state = carry
        after = step(model, params, sampling, rule, state)
        return out.at[:, state.count].set(after.tokens), after

    return lax.while_loop(lambda carry: jnp.any(carry[1].reason == RUNNING), body, (out, state))


def _prepare(kv, prompts, max_new_tokens, sampling, stop_ids):
    checks.check_positive_int("max_new_tokens", max_new_tokens)
    checks.require(len(prompts) > 0, "prompts", "none", "at least one")
    checks.require(
        len(prompts) <= kv.max_seqs,
        "prompts",
        f"{len(prompts)} prompts",
        f"at most the store's {kv.max_seqs} rows",
    )
    for i, prompt in enumerate(prompts):
        checks.require(len(prompt) > 0, f"prompts[{i}]", "no tokens", "at least one token long")
        total = len(prompt) + max_new_tokens
        checks.require(
            total <= kv.capacity,
            f"prompts[{i}]",
            f"{len(prompt)} tokens",
            f"short enough that with max_new_tokens={max_new_tokens} it fits the store's {kv.capacity} a row",
        )
    lens = [len(prompt) for prompt in prompts]
    tokens = np.zeros(_bucket(sum(lens)), np.int32)
    tokens[: sum(lens)] = np.concatenate([np.asarray(prompt, np.int32) for prompt in prompts])
    q_lens = np.zeros(kv.max_seqs, np.int32)
    q_lens[: len(lens)] = lens
    stops = np.full(_bucket(len(stop_ids)), -1, np.int32)
    stops[: len(stop_ids)] = stop_ids
    rule = Stopping(jnp.asarray(stops), jnp.int32(max_new_tokens))
    return jnp.asarray(tokens), jnp.asarray(q_lens), (sampling or Sampling()).checked(), rule


def _bucket(n: int) -> int:
    """n rounded up to one of four steps between powers of two, at least 16: at most a quarter is padding."""
    unit = max(16, (1 << max(n - 1, 1).bit_length()) // 8)
    return max(unit, -(-n // unit) * unit)


def _valid(ids: np.ndarray) -> list[int]:
    return [int(i) for i in ids if i >= 0]
