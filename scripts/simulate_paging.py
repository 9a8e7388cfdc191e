"""How the memory of a KV cache is managed, and what that is worth. NumPy alone; no model is run.

python scripts/simulate_paging.py --steps                                # page tables, step by step
python scripts/simulate_paging.py --lengths sharegpt --png paging.png    # the paper's setting, five schemes
python scripts/simulate_paging.py --trace requests.csv --json out.json   # the same on a trace of your own

All requests wait from the start and are admitted first come, first served, as soon as memory allows; every running
request gains one token a step. Five ways to give them memory are compared:

  max        one stretch of --max-len tokens each, whatever the request will need
  pow2       one stretch for the prompt and the next power of two of the output
  oracle     one stretch of the true length, as if it were known
  blockwise  a fixed row of --max-len tokens in blocks of 128, as in paxattn.BlockwiseKV
  paged      pages of --page-size tokens, taken as the request grows; where none is left, the latest request
             gives way and is computed again later

max, pow2 and oracle take their stretch from a real allocator over one range of addresses (--allocator). They follow
Orca (Max), (Pow2) and (Oracle) of Kwon et al., "Efficient Memory Management for Large Language Model Serving with
PagedAttention", SOSP 2023; paged follows vLLM.

At each step a token of memory is in one of five states:

  used       it holds a key and a value
  reserved   its request will fill it later
  internal   it belongs to a request that will never fill it
  external   free, and all that is free would do for the next request, but it lies in pieces
  free       free, and too little for the next request (paged admits none into the last 1% of the pages)

Effective use is used / memory, the mean over the steps in which a request waits.
"""

import argparse
import importlib.util
import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from scripts.paging.allocators import ALLOCATORS
from scripts.paging.lengths import COLUMNS, LENGTHS, Requests, is_positive, read_trace
from scripts.paging.plot import draw
from scripts.paging.schemes import Setting, compare
from scripts.paging.table import report
from scripts.paging.timeline import Timeline
from scripts.paging.tour import show_steps

PAPER_MEMORY = 15728  # tokens: 12 GiB at the 800 KiB a token of OPT-13B in float16 (Table 1: 15.7K)


def main() -> None:
    parser = arguments()
    options = parser.parse_args()
    if options.steps:
        show_steps()
        return
    try:
        run(options)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", action="store_true", help="tell a small example step by step, and no more")
    work = parser.add_argument_group("requests")
    source = work.add_mutually_exclusive_group()
    source.add_argument("--trace", type=Path, metavar="FILE", help=f"CSV with the columns {' and '.join(COLUMNS)}")
    source.add_argument("--lengths", choices=LENGTHS, default="azure", help="where there is no trace (%(default)s)")
    work.add_argument("--requests", type=positive, metavar="N", help="how many (all of the trace; 5000 without one)")
    work.add_argument("--seed", type=seed, default=0, help="of the drawn lengths (%(default)s)")
    memory = parser.add_argument_group("memory, in tokens")
    memory.add_argument("--memory", type=positive, default=PAPER_MEMORY, help="%(default)s: OPT-13B on an A100 40GB")
    memory.add_argument(
        "--max-len",
        type=length,
        default=2048,
        metavar="N",
        help="where requests are cut; longest = nowhere (%(default)s)",
    )
    memory.add_argument("--page-size", type=positive, default=16, help="%(default)s")
    memory.add_argument("--allocator", choices=ALLOCATORS, default="buddy", help="of max, pow2, oracle (%(default)s)")
    output = parser.add_argument_group("output")
    output.add_argument("--png", type=Path, metavar="FILE", help="draw it (needs matplotlib)")
    output.add_argument("--json", type=Path, metavar="FILE", help="write the settings and figures")
    return parser


def positive(text: str) -> int:
    if not is_positive(text):
        raise argparse.ArgumentTypeError(f"{text!r}: must be an integer from 1 to 999999999")
    return int(text)


def length(text: str) -> int | None:
    """A length that a prompt and an output fit in, or None for the longest request's."""
    if text == "longest":
        return None
    if not is_positive(text) or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r}: must be an integer of at least 2, or longest")
    return int(text)


def seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: must be an integer of at least 0")
    return int(text)


def run(options: argparse.Namespace) -> None:
    check_outputs(options)
    requests = requests_of(options)
    max_len = options.max_len or int(requests.total.max())
    setting = Setting(max_len, options.page_size, options.memory, options.allocator)
    requests = requests.cut(max_len)
    said = describe(requests, setting)
    print(said + "\n")
    start = time.perf_counter()
    timelines = compare(requests, setting)
    report(timelines)
    print(f"\nsimulated in {time.perf_counter() - start:.1f} s")
    if options.json:
        write_json(options.json, requests, setting, timelines)
    if options.png:
        draw(timelines, said, options.png)


def check_outputs(options: argparse.Namespace) -> None:
    """Before anything is simulated.

    Raises:
      ValueError: a file could not be written; the message names the option.
    """
    for name in ("png", "json"):
        path = getattr(options, name)
        if path and not path.parent.is_dir():
            raise ValueError(f"--{name}: {path.parent} is no folder")
    if options.png and not importlib.util.find_spec("matplotlib"):
        raise ValueError("--png: needs matplotlib, which is not installed")


def requests_of(options: argparse.Namespace) -> Requests:
    if options.trace:
        return read_trace(options.trace, options.requests)
    return LENGTHS[options.lengths](options.requests or 5000, np.random.default_rng(options.seed))


def describe(requests: Requests, setting: Setting) -> str:
    return (
        f"{len(requests)} requests, {requests.source}\n"
        f"cut at {setting.max_len} tokens: "
        f"prompt mean {requests.prompt.mean():.0f}, output mean {requests.output.mean():.0f}; "
        f"memory {setting.memory} tokens, pages of {setting.page_size}, {setting.allocator}"
    )


def write_json(path: Path, requests: Requests, setting: Setting, timelines: dict[str, Timeline]) -> None:
    figures = {name: timeline.figures() for name, timeline in timelines.items()}
    about = dict(source=requests.source, requests=len(requests), **asdict(setting))
    path.write_text(json.dumps(dict(**about, schemes=figures), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
