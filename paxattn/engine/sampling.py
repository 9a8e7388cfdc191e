"""Choosing the next token from logits: greedy, temperature, top-k, top-p, min-p; each row by its own rule."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
      seed: a row's n-th token depends on (seed, its stream, n) and the logits alone; see `sample`.
      min_p: only tokens at least this fraction as likely as the likeliest (Nguyen et al. 2024); 0 = all.
    """

    temperature: Any = 0.0
    top_k: Any = 0
    top_p: Any = 1.0
    seed: Any = 0
    min_p: Any = 0.0

    def checked(self) -> "Sampling":
        """The same with arrays for numbers.

        Raises:
          ValueError: a value is out of range; the message names it.
        """
        numbers = self.checked_numbers()
        return Sampling(
            jnp.float32(numbers.temperature),
            jnp.int32(numbers.top_k),
            jnp.float32(numbers.top_p),
            jnp.uint32(numbers.seed),
            jnp.float32(numbers.min_p),
        )

    def checked_numbers(self) -> "Sampling":
        """The same, on the host; raises as `checked`."""
        temperature, top_p, min_p = (
            checks.static_float32(name, getattr(self, name)) for name in ("temperature", "top_p", "min_p")
        )
        top_k, seed = checks.static_int("top_k", self.top_k, 0, 2**31), checks.static_int("seed", self.seed, 0, 2**32)
        checks.require(temperature >= 0, "temperature", temperature, "at least 0")
        checks.require(0 < top_p <= 1, "top_p", top_p, "above 0 and at most 1")
        checks.require(0 <= min_p <= 1, "min_p", min_p, "from 0 to 1")
        return Sampling(temperature, top_k, top_p, seed, min_p)


def sample(logits: Array, sampling: Sampling, count: Array, streams: Array | None = None) -> Array:
    """Next tokens i32 [R].

    Args:
      logits: f32 [R,V]
      sampling: checked; each field of one number, or of one a row.
      count: i32 [] or [R], how many tokens the rows have drawn.
      streams: i32 [R], what tells rows of one seed apart; by default the row's number.
    """
    rows = logits.shape[0]
    streams = jnp.arange(rows) if streams is None else streams
    sampling, count = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows,)), (sampling, count))
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    random = sampling.temperature > 0
    return lax.cond(
        jnp.any(random),
        lambda: jnp.where(random, _draw(logits, sampling, count, streams), greedy),
        lambda: greedy,
    )


def _draw(logits: Array, sampling: Sampling, count: Array, streams: Array) -> Array:
    logits = _keep_likely(logits / jnp.maximum(sampling.temperature, 1e-6)[:, None], sampling)

    def one(seed: Array, stream: Array, count: Array, logits: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), count)
        return jax.random.categorical(key, logits)

    return jax.vmap(one)(sampling.seed, streams, count, logits).astype(jnp.int32)


def _keep_likely(logits: Array, sampling: Sampling) -> Array:
    """-inf for all but the top k, of those all but the nucleus of probability top_p, of those the too unlikely."""
    counted = sampling.top_k > 0
    bounded = sampling.top_p < 1
    order = _as_ordered(logits)

    def in_top_k(logits: Array) -> Array:
        least = _threshold(order, lambda kept: jnp.sum(kept, axis=-1, dtype=jnp.int32) >= sampling.top_k)
        return jnp.where((order >= least[:, None]) | ~counted[:, None], logits, -jnp.inf)

    def in_nucleus(logits: Array) -> Array:
        p = jax.nn.softmax(logits, axis=-1)
        least = _threshold(order, lambda kept: jnp.sum(jnp.where(kept, p, 0), axis=-1) >= sampling.top_p)
        return jnp.where((order >= least[:, None]) | ~bounded[:, None], logits, -jnp.inf)

    likely = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(sampling.min_p)[:, None]
    logits = lax.cond(jnp.any(counted), in_top_k, lambda x: x, logits)
    logits = lax.cond(jnp.any(bounded), in_nucleus, lambda x: x, logits)
    return jnp.where(logits >= likely, logits, -jnp.inf)


def _as_ordered(x: Array) -> Array:
    """float32 as uint32 of the same order; the two zeros are one."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(order: Array, enough: Callable[[Array], Array]) -> Array:
    """u32 [R]: the largest number such that what is at least as large is enough; 0 where nothing is.

    Bit by bit, as a sort of a whole vocabulary takes a GPU longer than 32 sums over it.
    """

    def narrow(i: Array, least: Array) -> Array:
        more = least | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(enough(order >= more[:, None]), more, least)

    return lax.fori_loop(0, 32, narrow, jnp.zeros(order.shape[0], jnp.uint32))
