"""Statistics of an engine, gathered as loops are launched and looked at."""

import time
from dataclasses import replace
from typing import Any

from paxattn.engine.records import Stats


class Meter:
    """Keeps `stats`, which are replaced."""

    def __init__(self, num_pages: int):
        self.stats = Stats(num_pages=num_pages, num_free=num_pages)
        # When the device was last known to be at work; None = it has nothing to do.
        self._at_work: float | None = None

    def launch(self, start: float, under_way: bool) -> None:
        """A loop was enqueued from `start` on; where none was under way any more, the device may have waited for it."""
        if self._at_work is not None and not under_way:
            self.stats = replace(self.stats, host_gap=self.stats.host_gap + start - self._at_work)
        # From now on and not from `start`: where calls are not asynchronous, the loop has run meanwhile.
        self._at_work = time.perf_counter()

    def rest(self) -> None:
        """There is nothing to do."""
        self._at_work = None

    def land(self, start: float, waited: bool, news: Any) -> None:
        """A loop that was launched at `start` has been looked at, and the host had to wait for its end or not."""
        now, stats = time.perf_counter(), self.stats
        self._at_work = now if waited else self._at_work
        self.stats = replace(
            stats,
            num_free=int(news.num_free),
            num_shared=int(news.num_shared),
            stored=int(news.lens.sum()),
            steps=stats.steps + int(news.steps),
            seconds=stats.seconds + now - max(start, stats.last),
            last=now,
        )
