"""The serving loop compiled for an H100, where jax[cuda13] is installed; no GPU is needed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("options", [[], ["--draft-tokens", "4", "--max-seqs", "1"], ["--prompts"]], ids=str)
def test_the_loop_is_one_cuda_graph_that_copies_no_pages(options):
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs jax[cuda13]")
    command = [sys.executable, "scripts/compile_serving.py", "--layers", "2", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT)})
    assert "\none CUDA graph, " in done.stdout
    assert "\n0 copies of pages, 0 host operations\n" in done.stdout
