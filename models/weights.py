"""From named arrays to a decoder's parameters. A format is a table of names and a way to read one array."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models import decoder
from models.config import Config


def fill(config: Config, dtype: Any, read: Callable[[str], Any]) -> tuple[decoder.PureDecoder, nnx.State]:
    """The decoder and its parameters, each `read` by its name here, for example "blocks.0.mlp.up.weight".

    Raises:
      ValueError: an array has another shape than the config says; the message names it.
    """
    model, shapes = decoder.abstract(config, dtype)
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    return model, jax.tree.unflatten(tree, [_read(path, leaf, read) for path, leaf in leaves])


def _read(path: Any, leaf: Any, read: Callable[[str], Any]) -> jax.Array:
    name = name_of(path)
    array = read(name)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name}: the file has dtype {array.dtype}, only floating ones are supported")
    if array.shape != leaf.shape:
        raise ValueError(f"{name}: the file has shape {array.shape}, its config says {leaf.shape}")
    return jnp.asarray(array, leaf.dtype)


def flatten(params: nnx.State) -> dict[str, jax.Array]:
    """The inverse of `fill`: every parameter by its name here."""
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def name_of(path: Any) -> str:
    keys = [getattr(key, "key", getattr(key, "idx", getattr(key, "name", None))) for key in path]
    return ".".join(str(key) for key in keys if key != "value")


def rename(name: str, table: dict[str, str]) -> str:
    """The name in a file's format; the table has {i} for a block's number."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.*)", name)
    if match is None:
        return table[name]
    return table["blocks.{i}." + match[2]].format(i=match[1])
