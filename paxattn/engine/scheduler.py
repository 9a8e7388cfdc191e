"""Who runs, who waits and who gives way. Plain Python on the host; it sees token ids and page counts only.

The host plans a step while the device still runs the last one, so it knows pages a step late. It counts on the safe
side: what is free as last told, less all that running requests may take in the steps not told of yet. If the
device finds no page nevertheless, it tells so, and the next plan, made with nothing under way, lets the youngest go.
"""

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from paxattn.kv.prefix import Lease, PrefixIndex


class TooLongError(ValueError):
    """The request could never run: it outgrows a row of the page table, or all pages."""


@dataclass(eq=False)
class Request:
    """One continuation of one prompt.

    Fields:
      prompt: token ids.
      max_new_tokens: most to be drawn.
      priority: goes before `patience` earlier requests for each unit.
      salt: only requests of one salt share prefixes.
      twins: further continuations of the prompt, which are forked from this one once its prompt is stored.
      options: what the engine knows of it besides.
      output: tokens drawn so far.
      key: the order in which requests are served; the largest gives way first.
      row: of the page table; None = not running.
      stored: tokens in the row's pages, as last told.
      forked: pages that it got from the row that it was forked from.
      swapped: its pages in host memory, where it gave way so.
      ended: why it ended; None = it has not.
    """

    prompt: list[int]
    max_new_tokens: int
    priority: int = 0
    salt: str | bytes = ""
    twins: list["Request"] = field(default_factory=list)
    options: Any = None
    output: list[int] = field(default_factory=list)
    key: tuple[int, int] = (0, 0)
    row: int | None = None
    stored: int = 0
    forked: int = 0
    lease: Lease | None = None
    swapped: Any = None
    ended: str | None = None

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output

    @property
    def known(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def most(self) -> int:
        """Tokens that it can ever have in pages: the last one drawn is not fed."""
        return len(self.prompt) + self.max_new_tokens - 1

    def __lt__(self, other: "Request") -> bool:
        return self.key < other.key


@dataclass
class Plan:
    """What is to be done before the next step, in this order.

    Fields:
      preempted: requests and the rows they leave, whose pages go back.
      dropped: further rows to be emptied.
      let_go: pages that the prefix index gives up.
      forks: a request whose prompt is stored, and those that go on from it in rows of their own.
      admitted: requests with a new row, and the full pages that they find there already.
    """

    preempted: list[tuple[Request, int]] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    let_go: list[int] = field(default_factory=list)
    forks: list[tuple[Request, list[Request]]] = field(default_factory=list)
    admitted: list[tuple[Request, tuple[int, ...]]] = field(default_factory=list)


class Scheduler:
    """Requests in the order of their keys: first come, first served, but for priorities.

    A request's key is the number of its arrival less priority * patience. It never changes, so only finitely many can
    go before a request, and the one with the smallest key never gives way: nobody starves.

    Args:
      num_pages, page_size, max_seqs, max_len: of the store.
      index: where prefixes are found again; None = nowhere.
      patience: by how many arrivals a unit of priority goes ahead.
      reserve: pages that are left free when one more is admitted beside others, so that these can grow.
      window: the model's, where every layer has one.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        max_seqs: int,
        max_len: int,
        index: PrefixIndex | None = None,
        patience: int = 256,
        reserve: int = 0,
        window: int | None = None,
    ):
        self.num_pages, self.page_size, self.max_len = num_pages, page_size, max_len
        self.index, self.patience, self.reserve, self.window = index, patience, reserve, window
        self.running: dict[int, Request] = {}
        self.waiting: set[Request] = set()
        # A heap of those that wait, and of some that do not any more: to take one out would mean to go through it.
        self._queue: list[Request] = []
        self.num_preempted = 0
        self.num_free = num_pages
        self._rows = list(range(max_seqs))
        self._arrivals = 0
        self._dropped: list[int] = []
        self._let_go: list[int] = []
        self._evicted: deque[int] = deque()

    @property
    def busy(self) -> bool:
        """Whether a plan would have anything in it, or anything runs."""
        return bool(self.waiting or self.running or self._dropped or self._let_go)

    @property
    def cached(self) -> int:
        """Pages that only the prefix index keeps."""
        return 0 if self.index is None else self.index.cached

    def forget_prefixes(self) -> None:
        """All pages are new and free; nothing may be running."""
        if self.index is not None:
            self.index.evict(self.cached)
        self.num_free = self.num_pages

    def check(self, request: Request) -> None:
        """Raise TooLongError for a request that could never run."""
        if request.max_new_tokens >= self.max_len:
            raise TooLongError(
                f"max_new_tokens: got {request.max_new_tokens}, must be below {self.max_len}, what a row holds"
            )
        if request.most >= self.max_len:
            raise TooLongError(
                f"prompt: got {len(request.prompt)} tokens, must be at most {self.max_len - request.max_new_tokens} "
                f"with max_new_tokens={request.max_new_tokens}: a row holds {self.max_len}"
            )
        if self._pages(request.most) > self.num_pages:
            raise TooLongError(
                f"prompt: got {len(request.prompt)} tokens, which with max_new_tokens={request.max_new_tokens} take "
                f"{self._pages(request.most)} pages, must be at most {self.num_pages}, all there are"
            )

    def add(self, request: Request) -> None:
        """Let a request wait, and its twins with it.

        Raises:
          TooLongError: it could never run.
        """
        for one in (request, *request.twins):
            self.check(one)
            one.key = self._arrivals - one.priority * self.patience, self._arrivals
            self._arrivals += 1
        self._wait([request])

    def plan(self, ahead: int, more: int) -> Plan:
        """What to do before the next step; `report` must be called for each plan, in order.

        Args:
          ahead: tokens that each row may draw in the steps not reported yet; 0 = nothing is under way.
          more: tokens that each row may draw in the step to come.
        """
        plan = Plan(dropped=self._dropped, let_go=self._let_go)
        self._dropped, self._let_go = [], []
        evicted = 0 if ahead else self._preempt(plan)
        if not plan.preempted:
            evicted += self._fork(plan, ahead) + self._admit(plan, ahead)
        evicted += self._evict(plan, -self._room(ahead + more))
        self._evicted.append(evicted)
        return plan

    def report(self, num_free: int) -> None:
        """The oldest plan not reported yet has run, and left so many pages free."""
        self._evicted.popleft()
        self.num_free = num_free + sum(self._evicted)

    def offer(self, request: Request | None, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Full pages that hold the first of a request's tokens, and that are held for the index.

        Those that it does not take are let go with the next plan; all of them where the request is None.
        """
        taken: list[int] = []
        if request is not None and request.lease is not None and self.index is not None:
            taken = self.index.insert(request.lease, tokens, pages)
        self._let_go += set(pages) - set(taken)

    def end(self, request: Request, reason: str) -> None:
        """A request that the device has ended: its row is empty."""
        request.ended = reason
        self._leave(request)

    def cancel(self, request: Request, reason: str = "cancelled") -> None:
        """End a request that may be anywhere; where it runs, its pages go back with the next plan."""
        request.ended = reason
        request.swapped = None
        if request.row is not None:
            self._dropped.append(self._leave(request))
            self._wait(request.twins)
        elif request in self.waiting:
            self.waiting.remove(request)
            self._wait(request.twins)
        request.twins = []

    def _wait(self, requests: Iterable[Request]) -> None:
        for request in requests:
            if request.ended is None:
                self.waiting.add(request)
                heapq.heappush(self._queue, request)

    def _first(self) -> Request:
        """Of those that wait."""
        if len(self._queue) > 2 * len(self.waiting) + 64:  # or who left would be kept by one that never gets its turn
            self._queue = sorted(self.waiting)
        while self._queue[0] not in self.waiting:
            heapq.heappop(self._queue)
        return self._queue[0]

    def _leave(self, request: Request) -> int:
        row = request.row
        assert row is not None
        del self.running[row]
        self._rows.append(row)
        if request.lease is not None and self.index is not None:
            self.index.release(request.lease)
        request.row, request.lease, request.stored, request.forked = None, None, 0, 0
        return row

    def _enter(self, request: Request) -> None:
        request.row = self._rows.pop()
        self.running[request.row] = request

    def _fork(self, plan: Plan, ahead: int) -> int:
        """Twins of whom the prompt is stored get rows and pages as far as there are any; the others wait alone."""
        room, evicted = None, 0
        for request in list(self.running.values()):
            if not request.twins or request.stored < len(request.prompt) - 1:
                continue
            room = self._room(ahead) if room is None else room
            twins = [twin for twin in request.twins if twin.ended is None]
            count = min(len(twins), len(self._rows), max(0, room + self.cached))
            gained = self._evict(plan, count - room)
            room, evicted = room + gained - count, evicted + gained
            for twin in twins[:count]:
                self._enter(twin)
                # The last page is its own where it is not full.
                twin.forked = request.stored // self.page_size
                twin.stored = twin.forked * self.page_size
                if self.index is not None:
                    twin.lease = self.index.match(twin.prompt, twin.salt)
            self._wait(twins[count:])
            request.twins = []
            plan.forks.append((request, twins[:count]))
        return evicted

    def _preempt(self, plan: Plan) -> int:
        """Let the youngest go until the others can each take a step."""
        evicted = 0
        while len(self.running) > 1 and self._room(1) + self.cached < 0:
            youngest = max(self.running.values())
            pages = self._pages(youngest.stored) - max(self._shared(youngest), self._behind(youngest))
            self._wait(youngest.twins)
            youngest.twins = []
            row = self._leave(youngest)
            plan.preempted.append((youngest, row))
            self._wait([youngest])
            self.num_preempted += 1
            self.num_free += max(0, pages)
        if plan.preempted:
            evicted = self._evict(plan, -self._room(1))
        return evicted

    def _shared(self, request: Request) -> int:
        """Pages of a row that are not free when it leaves: the index keeps them, where others may run on them, too, or
        those have them that it was forked from. To count one as free would let the same request in again and again."""
        covered = 0 if request.lease is None or self.index is None else self.index.covered(request.lease)
        return max(covered, request.forked)

    def _behind(self, request: Request) -> int:
        """Pages of a row that were given back already, as all their tokens are behind the window."""
        return 0 if self.window is None else max(0, request.stored - self.window + 1) // self.page_size

    def _admit(self, plan: Plan, ahead: int) -> int:
        room, evicted = self._room(ahead), 0
        while self.waiting and self._rows:
            request = self._first()
            if self.index is not None and request.swapped is None:
                request.lease = self.index.match(request.tokens, request.salt)
            found = () if request.lease is None else request.lease.pages
            need = self._pages(min(request.most, request.known + 1)) - len(found)
            if need + (self.reserve if self.running else 0) > room + self.cached:
                if request.lease is not None and self.index is not None:
                    self.index.release(request.lease)
                    request.lease = None
                break
            gained = self._evict(plan, need - room)
            room, evicted = room + gained - need, evicted + gained
            self.waiting.remove(heapq.heappop(self._queue))
            self._enter(request)
            request.stored = len(found) * self.page_size
            plan.admitted.append((request, found))
        return evicted

    def _evict(self, plan: Plan, count: int) -> int:
        """Take up to `count` pages from the index, as free ones."""
        if self.index is None or count <= 0:
            return 0
        pages = self.index.evict(count)
        plan.let_go += pages
        self.num_free += len(pages)
        return len(pages)

    def _room(self, ahead: int) -> int:
        """Pages that are free for others if every running request draws `ahead` more tokens; negative = too few."""
        return self.num_free - sum(
            max(0, self._pages(min(one.most, one.known + ahead)) - self._pages(one.stored))
            for one in self.running.values()
        )

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.page_size)
