"""Measure the block sizes of the Hopper kernels and write them to paxattn/kernels/tuned/<device>.json.

python scripts/tune.py                                       # every head dim, causal and full; on the GPU to tune for
python scripts/tune.py --dims 128 192/128 --masks causal     # these alone; what the file says of others stays

For each head dim and mask the forward's candidates are timed, and with the fastest of them the backward's, once with
deterministic sums and once without. A candidate that does not compile, or whose results are wrong, is left out. All
are timed once; the best few then take turns as in bench_attention.py, and the lowest median wins. The kernels read the
table; where it says nothing, on other devices for one, they go by `config_for` of their plans.
"""

import argparse
import heapq
import importlib
import importlib.util
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.stages import Compiled

from paxattn.kernels import block_sizes
from scripts.attention import measuring, peers, programs, shapes
from scripts.attention.console import say
from scripts.attention.shapes import Documents, Inputs, Row, Shape

DIMS = ("64", "80", "96", "128", "192/128", "256")
MASKS = ("causal", "full")
WIDTH = 2048  # heads times head dim

# A frozen dataclass of block sizes.
Config = Any


class Problem(NamedTuple):
    """What one entry of the table is for."""

    dims: str  # D, or D/Dv
    mask: str
    deterministic: bool | None = None  # None: the forward

    def __str__(self) -> str:
        head_dim, *v_dim = map(int, self.dims.split("/"))
        return block_sizes.entry_of(head_dim, (v_dim or [head_dim])[0], self.mask == "causal", self.deterministic)

    @property
    def part(self) -> str:
        return "fwd" if self.deterministic is None else "bwd"

    def row(self, tokens: int, length: int) -> Row:
        heads = WIDTH // int(self.dims.split("/")[0])
        shape = Shape.parse(f"B{max(1, tokens // length)} S{length} H{heads} D{self.dims} {self.mask}")
        return Row("fwd" if self.deterministic is None else "fwdbwd", shape)


class Best(NamedTuple):
    config: Config
    ms: float
    tflops: float


def kernels(part: str) -> Any:
    """What plans the forward or backward kernel, with `candidates` and `Config`."""
    return importlib.import_module(f"paxattn.kernels.gpu_flash_{part}_plan")


def candidates(problem: Problem, shape: Shape) -> list[Config]:
    return kernels(problem.part).candidates(shape.dim, shape.v_dim)


def attend(deterministic: bool, **configs: Config) -> shapes.Make:
    """The kernel with block sizes given; None leaves the choice to it."""
    flash = importlib.import_module("paxattn.kernels.gpu_flash")

    def make(shape: Shape) -> shapes.Attend:
        right = 0 if shape.causal else None
        options = flash.Options(None, right, shape.scale, None, deterministic, flash.multiprocessors(), **configs)

        def run(q: Array, k: Array, v: Array, docs: Documents | None) -> Array:
            return flash.attend(options, q, k, v, None, None, None)[0]

        return run

    return make


def kernel(problem: Problem, config: Config, forward: Config | None) -> shapes.Make:
    if problem.deterministic is None:
        return attend(True, forward=config)
    return attend(problem.deterministic, forward=forward, backward=config)


def tune(problems: list[Problem], forwards: dict[Problem, Best], options: argparse.Namespace) -> dict[Problem, Best]:
    """The best config of each problem that has one; `forwards` are those that the backward runs after."""
    rows = {problem: problem.row(options.tokens, options.length) for problem in problems}
    jobs: dict[tuple[Problem, Config], Callable[[], Compiled]] = {}
    for problem, row in rows.items():
        forward = forwards.get(problem._replace(deterministic=None))
        for config in candidates(problem, row.shape):
            make = kernel(problem, config, forward and forward.config)
            jobs[problem, config] = partial(programs.compiled, row, make)
    start = time.perf_counter()
    built = programs.compile_all(jobs, options.threads)
    say(f"compiled {len(jobs)} candidates in {time.perf_counter() - start:.0f} s on {options.threads} threads")
    found = {}
    for problem, row in rows.items():
        mine = {config: one for (whose, config), one in built.items() if whose == problem}
        best = fastest(problem, row, mine, options)
        if best is not None:
            found[problem] = best
    return found


def fastest(
    problem: Problem, row: Row, built: dict[Config, Compiled | str], options: argparse.Namespace
) -> Best | None:
    args = shapes.inputs(row.shape)
    right = checked(row, args, built)
    # All of them once, then the best few with care.
    once = measuring.time_in_turns(right, dict.fromkeys(right, args), 1, 2)
    few = heapq.nsmallest(options.finalists, right, key=lambda config: milliseconds(once[config]))
    chosen = {config: right[config] for config in few}
    times = measuring.time_in_turns(chosen, dict.fromkeys(chosen, args), options.rounds, options.iterations)
    if not times:
        say(f"{problem}: no candidate works")
        return None
    config = min(times, key=lambda config: milliseconds(times[config]))
    ms = milliseconds(times[config])
    best = Best(config, ms, shapes.flops(row) / ms / 1e9)
    say(f"{problem}: {best.tflops:.0f} TFLOP/s with {config} ({len(right)} of {len(built)} candidates)")
    return best


def milliseconds(times: measuring.Times) -> float:
    return times.kernel_ms or times.wall_ms


def checked(row: Row, args: Inputs, built: dict[Config, Compiled | str]) -> dict[Config, Compiled]:
    """Those that compiled and give what cuDNN gives, or XLA where cuDNN declines; says why the others do not count."""
    expected = reference(row)(*args)
    right: dict[Config, Compiled] = {}
    for config, one in built.items():
        note = one if isinstance(one, str) else measuring.check(one, args, expected, row.shape.dtype)[1]
        if isinstance(one, str) or note:
            say(f"  {config}: {note}")
        else:
            right[config] = one
    return right


def reference(row: Row) -> Compiled:
    jobs = {"cudnn": partial(programs.compiled, row, peers.cudnn)}
    served = programs.compile_all(jobs, 1)["cudnn"]
    return programs.compiled(row, peers.ours("xla")) if isinstance(served, str) else served


def write(path: Path, found: dict[Problem, Best], options: argparse.Namespace) -> None:
    """Replace what was measured now and keep the rest."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    table = {part: dict(before.get(part, {})) for part in ("fwd", "bwd")}
    for problem, best in found.items():
        figures = dict(config=asdict(best.config), ms=round(best.ms, 4), tflops=round(best.tflops, 1))
        table[problem.part][str(problem)] = figures
    about = dict(device=jax.devices()[0].device_kind, jax=jax.__version__, tokens=options.tokens, length=options.length)
    told = {"machine": about, **{part: dict(sorted(entries.items())) for part, entries in table.items()}}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    say(f"wrote {len(found)} entries to {path.name}")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", nargs="+", default=list(DIMS), metavar="D[/DV]", help="default: all")
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=list(MASKS))
    parser.add_argument("--parts", nargs="+", choices=("fwd", "bwd"), default=["fwd", "bwd"])
    parser.add_argument("--tokens", type=int, default=16384, help="in the batch (%(default)s)")
    parser.add_argument("--length", type=int, default=4096, help="of a sequence (%(default)s)")
    parser.add_argument("--finalists", type=int, default=4, help="that take turns (%(default)s)")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="that compile (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: paxattn/kernels/tuned/<device>.json")
    return parser


def main() -> None:
    parser = arguments()
    options = parser.parse_args()
    if not importlib.util.find_spec("paxattn.kernels.gpu_flash"):
        parser.error("this version has no GPU kernel to tune")
    if jax.default_backend() != "gpu":
        parser.error("needs the GPU to tune for")
    path = options.out or block_sizes.table_of(jax.devices()[0].device_kind)
    forwards = [Problem(dims, mask) for dims in options.dims for mask in options.masks]
    backwards = [one._replace(deterministic=order) for one in forwards for order in (True, False)]
    found = {}
    if "fwd" in options.parts:
        found = tune(forwards, {}, options)
        write(path, found, options)
    if "bwd" in options.parts:
        write(path, tune(backwards, found, options), options)


if __name__ == "__main__":
    main()
