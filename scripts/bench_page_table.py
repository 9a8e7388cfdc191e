"""Microseconds of page-table operations inside a jitted loop, and a decode loop's allocation.

python scripts/bench_page_table.py --json bench.json
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from paxattn import PageTable

Body = Callable[[jax.Array, PageTable], PageTable]


def microseconds(body: Body, table: PageTable, steps: int, repeats: int = 5) -> tuple[float, PageTable]:
    """Median time of one step in a fori_loop of them, and the table after the last."""
    loop = jax.jit(lambda table: jax.lax.fori_loop(0, steps, body, table))
    after = jax.block_until_ready(loop(table))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(loop(table))
        times.append(time.perf_counter() - start)
    return statistics.median(times) / steps * 1e6, after


def reserve_one(_: jax.Array, table: PageTable) -> PageTable:
    return table.reserve(table.lens + 1)[0]


def release_and_reserve(rows: int) -> Body:
    """Release `rows` rows, another group each step, and fill them again, so that every step has work."""

    def body(step: jax.Array, table: PageTable) -> PageTable:
        row = jnp.arange(len(table.lens))
        mask = (row - step * rows) % len(row) < rows
        lens = table.lens
        return table.release(mask).reserve(lens)[0]

    return body


def fork(rows: int) -> Body:
    """Fork `rows` rows onto as many others, which releases what those held."""

    def body(step: jax.Array, table: PageTable) -> PageTable:
        src = (jnp.arange(rows) + 2 * rows * step) % len(table.lens)
        return table.fork(src, (src + rows) % len(table.lens))[0]

    return body


def measure(num_pages: int, rows: int, pages_per_seq: int, page_size: int, group: int, steps: int) -> dict[str, float]:
    empty = PageTable.create(num_pages, page_size, rows, pages_per_seq)
    # Lengths that differ, so that in every step some rows need a page; half of the memory.
    mean = num_pages // rows * page_size // 2
    full, ok = jax.jit(PageTable.reserve)(empty, jnp.arange(rows, dtype=jnp.int32) % page_size + mean)
    assert bool(ok.all())
    reserve_us, after = microseconds(reserve_one, full, min(steps, mean // 2))
    assert bool((after.lens == full.lens + min(steps, mean // 2)).all())
    both_us, after = microseconds(release_and_reserve(group), full, steps)
    assert bool((after.lens == full.lens).all())
    assert int(after.num_free) == int(full.num_free)
    fork_us, after = microseconds(fork(group), full, steps)
    assert int(after.num_free) + int((after.owners > 0).sum()) == num_pages
    return {
        "reserve one more token": reserve_us,
        f"release {group} rows": both_us - reserve_us,
        f"fork {group} rows": fork_us,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=131072)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--pages-per-seq", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    results = {
        width: measure(options.pages, options.rows, width, options.page_size, options.group, options.steps)
        for width in options.pages_per_seq
    }
    table = Table("microseconds", *(f"M = {width}" for width in results))
    for name in next(iter(results.values())):
        table.add_row(name, *(f"{times[name]:.1f}" for times in results.values()))
    Console().print(table)
    if options.json:
        machine = dict(device=str(jax.devices()[0]), jax=jax.__version__)
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
