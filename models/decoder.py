"""The decoder of the Llama family, and the same as a pure function for the engine."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from models.config import Config
from models.layers import Block, RMSNorm, matmul, rotation, weight


class Decoder(nnx.Module):
    """Packed tokens of any number of rows -> hidden states. It knows no store: each layer calls kv.attend."""

    def __init__(self, config: Config, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        embed = nnx.initializers.normal(0.02)(rngs.params(), (config.vocab_size, config.embed_dim), dtype)
        self.embed = nnx.Param(embed)
        self.blocks = nnx.List([Block(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.embed_dim, config.norm_eps, dtype=dtype)
        if not config.tied_head:
            self.head = weight(rngs, config.vocab_size, config.embed_dim, dtype=dtype)

    def __call__(self, tokens: Array, positions: Array, kv: Any) -> tuple[Array, Any]:
        """tokens, positions i32 [T] and a store -> hidden [T,E], or [W,E] of those that it says are wanted, and the
        store written to."""
        turn = rotation(positions, self.config)
        x = self.embed[...][tokens]
        wanted, last = getattr(kv, "wanted", None), len(self.blocks) - 1
        for layer, block in enumerate(self.blocks):
            x, kv = block(layer, x, turn, kv, wanted if layer == last else None)
        return self.norm(x), kv

    def logits(self, hidden: Array) -> Array:
        """[T,E] -> float32 [T,V]"""
        return matmul(hidden, self.embed if self.config.tied_head else self.head).astype(jnp.float32)


@dataclass(frozen=True)
class PureDecoder:
    """A Decoder without its parameters: what paxattn's engine calls a Model."""

    config: Config
    graph: nnx.GraphDef

    def __hash__(self) -> int:
        # jit hashes its static arguments at every call, and to hash a graph is to walk it.
        return hash(self.config)

    def __call__(self, params: Any, tokens: Array, positions: Array, kv: Any) -> tuple[Array, Any]:
        return nnx.merge(self.graph, params)(tokens, positions, kv)

    def logits(self, params: Any, hidden: Array) -> Array:
        return nnx.merge(self.graph, params).logits(hidden)


def split(decoder: Decoder) -> tuple[PureDecoder, nnx.State]:
    """The decoder as (pure function, parameters)."""
    graph, params = nnx.split(decoder)
    return PureDecoder(decoder.config, graph), params


def abstract(config: Config, dtype: Any = jnp.float32) -> tuple[PureDecoder, nnx.State]:
    """As `split`, with shapes in place of parameters; nothing is allocated."""
    return split(nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0))))


def random(config: Config, seed: int = 0, dtype: Any = jnp.float32) -> tuple[PureDecoder, nnx.State]:
    """As `split`, with random parameters: for tests and benchmarks of shapes."""
    # Not under jit, where XLA would compile the same few draws again for every layer.
    return split(Decoder(config, dtype=dtype, rngs=nnx.Rngs(seed)))
