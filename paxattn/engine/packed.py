"""A pytree of small arrays of the host as one array: each array that goes to a device is a transfer of its own."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

_Like = tuple[jax.tree_util.PyTreeDef, tuple[tuple[tuple[int, ...], np.dtype], ...]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packed:
    """Leaves of four bytes an element, or of bools, one after the other.

    Fields:
      words: i32 [W]
      like: the structure, and shape and dtype of each leaf; static.
    """

    words: Any
    like: _Like = field(metadata=dict(static=True))

    @classmethod
    def of(cls, tree: Any) -> "Packed":
        """Of numpy arrays, of which there is at least one."""
        leaves, structure = jax.tree.flatten(tree)
        words = np.concatenate([_words(x) for x in leaves])
        return cls(words, (structure, tuple((x.shape, x.dtype) for x in leaves)))

    def tree(self) -> Any:
        """The pytree, where `words` is on a device."""
        structure, kinds = self.like
        ends = np.cumsum([int(np.prod(shape)) for shape, _ in kinds])
        parts = jnp.split(self.words, ends[:-1])
        return structure.unflatten(_leaf(part, *kind) for part, kind in zip(parts, kinds, strict=True))


def _words(x: np.ndarray) -> np.ndarray:
    return np.ravel(x.astype(np.int32) if x.dtype.kind == "b" else x).view(np.int32)


def _leaf(words: Array, shape: tuple[int, ...], dtype: np.dtype) -> Array:
    return (words != 0 if dtype.kind == "b" else lax.bitcast_convert_type(words, dtype)).reshape(shape)
