"""Block sizes of the Hopper kernels as scripts/tune.py measured them, one table in tuned/ for each kind of GPU."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from paxattn.kernels.problem import Problem

TABLES = Path(__file__).parent / "tuned"


def table_of(device_kind: str) -> Path:
    return TABLES / (re.sub(r"[^a-z0-9]+", "_", device_kind.lower()) + ".json")


def entry_of(head_dim: int, v_dim: int, causal: bool, deterministic: bool | None) -> str:
    """The name of an entry; `deterministic` is None for the forward."""
    dims = str(head_dim) if head_dim == v_dim else f"{head_dim}/{v_dim}"
    order = {None: "", True: " deterministic", False: " any order"}[deterministic]
    return f"D{dims} {'causal' if causal else 'full'}{order}"


def measured(device_kind: str, problem: Problem, deterministic: bool | None) -> dict[str, Any] | None:
    """The fields of the Config that was the fastest on such a device, or None where none was measured."""
    entry = entry_of(problem.head_dim, problem.v_dim, problem.right is not None, deterministic)
    return _entries(device_kind, "fwd" if deterministic is None else "bwd").get(entry, {}).get("config")


@cache
def _entries(device_kind: str, part: str) -> dict[str, Any]:
    path = table_of(device_kind)
    return json.loads(path.read_text(encoding="utf-8"))[part] if path.exists() else {}
