"""Who may import whom, what importing costs, and what the wheel ships."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import paxattn
from paxattn import dispatch

ROOT = Path(__file__).parents[1]

# Which of our modules the files under a folder may import; the longest matching folder counts.
ALLOWED = {
    "paxattn/__init__.py": ("paxattn",),
    "paxattn/checks.py": (),
    "paxattn/damage.py": (),
    "paxattn/reference.py": (),
    "paxattn/dispatch.py": (),
    "paxattn/flags.py": (),
    "paxattn/kernels": ("paxattn.kernels",),
    "paxattn/flash_attention.py": ("paxattn.checks", "paxattn.dispatch"),
    "paxattn/paged_attention.py": (
        "paxattn.checks",
        "paxattn.dispatch",
        "paxattn.kernels.codes",
        "paxattn.kv.pages",
    ),
    "paxattn/kv": ("paxattn.checks", "paxattn.kv", "paxattn.flash_attention", "paxattn.paged_attention"),
    "paxattn/kv/pages.py": (
        "paxattn.checks",
        "paxattn.dispatch",
        "paxattn.kernels.codes",
        "paxattn.kernels.xla_pages",
    ),
    "paxattn/kv/page_table.py": ("paxattn.checks",),
    "paxattn/kv/prefix.py": ("paxattn.checks",),
    "paxattn/snapshot.py": ("paxattn.checks", "paxattn.damage"),
    "paxattn/engine/scheduler.py": ("paxattn.kv.prefix",),
    "paxattn/engine/edits.py": (
        "paxattn.engine.packed",
        "paxattn.engine.rules",
        "paxattn.engine.scheduler",
        "paxattn.engine.slots",
    ),
    "paxattn/engine/packed.py": (),
    "paxattn/engine/program_file.py": (),
    "paxattn/engine/programs.py": (
        "paxattn.engine.config",
        "paxattn.engine.edits",
        "paxattn.engine.generate",
        "paxattn.engine.memory",
        "paxattn.engine.packed",
        "paxattn.engine.program_file",
        "paxattn.engine.scheduler",
        "paxattn.engine.slots",
        "paxattn.kv",
    ),
    "paxattn/engine": ("paxattn.checks", "paxattn.kv", "paxattn.engine"),
    "models": ("models", "paxattn.damage"),
}
FILES = [path.relative_to(ROOT) for top in ("paxattn", "models") for path in sorted((ROOT / top).rglob("*.py"))]


def imported(path):
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_one_way(path):
    place = max((p for p in ALLOWED if path.as_posix() == p or path.is_relative_to(p)), key=len)
    for name in imported(path):
        if name.split(".")[0] in ("paxattn", "models", "scripts", "tests"):
            assert any(name == to or name.startswith(to + ".") for to in ALLOWED[place]), f"{path} imports {name}"


def test_kernels_import_only_jax_besides():
    standard = {"collections", "dataclasses", "functools", "json", "math", "pathlib", "re", "typing"}
    for path in FILES:
        if path.is_relative_to("paxattn/kernels") or path.as_posix() == "paxattn/reference.py":
            assert {name.split(".")[0] for name in imported(path)} <= {"jax", "jaxlib", "paxattn", *standard}


def test_the_scheduler_is_plain_python():
    assert {name.split(".")[0] for name in imported(Path("paxattn/engine/scheduler.py"))} <= {
        "collections", "dataclasses", "heapq", "paxattn", "typing",
    }  # fmt: skip


def test_every_implementation_that_dispatch_names_is_there():
    for op, modules in dispatch.MODULES.items():
        for name in modules:
            assert callable(dispatch.load(op, name))
        for names in dispatch.ORDER.values():
            assert set(names) & set(modules)


def test_public_names_are_there_and_documented():
    for name in paxattn.__all__:
        assert getattr(paxattn, name).__doc__, name


def test_import_is_quick_and_touches_no_device():
    """The least of six, as other tests run meanwhile; the processor's time hardly minds them."""
    code = (
        "import time, jax; clocks = time.perf_counter, time.process_time; start = [now() for now in clocks];"
        "import paxattn; spent = [now() - then for now, then in zip(clocks, start)];"
        "from jax._src import xla_bridge; assert not xla_bridge._backends; print(*spent)"
    )
    told = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(6)
    ]
    wall, processor = (min(map(float, seconds)) for seconds in zip(*told, strict=True))
    assert wall < 0.3
    assert processor < 0.2
