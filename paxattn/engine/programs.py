"""An engine's programs: compiled side by side, and kept in a file for the next process."""

import hashlib
import importlib
import json
import os
import zipfile
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.stages import Compiled, Lowered

ABOUT = "about.json"


def compile_all(
    lowered: Iterable[tuple[Hashable, Lowered]], progress: Callable[[int, int], None] | None, total: int
) -> dict[Hashable, Compiled]:
    """Compile `total` programs by name. Those that come first are compiled while Python lowers the others."""
    with ThreadPoolExecutor(total) as pool:
        under_way = {name: pool.submit(one.compile) for name, one in lowered}
        programs = {}
        for done, (name, one) in enumerate(under_way.items(), 1):
            programs[name] = one.result()
            if progress is not None:
                progress(done, total)
    return programs


def facts(**of_engine: Any) -> dict[str, str]:
    """What compiled programs hold for: of the engine, and of where they are compiled."""
    device = jax.devices()[0]
    where = dict(jax=jax.__version__, device=device.device_kind, XLA_FLAGS=os.environ.get("XLA_FLAGS", ""))
    return {name: _told(x) for name, x in (where | of_engine).items()}


def _told(value: Any) -> str:
    """As text, a long one by its digest."""
    text = str(value)
    return text if len(text) <= 500 else hashlib.sha256(text.encode()).hexdigest()


def save(path: Path, about: dict[str, str], programs: dict[Hashable, Compiled]) -> None:
    """Write a zip file of the programs; the one that is there is replaced by a whole one."""
    part = path.with_name(path.name + ".part")
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.writestr(ABOUT, json.dumps(about))
        for name, program in programs.items():
            file.writestr(str(name), serialize_executable.serialize(program)[0])
    part.replace(path)


def load(path: Path, about: dict[str, str], trees: dict[Hashable, tuple[Any, Any]]) -> dict[Hashable, Compiled]:
    """The programs by name, of which `trees` tells the structures of arguments and results.

    Raises:
      ValueError: they were compiled for something else; the message says what differs.
    """
    with zipfile.ZipFile(path) as file:
        there = json.loads(file.read(ABOUT))
        for name, here in about.items():
            if there.get(name) != here:
                raise ValueError(f"{path}: programs for {name} {there.get(name)}, not {here}; export them again")
        read = {name: file.read(str(name)) for name in trees}
    if jax.default_backend() == "gpu":
        importlib.import_module("jax.experimental.mosaic.gpu")  # tells the plugin where what its kernels call is
    with ThreadPoolExecutor(len(trees)) as pool:
        loads = {
            name: pool.submit(serialize_executable.deserialize_and_load, read[name], *tree)
            for name, tree in trees.items()
        }
        return {name: one.result() for name, one in loads.items()}
