"""Read a GGUF file of the Llama family: config, weights (dequantised) and tokenizer."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from flax import nnx

from models import weights
from models.config import Config
from models.decoder import PureDecoder
from models.tokenizer import Tokenizer, checked, from_gguf_fields
from paxattn.damage import Blame

NAMES = {
    "embed": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "head": "output.weight",
    "blocks.{i}.attention_norm.weight": "blk.{i}.attn_norm.weight",
    "blocks.{i}.attention.q": "blk.{i}.attn_q.weight",
    "blocks.{i}.attention.k": "blk.{i}.attn_k.weight",
    "blocks.{i}.attention.v": "blk.{i}.attn_v.weight",
    "blocks.{i}.attention.out": "blk.{i}.attn_output.weight",
    "blocks.{i}.mlp_norm.weight": "blk.{i}.ffn_norm.weight",
    "blocks.{i}.mlp.gate": "blk.{i}.ffn_gate.weight",
    "blocks.{i}.mlp.up": "blk.{i}.ffn_up.weight",
    "blocks.{i}.mlp.down": "blk.{i}.ffn_down.weight",
}


def load(path: Path, dtype: Any) -> tuple[PureDecoder, nnx.State, Tokenizer]:
    """Model, parameters and tokenizer of a GGUF file.

    Raises:
      ValueError: not a GGUF file, or not of the Llama family; the message says what is in the way.
    """
    with Blame(path):
        return _load(path, dtype)


def _load(path: Path, dtype: Any) -> tuple[PureDecoder, nnx.State, Tokenizer]:
    reader = _open(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(path, fields, tensors)
    heads = {"attention.q": config.num_heads, "attention.k": config.num_kv_heads}

    def read(name: str) -> np.ndarray:
        source = weights.rename(name, NAMES)
        if source not in tensors:
            raise ValueError(f"{path}: has no tensor {source}")
        array = gguf.dequantize(tensors[source].data, tensors[source].tensor_type)
        num_heads = heads.get(name.split(".", 2)[-1])
        return array if num_heads is None else _unpermute(array, num_heads)

    model, params = weights.convert(config, dtype, read)
    return model, params, checked(from_gguf_fields(fields), config, path)


def _open(path: Path) -> gguf.GGUFReader:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path}: not a GGUF file")
    return gguf.GGUFReader(path)


def _config(path: Path, fields: dict[str, Any], tensors: dict[str, Any]) -> Config:
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{path}: architecture {architecture!r}, only 'llama' is supported")
    if fields.get("llama.expert_count"):
        raise ValueError(f"{path}: a mixture of experts, only dense models are supported")

    def get(name: str, default: Any = None) -> Any:
        value = fields.get(f"llama.{name}", default)
        if value is None:
            raise ValueError(f"{path}: has no field llama.{name}")
        return value

    heads, embed_dim = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", embed_dim // heads)
    if get("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"{path}: partial RoPE is not supported")
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{path}: has no tensor token_embd.weight")
    return Config(
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        num_layers=get("block_count"),
        embed_dim=embed_dim,
        mlp_dim=get("feed_forward_length"),
        num_heads=heads,
        num_kv_heads=get("attention.head_count_kv", heads),
        head_dim=head_dim,
        context=get("context_length"),
        rope_theta=float(get("rope.freq_base", 10_000.0)),
        rope_factors=_rope_factors(path, fields, tensors, head_dim),
        norm_eps=float(get("attention.layer_norm_rms_epsilon")),
        tied_head="output.weight" not in tensors,
    )


def _rope_factors(path: Path, fields: dict, tensors: dict, head_dim: int) -> tuple[float, ...] | None:
    if "rope_freqs.weight" in tensors:
        factors = tuple(float(x) for x in tensors["rope_freqs.weight"].data)
        if len(factors) != head_dim // 2:
            raise ValueError(f"{path}: rope_freqs.weight has {len(factors)} factors, not {head_dim // 2}")
        return factors
    kind = fields.get("llama.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind != "linear":
        raise ValueError(f"{path}: RoPE scaling {kind!r} is not supported")
    return (float(fields["llama.rope.scaling.factor"]),) * (head_dim // 2)


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF stores q and k rows for interleaved RoPE; ours rotates the first half of a head against the second."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
