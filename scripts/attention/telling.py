"""What is said of the results: rows, tables, ratios, JSON and a plot."""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import math
import platform
import re
import shlex
import statistics
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

import paxattn
from scripts.attention.console import say
from scripts.attention.measuring import Figure, Result
from scripts.attention.shapes import ANY_ORDER, COMPARISONS, OURS, PASSES, Row, Shape, flops, rows_of


def say_row(result: Result) -> None:
    told = [f"{result.row}"]
    for name, one in result.figures.items():
        if one.tflops is not None:
            ms = one.kernel_ms or one.wall_ms
            worst = max(one.errors.values(), default=0.0)
            told.append(f"{name} {number(one.tflops)} ({ms:.4g} ms, err {worst:.0e})")
        elif not one.note.startswith("declines") or name in (OURS, ANY_ORDER):
            told.append(f"{name} {one.note}")
    say(" | ".join(told))


def number(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"


def table(results: list[Result], names: list[str]) -> Table:
    told = Table("TFLOP/s", *names, "ours / best peer", "any order / best peer")
    for result in results:
        cells = []
        for name in names:
            one = result.figures.get(name, Figure())
            cells.append("wrong" if one.note.startswith("wrong") else number(one.tflops) if one.tflops else "-")
        ratios = (result.ratio(name) for name in (OURS, ANY_ORDER))
        told.add_row(str(result.row), *cells, *(f"{x:.3f}" if x else "-" for x in ratios))
    return told


def summary(results: list[Result], suites: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Geometric mean and lowest of ours over the best peer, over the rows of each pass of each suite."""
    groups = {"fwd": ("fwd", OURS), "fwd+bwd": ("fwdbwd", OURS), "fwd+bwd, any order": ("fwdbwd", ANY_ORDER)}
    told = {}
    for suite in suites:
        rows = set(rows_of([suite], []))
        for title, (mode, name) in groups.items():
            mine = [r for r in results if r.row in rows and r.row.mode == mode]
            ratios = {str(r.row): ratio for r in mine if (ratio := r.ratio(name))}
            if ratios:
                told[f"{suite}, {title}"] = mean_and_lowest(ratios)
    return told


def mean_and_lowest(ratios: dict[str, float]) -> dict[str, Any]:
    lowest = min(ratios, key=lambda row: ratios[row])
    mean = math.exp(statistics.fmean(map(math.log, ratios.values())))
    return dict(rows=len(ratios), geometric_mean=mean, lowest=ratios[lowest], lowest_row=lowest)


def comparisons(results: list[Result]) -> list[dict[str, Any]]:
    by_row = {result.row: result for result in results}
    told = []
    for one in COMPARISONS:
        for mode in PASSES:
            rows = [by_row.get(Row(mode, Shape.parse(text))) for text in (one.shape, one.base)]
            for name in (OURS, ANY_ORDER):
                mine, base = rows[0] and rows[0].rate(name), rows[1] and rows[1].rate(one.beside or name)
                if mine and base:
                    told.append(dict(one._asdict(), mode=mode, kernel=name, ratio=mine / base))
    return told


def say_summary(results: list[Result], suites: Iterable[str], console: Console) -> None:
    for title, one in summary(results, suites).items():
        say(
            f"ours / best peer, {title}: geometric mean {one['geometric_mean']:.3f} over {one['rows']} rows, "
            f"lowest {one['lowest']:.3f} ({one['lowest_row']})"
        )
    ratios = Table("rate of", "on", "over that", "ratio", "at least")
    for told in comparisons(results):
        base = f"of {told['beside']}" if told["beside"] else f"on {told['base']}"
        kernel = f"{told['kernel']}, {told['mode']}"
        ratios.add_row(kernel, told["shape"], base, f"{told['ratio']:.3f}", f"{told['least']:.2f}")
    if ratios.row_count:
        console.print(ratios)


def say_notes(results: list[Result]) -> None:
    notes: dict[str, list[str]] = {}
    for result in results:
        for name, one in result.figures.items():
            if one.note:
                notes.setdefault(f"{name}: {one.note}", []).append(str(result.row))
    for note, rows in notes.items():
        say(f"{note}  [{rows[0]}{f' and {len(rows) - 1} more' if rows[1:] else ''}]")


def machine() -> dict[str, str]:
    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")
    about = dict(device=device.device_kind, platform=" ".join(device.client.platform_version.split()))
    about |= dict(processor=platform.processor() or platform.machine(), python=platform.python_version())
    for name in (*packages, "flash-attn3-jax", "jax-linear-attention", "tokamax"):
        try:
            about[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return about | {"paxattn": paxattn.__version__}


def command(script: str, words: list[str]) -> str:
    """As typed, without the names of the files it writes."""
    output = [i for i, word in enumerate(words) if re.match("--(json|plot)", word)]
    output += [i + 1 for i in output if "=" not in words[i]]
    kept = [shlex.quote(word) for i, word in enumerate(words) if i not in output]
    return " ".join([f"python scripts/{script}", *kept])


def write_json(path: Path, results: list[Result], options: argparse.Namespace) -> None:
    rows = [
        {
            "pass": one.row.mode,
            "shape": str(one.row.shape),
            "flops": flops(one.row),
            "reference": one.reference,
            "kernels": {name: asdict(figure) for name, figure in one.figures.items()},
            "over_best_peer": {name: one.ratio(name) for name in (OURS, ANY_ORDER)},
        }
        for one in results
    ]
    told = {
        "machine": machine(),
        "command": command("bench_attention.py", sys.argv[1:]),
        "rounds": options.rounds,
        "iterations": options.iterations,
        "rows": rows,
        "summary": summary(results, options.suite),
        "comparisons": comparisons(results),
    }
    path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def draw(results: list[Result], names: list[str], path: Path) -> None:
    """TFLOP/s over sequence length, a panel a pass, a line a kernel."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    modes = [mode for mode in PASSES if any(r.row.mode == mode for r in results)]
    figure, axes = plt.subplots(1, len(modes), figsize=(6 * len(modes), 4.2), squeeze=False, layout="constrained")
    for mode, panel in zip(modes, axes[0], strict=True):
        for index, name in enumerate(names):
            points = [(r.row.shape.kv_len, rate) for r in results if r.row.mode == mode and (rate := r.rate(name))]
            style = dict(linewidth=2.2, zorder=3) if name in (OURS, ANY_ORDER) else dict(linewidth=1.2, linestyle="--")
            if points:
                panel.plot(*zip(*sorted(points), strict=True), marker="o", color=f"C{index}", label=name, **style)
        lengths = sorted({r.row.shape.kv_len for r in results})
        panel.set_xscale("log", base=2)
        panel.set_xticks(lengths, map(str, lengths))
        panel.set(title="forward" if mode == "fwd" else "forward + backward", xlabel="sequence length")
        panel.set(ylabel="TFLOP/s", ylim=(0, None))
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(machine()["device"])
    figure.savefig(path, dpi=110)
