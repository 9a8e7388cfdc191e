"""What the Hopper consumer of compressed pages computes, with its own code run in NumPy.

Products are of what their tiles hold when they are waited for, so that a tile that is written too early is found out.
Whatever no query may see is NaN.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from test_gpu_numbers import Hopper, Lax, MosaicGpu, Pallas, Passive, Ref, attention

from paxattn.kernels import gpu_paged_codes, gpu_paged_decode
from paxattn.kernels.gpu_blocks import ROWS
from paxattn.kernels.gpu_paged_plan import Problem
from paxattn.kernels.problem import LOG2E


class InFlight:
    def __init__(self, product):
        self.product = product


class Asynchronous(Hopper):
    def scores(self, a, b):
        return InFlight(lambda: (a if isinstance(a, np.ndarray) else a.array) @ b.array.T)

    def accumulate(self, acc, p, b):
        return InFlight(lambda: acc + p @ b.array)

    def wait(self, _, *arrays):
        return self.settle(*(x.product() if isinstance(x, InFlight) else x for x in arrays))


class Codes:
    UNIT = 16

    def expand_keys(self, codes, scales, _, tile):
        tile.array[:, : codes.shape[1]] = codes.array * np.repeat(scales.array, self.UNIT, axis=1)

    def expand_values(self, codes, first, end, tile):
        tile.array[:, : codes.shape[1]] = np.where(kept(codes, first, end)[:, None], codes.array, 0)

    def load_scale(self, scales, _):
        return scales.array[:, 0]

    def store_scale(self, scale, first, end, factor, target):
        target.array[:] = np.where(kept(target, first, end), scale * factor, 0)


def kept(rows, first, end):
    row = np.arange(rows.shape[0])
    return (row >= first) & (row < end)


class Lanes(Passive):
    def load_rows(self, source, rows, _, width=None):
        loaded = source.array[np.maximum(rows, 0)]
        return np.pad(loaded, ((0, 0), (0, (width or loaded.shape[1]) - loaded.shape[1])))


class Gpu(MosaicGpu):
    def load(self, ref, **_):
        return ref.array


class Ring:
    """As many slots as there are blocks, [blocks, rows, columns]."""

    def __init__(self, array, first, block):
        rows = np.pad(array, ((0, -len(array) % block), (0, 0)), constant_values=np.nan)
        self.slots = rows.reshape(-1, block, array.shape[1])[first:]

    @property
    def at(self):
        return self

    def __getitem__(self, index):
        return Ref(self.slots[int(index[1])])


@pytest.fixture
def _numpy(monkeypatch):
    lax, hopper = Lax(), Asynchronous()
    fakes = dict(jnp=lax, lax=lax, pl=Pallas(), plgpu=Gpu(), hopper=hopper, hopper_pages=hopper)
    fakes |= dict(hopper_lanes=Lanes(), hopper_codes=Codes(), iota=lambda size, _: np.arange(size), HALF=np.float64)
    for module in (gpu_paged_decode, gpu_paged_codes):
        for name, fake in fakes.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, fake)
    with np.errstate(all="ignore"):
        yield


def problems(rng, count):
    for i in range(count):
        dim, group = (64, 80, 96, 128, 256)[i % 5], int(rng.choice([1, 4, 7]))
        left = None if rng.random() < 0.5 else int(rng.choice([0, 63, 64, 200]))
        softcap = None if rng.random() < 0.7 else 2.0
        yield Problem(int(rng.integers(1, 4)), group, 1, dim, 16, 3, left, dim**-0.5, softcap)


@pytest.mark.usefixtures("unchecked", "_numpy")
def test_blocks_of_compressed_keys_and_values(rng):
    for problem in problems(rng, 100):
        q_len, group, dim, left = problem.tokens, problem.group, problem.head_dim, problem.left
        config = replace(gpu_paged_codes.config_for(problem), slots=10**6)
        around_blocks = config.block * rng.integers(1, 6) + rng.integers(-1, 5)
        kv_len = int(rng.choice([rng.integers(q_len, 700), around_blocks]))
        begin = 0 if left is None else max(kv_len - q_len - left, 0)
        first = begin // config.block
        k, v = (rng.integers(-127, 128, (kv_len, dim)).astype(float) for _ in range(2))
        k_scale, v_scale = (rng.uniform(0.001, 0.01, (kv_len, n)) for n in (dim // Codes.UNIT, 1))
        for x in (k, v, k_scale, v_scale):
            x[:begin] = np.nan
        given = dict(k_codes=k, v_codes=v, k_scales=k_scale, v_scales=v_scale)
        smem = {name: Ring(x, first, config.block) for name, x in given.items()}
        for name, rows in dict(q=ROWS, k=config.block, v=config.block).items():
            smem[name] = None, Ref(np.full((1, rows, problem.columns), np.nan))
        smem |= dict(
            v_weights=Ref(np.full((1, config.block), np.nan)), **dict.fromkeys(("landed", "full", "free"), Passive())
        )
        q = rng.normal(size=(q_len * group, dim))
        plan = SimpleNamespace(problem=problem, config=config, skipped=None)
        lengths = dict(blocks=-(-kv_len // config.block) - first, begin=begin, kv_len=kv_len, q_len=q_len)
        item = SimpleNamespace(block=first, q_start=0, head=0, **lengths)
        consumer = gpu_paged_codes.CodeConsumer(plan, 0, 0, smem, Ref(q), *[None] * 8)
        if dim < problem.columns:
            consumer.clear_tiles()
        consumer.load_queries(item)
        nothing = np.zeros((ROWS, problem.columns)), np.full(ROWS, gpu_paged_decode.NEVER), np.zeros(ROWS)
        o, m, l = (x[: len(q)] for x in consumer.steps(item, 0, nothing))
        at, key = np.arange(q_len)[:, None] + kv_len - q_len, np.arange(kv_len)[None]
        seen = (key <= at) & (left is None or key >= at - left)
        keys, values = k * np.repeat(k_scale, Codes.UNIT, axis=1), v * v_scale
        want, want_lse = attention(q.reshape(q_len, group, dim), keys[:, None], values[:, None], seen, problem, None)
        np.testing.assert_allclose((o / (l * consumer.weight)[:, None])[:, :dim].reshape(want.shape), want, atol=1e-6)
        np.testing.assert_allclose(((m + np.log2(l)) / LOG2E).reshape(q_len, group).T, want_lse, atol=1e-6)
