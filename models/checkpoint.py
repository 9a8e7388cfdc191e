"""Save and restore a model with Orbax, so that the next start needs no conversion."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from models import tokenizer, weights
from models.config import Config
from models.decoder import PureDecoder, abstract
from models.tokenizer import Tokenizer
from paxattn.damage import Blame

PARAMS, CONFIG = "params", "config.json"


def exists(folder: Path) -> bool:
    return (folder / CONFIG).exists() and (folder / PARAMS).exists()


def save(folder: Path, model: PureDecoder, params: nnx.State, tokens: Tokenizer) -> None:
    """Write a checkpoint; it appears whole or not at all.

    Raises:
      ValueError: something is there already, and is not an empty folder.
    """
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: not an empty folder, and not overwritten")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    try:
        (draft / CONFIG).write_text(json.dumps(model.config.to_json()), encoding="utf-8")
        tokens.save(draft)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(draft / PARAMS, weights.flatten(params))
        if folder.exists():
            folder.rmdir()
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def restore(folder: Path, dtype: Any) -> tuple[PureDecoder, nnx.State, Tokenizer]:
    """Read a checkpoint that `save` wrote, cast to dtype.

    Raises:
      ValueError: the folder holds no checkpoint, or a damaged one.
    """
    folder = folder.absolute()
    if not exists(folder):
        raise ValueError(f"{folder}: holds no checkpoint")
    with Blame(folder):
        config = Config.from_json(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        arrays = _arrays(folder / PARAMS, config, dtype)
        model, params = weights.fill(config, dtype, arrays.__getitem__)
        return model, params, tokenizer.from_saved(folder)


def _arrays(path: Path, config: Config, dtype: Any) -> dict[str, jax.Array]:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = weights.flatten(abstract(config, dtype)[1])
    wanted = {name: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=device) for name, shape in shapes.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, wanted)
