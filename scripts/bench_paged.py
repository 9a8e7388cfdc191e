"""GB/s of keys and values that a call of paged_attention reads, beside cuDNN, FlashAttention-3, Triton and XLA.

python scripts/bench_paged.py --json bench.json                                  # the 8 anchors
python scripts/bench_paged.py --suite rows groups dims pages skew compressed prefill prefix
python scripts/bench_paged.py --shapes "131072+63x512 H32/8 D128 page16" "64x1..8192 H32/8 D128 page64 int8"
python scripts/bench_paged.py --quick                                            # tiny; runs on a CPU, too

A shape is a sum of row lengths (64x2048: so many rows; 1..8192: drawn between these; 512@2048: with 512 queries, the
last of them, instead of one), query/key heads, the head dim, the page size and, if not bf16, the dtype of the pages;
prefix4096 has all rows begin with the same pages of so many tokens, which are then counted once. Of calls with rows of
several queries TFLOP/s are told, not GB/s. Pages lie in random order. Every kernel is checked
against implementation="xla" in the same run; a wrong one is reported and not timed. The kernels of a shape then take
turns, and the figure is the median of all that a call runs on the GPU as CUPTI tells it (wall time where there is no
GPU). "read" is the rate at which XLA sums up 2 GiB in the same run. With --cold each call comes behind a sum of 512
MiB, whose time is taken off: as in a model, the cache holds nothing of the call before, nor has it that to write back.

The peers, where they are not what pip installs by itself: flash_attn3_jax.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.stages import Compiled
from rich.console import Console
from rich.table import Table

from scripts.attention.console import say
from scripts.attention.measuring import relative_errors, time_in_turns
from scripts.attention.programs import compile_all
from scripts.attention.telling import command, machine
from scripts.paged.peers import OURS, PEERS, PREPARED, UNTOLD, Make, paged, untold
from scripts.paged.shapes import SUITES, Shape, inputs

WRONG = 0.02  # relative error that no rounding explains
READ_BYTES = 2**31
OTHER_BYTES = 2**29


@dataclass(frozen=True)
class Figure:
    """Of one kernel on one shape; where `note` says why, there are no times."""

    kernel_ms: float | None = None
    wall_ms: float | None = None
    gbs: float | None = None
    tflops: float | None = None
    error: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Result:
    shape: Shape
    figures: dict[str, Figure]

    def rate(self, name: str) -> float | None:
        """GB/s, or TFLOP/s where rows have several queries."""
        one = self.figures.get(name, Figure())
        return one.gbs if self.shape.decodes else one.tflops

    @property
    def over_best_peer(self) -> float | None:
        best = max((rate for name in PEERS if (rate := self.rate(name))), default=None)
        mine = self.rate(OURS)
        return mine / best if mine and best else None


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=[], metavar="SHAPE")
    parser.add_argument(
        "--suite", nargs="+", choices=SUITES, default=[], help="default: anchors, unless --shapes is given"
    )
    parser.add_argument("--implementation", help="ours; default: mosaic_gpu on a GPU, xla elsewhere")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--cold", action="store_true", help="with nothing of the call before in the cache")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each kernel (%(default)s)")
    parser.add_argument("--iterations", type=int, default=5, help="calls in a turn, after a warm-up (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="--suite smoke, one round")
    parser.add_argument("--json", type=Path, metavar="FILE", help="rewritten after each row")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="GB/s by shape (needs matplotlib)")
    return parser


def completed(options: argparse.Namespace) -> argparse.Namespace:
    if options.quick:
        options.suite, options.rounds = ["smoke"], 1
    if not (options.suite or options.shapes):
        options.suite = ["anchors"]
    options.implementation = options.implementation or ("mosaic_gpu" if jax.default_backend() == "gpu" else "xla")
    if min(options.rounds, options.iterations) < 1:
        raise ValueError("--rounds, --iterations: must be at least 1")
    return options


def measure(shape: Shape, makes: dict[str, Make], options: argparse.Namespace) -> Result:
    x = inputs(shape)
    given: dict[str, tuple[Any, jax.Array | None]] = {}
    other = jnp.ones(OTHER_BYTES // 2, jnp.bfloat16) if options.cold else None

    def compiled(name: str, make: Make) -> Compiled:
        step = make(shape)
        given[name] = (PREPARED[name](shape, x) if name in PREPARED else x), other
        return jax.jit(behind_a_sum(step)).lower(*given[name]).compile()

    programs = compile_all({name: partial(compiled, name, make) for name, make in makes.items()}, 4)
    expected = paged("xla")(shape)(x)
    checked = {name: check(one, given.get(name, ()), expected) for name, one in programs.items()}
    right = {name: one for name, one in programs.items() if isinstance(one, Compiled) and not checked[name].note}
    times = time_in_turns(right, {name: given[name] for name in right}, options.rounds, options.iterations)
    sum_ms = 0.0 if other is None else of_a_sum(other, options)
    for name, one in times.items():
        kernel_ms, wall_ms = one.kernel_ms and one.kernel_ms - sum_ms, one.wall_ms - sum_ms
        ms = kernel_ms or wall_ms
        rates = shape.bytes_read / ms / 1e6, shape.flops / ms / 1e9
        checked[name] = Figure(kernel_ms, wall_ms, *rates, checked[name].error)
    return Result(shape, checked)


def behind_a_sum(step: Callable[[Any], jax.Array]) -> Callable[..., tuple[jax.Array, jax.Array | None]]:
    """The step, on the device after the sum of something else, if there is any."""

    def both(given: Any, other: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        if other is None:
            return step(given), None
        given, total = jax.lax.optimization_barrier((given, other.astype(jnp.float32).sum()))
        return step(given), total

    return both


def of_a_sum(x: jax.Array, options: argparse.Namespace) -> float:
    """ms that it takes."""
    total = jax.jit(lambda x: x.astype(jnp.float32).sum()).lower(x).compile()
    times = time_in_turns({"sum": total}, {"sum": (x,)}, options.rounds, options.iterations)["sum"]
    return times.kernel_ms or times.wall_ms


def check(program: Compiled | str, given: tuple[Any, ...], expected: jax.Array) -> Figure:
    if isinstance(program, str):
        return Figure(note=f"declines: {program}")
    error = float(relative_errors((program(*given)[0],), (expected,))[0])
    return Figure(error=error, note="" if error <= WRONG else f"wrong: {error:.1e}")


def read_rate(options: argparse.Namespace) -> float:
    """GB/s."""
    x = jnp.ones(READ_BYTES // 2 if jax.default_backend() == "gpu" else 2**20, jnp.bfloat16)
    return x.nbytes / of_a_sum(x, options) / 1e6


def say_result(result: Result) -> None:
    told = [str(result.shape)]
    for name, one in result.figures.items():
        if rate := result.rate(name):
            told.append(f"{name} {rate:.4g} ({one.kernel_ms or one.wall_ms:.4g} ms, err {one.error:.0e})")
        elif name == OURS or not one.note.startswith("declines"):
            told.append(f"{name} {one.note}")
    say(" | ".join(told))


def table(results: list[Result], names: list[str], read: float) -> Table:
    told = Table("GB/s (TFLOP/s of chunks)", *names, "ours / best peer", "ours / read")
    for one in results:
        rates = (f"{rate:.4g}" if (rate := one.rate(name)) else "-" for name in names)
        mine = one.rate(OURS)
        shares = one.over_best_peer, mine / read if mine and one.shape.decodes else None
        told.add_row(str(one.shape), *rates, *(f"{x:.3f}" if x else "-" for x in shares))
    return told


def write_json(path: Path, results: list[Result], read: float) -> None:
    rows = [
        dict(
            shape=str(one.shape),
            bytes_read=one.shape.bytes_read,
            kernels={name: asdict(figure) for name, figure in one.figures.items()},
            over_best_peer=one.over_best_peer,
            over_read=(one.figures[OURS].gbs or 0) / read,
        )
        for one in results
    ]
    told = dict(machine=machine(), command=command("bench_paged.py", sys.argv[1:]), read_gbs=read, rows=rows)
    path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def draw(results: list[Result], names: list[str], read: float, path: Path) -> None:
    """A group of bars a shape, a bar a kernel."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(1.4 * len(results) + 2, 4.2), layout="constrained")
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        places = [row + width * index for row in range(len(results))]
        panel.bar(places, [one.rate(name) or 0 for one in results], width, label=name)
    panel.axhline(read, color="black", linewidth=1, linestyle="--", label="read")
    middles = [row + (width * len(names) - width) / 2 for row in range(len(results))]
    panel.set_xticks(middles, [str(one.shape).replace(" ", "\n") for one in results], fontsize=7)
    panel.set(ylabel="GB/s of keys and values")
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=len(names) + 1)
    panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(machine()["device"])
    figure.savefig(path, dpi=110)


def say_summary(results: list[Result]) -> None:
    ratios = {str(one.shape): one.over_best_peer for one in results if one.over_best_peer}
    if ratios:
        lowest = min(ratios, key=lambda row: ratios[row] or 0)
        mean = math.exp(statistics.fmean(math.log(x) for x in ratios.values() if x))
        say(f"over the best peer: geometric mean {mean:.3f}, lowest {ratios[lowest]:.3f} ({lowest})")


def main() -> int:
    parser = arguments()
    options = parser.parse_args()
    try:
        options = completed(options)
        texts = [text for suite in options.suite for text in SUITES[suite]] + options.shapes
        shapes = [Shape.parse(text) for text in texts]
    except ValueError as error:
        parser.error(str(error))
    say(", ".join(f"{name} {value}" for name, value in machine().items()))
    makes = {OURS: paged(options.implementation)} | ({} if options.no_peers else PEERS)
    if any(shape.prefix for shape in shapes):
        makes[UNTOLD] = untold(options.implementation)
    read = read_rate(options)
    say(f"read {read:.0f} GB/s")
    results: list[Result] = []
    for shape in shapes:
        results.append(measure(shape, makes, options))
        say_result(results[-1])
        if options.json:
            write_json(options.json, results, read)
    names = [name for name in makes if any(one.rate(name) for one in results)]
    Console(width=None if sys.stdout.isatty() else 150).print(table(results, names, read))
    say_summary(results)
    if options.plot:
        draw(results, names, read, options.plot)
    return int(any(one.rate(OURS) is None for one in results))


if __name__ == "__main__":
    sys.exit(main())
