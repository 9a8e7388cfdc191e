"""Texts that guesses from a row's own text pay for, and texts that they do not: what a prompt must hold for each.

SmolLM2 is asked in words. Random weights write nothing that anybody would copy, so they are made to: the head gives
each token a successor, a chain that the layers hardly disturb, and a step takes what it takes with any weights. A
prompt then decides what the output repeats, pieces of the chain in another order than the output has them:

- copy: pieces of 16 tokens, so that guesses go wrong where one ends;
- decoy: pieces of 3, which is as many as a guess is looked up by: every one is wrong;
- free: nothing of the output; no guess is found.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import decoder
from models.config import Config
from models.tokenizer import Tokenizer

PIECES = {"copy": 16, "decoy": 3, "free": 0}
QUIET = 1e-4  # what the layers add to a token, so little that the token itself decides

Prompt = Callable[[str, int, int], list[int]]  # of a kind, for so many tokens of prompt and of output


def chain(config: Config, seed: int, dtype: Any) -> tuple[Any, Any, Prompt]:
    """Model, parameters and prompts for it; every token of the vocabulary is in the chain, which is a ring."""
    config = replace(config, tied_head=False)
    order = np.random.default_rng(seed).permutation(config.vocab_size)
    before = np.empty_like(order)
    before[order] = np.roll(order, 1)

    made = decoder.Decoder(config, dtype=dtype, rngs=nnx.Rngs(seed))
    for block in made.blocks:
        for last in (block.attention.out, block.mlp.down):
            last[...] = last[...] * jnp.asarray(QUIET, dtype)
    made.head[...] = made.embed[...][before]

    def prompt(kind: str, size: int, output: int) -> list[int]:
        return _pieces(order, PIECES[kind], size, output, seed)

    return *decoder.split(made), prompt


def _pieces(order: np.ndarray, piece: int, size: int, output: int, seed: int) -> list[int]:
    """`size` tokens behind which the chain goes on from its first."""
    if size + output > len(order):
        raise ValueError(f"--jobs: got {size} + {output} tokens, must be at most the vocabulary's {len(order)}")
    if not piece:
        return order[-size:].tolist()
    pieces = np.split(order[: size - 1], range(piece, size - 1, piece))
    shuffled = [pieces[i] for i in np.random.default_rng(seed).permutation(len(pieces))]
    return [*np.concatenate(shuffled).tolist(), int(order[-1])]


def words(tokenizer: Tokenizer) -> Prompt:
    """Prompts for a model that follows instructions; they are about as long as asked for, unless nothing is copied."""

    def prompt(kind: str, size: int, output: int) -> list[int]:
        del output
        if kind == "copy":
            text = (Path(__file__).parents[2] / "paxattn" / "engine" / "scheduler.py").read_text(encoding="utf-8")
            some = tokenizer.decode(tokenizer.encode(text, parse_special=False)[:size])
            return _asked(tokenizer, f"Repeat this file word for word:\n\n{some}")
        if kind == "free":
            return _asked(tokenizer, "Write a long story about somebody who keeps a lighthouse.")
        raise ValueError(f"--jobs: got {kind}, must be copy or free with this model")

    return prompt


def _asked(tokenizer: Tokenizer, what: str) -> list[int]:
    return tokenizer.encode_chat([{"role": "user", "content": what}])
