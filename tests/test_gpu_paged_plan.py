"""What the workers of the paged decode kernel read and who merges it, with the kernel's own code run in NumPy."""

import itertools
import math
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from test_gpu_plan import Grid

from paxattn.kernels import gpu_blocks, gpu_paged_ahead, gpu_paged_codes, gpu_paged_plan
from paxattn.kernels.gpu_paged_ahead import Following
from paxattn.kernels.gpu_paged_plan import Config, Plan, Problem


class Warp(Grid):
    """NumPy in place of jnp, lax and what a warp exchanges: a number for each of 32 lanes, or one for all."""

    def lane(self):
        return np.arange(32)

    def warp_sum(self, x):
        return np.broadcast_to(x, 32).sum()

    def warp_scan(self, x):
        return np.broadcast_to(x, 32).cumsum()

    def from_lane(self, x, source):
        return np.broadcast_to(x, 32)[source]

    def while_loop(self, condition, body, state):
        while condition(state):
            state = body(state)
        return state


@pytest.fixture
def warp(monkeypatch):
    fake = Warp()
    for module in (gpu_blocks, gpu_paged_plan):
        monkeypatch.setattr(module, "jnp", fake)
        monkeypatch.setattr(module, "lax", fake)
    monkeypatch.setattr(gpu_paged_plan, "hopper_lanes", fake)
    return fake


def plans(rng, count):
    """Rows of every kind: idle, without keys, of more queries than are served; and more rows than a warp has lanes."""
    for i in range(count):
        rows = int(rng.choice([1, 2, 7, 31, 64, 250, 257, 600]))
        q_lens = rng.integers(0, int(rng.choice([2, 5])), rows) if i % 3 else np.ones(rows, int)
        kv_lens = rng.integers(0, int(rng.choice([2, 70, 3000])), rows) if i % 4 else np.full(rows, 640)
        kv_lens = kv_lens + q_lens * rng.integers(0, 2)
        if i % 5 == 0:
            kv_lens[rng.integers(rows)] = 20000
        left = None if rng.random() < 0.6 else int(rng.choice([0, 5, 64, 200]))
        kv_heads, workers = int(rng.integers(1, 9)), int(rng.choice([1, 3, 8, 128, 256, 264]))
        shape = int(q_lens.sum()), 2 * kv_heads, kv_heads, 128, 16, int(rng.integers(1, 4))
        problem, config = Problem(*shape, left, 1.0, None), Config(int(rng.choice([64, 128])), 6)
        skipped = None if left is not None or i % 3 else [int(rng.integers(0, max(1, (kv_lens - q_lens).min()) + 1))]
        yield Plan(problem, config, workers, kv_lens, np.cumsum([0, *q_lens]), skipped)


def items_of(plan, worker):
    item = plan.start(np.int64(worker))
    while item.blocks > 0:
        yield item
        item = plan.next(item)
    assert item.unread == 0


def visible_blocks(plan, row):
    """By the definition of the arguments; one block where queries see nothing."""
    q_len, kv_len = plan.cu_q_lens[row + 1] - plan.cu_q_lens[row], plan.kv_lens[row]
    if not 0 < q_len <= plan.problem.max_q_len:
        return []
    first = plan.skipped[0] if plan.skipped else 0
    first = first if plan.problem.left is None else max(first, kv_len - q_len - plan.problem.left)
    return sorted({position // plan.config.block for position in range(first, kv_len)}) or [first // plan.config.block]


@pytest.mark.usefixtures("unchecked", "warp")
def test_every_block_is_read_once_and_the_shares_are_equal(rng):
    for plan in plans(rng, 25):
        read, shares = defaultdict(list), []
        for worker in range(plan.workers):
            items = list(items_of(plan, worker))
            shares.append(sum(int(item.blocks) for item in items))
            for item in items:
                read[int(item.row), int(item.head)] += range(int(item.block), int(item.block + item.blocks))
        heads = range(plan.problem.kv_heads)
        wanted = {(r, h): blocks for r in range(plan.rows) if (blocks := visible_blocks(plan, r)) for h in heads}
        assert read == wanted
        assert max(shares) - min(shares) <= 1


@pytest.mark.usefixtures("unchecked", "warp")
def test_the_parts_of_an_item_are_of_neighbours_and_have_places_of_their_own(rng):
    for plan in plans(rng, 25):
        parts, places, counters = defaultdict(list), [], set()
        for worker in range(plan.workers):
            for item in items_of(plan, worker):
                first, last = map(int, plan.parts(item))
                team = worker // plan.team
                assert item.whole == (first == last)
                assert first <= team <= last
                assert plan.worker(team, item) == worker
                if not item.whole:
                    parts[int(item.row), int(item.head), first, last, worker % plan.team].append(team)
                    places.append(2 * worker + (team == first))
        assert len(places) == len(set(places))
        for (*_, first, last, member), teams in parts.items():
            assert teams == list(range(first, last + 1))
            counters.add((first, member))
        assert len(counters) == len(parts)


@pytest.mark.usefixtures("unchecked", "warp")
def test_a_team_reads_the_same_blocks_of_neighbouring_heads(rng):
    for plan in plans(rng, 12):
        for team in range(plan.teams):
            of_members = [list(items_of(plan, team * plan.team + member)) for member in range(plan.team)]
            for items in zip(*of_members, strict=True):
                assert len({(int(item.row), int(item.block), int(item.blocks)) for item in items}) == 1
                assert [int(item.head - items[0].head) for item in items] == list(range(plan.team))


class Rows:
    """An array of pages of which only places are asked for."""

    @property
    def at(self):
        return self

    def __getitem__(self, place):
        return place


@pytest.mark.usefixtures("unchecked")
def test_what_workers_read_first_is_brought_near(rng, monkeypatch, warp):
    brought, allowed = [], []

    def when(condition):
        allowed[:] = [np.broadcast_to(condition, 32)]
        return lambda body: body() if np.any(condition) else None

    def prefetch(place, size):
        assert size == 2 * plan.problem.head_dim * following.heads
        brought.extend(itertools.compress(zip(*np.broadcast_arrays(*place, np.arange(32)), strict=True), allowed[0]))

    warp.prefetch = prefetch
    for name, fake in dict(jnp=warp, lax=warp, hopper_lanes=warp).items():
        monkeypatch.setattr(gpu_paged_ahead, name, fake)
    monkeypatch.setattr(gpu_paged_ahead.pl, "when", when)
    for plan in plans(rng, 12):
        config = replace(plan.config, warpgroups=2 - plan.workers % 2)
        plan = replace(plan, problem=replace(plan.problem, abreast=int(rng.integers(1, 3))))
        following = Following(plan.problem, config, plan.workers // config.warpgroups)
        columns = max(1, -(-max(plan.kv_lens) // 16))
        table = rng.permutation(plan.rows * columns).reshape(plan.rows, columns)
        arrays = Rows(), Rows(), table, plan.kv_lens, plan.cu_q_lens, plan.skipped
        for warp.cta in range(0, following.blocks + 3, 5):
            brought.clear()
            following.bring_near(*arrays)
            items = [plan.start(np.int64(warp.cta * config.warpgroups + which)) for which in range(following.heads)]
            wanted: list = []
            abreast = plan.problem.abreast
            if warp.cta < following.blocks:
                assert {int(item.head - items[0].head - i) for i, item in enumerate(items)} == {0}
                assert len({(int(item.row), int(item.block), int(item.blocks)) for item in items}) == 1
                item = items[0]
                begin, end = item.block * config.block, (item.block + item.blocks) * config.block
                keys = range(int(max(begin, item.begin)), int(min(end, item.kv_len)))[: following.keys]
                wanted = [(int(table[item.row, key // 16]), key % 16, int(item.head) * abreast) for key in keys]
            assert sorted(tuple(map(int, one[:3])) for one in brought) == sorted(2 * wanted)
    assert following.keys == 256


@pytest.mark.parametrize(("kv_heads", "team"), [(1, 1), (2, 2), (7, 1), (8, 8), (12, 4), (32, 32), (40, 8)])
def test_the_workers_of_128_blocks_form_teams(kv_heads, team):
    assert Problem(64, 4 * kv_heads, kv_heads, 128, 16, 1, None, 1.0, None).team(256) == team


@pytest.mark.parametrize(("multiprocessors", "blocks"), [(132, 128), (114, 114), (78, 78), (128, 128), (1, 1)])
def test_blocks_are_a_power_of_two_where_few_multiprocessors_are_left_over(multiprocessors, blocks):
    assert gpu_paged_plan.blocks(multiprocessors) == blocks


@pytest.mark.parametrize(
    ("dim", "kv_heads", "group", "max_q_len", "pairs"),
    [(64, 8, 4, 1, 2), (64, 2, 16, 2, 2), (64, 2, 16, 3, 1), (64, 3, 1, 1, 1), (128, 8, 4, 1, 1), (80, 8, 1, 1, 1)],
)
def test_pairs_of_heads_of_64_columns_are_read_as_one_where_their_queries_fit(dim, kv_heads, group, max_q_len, pairs):
    problem = Problem(64, group * kv_heads, kv_heads, dim, 16, max_q_len, None, 1.0, None)
    read_as = gpu_paged_plan.abreast(problem)
    assert (read_as.abreast, read_as.kv_heads, read_as.head_dim) == (pairs, kv_heads // pairs, dim * pairs)
    assert read_as.packed == pairs * problem.packed <= gpu_blocks.ROWS
    assert read_as.heads == problem.heads


@pytest.mark.usefixtures("unchecked", "warp")
def test_one_long_row_is_shared_by_all_workers():
    problem = Problem(64, 32, 8, 128, 16, 1, None, 1.0, None)
    plan = Plan(problem, Config(64, 6), 264, np.array([131072] + [512] * 63), np.arange(65))
    shares = [sum(int(item.blocks) for item in items_of(plan, worker)) for worker in range(264)]
    assert max(shares) - min(shares) <= 1


@pytest.mark.usefixtures("unchecked", "warp")
def test_who_has_read_its_share_looks_at_no_more_rows(monkeypatch):
    problem = Problem(64, 32, 8, 128, 16, 1, None, 1.0, None)
    plan = Plan(problem, Config(64, 6), 8, np.array([640, *[0] * 300]), np.array([0, *[1] * 301]))
    looked_at = []
    found = Plan._row
    monkeypatch.setattr(Plan, "_row", lambda self, row: looked_at.append(row) or found(self, row))
    item = plan.start(np.int64(0))
    looked_at.clear()
    assert not plan.next(item).blocks
    assert len(looked_at) <= 2


def test_compressed_blocks_in_flight_fit_and_are_enough():
    for dim in (64, 80, 96, 128, 256):
        problem = Problem(64, 32, 8, dim, 16, 1, None, 1.0, None)
        config = gpu_paged_codes.config_for(problem)
        scratch = gpu_paged_codes.CODES.scratch(problem, config, np.int8)
        tiles = [x.refs[1] if hasattr(x, "refs") else x for name, x in scratch.items() if name not in ("full", "free")]
        assert sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in tiles) <= gpu_paged_plan.SHARED_BYTES
        assert config.slots >= 3
        assert config.warpgroups * (config.slots - 1) * config.block * 2 * dim >= 32 * 1024


def test_what_is_in_flight_fits_and_is_enough():
    for dim, group in itertools.product((64, 80, 96, 128, 256), (1, 8, 64)):
        problem = Problem(64, 8 * group, 8, dim, 16, 1, None, 1.0, None)
        config = gpu_paged_plan.config_for(problem)
        ring = config.warpgroups * config.slots * config.block * dim * 2
        queries = config.warpgroups * gpu_blocks.ROWS * dim * 2
        assert ring + queries <= gpu_paged_plan.SHARED_BYTES
        assert ring - config.warpgroups * config.block * dim * 2 >= 32 * 1024
