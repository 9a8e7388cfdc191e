"""Requests that have one stretch of memory each."""

import heapq

import numpy as np

from scripts.paging.allocators import Allocator
from scripts.paging.lengths import Requests
from scripts.paging.timeline import Timeline


def simulate_contiguous(requests: Requests, sizes: np.ndarray, allocator: Allocator) -> Timeline:
    """Each request has one stretch of sizes[i] tokens from its admission to its end.

    Nothing but the count of tokens changes between one request's end and the next, so time runs in such intervals.
    """
    run, pieces = _Run(requests, sizes, allocator), []
    while run.waiting or run.running:
        run.finish()
        run.admit()
        if not run.running:
            break
        pieces.append(run.advance())
    return Timeline.of(pieces)


class _Run:
    def __init__(self, requests: Requests, sizes: np.ndarray, allocator: Allocator) -> None:
        self.prompt, self.output, self.total = (
            requests.prompt.tolist(),
            requests.output.tolist(),
            requests.total.tolist(),
        )
        self.sizes = sizes.tolist()
        self.allocator = allocator
        self.running: list[tuple[int, int, int]] = []  # a heap of (step of the end, request, address)
        self.now = self.head = self.used = self.reserved = self.internal = 0

    @property
    def waiting(self) -> int:
        return len(self.total) - self.head

    def finish(self) -> None:
        while self.running and self.running[0][0] == self.now:
            _, i, start = heapq.heappop(self.running)
            self.allocator.give(start, self.sizes[i])
            self.used -= self.total[i]
            self.internal -= self.never_filled(i)

    def admit(self) -> None:
        while self.waiting and (address := self.allocator.take(self.sizes[self.head])) is not None:
            i = self.head
            heapq.heappush(self.running, (self.now + self.output[i], i, address))
            self.used += self.prompt[i]
            self.reserved += self.output[i]
            self.internal += self.never_filled(i)
            self.head += 1

    def never_filled(self, i: int) -> int:
        return self.allocator.rounded(self.sizes[i]) - self.total[i]

    def advance(self) -> np.ndarray:
        """The steps until a request ends: [steps, 7], as in Timeline.of."""
        free = self.allocator.free
        in_pieces = self.waiting > 0 and self.allocator.rounded(self.sizes[self.head]) <= free
        steps = self.running[0][0] - self.now
        grown = np.arange(1, steps + 1) * len(self.running)
        piece = np.empty((steps, 7), np.int64)
        piece[:, 0] = self.used + grown
        piece[:, 1] = self.reserved - grown
        piece[:, 2] = self.internal
        piece[:, 3:5] = (free, 0) if in_pieces else (0, free)
        piece[:, 5:] = len(self.running), self.waiting
        self.now, self.used, self.reserved = self.now + steps, int(piece[-1, 0]), int(piece[-1, 1])
        return piece
