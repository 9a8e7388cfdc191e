"""What the flash kernels of GPU and TPU are given: the shapes and options of a call."""

import math
from dataclasses import dataclass
from typing import Any

from jax import Array

LOG2E = math.log2(math.e)
TINY = 1e-30


class Scaled:
    """What softmax sees of a problem."""

    scale: float
    softcap: float | None

    @property
    def shaped(self) -> bool:
        """Whether scores need more than a positive factor before exp2; one too small would lose the mask's infinity."""
        return self.softcap is not None or self.scale < TINY

    @property
    def exponent(self) -> float:
        """The factor that exp2 sees."""
        if self.softcap is not None:
            return self.softcap * LOG2E
        return LOG2E * (1.0 if self.scale < TINY else self.scale)


@dataclass(frozen=True)
class Problem(Scaled):
    """What is static in a call."""

    batch: int
    q_len: int
    kv_len: int
    heads: int
    kv_heads: int
    head_dim: int
    v_dim: int
    left: int | None
    right: int | None
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, options: Any, q: Array, v: Array) -> "Problem":
        """Of q [B,T,H,D], v [B,S,K,Dv] and options with the fields that are no shapes."""
        batch, q_len, heads, head_dim = q.shape
        _, kv_len, kv_heads, v_dim = v.shape
        shape = (batch, q_len, kv_len, heads, kv_heads, head_dim, v_dim)
        return cls(*shape, options.left, options.right, options.scale, options.softcap)

    @property
    def offset(self) -> int:
        """Position of the first query."""
        return self.kv_len - self.q_len
