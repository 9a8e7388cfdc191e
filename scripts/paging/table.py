"""The figures of a comparison as text."""

from scripts.paging.timeline import STATES, Timeline


def report(timelines: dict[str, Timeline]) -> None:
    columns = ("of memory:", *STATES, "used of owned", "running", "steps", "preempted")
    print(("{:10}" + "{:>10}" * 5 + "{:>15}{:>9}{:>9}{:>11}").format(*columns))
    for name, timeline in timelines.items():
        figures = timeline.figures()
        print(
            f"{name:10}"
            + "".join(f"{figures[state]:10.1%}" for state in STATES)
            + f"{figures['used_of_owned']:15.1%}{figures['running']:9.1f}"
            + f"{figures['steps']:9}{figures['preempted']:11}"
        )
    if not any(timeline.waiting.any() for timeline in timelines.values()):
        print("No request ever waited: this memory holds them all at once, and the figures say little.")
