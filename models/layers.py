"""The parts of a decoder layer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from models.config import Config


class Linear(nnx.Module):
    """x @ weight.T with weight [out, in], the layout that checkpoints have and that reads best for few tokens."""

    def __init__(self, in_dim: int, out_dim: int, *, dtype: Any, rngs: nnx.Rngs):
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=0)
        self.weight = nnx.Param(init(rngs.params(), (out_dim, in_dim), dtype))

    def __call__(self, x: Array) -> Array:
        return matmul(x, self.weight[...])


def matmul(x: Array, weight: Array) -> Array:
    """[T,I] and [O,I] -> [T,O]. The weight goes first: on a CPU that reads it once for all of a few tokens."""
    return jax.lax.dot_general(weight, x, (((1,), (1,)), ((), ()))).T


class RMSNorm(nnx.Module):
    """Root mean square norm (Zhang and Sennrich 2019), in float32."""

    def __init__(self, dim: int, eps: float, *, dtype: Any):
        self.weight = nnx.Param(jnp.ones(dim, dtype))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * self.weight[...][None, :]


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs):
        self.gate = Linear(config.embed_dim, config.mlp_dim, dtype=dtype, rngs=rngs)
        self.up = Linear(config.embed_dim, config.mlp_dim, dtype=dtype, rngs=rngs)
        self.down = Linear(config.mlp_dim, config.embed_dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Attention(nnx.Module):
    """Grouped-query attention; what is stored and how it is read is the store's affair."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs):
        q_dim = config.num_heads * config.head_dim
        kv_dim = config.num_kv_heads * config.head_dim
        self.q = Linear(config.embed_dim, q_dim, dtype=dtype, rngs=rngs)
        self.k = Linear(config.embed_dim, kv_dim, dtype=dtype, rngs=rngs)
        self.v = Linear(config.embed_dim, kv_dim, dtype=dtype, rngs=rngs)
        self.out = Linear(q_dim, config.embed_dim, dtype=dtype, rngs=rngs)
        self.head_dim = config.head_dim

    def __call__(self, layer: int, x: Array, rotation: tuple[Array, Array], kv: Any) -> tuple[Array, Any]:
        q, k, v = (self._heads(project(x)) for project in (self.q, self.k, self.v))
        out, kv = kv.attend(layer, rotate(q, rotation), rotate(k, rotation), v)
        return self.out(out.reshape(len(x), -1)), kv

    def _heads(self, x: Array) -> Array:
        return x.reshape(len(x), -1, self.head_dim)


class Block(nnx.Module):
    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype=dtype)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, layer: int, x: Array, rotation: tuple[Array, Array], kv: Any) -> tuple[Array, Any]:
        attended, kv = self.attention(layer, self.attention_norm(x), rotation, kv)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), kv


def rotation(positions: Array, config: Config) -> tuple[Array, Array]:
    """Cosine and sine [T,1,D/2] of RoPE (Su et al. 2021) at positions [T]."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_factors is not None:
        frequency /= jnp.asarray(config.rope_factors, jnp.float32)
    angle = positions.astype(jnp.float32)[:, None, None] * frequency[None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Array, rotation: tuple[Array, Array]) -> Array:
    """Rotate x [T,heads,D], the first half of D against the second, in float32."""
    cos, sin = rotation
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)

