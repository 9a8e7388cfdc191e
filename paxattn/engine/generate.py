"""Generate: one pass over the prompts, then one pure step a token.

`decode` is what both ways of running share: `generate` runs it in one jitted while_loop that stops on the device,
`stream` and `step` jit it alone and hand out each token as it comes. Packed sizes are rounded up to a few buckets, so
that other prompts of similar length compile nothing anew.
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
from paxattn.kv.stores import BlockwiseKV, ContiguousKV, PagedKV

RUNNING, STOP, LENGTH, NO_ROOM = np.arange(4, dtype=np.int32)
REASONS = ("running", "stop", "length", "no_room")


class Model(Protocol):
    """A decoder as a pure function of its parameters; hashable, as it is static under jit."""

    def __call__(self, params: Any, tokens: Array, positions: Array, kv: Any) -> tuple[Array, Any]:
        """Packed tokens and positions i32 [T] and a store -> hidden states [T,E], and the store written to.

        Where `kv.wanted` tells of which tokens they are looked at, it may also give those alone, [W,E].
        """

    def logits(self, params: Any, hidden: Array) -> Array:
        """[...,E] -> float32 [...,V]"""

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class Generation:
    """One prompt's continuation.

    Fields:
      ids: the new tokens; a stop token is the last of them.
      reason: "stop" (a stop token), "length" (max_new_tokens), or "no_room" (the store had no page left).
      logprobs: what an Engine tells of each token, where it was asked to.
    """

    ids: list[int]
    reason: str
    logprobs: list[Any] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stopping:
    """When rows end: stop_ids i32 [any], -1 = unused; max_new_tokens i32 []."""

    stop_ids: Array
    max_new_tokens: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """A generation under way, with all that decides how it goes on: saved and restored, it draws the same tokens.

    Fields:
      kv: the store; it holds all tokens but the newest.
      tokens: i32 [R], what the last step drew; -1 for rows that it drew nothing for.
      reason: i32 [R], RUNNING or why the row ended.
      count: i32 [], tokens drawn by rows that are still running.
      sampling, stopping: as given to `prefill`.
    """

    kv: Any
    tokens: Array
    reason: Array
    count: Array
    sampling: Sampling
    stopping: Stopping


def generate(
    model: Model,
    params: Any,
    kv: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] = (),
    num_samples: int = 1,
) -> list[Generation]:
    """Continue every prompt; the whole loop runs on the device.

    Args:
      model, params: see `Model`.
      kv: an empty store with a row for each continuation. It is consumed (donated).
      prompts: token ids; not empty.
      max_new_tokens: at least 1.
      sampling: greedy by default.
      stop_ids: tokens that end a row.
      num_samples: continuations of each prompt. They share its pages, so the store must be able to fork.

    Returns:
      A Generation for each prompt, in order; with num_samples, those of one prompt after each other.

    Raises:
      ValueError: an argument does not fit; the message names it.
      NotImplementedError: num_samples > 1 with a store that cannot fork.
    """
    inputs = _prepare(model, params, kv, prompts, max_new_tokens, sampling, stop_ids, num_samples)
    state, *_ = _prefill(model, params, kv, *inputs)
    out, state = _loop(model, params, state, bucket(max_new_tokens))
    out, reason = np.asarray(out), np.asarray(state.reason)
    rows = [i + j * len(prompts) for i in range(len(prompts)) for j in range(num_samples)]
    return [Generation(_valid(out[r]), REASONS[reason[r]]) for r in rows]


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
    inputs = _prepare(model, params, kv, prompts, max_new_tokens, sampling, stop_ids)
    return _stream(model, params, kv, inputs, len(prompts))


def _stream(model, params, kv, inputs, rows) -> Iterator[list[int | None]]:
    state, drawn, running = _prefill(model, params, kv, *inputs)
    while True:
        state, next_drawn, next_running = _step(model, params, state)
        ids = np.asarray(drawn)[:rows].tolist()
        if max(ids) >= 0:
            yield [i if i >= 0 else None for i in ids]
        if not running:
            return
        drawn, running = next_drawn, next_running


def prefill(
    model: Model,
    params: Any,
    kv: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] = (),
) -> State:
    """The first step of `generate`: all prompts are in the store (kv is consumed) and a token each is drawn.

    For those who run the loop themselves: `step` takes it from there, and state.tokens has each step's tokens.
    """
    inputs = _prepare(model, params, kv, prompts, max_new_tokens, sampling, stop_ids)
    state, *_ = _prefill(model, params, kv, *inputs)
    return state


def step(model: Model, params: Any, state: State) -> State:
    """Feed each running row its newest token and draw the next; the state that goes in is consumed."""
    return _step(model, params, state)[0]


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
    inputs = _prepare(model, params, kv, prompts, max_new_tokens, sampling, stop_ids)
    lowered = _prefill.lower(model, params, kv, *inputs)
    lowered.compile()
    _step.lower(model, params, lowered.out_info[0]).compile()


def decode(model: Model, params: Any, state: State) -> State:
    """`step`, to be traced into a larger program."""
    running = state.reason == RUNNING
    kv, ok = state.kv.extend(running.astype(jnp.int32), num_tokens=running.shape[0], max_q_len=1)
    last, kv = last_hidden(model, params, state.tokens[kv.batch.rows], kv)
    return _draw(model, params, replace(state, kv=kv), last, ok)


def last_hidden(model: Model, params: Any, tokens: Array, kv: Any) -> tuple[Array, Any]:
    """`hidden_at` each row's last token in the batch; anything for rows that have none."""
    return hidden_at(jnp.maximum(kv.batch.cu_q_lens[1:] - 1, 0), model, params, tokens, kv)


def hidden_at(places: Array, model: Model, params: Any, tokens: Array, kv: Any) -> tuple[Array, Any]:
    """Take the step under way with tokens [T]: hidden states [W,E] at places [W] of them, and the store after it."""
    fewer = len(places) < len(tokens)
    hidden, kv = model(params, tokens, kv.batch.positions, kv.want(places) if fewer else kv)
    return hidden if fewer and len(hidden) == len(places) else hidden[places], kv.end_step()


def _draw(model, params, state: State, last: Array, ok: Array) -> State:
    """Draw a token for each running row from its last hidden state [R,E]."""
    drawn = sample(model.logits(params, last), state.sampling, state.count)
    running = state.reason == RUNNING
    count = state.count + 1
    reason = jnp.where(count >= state.stopping.max_new_tokens, LENGTH, RUNNING)
    reason = jnp.where(jnp.isin(drawn, state.stopping.stop_ids), STOP, reason)
    reason = jnp.where(ok, reason, NO_ROOM)
    return replace(
        state,
        tokens=jnp.where(running & ok, drawn, -1),
        reason=jnp.where(running, reason, state.reason),
        count=count,
    )


@partial(jax.jit, static_argnames=("model",), donate_argnames=("kv",))
def _prefill(model, params, kv, tokens, q_lens, parents, sampling, stopping):
    """The first step, over whole prompts; returns what `_step` does.

    parents: i32 [R], the row whose prompt each row continues, or None: its own.
    """
    kv, ok = kv.extend(q_lens, num_tokens=tokens.shape[0])
    last, kv = last_hidden(model, params, tokens, kv)
    if parents is not None:
        kv, forked = kv.fork(parents, jnp.arange(len(parents)))
        last, ok, q_lens = last[parents], ok[parents] & forked, q_lens[parents]
    reason = jnp.where(q_lens > 0, RUNNING, LENGTH)
    state = State(kv, jnp.full_like(q_lens, -1), reason, jnp.int32(0), sampling, stopping)
    return _with_news(_draw(model, params, state, last, ok))


@partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def _step(model, params, state):
    return _with_news(decode(model, params, state))


def _with_news(state: State) -> tuple[State, Array, Array]:
    """Also what was drawn and whether any row runs on, outside the state, which the next call takes away."""
    return state, jnp.copy(state.tokens), jnp.any(state.reason == RUNNING)


@partial(jax.jit, static_argnames=("model", "most"), donate_argnames=("state",))
def _loop(model, params, state, most):
    """Step until every row has ended: out i32 [R, most], -1 past a row's end."""
    out = jnp.full((len(state.tokens), most), -1, jnp.int32).at[:, 0].set(state.tokens)

    def body(carry):
        out, state = carry
        after = decode(model, params, state)
        return out.at[:, state.count].set(after.tokens), after

    return lax.while_loop(lambda carry: jnp.any(carry[1].reason == RUNNING), body, (out, state))


def _prepare(model, params, kv, prompts, max_new_tokens, sampling, stop_ids, num_samples=1):
    """Checked, and as `_prefill` takes them: tokens, q_lens, parents, sampling, stopping."""
    checks.check_positive_int("max_new_tokens", max_new_tokens)
    checks.check_positive_int("num_samples", num_samples)
    sampling = Sampling() if sampling is None else sampling
    checks.require(isinstance(sampling, Sampling), "sampling", repr(sampling), "a Sampling or None")
    tokens, q_lens = pack(model, params, kv, prompts, max_new_tokens, num_samples)
    rule = stopping(stop_ids, max_new_tokens)
    parents = None if num_samples == 1 else _parents(kv, len(prompts), num_samples)
    return tokens, q_lens, parents, sampling.checked(), rule


def stopping(stop_ids: Sequence[int], max_new_tokens: int) -> Stopping:
    """Checked and padded.

    Raises:
      ValueError: stop_ids are not token ids.
    """
    ids = checks.token_ids("stop_ids", stop_ids)
    padded = np.full(bucket(len(ids)), -1, np.int32)
    padded[: len(ids)] = ids
    return Stopping(jnp.asarray(padded), jnp.int32(max_new_tokens))


@partial(jax.jit, static_argnames=("model",))
def _first_logits(model, params, kv, tokens, q_lens):
    kv, _ = kv.extend(q_lens, num_tokens=len(tokens))
    return model.logits(params, last_hidden(model, params, tokens, kv)[0])


def _vocabulary(model: Model, params: Any, kv: Any) -> int:
    """How many logits a model gives. It is traced for a model and a store, once, and nothing runs."""
    tokens, q_lens = (jax.ShapeDtypeStruct((n,), jnp.int32) for n in (1, kv.max_seqs))
    return _first_logits.eval_shape(model, params, kv, tokens, q_lens).shape[-1]


def pack(
    model: Model,
    params: Any,
    kv: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    rows_each: int = 1,
) -> tuple[Array, Array]:
    """Prompts one after the other, i32 [T], and q_lens i32 [R]: prompt i is row i's.

    Raises:
      ValueError: there are none, one that is empty or not of the model's token ids, or more than the store has room
        for; or the store is not an empty one.
    """
    _check_empty(kv)
    check_prompts(prompts)
    checks.require(len(prompts) > 0, "prompts", "none", "at least one")
    checks.require(
        len(prompts) * rows_each <= kv.max_seqs,
        "prompts",
        f"{len(prompts)} prompts of {rows_each} rows each",
        f"at most the store's {kv.max_seqs} rows",
    )
    vocabulary = _vocabulary(model, params, kv)
    ids = [checks.token_ids(f"prompts[{i}]", prompt, vocabulary) for i, prompt in enumerate(prompts)]
    for i, prompt in enumerate(ids):
        checks.require(len(prompt) > 0, f"prompts[{i}]", "no tokens", "at least one token long")
        total = len(prompt) + max_new_tokens
        checks.require(
            total <= kv.capacity,
            f"prompts[{i}]",
            f"{len(prompt)} tokens",
            f"short enough that with max_new_tokens={max_new_tokens} it fits the store's {kv.capacity} a row",
        )
    lens = [len(prompt) for prompt in ids]
    tokens = np.zeros(bucket(sum(lens)), np.int32)
    tokens[: sum(lens)] = np.concatenate(ids)
    q_lens = np.zeros(kv.max_seqs, np.int32)
    q_lens[: len(lens)] = lens
    return jnp.asarray(tokens), jnp.asarray(q_lens)


def check_prompts(prompts: Any) -> None:
    """Raise a ValueError for what is not a sequence; what is in it is checked one by one."""
    listed = isinstance(prompts, Sequence) and not isinstance(prompts, str | bytes)
    listed = listed or getattr(prompts, "ndim", 0) == 2
    checks.require(listed, "prompts", type(prompts).__name__, "a sequence of prompts")


def _check_empty(kv: Any) -> None:
    """As far as can be told: lens that are traced are not known."""
    stores = PagedKV | ContiguousKV | BlockwiseKV
    checks.require(isinstance(kv, stores), "kv", f"an object of {type(kv)}", "a PagedKV, ContiguousKV or BlockwiseKV")
    checks.require(kv.batch is None, "kv", "a store with a step under way", "an empty one")
    if isinstance(kv.lens, Array) and not isinstance(kv.lens, jax.core.Tracer):
        checks.require(not kv.lens.is_deleted(), "kv", "a store that was consumed", "an empty one")
        checks.require(not np.any(kv.lens), "kv", "a store whose rows hold tokens", "an empty one")


def _parents(kv, num_prompts, num_samples):
    """Row i + j * num_prompts is the j-th sample of prompt i."""
    require_fork(kv, "num_samples")
    parents = np.arange(kv.max_seqs, dtype=np.int32)
    samples = num_prompts * num_samples
    parents[:samples] = np.tile(np.arange(num_prompts), num_samples)
    return jnp.asarray(parents)


def require_fork(kv: Any, name: str) -> None:
    if not hasattr(kv, "fork"):
        raise NotImplementedError(f"{name}: {type(kv).__name__} cannot fork rows, PagedKV can")


def bucket(n: int) -> int:
    """n rounded up to one of four steps between powers of two, at least 16: at most a quarter is padding."""
    n = int(n)  # of a NumPy integer, which has no bit_length
    unit = max(16, (1 << max(n - 1, 1).bit_length()) // 8)
    return max(unit, -(-n // unit) * unit)


def _valid(ids: np.ndarray) -> list[int]:
    return [int(i) for i in ids if i >= 0]
