"""Read a Hugging Face folder of the Llama family: config.json, *.safetensors, tokenizer.json."""

import json
import math
from pathlib import Path
from typing import Any

from flax import nnx
from safetensors import SafetensorError, safe_open

from models import weights
from models.config import Config
from models.decoder import PureDecoder
from models.tokenizer import Tokenizer, checked, from_huggingface
from paxattn.damage import Blame

NAMES = {
    "embed": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head": "lm_head.weight",
    "blocks.{i}.attention_norm.weight": "model.layers.{i}.input_layernorm.weight",
    "blocks.{i}.attention.q": "model.layers.{i}.self_attn.q_proj.weight",
    "blocks.{i}.attention.k": "model.layers.{i}.self_attn.k_proj.weight",
    "blocks.{i}.attention.v": "model.layers.{i}.self_attn.v_proj.weight",
    "blocks.{i}.attention.out": "model.layers.{i}.self_attn.o_proj.weight",
    "blocks.{i}.mlp_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    "blocks.{i}.mlp.gate": "model.layers.{i}.mlp.gate_proj.weight",
    "blocks.{i}.mlp.up": "model.layers.{i}.mlp.up_proj.weight",
    "blocks.{i}.mlp.down": "model.layers.{i}.mlp.down_proj.weight",
}

SIZES = (
    "vocab_size",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)


def load(folder: Path, dtype: Any) -> tuple[PureDecoder, nnx.State, Tokenizer]:
    """Model, parameters and tokenizer of a folder.

    Raises:
      ValueError: a file is missing or damaged, or the model is not of the Llama family.
    """
    with Blame(folder):
        return _load(folder, dtype)


def _load(folder: Path, dtype: Any) -> tuple[PureDecoder, nnx.State, Tokenizer]:
    fields = read_json(folder / "config.json")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: has no *.safetensors file")
    tensors = _Tensors(files)
    config = _config(folder / "config.json", fields)
    model, params = weights.convert(config, dtype, lambda name: tensors.read(weights.rename(name, NAMES)))
    return model, params, checked(from_huggingface(folder, fields), config, folder)


class _Tensors:
    """The tensors of one or many safetensors files by name."""

    def __init__(self, files: list[Path]):
        self._file_of = {}
        self._folder = files[0].parent
        for path in files:
            try:
                file = safe_open(path, framework="flax")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: a damaged or truncated safetensors file ({error})") from error
            self._file_of.update(dict.fromkeys(file.keys(), file))

    def read(self, name: str) -> Any:
        if name not in self._file_of:
            raise ValueError(f"{self._folder}: no safetensors file has the tensor {name}")
        return self._file_of[name].get_tensor(name)


def read_json(path: Path) -> Any:
    if not path.exists():
        raise ValueError(f"{path.parent}: has no {path.name}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error


def _config(path: Path, fields: dict[str, Any]) -> Config:
    if fields.get("model_type") != "llama":
        raise ValueError(f"{path}: model_type {fields.get('model_type')!r}, only 'llama' is supported")
    for feature in ("attention_bias", "mlp_bias", "quantization_config"):
        if fields.get(feature):
            raise ValueError(f"{path}: {feature} is not supported")
    if fields.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{path}: hidden_act {fields['hidden_act']!r}, only 'silu' is supported")
    missing = [name for name in SIZES if name not in fields]
    if missing:
        raise ValueError(f"{path}: has no {', '.join(missing)}")
    heads = fields["num_attention_heads"]
    head_dim = fields.get("head_dim") or fields["hidden_size"] // heads
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1)) != 1:
        raise ValueError(f"{path}: partial RoPE is not supported")
    return Config(
        vocab_size=fields["vocab_size"],
        num_layers=fields["num_hidden_layers"],
        embed_dim=fields["hidden_size"],
        mlp_dim=fields["intermediate_size"],
        num_heads=heads,
        num_kv_heads=fields.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        context=fields["max_position_embeddings"],
        rope_theta=float(rope.get("rope_theta", fields.get("rope_theta", 10_000.0))),
        rope_factors=_rope_factors(path, rope, fields, head_dim),
        norm_eps=fields["rms_norm_eps"],
        tied_head=fields.get("tie_word_embeddings", False),
    )


def _rope_factors(path: Path, rope: dict, fields: dict, head_dim: int) -> tuple[float, ...] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    half = head_dim // 2
    if kind == "default":
        return None
    if kind == "linear":
        return (float(rope["factor"]),) * half
    if kind != "llama3":
        raise ValueError(f"{path}: RoPE scaling {kind!r} is not supported")
    theta = rope.get("rope_theta", fields.get("rope_theta", 10_000.0))
    return tuple(_llama3_factor(rope, theta ** (-i / half)) for i in range(half))


def _llama3_factor(rope: dict[str, float], frequency: float) -> float:
    """Llama 3.1: wavelengths beyond the original context grow by `factor`, short ones stay, between they blend."""
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    keep = min(max((turns - low) / (high - low), 0.0), 1.0)
    return 1 / (keep + (1 - keep) / rope["factor"])
