"""Choosing the next token from logits: greedy, temperature, top-k, top-p."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax

from paxattn import checks


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. A pytree of numbers, so that other values do not compile anew.

    Fields:
      temperature: logits are divided by it; 0 = greedy.
      top_k: only the k most likely tokens; 0 = all.
      top_p: only the most likely tokens that reach this probability together (Holtzman et al. 2020).
      seed: row r's n-th token depends on (seed, r, n) and the logits alone.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def checked(self) -> "Sampling":
        """The same with arrays for numbers.

        Raises:
          ValueError: a value is out of range; the message names it.
        """
        temperature, top_p = float(self.temperature), float(self.top_p)
        top_k, seed = int(self.top_k), int(self.seed)
        checks.require(temperature >= 0, "temperature", temperature, "at least 0")
        checks.require(top_k >= 0, "top_k", top_k, "at least 0")
        checks.require(0 < top_p <= 1, "top_p", top_p, "above 0 and at most 1")
        checks.require(0 <= seed < 2**32, "seed", seed, "at least 0 and below 2**32")
        return Sampling(
            jnp.float32(temperature),
            jnp.int32(top_k),
            jnp.float32(top_p),
            jnp.uint32(seed),
        )


def sample(logits: Array, sampling: Sampling, count: Array) -> Array:
    """Next tokens i32 [R] from logits f32 [R,V]; `count` i32 [] is how many tokens the rows have drawn."""
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return lax.cond(sampling.temperature > 0, lambda: _draw(logits, sampling, count), lambda: greedy)


def _draw(logits: Array, sampling: Sampling, count: Array) -> Array:
    logits = _keep_likely(logits / jnp.maximum(sampling.temperature, 1e-6), sampling)

    def one(row: Array, logits: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(sampling.seed), row), count)
        return jax.random.categorical(key, logits)

    return jax.vmap(one)(jnp.arange(logits.shape[0]), logits).astype(jnp.int32)


def _keep_likely(logits: Array, sampling: Sampling) -> Array:
    """-inf for all but the top k, and of those all but the nucleus of probability top_p."""
    vocab = logits.shape[-1]
    ranked = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    in_top_k = (jnp.arange(vocab) < jnp.where(sampling.top_k > 0, sampling.top_k, vocab))[None, :]
    p = jax.nn.softmax(jnp.where(in_top_k, ranked, -jnp.inf), axis=-1)
    in_nucleus = (jnp.cumsum(p, axis=-1) - p < sampling.top_p) | (sampling.top_p >= 1)
    least = jnp.min(jnp.where(in_top_k & in_nucleus, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
