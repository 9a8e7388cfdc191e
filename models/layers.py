"""The parts of a decoder layer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from models.config import Config


def weight(rngs: nnx.Rngs, *shape: int, dtype: Any) -> nnx.Param:
    """A random matrix [..., out, in], the layout that checkpoints have."""
    return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(shape[-1] ** -0.5, dtype))


def matmul(x: Array, weight: nnx.Param) -> Array:
    """[T,I] and [...,O,I] -> [T,O], the weight's leading axes in O."""
    matrix = weight[...].reshape(-1, x.shape[-1])
    if len(x) != 1:
        return _product(x, matrix)
    return jax.lax.platform_dependent(x, matrix, cuda=_sums, default=_product)


def _product(x: Array, matrix: Array) -> Array:
    """The matrix goes first, as the larger operand: on a CPU, XLA reads it faster so."""
    return jnp.einsum("oi,ti->ot", matrix, x).T


def _sums(x: Array, matrix: Array) -> Array:
    """Of one row: on a GPU XLA reads the matrix by a reduction, in which what is done with the result is, too."""
    kind = jnp.result_type(x, matrix)
    exact = kind if kind == jnp.float64 else jnp.float32
    return jnp.sum(matrix.astype(exact) * x.astype(exact), axis=1)[None].astype(kind)


class RMSNorm(nnx.Module):
    """Root mean square norm (Zhang and Sennrich 2019), in float32."""

    def __init__(self, dim: int, eps: float, *, dtype: Any):
        self.weight = nnx.Param(jnp.ones(dim, dtype))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32) * self._factor(x)
        return y.astype(x.dtype) * self.weight[...][None, :]

    def matmul(self, x: Array, weight: nnx.Param) -> Array:
        """matmul of the norm of x.

        The factor of a single row is applied behind the product, so that what reads the row once gives all that is
        needed: for a GPU, XLA makes one kernel of that, and three of the whole norm; of more rows it makes one, too.
        In bfloat16 it rounds as often, elsewhere. In float16, such a product might overflow.
        """
        if len(x) > 1 or x.dtype == jnp.float16:
            return matmul(self(x), weight)
        y = matmul(x * self.weight[...][None, :], weight)
        return (y.astype(jnp.float32) * self._factor(x)).astype(y.dtype)

    def _factor(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        return jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020). gate_up is [2,F,E]: one matrix product for both."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs):
        self.gate_up = weight(rngs, 2, config.mlp_dim, config.embed_dim, dtype=dtype)
        self.down = weight(rngs, config.embed_dim, config.mlp_dim, dtype=dtype)

    def __call__(self, x: Array, norm: RMSNorm) -> Array:
        gate, up = jnp.split(norm.matmul(x, self.gate_up), 2, axis=-1)
        return matmul(jax.nn.silu(gate) * up, self.down)


class Attention(nnx.Module):
    """Grouped-query attention; what is stored and how it is read is the store's affair.

    qkv is [K,G+2,D,E]: a KV head's G query heads, its key and its value lie together, so that one matrix product
    serves all and the first axis can be sharded.
    """

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs):
        heads = config.num_kv_heads, config.num_heads // config.num_kv_heads + 2, config.head_dim
        self.qkv = weight(rngs, *heads, config.embed_dim, dtype=dtype)
        self.out = weight(rngs, config.embed_dim, config.num_heads * config.head_dim, dtype=dtype)

    def __call__(
        self, layer: int, x: Array, norm: RMSNorm, rotation: tuple[Array, Array], kv: Any, wanted: Array | None
    ) -> tuple[Array, Any]:
        qkv = norm.matmul(x, self.qkv).reshape(len(x), *self.qkv.shape[:3])
        qk = rotate(qkv[:, :, :-1], rotation)
        q = qk[:, :, :-1].reshape(len(x), -1, qk.shape[-1])
        out, kv = kv.attend(layer, q, qk[:, :, -1], qkv[:, :, -1])
        return matmul(_those(wanted, out.reshape(len(x), -1)), self.out), kv


class Block(nnx.Module):
    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype=dtype)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, layer: int, x: Array, rotation: tuple[Array, Array], kv: Any, wanted: Array | None = None
    ) -> tuple[Array, Any]:
        """x [T,E] -> [T,E], or of the tokens at wanted [W] alone [W,E], and the store written to."""
        attended, kv = self.attention(layer, x, self.attention_norm, rotation, kv, wanted)
        x = _those(wanted, x) + attended
        return x + self.mlp(x, self.mlp_norm), kv


def _those(wanted: Array | None, x: Array) -> Array:
    return x if wanted is None else x[wanted]


def rotation(positions: Array, config: Config) -> tuple[Array, Array]:
    """Cosine and sine [T,1,1,D/2] of RoPE (Su et al. 2021) at positions [T]."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_factors is not None:
        frequency /= jnp.asarray(config.rope_factors, jnp.float32)
    angle = positions.astype(jnp.float32)[:, None, None, None] * frequency[None, None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Array, rotation: tuple[Array, Array]) -> Array:
    """Rotate x [T,K,G+1,D], the first half of D against the second, in float32."""
    cos, sin = rotation
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
