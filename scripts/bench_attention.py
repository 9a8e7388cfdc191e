"""TFLOP/s of flash_attention beside cuDNN (through jax.nn) and, where installed, FlashAttention-3, jla and tokamax.

python scripts/bench_attention.py --json bench.json                         # the 12 forward and 5 fwd+bwd anchors
python scripts/bench_attention.py --suite ragged small                      # odd lengths, packed documents, a window
python scripts/bench_attention.py --suite sweep --plot sweep.png            # over sequence length
python scripts/bench_attention.py --shapes "B2 T1 S8192 H32/8 D128 causal" "S16384 H16 D192/128 docs16" --passes fwd
python scripts/bench_attention.py --quick                                   # tiny shapes; runs on a CPU, too

A shape is B, S, H (query/key heads) and D (key/value head dim), then as needed T (if not S), causal or full, window1024
(the query's own key and the 1023 before it), docs16 (so many packed documents of uneven length) and bf16, f16 or f32.

Every kernel is checked first, against cuDNN in the same run or, where cuDNN does not serve the call, against
implementation="xla"; a wrong one is reported and not timed. The kernels of a shape then take turns, several rounds of
them, and the figure is the median of their time on the GPU as CUPTI tells it (wall time where there is no GPU).
CUPTI counts kernels alone: not the gaps between them, nor a memset.

FLOPs: 2 (D + Dv) for each query and key that it sees; causal with T = S counts half of T x S, windows and documents
count what they leave; fwd+bwd counts 3.5 times the forward. The peers, where they are not what pip installs by itself:
flash_attn3_jax, jax_linear_attention and tokamax (its profiler xprof is not needed).
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import time
from pathlib import Path

import jax
from rich.console import Console

from scripts.attention.console import say
from scripts.attention.measuring import Result, measure
from scripts.attention.peers import PEERS, peers_here
from scripts.attention.programs import compile_kernels, compile_references
from scripts.attention.shapes import ANY_ORDER, CUDNN, OURS, PASSES, SUITES, SWEEP, Row, Shape, rows_of
from scripts.attention.telling import draw, machine, say_notes, say_row, say_summary, table, write_json


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what is measured")
    what.add_argument("--shapes", nargs="+", default=[], metavar="SHAPE")
    what.add_argument(
        "--suite", nargs="+", choices=SUITES, default=[], help="default: anchors, unless --shapes is given"
    )
    what.add_argument("--sweep", action="store_true", help="the same as --suite sweep")
    what.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    what.add_argument("--implementation", help="ours; default: mosaic_gpu on a GPU, xla elsewhere")
    what.add_argument(
        "--reference", choices=(CUDNN, "xla", "reference"), help="default: cuDNN, or xla where it declines"
    )
    what.add_argument("--no-peers", action="store_true", help="ours alone, and cuDNN to check against")
    how = parser.add_argument_group("how")
    how.add_argument("--rounds", type=int, default=4, help="turns of each kernel (%(default)s)")
    how.add_argument("--iterations", type=int, default=4, help="calls in a turn, after a warm-up (%(default)s)")
    how.add_argument("--threads", type=int, default=os.cpu_count(), help="that compile (%(default)s)")
    how.add_argument("--quick", action="store_true", help="--suite smoke, one round")
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="rewritten after each row")
    output.add_argument("--plot", type=Path, metavar="FILE", help="TFLOP/s over sequence length (needs matplotlib)")
    return parser


def completed(options: argparse.Namespace) -> argparse.Namespace:
    options.suite += ["sweep"] if options.sweep else []
    if options.quick:
        options.suite, options.rounds = ["smoke"], 1
    if not (options.suite or options.shapes):
        options.suite = ["anchors"]
    options.implementation = options.implementation or ("mosaic_gpu" if jax.default_backend() == "gpu" else "xla")
    if min(options.rounds, options.iterations, options.threads) < 1:
        raise ValueError("--rounds, --iterations, --threads: must be at least 1")
    for name in ("json", "plot"):
        path = getattr(options, name)
        if path and not path.parent.is_dir():
            raise ValueError(f"--{name}: {path.parent} is no folder")
    if options.plot and not importlib.util.find_spec("matplotlib"):
        raise ValueError("--plot: needs matplotlib, which is not installed")
    return options


def run(options: argparse.Namespace, rows: list[Row]) -> list[Result]:
    say(", ".join(f"{name} {value}" for name, value in machine().items()))
    peers = [name for name in peers_here() if not options.no_peers or name == CUDNN]
    programs = compile_kernels(rows, options.implementation, peers, options.threads)
    references = compile_references(programs, options.implementation, options.reference, options.threads)
    results: list[Result] = []
    for row in rows:
        results.append(measure(row, programs[row], references[row], options))
        say_row(results[-1])
        if options.json:
            write_json(options.json, results, options)
    return results


def main() -> int:
    parser = arguments()
    options = parser.parse_args()
    try:
        options = completed(options)
        rows = rows_of(options.suite, options.shapes, options.passes)
    except ValueError as error:
        parser.error(str(error))
    start = time.perf_counter()
    results = run(options, rows)
    names = [name for name in (OURS, ANY_ORDER, *PEERS) if any(r.rate(name) for r in results)]
    console = Console(width=None if sys.stdout.isatty() else 170)
    console.print(table(results, names))
    say_summary(results, options.suite, console)
    say_notes(results)
    say(f"done in {time.perf_counter() - start:.0f} s")
    if options.plot:
        sweep = {Shape.parse(text) for text in SWEEP} if "sweep" in options.suite else {row.shape for row in rows}
        draw([r for r in results if r.row.shape in sweep], names, options.plot)
    mine = [one for r in results for name, one in r.figures.items() if name in (OURS, ANY_ORDER)]
    return int(any(one.tflops is None for one in mine))


if __name__ == "__main__":
    sys.exit(main())
