"""A model from wherever it lies: the first-run model, a GGUF file, a Hugging Face folder, a checkpoint."""

from pathlib import Path
from typing import Any

from flax import nnx

from models import checkpoint, gguf, huggingface, smollm2
from models.decoder import PureDecoder
from models.tokenizer import Tokenizer

Loaded = tuple[PureDecoder, nnx.State, Tokenizer]


def load(source: Path | None, dtype: Any, checkpoint_folder: Path | None = None) -> Loaded:
    """Model, parameters and tokenizer.

    Args:
      source: a GGUF file or a Hugging Face folder; None = SmolLM2-135M-Instruct, fetched on first use.
      dtype: of the parameters.
      checkpoint_folder: restored from where it holds a checkpoint, else written to.

    Raises:
      ValueError: what lies there cannot be used, the message says why.
      FetchError: SmolLM2 could not be fetched.
    """
    if checkpoint_folder is not None and checkpoint.exists(checkpoint_folder):
        return checkpoint.restore(checkpoint_folder, dtype)
    loaded = _convert(source, dtype)
    if checkpoint_folder is not None:
        checkpoint.save(checkpoint_folder, *loaded)
    return loaded


def _convert(source: Path | None, dtype: Any) -> Loaded:
    if source is None:
        source = smollm2.fetch()
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    return huggingface.load(source, dtype) if source.is_dir() else gguf.load(source, dtype)
