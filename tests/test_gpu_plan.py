"""What the Hopper kernels visit and in which order, with their own code run in NumPy for every block of the grid."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from paxattn.kernels import (
    block_sizes,
    gpu_blocks,
    gpu_flash_bwd,
    gpu_flash_bwd_plan,
    gpu_flash_fwd,
    gpu_flash_fwd_plan,
)
from paxattn.kernels.gpu_blocks import ROWS
from paxattn.kernels.problem import Problem

DIMS = [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (192, 128)]


class Grid:
    """NumPy in place of jnp and lax, seen from block `cta`; what Python and lax divide differently is refused."""

    int32 = np.int64

    def __init__(self):
        self.cta = 0

    def __getattr__(self, name):
        return getattr(np, name)

    def axis_index(self, _):
        return self.cta

    def asarray(self, x, dtype=None):
        return np.asarray(x, np.int64 if dtype is not None else None)

    def div(self, a, b):
        assert np.min(a) >= 0
        assert np.min(b) > 0
        return np.asarray(a) // b

    def rem(self, a, b):
        assert np.min(a) >= 0
        assert np.min(b) > 0
        return np.asarray(a) % b

    def fori_loop(self, start, end, body, state):
        for i in range(int(start), int(end)):
            state = body(i, state)
        return state

    def cummax(self, x, axis):
        return np.maximum.accumulate(x, axis=axis)

    def cummin(self, x, axis, reverse):
        assert reverse
        return np.flip(np.minimum.accumulate(np.flip(x, axis), axis=axis), axis)


@pytest.fixture
def grid(monkeypatch):
    grid = Grid()
    for module in (gpu_blocks, gpu_flash_fwd_plan, gpu_flash_fwd, gpu_flash_bwd_plan, gpu_flash_bwd):
        monkeypatch.setattr(module, "jnp", grid)
        monkeypatch.setattr(module, "lax", grid)
    return grid


def segment_ids(rng, kind, batch, length):
    if kind == "sorted":
        return np.sort(rng.integers(0, 5, (batch, length)), axis=1)
    if kind == "repeating":
        rows = [np.repeat(rng.integers(0, 3, length), rng.integers(1, 300, length))[:length] for _ in range(batch)]
        return np.stack(rows)
    return rng.integers(-2, 3, (batch, length))


def problems(rng, count):
    """Problems and their segment ids, or None; every other one has lengths in whole blocks."""
    for i in range(count):
        kv_heads, group, batch = int(rng.integers(1, 4)), int(rng.choice([1, 2, 3, 7])), int(rng.integers(1, 3))
        q_len, kv_len = (int(x) for x in (128 * rng.integers(1, 7, 2) if i % 2 else rng.integers(1, 900, 2)))
        if i % 3 == 0:
            kv_len = q_len + 128 * int(rng.integers(0, 3))
        left = None if rng.random() < 0.5 else int(rng.choice([0, 1, 63, 64, 127, 128, 300, 2**30]))
        right = None if rng.random() < 0.3 else int(rng.choice([0, 0, 0, 1, 64, 128, 2**30]))
        dims = DIMS[rng.integers(len(DIMS))]
        problem = Problem(batch, q_len, kv_len, kv_heads * group, kv_heads, *dims, left, right, 1.0, None)
        kind = rng.choice(["none", "sorted", "repeating", "random"])
        if kind == "none":
            yield problem, None
            continue
        q_seg = segment_ids(rng, kind, batch, q_len)
        alike = q_len == kv_len and rng.random() < 0.7
        yield problem, (q_seg, q_seg if alike else segment_ids(rng, kind, batch, kv_len))


def visible(problem, segments, batch):
    q = np.arange(problem.q_len)[:, None] + problem.offset
    kv = np.arange(problem.kv_len)[None]
    seen = np.ones((problem.q_len, problem.kv_len), bool)
    if problem.left is not None:
        seen &= kv >= q - problem.left
    if problem.right is not None:
        seen &= kv <= q + problem.right
    if segments is not None:
        seen &= segments[0][batch][:, None] == segments[1][batch][None]
    return seen


def padded(ids, size):
    return np.pad(ids, ((0, 0), (0, -ids.shape[1] % size)), mode="edge")


class ForwardConsumer(gpu_flash_fwd.Consumer):
    def step(self, item, count, masked, j, state):
        return (*state, (j, masked))


@pytest.mark.usefixtures("unchecked")
def test_the_forward_visits_what_is_visible_once(grid, rng):
    aligned = Problem(1, 384, 384, 1, 1, 128, 128, None, 0, 1.0, None)
    again = np.repeat([[1, 2, 1]], 128, axis=1)
    for problem, segments in [(aligned, (again, again)), *problems(rng, 60)]:
        config = gpu_flash_fwd_plan.config_for(problem)
        bounds = None
        if segments is not None:
            q_seg, kv_seg = padded(segments[0], config.block_q), padded(segments[1], config.block_kv)
            bounds, _ = gpu_flash_fwd_plan.segment_bounds(problem, config, q_seg, kv_seg)
        tiles = -(-problem.q_len // config.block_q)
        ctas = min(int(rng.choice([1, 3, 7, 132])), problem.batch * problem.heads * tiles)
        plan = gpu_flash_fwd_plan.Plan(problem, config, ctas, bounds)
        found = set()
        assert sorted(indices(grid, plan)) == list(range(plan.items))
        for index in range(plan.items):
            item = plan.item(np.int64(index))
            found.add((int(item.batch), int(item.head), int(item.q_start)))
            if item.head == 0:
                check_forward_item(problem, config, segments, item)
        assert len(found) == problem.batch * problem.heads * tiles


def indices(grid, plan):
    """What the blocks take in a fixed order, then what they take as they become ready."""
    for grid.cta in range(plan.ctas):
        taken = map(plan.index, map(np.int64, itertools.count() if plan.dealt else range(1)))
        dealt = list(map(int, itertools.takewhile(lambda index: index < plan.items, taken)))
        assert not plan.dealt or len(dealt) == plan.count()
        yield from dealt
    if not plan.dealt:
        yield from range(plan.ctas, plan.items)


def check_forward_item(problem, config, segments, item):
    lo, end = int(item.lo), int(item.lo + item.blocks)
    assert 0 <= lo < end <= -(-problem.kv_len // config.block_kv)
    seen = visible(problem, segments, int(item.batch))
    if segments is not None and not item.run[2]:
        unbounded = visible(problem, None, int(item.batch))
        keys = np.arange(problem.kv_len)[None]
        rows = slice(item.q_start, item.q_start + config.block_q)
        np.testing.assert_array_equal(seen[rows], (unbounded & (keys >= item.run[0]) & (keys < item.run[1]))[rows])
    columns = np.flatnonzero(seen[item.q_start : item.q_start + config.block_q].any(axis=0)) // config.block_kv
    assert not columns.size or (lo <= columns[0] and columns[-1] < end)
    for which in range(config.warpgroups):
        consumer = ForwardConsumer(problem, config, which, {}, None, segments, None, None)
        steps = [(0, consumer.right_edge_exists()), *consumer.steps(item, 0, ())]
        assert [j for j, _ in steps] == list(range(end - lo))
        start = int(item.q_start) + which * ROWS
        for j, masked in steps:
            block = seen[start : start + ROWS, (end - 1 - j) * config.block_kv : (end - j) * config.block_kv]
            assert masked or (block.all() and block.shape[1] == config.block_kv)
    if segments is None and gpu_flash_fwd.halves_diagonal(problem, config):
        unseen = seen[item.q_start : item.q_start + ROWS, (end - 1) * config.block_kv + ROWS : end * config.block_kv]
        assert not unseen.any()


CAUSAL = [(16, 1024, 16, 16, 128), (4, 4096, 16, 16, 128), (1, 16384, 16, 16, 128), (2, 8192, 32, 8, 128)]
CAUSAL += [(4, 4096, 32, 32, 64), (4, 4096, 8, 8, 256), (3, 3000, 14, 2, 64), (1, 2048, 32, 8, 128)]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("batch", "length", "heads", "kv_heads", "dim"), CAUSAL)
def test_the_blocks_of_a_causal_forward_have_equally_much_to_do(grid, batch, length, heads, kv_heads, dim):
    problem = Problem(batch, length, length, heads, kv_heads, dim, dim, None, 0, 1.0, None)
    plan = gpu_flash_fwd_plan.Plan(problem, gpu_flash_fwd_plan.config_for(problem), 132, None)
    work = np.zeros(plan.ctas)
    for grid.cta in range(plan.ctas):
        index = plan.index(np.arange(-(-plan.items // plan.ctas)))
        work[grid.cta] = (plan.item(index[index < plan.items]).blocks + 1).sum()
    assert work.max() <= 1.05 * work.mean()


@pytest.mark.usefixtures("unchecked", "grid")
@pytest.mark.parametrize("documents", [1, 8, 16, 100])
def test_the_blocks_of_a_packed_forward_have_equally_much_to_do(rng, documents):
    length, heads, ctas = 16384, 16, 132
    problem = Problem(1, length, length, heads, heads, 128, 128, None, 0, 1.0, None)
    ids = np.sort(rng.integers(0, documents, (1, length)), axis=1)
    config = gpu_flash_fwd_plan.config_for(problem)
    bounds, _ = gpu_flash_fwd_plan.segment_bounds(problem, config, ids, ids)
    plan = gpu_flash_fwd_plan.Plan(problem, config, ctas, bounds)
    work = np.zeros(ctas)
    for index in range(plan.items):
        work[work.argmin()] += plan.item(np.int64(index)).blocks + 1
    assert work.max() <= 1.05 * work.mean()


class Passive:
    """Does nothing, whatever it is asked to do."""

    def __getattr__(self, _):
        return lambda *_, **__: None


class BackwardConsumer(gpu_flash_bwd.Consumer):
    def nothing(self):
        return (), ()

    def step(self, item, count, is_open, i, j, g, sums):
        block = self.plan.block(item, j)
        self.smem["steps"].append((int(i), int(g), int(block), bool(is_open(block))))
        return sums

    def wait_for_ds(self, slot):
        pass

    def store(self, item, dk, dv):
        pass


@pytest.mark.usefixtures("unchecked")
def test_the_backward_visits_what_is_visible_once_and_in_turns_that_come(grid, rng, monkeypatch):
    monkeypatch.setattr(gpu_flash_bwd, "plgpu", Passive())
    monkeypatch.setattr(gpu_flash_bwd, "pl", SimpleNamespace(when=lambda _: lambda _: None))
    for problem, segments in problems(rng, 60):
        config = gpu_flash_bwd_plan.config_for(problem)
        found = None
        if segments is not None:
            q_seg, kv_seg = padded(segments[0], config.block_q), padded(segments[1], config.block_kv)
            found = (q_seg, kv_seg, *gpu_flash_bwd_plan.segment_bounds(problem, config, q_seg, kv_seg))
        tiles = -(-problem.kv_len // config.block_kv)
        ctas = min(int(rng.choice([1, 3, 7, 132])), problem.batch * problem.kv_heads * tiles)
        plan = gpu_flash_bwd_plan.Plan(problem, config, ctas, found, bool(rng.integers(2)))
        work = dealt_or_taken(grid, plan)
        for item in (item for items in work for item in items if item.kv_head == 0):
            check_backward_item(plan, segments, item)
        places = [(int(i.batch), int(i.kv_head), int(i.tile)) for items in work for i in items]
        assert sorted(places) == sorted(set(places))
        assert len(places) == problem.batch * problem.kv_heads * tiles
        check_turns(plan, work, rng)


def dealt_or_taken(grid, plan):
    """The items of each block, in their order; where blocks take them, one for each in the order of taking."""
    if not plan.dealt:
        return [[plan.item_taken(np.int64(index))] for index in range(plan.items)]
    work = []
    for grid.cta in range(plan.ctas):
        work.append([item for turn in range(plan.rounds) if (item := plan.item(np.int64(turn))).exists])
    return work


def check_backward_item(plan, segments, item):
    problem, config = plan.problem, plan.config
    lo, end = int(item.lo), int(item.lo + item.blocks)
    assert 0 <= lo <= end <= -(-problem.q_len // config.block_q)
    seen = visible(problem, segments, int(item.batch))[:, item.kv_start : item.kv_start + config.block_kv]
    rows = np.flatnonzero(seen.any(axis=1)) // config.block_q
    assert not rows.size or (lo <= rows[0] and rows[-1] < end)
    for which in range(gpu_flash_bwd_plan.WARPGROUPS):
        smem = dict(steps=[], k_full=None, v_full=None, kv_free=None)
        consumer = BackwardConsumer(plan, which, smem, None, None)
        consumer.attend(item, 0)
        assert [i for i, *_ in smem["steps"]] == list(range((end - lo) * plan.group))
        visits = {(g, block) for _, g, block, _ in smem["steps"]}
        assert visits == {(g, block) for g in range(plan.group) for block in range(lo, end)}
        for _, _, b, is_open in smem["steps"]:
            block = seen[b * config.block_q : (b + 1) * config.block_q]
            block = block[:, consumer.first_key : consumer.first_key + ROWS]
            assert not (is_open or not consumer.edge_exists()) or (block.all() and block.shape[1] == ROWS)


def check_turns(plan, work, rng):
    """A block's turns are 0, 1, 2 ... and CTAs that run at any speed all get theirs."""
    waiting = [[one for item in items for one in visits(plan, item)] for items in work]
    by_block = {}
    for *block, turn in (one for many in waiting for one in many):
        by_block.setdefault(tuple(block), []).append(turn)
    if not plan.takes_turns:
        return
    right = (lambda n: list(range(n))) if plan.ordered else (lambda n: [0] + [1] * (n - 1))
    assert all(sorted(one) == right(len(one)) for one in by_block.values())
    if plan.covers():
        assert len(by_block) == plan.pairs * plan.group * plan.q_blocks
    done = dict.fromkeys(by_block, 0)
    while any(waiting):
        moved = False
        for cta in rng.permutation(len(waiting)):
            if not waiting[cta] or not (plan.dealt or cta in running(waiting, plan)):
                continue
            if done[waiting[cta][0][:4]] == waiting[cta][0][4]:
                turn = waiting[cta].pop(0)
                done[turn[:4]] += int(plan.counts(turn[4]))
                moved = True
        assert moved, "no block's turn comes"


def running(waiting, plan):
    """The items that are being worked on where no more than the grid's blocks of them are taken, in order."""
    return [i for i, steps in enumerate(waiting) if steps][: plan.ctas]


def visits(plan, item):
    """(batch, KV head, head of the group, query block, turn) of every step."""
    found = []

    def step(i, j, g, _):
        assert i == len(found)
        block = plan.block(item, j)
        turn = plan.turn(item, g, block) if plan.takes_turns else 0
        place = item.batch, item.kv_head, g, block
        found.append(tuple(int(x) for x in (*place, turn)))

    plan.each_step(item, step)
    return found


@pytest.mark.parametrize("right", [0, None])
@pytest.mark.parametrize(("length", "heads", "group"), [(2048, 70, 1), (1024, 100, 2), (1536, 60, 3)])
@pytest.mark.usefixtures("unchecked")
def test_blocks_in_step_wait_for_no_turn(grid, length, heads, group, right):
    """Where all tiles of a round begin together, and a visit takes as long as any other, every turn has come."""
    problem = Problem(1, length, length, heads * group, heads, 128, 128, None, right, 1.0, None)
    plan = gpu_flash_bwd_plan.Plan(problem, gpu_flash_bwd_plan.config_for(problem), 132, None, True)
    times = []
    for grid.cta in range(plan.ctas):
        steps = [one for turn in range(plan.rounds) for one in visits(plan, plan.item(np.int64(turn)))]
        times += [(*one, time) for time, one in enumerate(steps)]
    times.sort()
    assert not [(a, b) for a, b in itertools.pairwise(times) if a[:4] == b[:4] and a[5] > b[5]]


def test_measured_block_sizes_are_taken_and_others_left_to_the_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(block_sizes, "TABLES", tmp_path)
    problem = Problem(1, 100, 100, 2, 2, 192, 128, None, 0, 1.0, None)
    entries = {"D192/128 causal": dict(config=dict(block_kv=64, stages=3), ms=1.0)}
    (tmp_path / "nvidia_h100_80gb.json").write_text(json.dumps(dict(fwd=entries, bwd={})), encoding="utf-8")
    assert block_sizes.measured("NVIDIA H100-80GB", problem, None) == dict(block_kv=64, stages=3)
    assert block_sizes.measured("NVIDIA H100-80GB", problem, True) is None
    assert block_sizes.measured("NVIDIA H100-80GB", replace(problem, right=None), None) is None
    assert block_sizes.measured("NVIDIA H200", problem, None) is None


def test_tables_hold_block_sizes_that_were_candidates():
    for path in block_sizes.TABLES.glob("*.json"):
        table = json.loads(path.read_text(encoding="utf-8"))
        for part, plan in (("fwd", gpu_flash_fwd_plan), ("bwd", gpu_flash_bwd_plan)):
            for name, entry in table[part].items():
                head_dim, *v_dim = map(int, name.split()[0][1:].split("/"))
                assert plan.Config(**entry["config"]) in plan.candidates(head_dim, (v_dim or [head_dim])[0]), name
