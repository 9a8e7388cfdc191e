"""From a checkpoint's named matrices to a decoder's parameters and back.

A file format is a table from our names to its own and a way to read one matrix. Our names are the parameters'
paths, for example "blocks.0.mlp.down", with the parts of a packed one in its place: "blocks.0.attention.q".
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import decoder
from models.config import Config

PACKED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
Read = Callable[[str], Any]


def convert(config: Config, dtype: Any, read: Read) -> tuple[decoder.PureDecoder, nnx.State]:
    """The decoder and its parameters from the matrices of a file; `read` gives one by our name.

    Raises:
      ValueError: a matrix has another shape than the config says; the message names it.
    """
    sizes = matrix_shapes(config)

    def matrix(name: str) -> Any:
        array, shape = read(name), sizes[name.rsplit(".", 1)[-1]]
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name}: the file has dtype {array.dtype}, only floating ones are supported")
        if array.shape != shape:
            raise ValueError(f"{name}: the file has shape {array.shape}, its config says {shape}")
        return array

    def parameter(name: str) -> Any:
        path, last = name.rpartition(".")[::2]
        if last not in PACKED:
            return matrix(name)
        return pack(config, [np.asarray(matrix(f"{path}.{part}")) for part in PACKED[last]])

    return fill(config, dtype, parameter)


def matrix_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """By the last part of our names."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    embed, mlp, vocab = config.embed_dim, config.mlp_dim, (config.vocab_size, config.embed_dim)
    shapes = dict(q=(q, embed), k=(kv, embed), v=(kv, embed), out=(embed, q))
    shapes |= dict(gate=(mlp, embed), up=(mlp, embed), down=(embed, mlp))
    return shapes | dict(embed=vocab, head=vocab, weight=(embed,))


def pack(config: Config, parts: list[np.ndarray]) -> np.ndarray:
    """q, k, v -> [K,G+2,D,E]; gate, up -> [2,F,E]."""
    if len(parts) == 2:
        return np.stack(parts)
    heads = (config.num_kv_heads, -1, config.head_dim, config.embed_dim)
    return np.concatenate([part.reshape(heads) for part in parts], axis=1)


def unpack(config: Config, params: nnx.State) -> dict[str, Any]:
    """The inverse of `convert`: every matrix by our name."""
    matrices: dict[str, Any] = {}
    for name, array in flatten(params).items():
        path, last = name.rpartition(".")[::2]
        if last == "gate_up":
            matrices |= {f"{path}.gate": array[0], f"{path}.up": array[1]}
        elif last == "qkv":
            for part, heads in (("q", array[:, :-2]), ("k", array[:, -2]), ("v", array[:, -1])):
                matrices[f"{path}.{part}"] = heads.reshape(-1, config.embed_dim)
        else:
            matrices[name] = array
    return matrices


def fill(config: Config, dtype: Any, read: Read) -> tuple[decoder.PureDecoder, nnx.State]:
    """The decoder and its parameters, each read by its path."""
    model, shapes = decoder.abstract(config, dtype)
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    arrays = [jnp.asarray(read(name_of(path)), leaf.dtype) for path, leaf in leaves]
    return model, jax.tree.unflatten(tree, arrays)


def flatten(params: nnx.State) -> dict[str, jax.Array]:
    """Every parameter by its path, as `fill` reads them."""
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
