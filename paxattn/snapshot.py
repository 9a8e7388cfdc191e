"""Save a store, or any pytree of arrays, with Orbax in mid-generation, and go on from it later or elsewhere.

A snapshot is a folder: the arrays as Orbax writes them, and a manifest that says what they are and what their bytes
add up to. Orbax itself pads what is too short, casts what has another dtype and reads flipped bits as they are.
"""

import dataclasses
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from paxattn import checks
from paxattn.damage import Blame

FORMAT = 1
ARRAYS, MANIFEST = "arrays", "manifest.json"


def save_snapshot(folder: str | Path, tree: Any) -> None:
    """Write a folder that `restore_snapshot` reads; it appears whole or not at all.

    Args:
      folder: new, or empty; its parents are made.
      tree: a pytree of arrays, all of them addressable by this process: a store, an engine's state.

    Raises:
      ValueError: something is at `folder` already, and is not an empty folder; or `tree` holds no numbers.
      ImportError: Orbax is not installed.
    """
    ocp = _orbax()
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: not an empty folder, and not overwritten")
    arrays = {name: np.asarray(x) for name, x in _arrays(tree).items()}
    checks.require(bool(_filled(arrays)), "tree", "nothing to save", "a pytree with arrays that are not empty")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    try:
        _write_manifest(draft, _describe(tree), arrays)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(draft / ARRAYS, _filled(arrays))
        if folder.exists():
            folder.rmdir()
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def restore_snapshot[T](folder: str | Path, like: T) -> T:
    """Read what `save_snapshot` wrote; every number is checked before any is put on a device.

    Args:
      folder: a snapshot.
      like: a pytree of the structure that was saved, for example a fresh store made with the same sizes. Of its
        arrays only shape, dtype and placement are looked at. The static fields of its dataclasses, such as
        page_size, must be those that were saved; they are compared by their repr.

    Returns:
      A new tree with like's structure and static fields and the saved arrays, each placed where like's is.

    Raises:
      ValueError: the folder holds no snapshot, a damaged one, or one of another tree; the message begins with the
        folder and names the leaves and static fields that differ.
      ImportError: Orbax is not installed.
    """
    ocp = _orbax()
    folder = Path(folder).absolute()
    places, want = _arrays(like), _describe(like)
    with Blame(folder, "damaged"):
        sums = _read_manifest(folder, want)
        with ocp.StandardCheckpointer() as checkpointer:
            # Orbax compares what is in them when it says how trees differ: NaN, left in np.empty's, is a warning.
            arrays = {name: np.zeros(x.shape, x.dtype) for name, x in places.items()}
            arrays |= checkpointer.restore(folder / ARRAYS, _filled(arrays))
        for name in places:
            if _checksum(arrays[name]) != sums[name]:
                raise ValueError(f"{folder}: damaged, {name} is not what was saved")
    return jax.tree.unflatten(jax.tree.structure(like), [_place(arrays[name], places[name]) for name in places])


def _orbax() -> Any:
    """Imported on use: it is no dependency of the kernels and stores, and slow to import."""
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError('snapshots need Orbax: pip install "paxattn[snapshot]"') from error
    return ocp


def _arrays(tree: Any) -> dict[str, Array]:
    return {jax.tree_util.keystr(path): _array(path, x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _array(path: Any, x: Any) -> Array:
    """Without x64, jax would cut a NumPy array of 64 bits to 32 and say nothing."""
    array = jnp.asarray(x)
    given = getattr(x, "dtype", array.dtype)
    checks.require(
        given == array.dtype, "tree", f"{given} at {jax.tree_util.keystr(path)}", f"{array.dtype} without x64"
    )
    return array


def _filled(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Orbax refuses arrays without elements; their shape in the manifest is all there is to keep."""
    return {name: x for name, x in arrays.items() if x.size}


def _place(x: np.ndarray, like: Array) -> Array:
    # An array that is committed to a device where like's is not is compiled for anew.
    return jax.device_put(x, like.sharding if like.committed else None)


def _describe(tree: Any) -> dict[str, str]:
    """What must agree between the tree that was saved and the one to restore, in words that outlast the process."""
    return dict(_statics(tree)) | {name: _kind(x) for name, x in _arrays(tree).items()}


def _statics(tree: Any, at: str = "") -> Iterator[tuple[str, str]]:
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=dataclasses.is_dataclass):
        for field in dataclasses.fields(node) if dataclasses.is_dataclass(node) else ():
            name = f"{at}{jax.tree_util.keystr(path)}.{field.name}"
            value = getattr(node, field.name)
            if field.metadata.get("static"):
                yield name, repr(value)
            else:
                yield from _statics(value, name)


def _kind(x: Array | np.ndarray) -> str:
    return f"{x.dtype}{list(x.shape)}"


def _checksum(x: np.ndarray) -> int:
    """Of the shape and dtype, too: the same bytes may be read as another array."""
    return zlib.crc32(x.reshape(-1).view(np.uint8), zlib.crc32(_kind(x).encode()))


def _write_manifest(folder: Path, kinds: dict[str, str], arrays: dict[str, np.ndarray]) -> None:
    manifest = dict(format=FORMAT, tree=kinds, crc32={name: _checksum(x) for name, x in arrays.items()})
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _read_manifest(folder: Path, want: dict[str, str]) -> dict[str, int]:
    """The checksum of each leaf, of a snapshot that is like `want`."""
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder}: holds no snapshot")
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if manifest["format"] != FORMAT:
        raise ValueError(f"{folder}: a snapshot of format {manifest['format']}, must be {FORMAT}")
    if differences := _differences(manifest["tree"], want):
        more = f"; and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise ValueError(f"{folder}: a snapshot of something else: {'; '.join(differences[:4])}{more}")
    return manifest["crc32"]


def _differences(saved: dict[str, str], want: dict[str, str]) -> list[str]:
    return [
        f"{name}: saved {saved.get(name, 'nothing')}, like has {want.get(name, 'nothing')}"
        for name in want | saved
        if saved.get(name) != want.get(name)
    ]
