"""What a decoder of the Llama family is made of."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Config:
    """rope_factors: D/2 divisors of the RoPE frequencies, for models stretched to long contexts."""

    vocab_size: int
    num_layers: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context: int
    rope_theta: float = 10_000.0
    rope_factors: tuple[float, ...] | None = None
    norm_eps: float = 1e-5
    tied_head: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Config":
        factors = fields.get("rope_factors")
        return cls(**{**fields, "rope_factors": None if factors is None else tuple(factors)})
