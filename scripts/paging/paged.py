"""Requests that take pages as they grow."""

from collections import deque

import numpy as np

from scripts.paging.lengths import Requests
from scripts.paging.pool import PagePool
from scripts.paging.timeline import Timeline

WATERMARK = 0.01  # of the pages stay free at an admission, so that it does not cost a preemption soon; vLLM's default


def simulate_paged(requests: Requests, pool: PagePool, memory: int, stride: int | None = None) -> Timeline:
    """Requests take pages as they grow.

    As in vLLM, running requests are served before waiting ones, and where one finds no page the latest gives way: it
    loses its pages, goes to the head of the queue and has its keys and values computed again when it is back.

    Time runs in intervals in which no request ends and no page is missing, of at most `stride` steps.
    """
    run, pieces = _Run(requests, pool), []
    while run.waiting or run.running:
        run.finish()
        # A request that gave way must not come back in the same step, or it would give way again.
        if run.make_room():
            run.admit()
        if not run.running:
            break
        pieces.append(run.advance(memory, stride))
    return Timeline.of(pieces, run.preempted, run.recomputed)


class _Run:
    def __init__(self, requests: Requests, pool: PagePool) -> None:
        self.pool = pool
        self.total = requests.total
        self.held = requests.prompt.tolist()  # tokens that a request starts with: more after a preemption
        self.waiting = deque(range(len(requests)))
        self.running: list[int] = []  # in order of arrival: the last is the latest
        self.preempted = self.recomputed = 0

    def finish(self) -> None:
        done = [i for i in self.running if self.pool.lens[i] == self.total[i]]
        self.pool.release(done)
        self.running = [i for i in self.running if i not in done]

    def make_room(self) -> bool:
        """The latest requests give way until the others can grow by a token; True where all could stay."""
        before = self.preempted
        while self.needed() > self.pool.num_free:
            self.preempt()
        return self.preempted == before

    def needed(self) -> int:
        """Pages for one more token of each request that is running."""
        pool = self.pool
        return sum(pool.pages(pool.lens[i] + 1) - len(pool.rows[i]) for i in self.running)

    def preempt(self) -> None:
        victim = self.running.pop()
        self.held[victim] = self.pool.lens[victim]
        self.pool.release([victim])
        self.waiting.appendleft(victim)
        self.preempted += 1
        self.recomputed += self.held[victim]

    def admit(self) -> None:
        kept = int(WATERMARK * len(self.pool.owners)) if self.running else 0
        left = self.pool.num_free - self.needed() - kept
        while self.waiting and (pages := self.pool.pages(self.held[self.waiting[0]] + 1)) <= left:
            i = self.waiting.popleft()
            self.running.append(i)
            self.pool.reserve(i, self.held[i])
            left -= pages

    def advance(self, memory: int, stride: int | None) -> np.ndarray:
        """The steps until a request ends or pages run out: [steps, 7], as in Timeline.of."""
        lens = np.array([self.pool.lens[i] for i in self.running])
        tokens = self.lengths_ahead(lens, stride)
        piece = self.states(tokens, memory)
        for i, length in zip(self.running, tokens[-1].tolist(), strict=True):
            self.pool.reserve(i, length)
        return piece

    def lengths_ahead(self, lens: np.ndarray, stride: int | None) -> np.ndarray:
        """The running requests' lengths after each step: [steps, requests]."""
        steps = int((self.total[self.running] - lens).min())
        tokens = lens + np.arange(1, min(steps, stride or steps) + 1)[:, None]
        owned = sum(len(self.pool.rows[i]) for i in self.running)
        more = (-(-tokens // self.pool.page_size)).sum(axis=1) - owned
        return tokens[: int(np.searchsorted(more, self.pool.num_free, side="right"))]

    def states(self, tokens: np.ndarray, memory: int) -> np.ndarray:
        room = -(-tokens // self.pool.page_size) * self.pool.page_size
        will = np.minimum(room, self.total[self.running])
        piece = np.zeros((len(tokens), 7), np.int64)
        piece[:, 0] = tokens.sum(axis=1)
        piece[:, 1] = (will - tokens).sum(axis=1)
        piece[:, 2] = (room - will).sum(axis=1)
        piece[:, 4] = memory - room.sum(axis=1)
        piece[:, 5:] = len(self.running), len(self.waiting)
        return piece
