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

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "num_layers",
            "embed_dim",
            "mlp_dim",
            "num_heads",
            "num_kv_heads",
            "head_dim",
        ):
            size = getattr(self, name)
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: got {size!r}, must be a positive int")
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise ValueError("num_heads must be a multiple of num_kv_heads, and head_dim even")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Config":
        factors = fields.get("rope_factors")
        return cls(**{**fields, "rope_factors": None if factors is None else tuple(factors)})
