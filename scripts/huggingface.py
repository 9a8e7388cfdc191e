"""Hugging Face transformers as a peer of the benchmarks, which do without where it is not installed."""

import importlib.util
import time
from typing import Any

from models.config import Config


def installed() -> bool:
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def llama_config(config: Config) -> Any:
    """The same model as transformers describes it."""
    import transformers

    return transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.embed_dim,
        intermediate_size=config.mlp_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.context,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tied_head,
    )


def generate(model: Any, prompts: list[list[int]], count: int, **options: Any) -> tuple[list[list[int]], float]:
    """Greedy: `count` new ids after each of prompts [B][T], and seconds."""
    import torch

    ids = torch.tensor(prompts, device=model.device)
    with torch.inference_mode():
        start = time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
            eos_token_id=None,
            pad_token_id=0,
            **options,
        )
        return out[:, ids.shape[1] :].tolist(), time.perf_counter() - start
