"""Prompt-lookup drafts: what followed the last time that a row ended in the same tokens (Saxena 2023)."""

import jax.numpy as jnp
from jax import Array


def look_up(tokens: Array, known: Array, ngram: int, count: int) -> tuple[Array, Array]:
    """Guesses of each row's next tokens, from its own tokens.

    Args:
      tokens: i32 [R,S], of which the first known[r] are row r's.
      ngram: how many tokens must agree.
      count: D, most tokens to guess.

    Returns:
      drafts i32 [R,D], and how many of them there are, i32 [R]: those that follow the latest place but the end where
      the row's last `ngram` tokens stand.
    """
    place = jnp.arange(tokens.shape[1])[None, :]
    ends = jnp.ones(tokens.shape, bool)
    for back in range(ngram):
        last = jnp.take_along_axis(tokens, jnp.maximum(known - 1 - back, 0)[:, None], axis=1)
        ends &= jnp.roll(tokens, back, axis=1) == last
    ends &= (place >= ngram - 1) & (place < known[:, None] - 1)
    found = jnp.max(jnp.where(ends, place, -1), axis=1)
    begin = jnp.where(found < 0, known, found + 1)
    index = begin[:, None] + jnp.arange(count)[None, :]
    drafts = jnp.take_along_axis(tokens, jnp.minimum(index, tokens.shape[1] - 1), axis=1)
    return drafts, jnp.clip(known - begin, 0, count)
