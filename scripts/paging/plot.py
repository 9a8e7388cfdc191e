"""The picture of a comparison."""

from pathlib import Path
from typing import Any

import numpy as np

from scripts.paging.timeline import STATES, Timeline

COLOURS = ("#2a9d55", "#8ecae6", "#e76f51", "#6d597a", "#d9d9d9")


def draw(timelines: dict[str, Timeline], title: str, path: Path) -> None:
    """Where memory goes, as Figure 2 of Kwon et al. 2023, and requests running and effective use over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplot_mosaic("ab;ac", width_ratios=[1.15, 1])
    draw_shares(axes["a"], timelines)
    for name, timeline in timelines.items():
        style: Any = dict(label=name, linewidth=1, linestyle="--" if name == "blockwise" else "-")
        axes["b"].plot(*binned(timeline.running), **style)
        axes["c"].plot(*binned(100 * timeline.states[:, 0] / timeline.states[0].sum()), **style)
    axes["b"].set(ylabel="requests running", ylim=(0, None))
    axes["b"].legend(fontsize=8, frameon=False)
    axes["c"].set(ylabel="effective use, %", xlabel="step (one token for each running request)", ylim=(0, 100))
    for one in axes.values():
        one.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def draw_shares(axes: Any, timelines: dict[str, Timeline]) -> None:
    bottom = np.zeros(len(timelines))
    shares = [timeline.shares() for timeline in timelines.values()]
    for state, colour in zip(STATES, COLOURS, strict=True):
        heights = np.array([100 * share[state] for share in shares])
        drawn = axes.bar(list(timelines), heights, bottom=bottom, label=state, color=colour)
        axes.bar_label(drawn, [f"{h:.1f}" if h > 2.5 else "" for h in heights], label_type="center", fontsize=8)
        bottom += heights
    axes.set(ylabel="share of KV memory, %", ylim=(0, 100))
    axes.legend(ncols=len(STATES), loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False, fontsize=8)


def binned(values: np.ndarray, bins: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Means over equal stretches of time: (their middles, the means)."""
    edges = np.unique(np.linspace(0, len(values), bins + 1).astype(int))
    return (edges[:-1] + edges[1:]) / 2, np.add.reduceat(values, edges[:-1]) / np.diff(edges)
