"""What the paged prefill kernel visits, with its own code run in NumPy; how the parts of a prefix merge."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_gpu_paged_plan import Warp
from test_gpu_plan import DIMS

from paxattn.kernels import (
    gpu_blocks,
    gpu_flash_fwd,
    gpu_flash_fwd_plan,
    gpu_paged,
    gpu_paged_plan,
    gpu_paged_prefill,
    gpu_paged_prefill_plan,
)
from paxattn.kernels.gpu_blocks import ROWS
from paxattn.kernels.problem import Problem

MODULES = (gpu_blocks, gpu_flash_fwd_plan, gpu_flash_fwd, gpu_paged_plan, gpu_paged_prefill_plan, gpu_paged_prefill)


@pytest.fixture
def _warp(monkeypatch):
    warp = Warp()
    for module in MODULES:
        for name in ("jnp", "lax", "hopper_lanes"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, warp)


class Consumer(gpu_paged_prefill.PagedConsumer):
    def step(self, item, count, masked, j, state):
        return (*state, (j, masked))


def batches(rng, count):
    """Problems, the rows' numbers of queries and keys, and how many keys all leave out, or None."""
    for i in range(count):
        rows, kv_heads, group = int(rng.integers(1, 6)), int(rng.integers(1, 3)), int(rng.choice([1, 2, 7]))
        if i % 10 == 0:  # more than a warp looks at at once
            rows, kv_heads, group = int(rng.choice([32, 33, 256, 257, 600])), 1, 1
        q_lens = rng.choice([0, 1, 5, 16, 17, 127, 128, 129, 300], rows)
        kv_lens = np.where(rng.random(rows) < 0.8, q_lens, 0) + rng.choice([0, 1, 64, 127, 128, 500], rows)
        left = None if rng.random() < 0.5 else int(rng.choice([0, 1, 127, 128, 200]))
        right = 0 if rng.random() < 0.8 else None
        dims = DIMS[rng.integers(len(DIMS) - 1)]
        tokens = int(q_lens.sum() + rng.integers(0, 4)) or 1
        problem = Problem(1, tokens, 1024, kv_heads * group, kv_heads, *dims, left, right, 1.0, None)
        yield problem, q_lens, kv_lens, None if rng.random() < 0.6 else np.array([int(rng.choice([0, 1, 100, 128]))])


@pytest.mark.usefixtures("unchecked", "_warp")
@pytest.mark.parametrize("left_out", [0, 16])
def test_every_query_of_a_long_row_is_served_once_and_sees_what_it_should(rng, left_out):
    for problem, q_lens, kv_lens, skipped in batches(rng, 60):
        config, cu_q_lens = gpu_flash_fwd_plan.config_for(problem), np.cumsum([0, *q_lens])
        plan = gpu_paged_prefill_plan.PagedPlan(problem, config, 7, left_out, kv_lens, cu_q_lens, skipped)
        items = list(itertools.takewhile(lambda item: item.blocks, map(plan.item, map(np.int64, itertools.count()))))
        served = np.zeros((problem.heads, problem.q_len), int)
        for item in items:
            served[item.head, item.q_start : item.q_start + item.place.rows] += 1
            check(problem, config, item, int(q_lens[item.place.row]), skipped)
        of_long = np.repeat(q_lens > left_out, q_lens)
        np.testing.assert_array_equal(
            served, np.pad(of_long, (0, problem.q_len - len(of_long)))[None] * np.ones_like(served)
        )


def check(problem, config, item, q_len, skipped):
    size, start, blocks, place = config.block_kv, int(item.lo * config.block_kv), int(item.blocks), item.place
    assert 0 < place.rows <= config.block_q
    position = int(place.position) + np.arange(config.block_q)[:, None]
    assert 0 <= place.position - (place.end - q_len) <= q_len - place.rows
    keys = np.arange(start + blocks * size + 2 * size)[None]
    seen = (keys < place.end) & (keys >= (0 if skipped is None else skipped[0]))
    if problem.right is not None:
        seen = seen & (keys <= position)
    if problem.left is not None:
        seen = seen & (keys >= position - problem.left)
    seen = np.broadcast_to(seen, (config.block_q, keys.size))
    columns = np.flatnonzero(seen[: place.rows].any(axis=0))
    assert not columns.size or (
        place.begin <= columns[0] and start <= columns[0] and columns[-1] < start + blocks * size
    )
    for which in range(config.warpgroups):
        consumer = Consumer(problem, config, which, {}, None, None, None, None, skipped is not None)
        steps = [(0, consumer.right_edge_exists()), *consumer.steps(item, 0, ())]
        assert [j for j, _ in steps] == list(range(blocks))
        for j, masked in steps:
            first = start + (blocks - 1 - j) * size
            assert masked or seen[which * ROWS : (which + 1) * ROWS, first : first + size].all()


@pytest.mark.parametrize("few", [1, 9, 64])
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_pieces_of_rows_have_every_query_where_it_was(rng, few, rows):
    tokens = 40 * rows
    pieces = jax.jit(partial(gpu_paged._in_pieces, few, tokens))
    for _ in range(20):
        q_lens = rng.choice([0, 1, few, few + 1, 2 * few, 40], rows).clip(max=40)
        kv_lens = np.where(rng.random(rows) < 0.8, q_lens, 0) + rng.choice([0, 1, 64, 500], rows)
        own = np.stack([np.arange(rows), rng.choice([-5, 2**31 - 1], rows)], axis=1)  # and what may be anything
        arrays = own, kv_lens, np.cumsum([0, *q_lens])
        table, ends, starts = map(np.asarray, pieces(*(jnp.asarray(x, jnp.int32) for x in arrays)))
        lens = np.diff(starts)
        assert len(table) == len(ends) == len(lens)
        assert 0 <= lens.min() <= lens.max() <= few
        assert (starts[0], starts[-1]) == (0, q_lens.sum())
        assert (table[:, 1] == own[table[:, 0], 1]).all()
        assert places(table[:, 0], ends, lens) == places(np.arange(rows), kv_lens, q_lens)


def places(row, kv_lens, q_lens):
    """Of each query its row and position; -1 where it sees nothing."""
    position = np.concatenate([np.arange(n) + end - n for n, end in zip(q_lens, kv_lens, strict=True)])
    return np.repeat(row, q_lens).tolist(), np.maximum(position, -1).tolist()


def test_results_over_parts_of_the_keys_merge_to_that_over_all(rng):
    tokens, heads, dim, parts, keys = 5, 3, 4, 3, 7
    scores = rng.normal(size=(parts + 1, tokens, heads, keys))
    values = rng.normal(size=(*scores.shape, dim))

    def attend(s, v):
        p = np.exp(s)
        return (p[..., None] * v).sum(axis=2) / p.sum(axis=2)[..., None], np.log(p.sum(axis=2)).T

    (own, own_lse), *others = [attend(*part) for part in zip(scores, values, strict=True)]
    outs, lses = np.stack([x for x, _ in others]), np.stack([x for _, x in others], axis=1)
    own[-1], own_lse[:, -1], outs[:, -1], lses[..., -1] = 0, -np.inf, np.nan, np.nan  # a token of the padding
    exact = partial(jnp.asarray, dtype=jnp.float32)
    merged = gpu_paged._merge((exact(own), exact(own_lse)), (exact(outs), exact(lses)), jnp.int32(tokens - 1))
    want, want_lse = attend(*(np.concatenate(list(x), axis=2) for x in (scores, values)))
    want[-1], want_lse[:, -1] = 0, -np.inf
    np.testing.assert_allclose(merged[0], want, atol=1e-6)
    np.testing.assert_allclose(merged[1], want_lse, atol=1e-6)
