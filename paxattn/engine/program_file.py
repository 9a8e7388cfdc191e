"""An engine's programs in a file, for the next process."""

import hashlib
import importlib
import json
import os
import pickle
import zipfile
import zlib
from collections.abc import Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.stages import Compiled

ABOUT = "about.json"
UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, EOFError, KeyError, json.JSONDecodeError, pickle.UnpicklingError),
    jax.errors.JaxRuntimeError,
)


def facts(**of_engine: Any) -> dict[str, str]:
    """What compiled programs hold for: of the engine, and of where they are compiled."""
    device = jax.devices()[0]
    where = dict(
        paxattn=_sources(),
        jax=jax.__version__,
        device=device.device_kind,
        XLA_FLAGS=os.environ.get("XLA_FLAGS", ""),
        jax_default_matmul_precision=jax.config.jax_default_matmul_precision,
        jax_enable_x64=jax.config.jax_enable_x64,
    )
    return {name: _told(x) for name, x in (where | of_engine).items()}


@cache
def _sources() -> str:
    """A digest of paxattn itself, whose version does not tell one checkout from another."""
    files = sorted(file for file in Path(__file__).parents[1].rglob("*") if file.suffix in (".py", ".json"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _told(value: Any) -> str:
    """As text, a long one by its digest."""
    text = str(value)
    return text if len(text) <= 500 else hashlib.sha256(text.encode()).hexdigest()


def save(path: Path, about: dict[str, str], programs: Mapping[Hashable, Compiled]) -> None:
    """Write a zip file of the programs; the one that is there is replaced by a whole one.

    Raises:
      ValueError: they cannot be written; the message says what to do.
    """
    _check_not_cached(path)
    written = {str(name): _written(path, program) for name, program in programs.items()}
    part = path.with_name(path.name + ".part")
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.writestr(ABOUT, json.dumps(about))
        for name, program in written.items():
            file.writestr(name, program)
    part.replace(path)


def _check_not_cached(path: Path) -> None:
    """What a CPU compiles, and finds in JAX's cache, lacks functions once it has been written and read again."""
    cached = jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir is not None
    if cached and jax.default_backend() == "cpu":
        raise ValueError(
            f"{path}: programs of a CPU cannot be kept while JAX keeps them in jax_compilation_cache_dir; start "
            "anew with jax_enable_compilation_cache=False, warm up and export"
        )


def _written(path: Path, program: Compiled) -> bytes:
    try:
        return serialize_executable.serialize(program)[0]
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise ValueError(
            f"{path}: a program cannot be written any more once requests have run ({_first_line(error)}); export "
            "right after warmup, in a process that has run none"
        ) from error


def load(path: Path, about: dict[str, str], trees: dict[Hashable, tuple[Any, Any]]) -> dict[Hashable, Compiled]:
    """The programs by name, of which `trees` tells the structures of arguments and results.

    Raises:
      ValueError: they were compiled for something else, or cannot be read; the message says which.
    """
    with readable(path), zipfile.ZipFile(path) as file:
        there = json.loads(file.read(ABOUT))
        for name, here in about.items():
            if there.get(name) != here:
                raise ValueError(f"{path}: programs for {name} {there.get(name)}, not {here}; export them again")
        read = {name: file.read(str(name)) for name in trees}
    if jax.default_backend() == "gpu":
        importlib.import_module("jax.experimental.mosaic.gpu")  # tells the plugin where what its kernels call is
    with readable(path), ThreadPoolExecutor(len(trees)) as pool:
        loads = {
            name: pool.submit(serialize_executable.deserialize_and_load, read[name], *tree)
            for name, tree in trees.items()
        }
        return {name: one.result() for name, one in loads.items()}


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """What a file that is no such file, or a damaged one, lets libraries raise becomes a ValueError that names it."""
    try:
        yield
    except UNREADABLE as error:
        raise ValueError(f"{path}: programs that do not run here ({_first_line(error)}); export them again") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
