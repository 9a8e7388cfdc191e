"""The scheduler against a device that is a few lines of Python: every request ends, in order, and no page is lost."""

import random
import time
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paxattn.engine.scheduler import Request, Scheduler, TooLongError
from paxattn.kv.prefix import PrefixIndex

P = 4


@dataclass
class Row:
    request: Request
    tokens: list[int]
    pages: list[int]
    stored: int
    most: int
    paused: bool
    fresh: bool = True
    ended: bool = False


@dataclass
class Device:
    """Owners of pages, rows, and what the engine's loop does with them."""

    num_pages: int
    rows: dict[int, Row] = field(default_factory=dict)

    def __post_init__(self):
        self.owners = [0] * self.num_pages
        self.content = {}

    @property
    def free(self):
        return [page for page, count in enumerate(self.owners) if count == 0]

    def let_go(self, pages):
        for page in pages:
            self.owners[page] -= 1
            assert self.owners[page] >= 0

    def empty(self, row):
        if row in self.rows:
            self.let_go(self.rows.pop(row).pages)

    def apply(self, plan):
        for row in [*plan.dropped, *(row for _, row in plan.preempted)]:
            self.empty(row)
        self.let_go(plan.let_go)
        for request, pages in plan.admitted:
            assert request.row not in self.rows
            for i, page in enumerate(pages):
                assert self.owners[page] > 0
                assert self.content[page] == (request.salt, request.tokens[: (i + 1) * P])
                self.owners[page] += 1
            most = len(request.prompt) + request.max_new_tokens
            paused = bool(request.twins)
            self.rows[request.row] = Row(request, request.tokens, list(pages), len(pages) * P, most, paused=paused)
        for request, twins in plan.forks:
            row = self.rows[request.row]
            assert row.paused
            assert row.stored == len(row.tokens) - 1
            row.paused = False
            for twin in twins:
                shared = row.pages[: row.stored // P]
                assert twin.row not in self.rows
                mine = [self.free[0]] if row.stored % P else []
                for page in [*shared, *mine]:
                    self.owners[page] += 1
                most = len(twin.prompt) + twin.max_new_tokens
                self.rows[twin.row] = Row(twin, list(row.tokens), shared + mine, row.stored, most, False, row.fresh)

    def loop(self, steps, budget):
        """Each row's news: drawn tokens, offers, whether it ended. And whether one found no page."""
        news, stalled = {}, False
        for _ in range(steps):
            left = budget
            for number, row in self.rows.items():
                count = min(len(row.tokens) - row.paused - row.stored, 1 + left)
                if row.ended or count <= 0:
                    continue
                left -= count - 1
                need = -(-(row.stored + count) // P) - len(row.pages)
                if need > len(self.free):
                    stalled = True
                    continue
                for page in self.free[:need]:
                    self.owners[page] += 1
                    row.pages.append(page)
                row.stored += count
                told = news.setdefault(number, ([], []))
                if row.stored < len(row.tokens) - row.paused:
                    continue
                if row.fresh:
                    self.offer(row, told)
                    row.fresh = False
                if row.paused:
                    continue
                row.tokens.append(len(row.tokens) % 7)
                told[0].append(row.tokens[-1])
                if len(row.tokens) == row.most:
                    row.ended = True
                    self.offer(row, told)
                    self.let_go(row.pages)
                    row.pages = []
            if stalled:
                break
        return news, stalled

    def offer(self, row, told):
        full = row.pages[: row.stored // P]
        for i, page in enumerate(full):
            self.owners[page] += 1
            self.content[page] = (row.request.salt, row.tokens[: (i + 1) * P])
        told[1].append(full)


class Driver:
    """What the engine does around a scheduler: a loop is looked at after the next was started."""

    def __init__(self, num_pages, rows, max_len, cached, steps):
        index = PrefixIndex(P) if cached else None
        self.scheduler = Scheduler(
            num_pages=num_pages, page_size=P, max_seqs=rows, max_len=max_len, index=index, patience=5
        )
        self.device, self.steps, self.flights, self.settle = Device(num_pages), steps, [], False
        self.admitted = []

    def step(self):
        if self.settle:
            self.collect(0)
        plan = self.scheduler.plan(self.steps * len(self.flights), self.steps)
        assert not (self.flights and plan.preempted)
        self.admitted += [request for request, _ in plan.admitted]
        self.device.apply(plan)
        rows = dict(self.scheduler.running)
        news, stalled = self.device.loop(self.steps, budget=11)
        stored = {number: row.stored for number, row in self.device.rows.items()}
        ended = {number for number, row in self.device.rows.items() if row.ended}
        for number in ended:
            del self.device.rows[number]
        self.flights.append((rows, news, stalled, stored, ended, len(self.device.free)))
        self.collect(1)

    def collect(self, keep):
        while len(self.flights) > keep:
            rows, news, self.settle, stored, ended, free = self.flights.pop(0)
            self.scheduler.report(free)
            for number, request in rows.items():
                drawn, offers = news.get(number, ([], []))
                if request.row != number or request.ended is not None:
                    for pages in offers:
                        self.scheduler.offer(None, [], pages)
                    continue
                request.output += drawn
                request.stored = stored.get(number, request.stored)
                for pages in offers if self.scheduler.index is not None else []:
                    self.scheduler.offer(request, request.tokens[: len(pages) * P], pages)
                if number in ended:
                    self.scheduler.end(request, "length")

    def finish(self):
        for _ in range(5000):
            if not self.scheduler.busy:
                break
            self.step()
        self.collect(0)
        while self.scheduler.busy:
            self.step()
            self.collect(0)


requests = st.lists(
    st.tuples(
        st.integers(1, 20), st.integers(1, 20), st.integers(-2, 2), st.integers(1, 4), st.sampled_from(["", "tenant"])
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(
    requests=requests,
    spare=st.integers(0, 25),
    rows=st.integers(1, 6),
    steps=st.integers(1, 6),
    cached=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_request_ends_and_every_page_comes_back(requests, spare, rows, steps, cached, seed):
    """Any arrivals, priorities, twins and cancellations, in as few pages as the largest request takes, or some more."""
    chance = random.Random(seed)
    base = [chance.randrange(5) for _ in range(40)]
    driver = Driver(10 + spare, rows, 40, cached, steps)
    # Without a prefix cache the device holds nothing.
    if not cached:
        driver.device.offer = lambda row, told: None
    every = []
    for size, new, priority, samples, salt in requests:
        prompt = base[:size]
        group = [Request(prompt, new, priority, salt) for _ in range(samples)]
        group[0].twins = group[1:]
        driver.scheduler.add(group[0])
        every += group
        for _ in range(chance.randrange(3)):
            driver.step()
        if chance.random() < 0.2:
            one = chance.choice(every)
            if one.ended is None:
                driver.scheduler.cancel(one)
    driver.finish()
    assert {one.ended for one in every} <= {"length", "cancelled"}
    assert all(len(one.output) == one.max_new_tokens for one in every if one.ended == "length")
    assert len(driver.device.free) + driver.scheduler.cached == driver.device.num_pages
    assert not driver.device.rows


def test_first_come_first_served_but_for_priorities():
    driver = Driver(100, 1, 40, cached=False, steps=3)
    driver.device.offer = lambda row, told: None
    plain = [Request([1] * 5, 4) for _ in range(8)]
    for one in plain[:7]:
        driver.scheduler.add(one)
    urgent, late = Request([1] * 5, 4, priority=1), Request([1] * 5, 4, priority=-1)
    driver.scheduler.add(late)
    driver.scheduler.add(urgent)
    driver.scheduler.add(plain[7])
    driver.finish()
    # A unit goes before the five that came before, and no more: `patience`.
    want = [*plain[:4], urgent, *plain[4:7], plain[7], late]
    assert driver.admitted == want


def test_the_youngest_gives_way_and_comes_back():
    driver = Driver(10, 3, 40, cached=False, steps=4)
    driver.device.offer = lambda row, told: None
    group = [Request([i] * 10, 20) for i in range(3)]
    for one in group:
        driver.scheduler.add(one)
    driver.finish()
    assert driver.scheduler.num_preempted > 0
    assert driver.admitted[:3] == group
    assert driver.admitted.count(group[0]) == 1
    assert all(len(one.output) == 20 for one in group)


@pytest.mark.parametrize(("prompt", "new", "fits"), [(30, 10, True), (31, 10, False), (1, 40, False)])
def test_what_outgrows_a_row_is_refused(prompt, new, fits):
    scheduler = Scheduler(num_pages=100, page_size=P, max_seqs=2, max_len=40)
    if fits:
        scheduler.add(Request([0] * prompt, new))
        return
    with pytest.raises(TooLongError, match=r"^prompt: got .* a row holds 40|^max_new_tokens: got 40"):
        scheduler.add(Request([0] * prompt, new))


@pytest.mark.parametrize(("prompt", "new", "fits"), [(9, 12, True), (10, 12, False)])
def test_what_outgrows_all_pages_is_refused(prompt, new, fits):
    """The last token that is drawn needs no page."""
    scheduler = Scheduler(num_pages=5, page_size=P, max_seqs=2, max_len=40)
    if fits:
        scheduler.add(Request([0] * prompt, new))
        return
    with pytest.raises(TooLongError, match=r"^prompt: got .* at most 5, all there are"):
        scheduler.add(Request([0] * prompt, new))


def test_a_cancelled_request_leaves_no_trace():
    driver = Driver(20, 2, 40, cached=False, steps=2)
    driver.device.offer = lambda row, told: None
    group = [Request([1] * 9, 20) for _ in range(4)]
    for one in group:
        driver.scheduler.add(one)
    driver.step()
    driver.step()
    for one in group:
        driver.scheduler.cancel(one)
    driver.step()
    assert len(driver.device.free) == 20
    driver.finish()
    assert not driver.scheduler.busy


def test_pages_that_others_run_on_are_not_free_when_a_row_gives_way():
    scheduler = Scheduler(
        num_pages=6, page_size=P, max_seqs=2, max_len=40, index=PrefixIndex(P), patience=10, reserve=0
    )
    older, younger = (Request(list(range(17)), 8) for _ in range(2))
    scheduler.add(older)
    scheduler.plan(0, 1)
    scheduler.report(1)
    scheduler.offer(older, older.prompt[:16], [0, 1, 2, 3])
    older.stored = 17
    scheduler.add(younger)
    assert scheduler.plan(0, 1).admitted == [(younger, (0, 1, 2, 3))]
    scheduler.report(0)
    for one in (older, younger):
        one.output, one.stored = [1] * 4, 20
    [(gone, _)] = scheduler.plan(0, 1).preempted
    assert gone is younger
    assert scheduler.num_free == 1
    assert scheduler.running == {older.row: older}


def test_to_cancel_many_takes_time_in_proportion():
    """Those that wait are not gone through for each, whatever their order, and none is kept."""
    scheduler = Scheduler(num_pages=5, page_size=P, max_seqs=1, max_len=40)
    group = [Request([0], 1, priority=i % 3) for i in range(20_000)]
    for one in group:
        scheduler.add(one)
    start = time.perf_counter()
    for one in group[:-1]:
        scheduler.cancel(one)
    assert time.perf_counter() - start < 2
    assert scheduler.waiting == {group[-1]}
    assert [request for request, _ in scheduler.plan(0, 1).admitted] == [group[-1]]
    assert not scheduler.waiting
    assert len(scheduler._queue) < 100


@pytest.mark.parametrize("window", [None, 6])
def test_pages_behind_a_window_are_not_free_once_more_when_a_row_gives_way(window):
    """Of 18 tokens in five pages, the last 6 see 5 before them: three pages went back before."""
    scheduler = Scheduler(num_pages=8, page_size=P, max_seqs=2, max_len=40, window=window)
    older, younger = (Request([i] * 3, 30) for i in range(2))
    for one in (older, younger):
        scheduler.add(one)
    scheduler.plan(0, 1)
    scheduler.report(0)
    for one in (older, younger):
        one.output, one.stored = [1] * 14, 16
    younger.output, younger.stored = [1] * 16, 18
    [(gone, _)] = scheduler.plan(0, 1).preempted
    assert gone is younger
    assert scheduler.num_free == (5 if window is None else 2)
