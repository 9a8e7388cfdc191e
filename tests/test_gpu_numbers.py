"""What the Hopper forward kernels compute, with their own code run in NumPy: tiles, masks, softmax, what is stored.

One block of the grid does everything. Its producers run first and fill as many slots as it takes, then each warpgroup
runs alone: barriers and registers are left to the GPU. Whatever no query may see is NaN.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from test_gpu_plan import Grid, padded, segment_ids

from paxattn.kernels import (
    gpu_blocks,
    gpu_flash_fwd,
    gpu_flash_fwd_plan,
    gpu_paged_plan,
    gpu_paged_prefill,
    gpu_paged_prefill_plan,
)
from paxattn.kernels.gpu_blocks import ROWS
from paxattn.kernels.hopper import CHUNK
from paxattn.kernels.problem import Problem

MODULES = (gpu_blocks, gpu_flash_fwd_plan, gpu_flash_fwd, gpu_paged_plan, gpu_paged_prefill_plan, gpu_paged_prefill)


class Ref:
    """A view of an array, as Pallas has it."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    @property
    def at(self):
        return _At(self.array)

    def __getitem__(self, index):
        return self.array[index]

    def __setitem__(self, index, value):
        self.array[index] = value


class _At:
    def __init__(self, array):
        self.array = array

    def __getitem__(self, index):
        return Ref(self.array[index])


class Slots:
    """As many tiles as are asked for, each by its number."""

    def __init__(self, *shape):
        self.shape, self.tiles = shape, {}

    @property
    def at(self):
        return self

    def __getitem__(self, slot):
        return self.tiles.setdefault(int(slot), Ref(np.full(self.shape, np.nan, np.float32)))


class Queries:
    """Of each warpgroup the tiles of all items; `turn` says which one is looked at."""

    def __init__(self, warpgroups, *shape):
        self.shape, self.tiles, self.turn = shape, [[] for _ in range(warpgroups)], [-1] * warpgroups

    @property
    def at(self):
        return self

    def __getitem__(self, wg):
        if self.turn[wg] >= 0:
            return self.tiles[wg][self.turn[wg]]
        self.tiles[wg].append(Ref(np.full(self.shape, np.nan, np.float32)))
        return self.tiles[wg][-1]


class Lax(Grid):
    def cond(self, condition, yes, no):
        return yes() if condition else no()

    def while_loop(self, condition, body, state):
        while condition(state):
            state = body(state)
        return state

    def broadcast_in_dim(self, x, shape, axes):
        places = [n if i in axes else 1 for i, n in enumerate(shape)]
        return np.broadcast_to(np.asarray(x).reshape(places), shape)


class Pallas:
    @staticmethod
    def when(condition):
        return lambda body: body() if condition else None

    @staticmethod
    def ds(start, size):
        return slice(int(start), int(start) + int(size))


class Passive:
    """A barrier, or whatever does nothing when it is asked to."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, _):
        return self

    def __call__(self, *_, **__):
        return None


class MosaicGpu(Passive):
    def layout_cast(self, x, _):
        return x

    def copy_smem_to_gmem(self, source, target):
        target.array[...] = source.array[tuple(slice(n) for n in target.shape)]


class Hopper(Passive):
    FIRST_BARRIER = 5

    def load_tile(self, source, start, target, _):
        chunks, rows, _ = target.shape
        columns = np.zeros((rows, chunks * CHUNK), np.float32)
        there = source.array[int(start) : int(start) + rows]
        columns[: len(there), : there.shape[1]] = there
        target.array[...] = columns.reshape(rows, chunks, CHUNK).swapaxes(0, 1)

    def load(self, tile):
        return np.concatenate(list(tile.array), axis=1)

    def products_t(self, *pairs):
        return [(a if isinstance(a, np.ndarray) else self.load(a)) @ self.load(b).T for a, b in pairs]

    def accumulate(self, acc, p, b):
        return acc + p @ self.load(b)

    def settle(self, *arrays):
        return arrays if len(arrays) > 1 else arrays[0]

    def wait(self, _, *arrays):
        return self.settle(*arrays)

    def columns(self, chunk, width, _):
        return slice(chunk * CHUNK, min((chunk + 1) * CHUNK, width))

    def store_rows(self, target, x, start, rows):
        end = max(int(start) + min(int(rows), len(x)), int(start))
        target.array[int(start) : end] = x[(slice(end - int(start)), *(slice(n) for n in target.shape[1:]))]


class Lanes:
    @staticmethod
    def lane():
        return np.arange(32)

    @staticmethod
    def from_lane(x, source):
        return x[source]

    @staticmethod
    def warp_sum(x):
        return np.broadcast_to(x, 32).sum()

    @staticmethod
    def warp_scan(x):
        return np.broadcast_to(x, 32).cumsum()


class Queue(Passive):
    def __init__(self):
        self.items, self.taken = [], 0

    def take(self, _, blocks):
        self.taken += 1
        return blocks + self.taken - 1

    def leave(self, _, turn, *fields):
        assert turn == len(self.items) + 1
        self.items.append(fields)

    def look(self, _, turn):
        return self.items[turn - 1]


@pytest.fixture
def numpy(monkeypatch):
    """NumPy in place of all that the kernels are written in; what divides by a sum of 0 is replaced after that."""
    lax = Lax()
    fakes = dict(jnp=lax, lax=lax, pl=Pallas(), plgpu=MosaicGpu(), hopper=Hopper(), hopper_lanes=Lanes())
    fakes |= dict(gpu_queue=Queue(), iota=lambda size, _: np.arange(size))
    fakes["load_segments"] = lambda ids, batch, start, size, _: ids[batch, int(start) : int(start) + size]
    for module in MODULES:
        for name, fake in fakes.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, fake)
    with np.errstate(all="ignore"):
        yield


def seen_queries(consumer):
    """A kind of Consumer that looks at the next item's queries when it waits for them."""

    class Sequential(consumer):
        def queries(self):
            self.smem["q"][1].turn[int(self.wg)] += 1
            return super().queries()

    return Sequential


def shared_memory(problem, config):
    qk, vo = -(-problem.head_dim // CHUNK), -(-problem.v_dim // CHUNK)
    q, k = Queries(config.warpgroups, qk, ROWS, CHUNK), Slots(qk, config.block_kv, CHUNK)
    v = Slots(vo, config.block_kv, CHUNK)
    out = Ref(np.zeros((config.warpgroups, min(vo, 2), ROWS, CHUNK), np.float32))
    smem = dict(q=(q, q), k=(k, k), v=(v, v), out=(out, out), lse=Ref(np.zeros((config.warpgroups, ROWS), np.float32)))
    names = ("q_full", "q_free", "k_full", "v_full")
    return smem | dict.fromkeys(names, Passive())


def attention(q, k, v, seen, problem, sinks):
    """q [T,H,D], k, v [S,K,D], seen [T,S] -> out [T,H,Dv], lse [H,T], in float64."""
    group = problem.heads // problem.kv_heads
    k, v = (np.repeat(np.nan_to_num(x.astype(np.float64)), group, axis=1) for x in (k, v))
    s = np.einsum("thd,shd->hts", q.astype(np.float64), k) * problem.scale
    if problem.softcap is not None:
        s = problem.softcap * np.tanh(s / problem.softcap)
    s = np.where(seen, s, -np.inf)
    if sinks is not None:
        s = np.concatenate([s, np.broadcast_to(sinks[:, None, None], (*s.shape[:2], 1))], axis=2)
    s = np.where(seen.any(axis=1)[None, :, None], s, -np.inf)
    top = np.maximum(s.max(axis=2, keepdims=True), -1e300)
    p = np.exp(s - top)
    total = p.sum(axis=2)
    lse = np.log(total) + top[..., 0]
    p = p[..., : k.shape[0]] / np.where(total > 0, total, 1)[..., None]
    return np.einsum("hts,shd->thd", p, v), lse


DIMS = [(64, 64), (80, 80), (128, 128), (256, 256)]


def dense_problems(rng, count):
    for i in range(count):
        kv_heads, group = int(rng.integers(1, 3)), int(rng.choice([1, 2]))
        q_len, kv_len = (int(x) for x in (rng.integers(1, 400, 2) if i % 2 else 128 * rng.integers(1, 4, 2)))
        left = None if rng.random() < 0.6 else int(rng.choice([0, 63, 128, 200]))
        right = None if rng.random() < 0.3 else int(rng.choice([0, 0, 0, 64, 128]))
        softcap = None if rng.random() < 0.7 else 2.0
        dims = (192, 128) if i % 5 == 4 else DIMS[i % 4]
        yield Problem(1, q_len, kv_len, kv_heads * group, kv_heads, *dims, left, right, 0.1, softcap)


@pytest.mark.usefixtures("unchecked", "numpy")
@pytest.mark.parametrize("ids", [None, "sorted", "repeating"])
def test_dense_attention(ids, rng):
    halved = 0
    for problem in dense_problems(rng, 40):
        q, k, v = (
            rng.normal(size=(1, length, heads, dim)).astype(np.float32)
            for length, heads, dim in (
                (problem.q_len, problem.heads, problem.head_dim),
                (problem.kv_len, problem.kv_heads, problem.head_dim),
                (problem.kv_len, problem.kv_heads, problem.v_dim),
            )
        )
        sinks = rng.normal(size=(1, problem.heads)) if rng.random() < 0.3 else None
        config = gpu_flash_fwd_plan.config_for(problem)
        halves = ids is None and gpu_flash_fwd.halves_diagonal(problem, config)
        halved += halves
        smem, config = shared_memory(problem, config), replace(config, stages=10**9)
        at, key = np.arange(problem.q_len)[:, None] + problem.offset, np.arange(problem.kv_len)[None]
        seen, segments, bounds = np.ones((problem.q_len, problem.kv_len), bool), None, None
        if ids is not None:
            of_q, of_kv = (segment_ids(rng, ids, 1, length) for length in (problem.q_len, problem.kv_len))
            seen &= of_q[0][:, None] == of_kv[0][None]
            arrays = padded(of_q, config.block_q), padded(of_kv, config.block_kv)
            bounds, kv_ends = gpu_flash_fwd_plan.segment_bounds(problem, config, *arrays)
            segments = tuple(map(Ref, (*arrays, bounds, kv_ends)))
        feed = gpu_flash_fwd.Dealt(gpu_flash_fwd_plan.Plan(problem, config, 1, bounds))
        gpu_flash_fwd.Producer(problem, config, feed, smem, *map(Ref, (q, k, v))).run()
        tokens = -(-problem.q_len // config.block_q) * config.block_q
        out = Ref(np.full((1, problem.q_len, problem.heads, problem.v_dim), np.nan, np.float32))
        lse = Ref(np.full((1, problem.heads, tokens), np.nan, np.float32))
        kind = seen_queries(gpu_flash_fwd.Consumer)
        for wg in range(config.warpgroups):
            wg = wg if halves else np.int64(wg)
            kind(problem, config, wg, smem, None if sinks is None else Ref(sinks), segments, out, lse).run(feed)
        if problem.left is not None:
            seen &= key >= at - problem.left
        if problem.right is not None:
            seen &= key <= at + problem.right
        want, want_lse = attention(q[0], k[0], v[0], seen, problem, None if sinks is None else sinks[0])
        np.testing.assert_allclose(out.array[0], want, atol=2e-5)
        np.testing.assert_allclose(lse.array[0, :, : problem.q_len], want_lse, atol=2e-5)
    assert halved or ids is not None


def paged_batch(rng, problem, page_size, q_lens, kv_lens, skipped):
    """Pages whose unowned slots, and what all leave out, are NaN, and a table with garbage where none may look."""
    counts = -(-kv_lens // page_size)
    num_pages, width = int(counts.sum()) + 2, int(counts.max(initial=0)) + 2
    k, v = (np.full((num_pages, page_size, problem.kv_heads, problem.head_dim), np.nan, np.float32) for _ in range(2))
    table, free = rng.choice([-5, num_pages, 2**31 - 1], (len(q_lens), width)), list(rng.permutation(num_pages))
    rows = []
    for row, kv_len in enumerate(kv_lens):
        ids = [free.pop() for _ in range(counts[row])]
        first = max(skipped or 0, 0 if problem.left is None else kv_len - q_lens[row] - problem.left)
        table[row, first // page_size : len(ids)] = ids[first // page_size :]
        of_row = [np.full((kv_len, *k.shape[2:]), np.nan, np.float32) for _ in range(2)]
        for at in range(first // page_size * page_size, kv_len):
            for pages, kept in zip((k, v), of_row, strict=True):
                kept[at] = pages[ids[at // page_size], at % page_size] = rng.normal(size=k.shape[2:])
        rows.append(of_row)
    return k, v, table, rows


def paged_cases(rng, count):
    for i in range(count):
        kv_heads, group = int(rng.integers(1, 3)), int(rng.choice([1, 2]))
        rows = int(rng.integers(1, 5))
        q_lens = rng.choice([0, 1, 5, 20, 127, 128, 129, 200], rows)
        kv_lens = np.where(rng.random(rows) < 0.85, q_lens, 0) + rng.choice([0, 1, 64, 130, 256], rows)
        left = None if rng.random() < 0.6 else int(rng.choice([0, 63, 128, 200]))
        right = None if rng.random() < 0.2 else 0
        skipped = None if left is not None or rng.random() < 0.6 else int(rng.choice([0, 1, 64, 100]))
        tokens = max(int(q_lens.sum()) + int(rng.integers(0, 4)), 1)
        dims = DIMS[i % 4]
        problem = Problem(1, tokens, 1024, kv_heads * group, kv_heads, *dims, left, right, 0.1, None)
        yield problem, [8, 16, 64, 128, 256][i % 5], q_lens, kv_lens, skipped


@pytest.mark.usefixtures("unchecked", "numpy")
def test_paged_prefill(rng, monkeypatch):
    for problem, page_size, q_lens, kv_lens, skipped in paged_cases(rng, 40):
        for module in MODULES:
            if hasattr(module, "gpu_queue"):
                monkeypatch.setattr(module, "gpu_queue", Queue())
        monkeypatch.setattr(gpu_flash_fwd, "gpu_queue", Queue())
        left_out = int(rng.choice([0, 16]))
        k, v, table, of_rows = paged_batch(rng, problem, page_size, q_lens, kv_lens, skipped)
        q = np.full((1, problem.q_len, problem.heads, problem.head_dim), np.nan, np.float32)
        q[0, : q_lens.sum()] = rng.normal(size=q[0, : q_lens.sum()].shape)
        sinks = rng.normal(size=(1, problem.heads)) if rng.random() < 0.3 else None
        config, cu_q_lens = gpu_flash_fwd_plan.config_for(problem), np.cumsum([0, *q_lens])
        smem, config = shared_memory(problem, config), replace(config, stages=10**9)
        given = None if skipped is None else np.array([skipped])
        plan = gpu_paged_prefill_plan.PagedPlan(problem, config, 1, left_out, kv_lens, cu_q_lens, given)
        feed = gpu_flash_fwd.Taken(plan, smem)
        gpu_flash_fwd.take_items(plan, smem, None)
        for name in "kv":
            arrays = map(Ref, (q, k, v, table))
            gpu_paged_prefill.PagedProducer(problem, config, feed, smem, *arrays, page_size, name).run()
        out, lse = np.full(q.shape, 7.0, np.float32), np.full((1, problem.heads, problem.q_len), 7.0, np.float32)
        kind = seen_queries(gpu_paged_prefill.PagedConsumer)
        for wg in range(config.warpgroups):
            refs = None if sinks is None else Ref(sinks), None, Ref(out), Ref(lse)
            kind(problem, config, np.int64(wg), smem, *refs, skipped is not None).run(feed)
        check_rows(problem, q[0], of_rows, out[0], lse[0], sinks, cu_q_lens, left_out, skipped or 0)


def check_rows(problem, q, of_rows, out, lse, sinks, cu_q_lens, left_out, skipped):
    for (k, v), (start, end) in zip(of_rows, itertools.pairwise(cu_q_lens), strict=True):
        if end - start <= left_out:
            assert (out[start:end] == 7).all()
            continue
        at, key = np.arange(end - start)[:, None] + len(k) - (end - start), np.arange(len(k))[None]
        seen = np.broadcast_to(key >= skipped, (end - start, len(k)))
        if problem.right is not None:
            seen = seen & (key <= at)
        if problem.left is not None:
            seen = seen & (key >= at - problem.left)
        if not len(k):
            assert not out[start:end].any()
            assert np.isneginf(lse[:, start:end]).all()
            continue
        want, want_lse = attention(q[start:end], k, v, seen, problem, None if sinks is None else sinks[0])
        np.testing.assert_allclose(out[start:end], want, atol=2e-5)
        np.testing.assert_allclose(lse[:, start:end], want_lse, atol=2e-5)
    assert (out[cu_q_lens[-1] :] == 7).all()
