"""What each row of an engine asks of its tokens, as arrays: how logits are changed before a token is drawn."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from paxattn.engine.sampling import Sampling


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rules:
    """Of R rows.

    Fields:
      sampling: fields of [R]
      stream: i32 [R], tells samples of one prompt and seed apart.
      prompt: i32 [R], tokens of the prompt, before those drawn.
      least, most: i32 [R], tokens of prompt and output together, before which and at which a row ends.
      stop_ids: i32 [R,X], -1 = unused
      bias_ids: i32 [R,Y], -1 = unused
      bias: f32 [R,Y], added to the logits of bias_ids.
      repetition: f32 [R], divides logits above 0 of tokens in prompt or output, multiplies others (Keskar et al. 2019).
      presence, frequency: f32 [R], taken from logits of tokens in the output, once and for each time.
      logprobs: bool [R], whether log-probabilities are asked for.
    """

    sampling: Sampling
    stream: Any
    prompt: Any
    least: Any
    most: Any
    stop_ids: Any
    bias_ids: Any
    bias: Any
    repetition: Any
    presence: Any
    frequency: Any
    logprobs: Any

    @classmethod
    def none(cls, rows: int, stop_ids: int, biases: int) -> "Rules":
        """Greedy rows without an end."""

        # Each an array of its own, as a buffer is donated once.
        def ints() -> Array:
            return jnp.zeros(rows, jnp.int32)

        return cls(
            sampling=jax.tree.map(lambda x: jnp.full(rows, x, x.dtype), Sampling().checked()),
            stream=ints(),
            prompt=ints(),
            least=ints(),
            most=ints(),
            stop_ids=jnp.full((rows, stop_ids), -1, jnp.int32),
            bias_ids=jnp.full((rows, biases), -1, jnp.int32),
            bias=jnp.zeros((rows, biases), jnp.float32),
            repetition=jnp.ones(rows, jnp.float32),
            presence=jnp.zeros(rows, jnp.float32),
            frequency=jnp.zeros(rows, jnp.float32),
            logprobs=jnp.zeros(rows, bool),
        )

    def of_running(self, running: Array) -> "Rules":
        """With rows that do not run asking for nothing, so that they cost nothing."""

        def keep(x: Array, nothing: Any) -> Array:
            return jnp.where(running.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.asarray(nothing, x.dtype))

        sampling = self.sampling
        quiet = Sampling(keep(sampling.temperature, 0), sampling.top_k, sampling.top_p, sampling.seed, sampling.min_p)
        return replace(
            self,
            sampling=quiet,
            least=keep(self.least, 0),
            bias_ids=keep(self.bias_ids, -1),
            repetition=keep(self.repetition, 1),
            presence=keep(self.presence, 0),
            frequency=keep(self.frequency, 0),
            logprobs=keep(self.logprobs, False),
        )

    def plain(self, known: Array) -> Array:
        """bool [], whether every row wants the likeliest token of the logits as they are, and nothing told of them."""
        special = (self.sampling.temperature > 0) | self.penalized | self.logprobs | (known < self.least)
        return ~(jnp.any(special) | jnp.any(self.bias_ids >= 0))

    @property
    def penalized(self) -> Array:
        """bool [R], whether logits depend on the tokens before."""
        return (self.repetition != 1) | (self.presence != 0) | (self.frequency != 0)

    def apply(self, logits: Array, tokens: Array, known: Array) -> Array:
        """Logits [R,V] as the rows want them; tokens i32 [R,S], of which the first known[r] are row r's."""
        logits = lax.cond(jnp.any(self.penalized), lambda x: self._penalize(x, tokens, known), lambda x: x, logits)
        early = known < self.least
        marked = jnp.any(self.bias_ids >= 0) | jnp.any(early)
        return lax.cond(marked, lambda x: self._mark(x, early), lambda x: x, logits)

    def _penalize(self, logits: Array, tokens: Array, known: Array) -> Array:
        rows = jnp.arange(len(tokens))[:, None]
        place = jnp.arange(tokens.shape[1])[None, :]
        drawn = (place >= self.prompt[:, None]) & (place < known[:, None])

        def tally(where: Array) -> Array:
            ids = jnp.where(where, tokens, logits.shape[1])
            return jnp.zeros(logits.shape, jnp.int32).at[rows, ids].add(1, mode="drop")

        repetition = self.repetition[:, None]
        repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
        logits = jnp.where(tally(place < known[:, None]) > 0, repeated, logits)
        count = tally(drawn).astype(jnp.float32)
        return logits - self.presence[:, None] * jnp.minimum(count, 1) - self.frequency[:, None] * count

    def _mark(self, logits: Array, early: Array) -> Array:
        rows, vocab = jnp.arange(len(logits))[:, None], logits.shape[1]

        def ids(x: Array) -> Array:
            return jnp.where(x >= 0, x, vocab)

        logits = logits.at[rows, ids(self.bias_ids)].add(self.bias, mode="drop")
        stops = jnp.where(early[:, None], self.stop_ids, -1)
        return logits.at[rows, ids(stops)].set(-jnp.inf, mode="drop")


def log_probabilities(logits: Array, drawn: Array, wanted: Array, top: int) -> tuple[Array, Array, Array]:
    """Of the drawn tokens [R], f32 [R], and the `top` likeliest ids and theirs, [R,top]; zeros if none is wanted."""

    def compute(logits: Array) -> tuple[Array, Array, Array]:
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        chosen = jnp.take_along_axis(logits, drawn[:, None], axis=1)
        best, ids = lax.top_k(logits, top)
        return (chosen - total)[:, 0], ids.astype(jnp.int32), best - total

    shape = len(logits), top
    nothing = jnp.zeros(len(logits), jnp.float32), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
    return lax.cond(jnp.any(wanted), compute, lambda _: nothing, logits)
