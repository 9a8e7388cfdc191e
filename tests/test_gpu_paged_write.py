"""What the Hopper kernel that compresses and writes computes, with its own code run in NumPy for every worker."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from paged_cases import check_compressed
from test_gpu_numbers import Lax, Pallas, Ref

from paxattn.kernels import codes, gpu_blocks, gpu_paged_write_codes
from paxattn.kernels.hopper_units import ROWS, UNIT


class Block(Lax):
    """One warpgroup of the grid."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks, self.wg = blocks, 0

    def axis_index(self, name):
        return self.wg if name == "wg" else self.cta

    def axis_size(self, _):
        return self.blocks


class Units:
    """A row of [128, 16] is a unit."""

    def turn(self, x, block):
        signs = 1 - 2 * (np.bitwise_count(np.arange(block)[:, None] & np.arange(block)).astype(int) % 2)
        return (x.reshape(-1, block) @ signs.astype(np.float32)).reshape(x.shape)

    def largest(self, x):
        return np.abs(x).max(axis=1)

    def over_lanes_sum(self, x, lanes):
        return x.reshape(-1, lanes).sum(axis=1).repeat(lanes)

    def over_lanes_max(self, x, lanes):
        return x.reshape(-1, lanes).max(axis=1).repeat(lanes)

    def sums(self, x, inverse, dtype):
        rounded = self.codes(x, inverse, dtype).astype(np.float32)
        return (rounded * rounded).sum(axis=1), (rounded * x).sum(axis=1)

    def codes(self, x, inverse, dtype):
        assert x.dtype == inverse.dtype == np.float32
        scaled = x * inverse[:, None]
        assert (np.abs(scaled) < codes.COMPRESSED[dtype.name] + 0.01).all()
        return (np.round(scaled) if dtype == np.int8 else scaled).astype(dtype)


class Lanes:
    def along(self, x, shape, _):
        return np.broadcast_to(x[:, None], shape)

    def load_rows(self, source, rows, _):
        assert rows.shape == (ROWS,)
        return source.array[np.maximum(rows, 0)]

    def store_rows(self, target, rows, x, _):
        assert len(set(rows[rows >= 0])) == (rows >= 0).sum()
        target.array[rows[rows >= 0]] = x[rows >= 0]


@pytest.fixture
def block(monkeypatch):
    block = Block(3)
    fakes = dict(jnp=block, lax=block, pl=Pallas(), hopper_lanes=Lanes(), hopper_units=Units())
    fakes["iota"] = lambda size, _: np.arange(size)
    for module in (gpu_blocks, gpu_paged_write_codes):
        for name, fake in fakes.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, fake)
    with np.errstate(divide="ignore"):
        yield block


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize(
    ("tokens", "heads", "dim"), [(1, 1, 64), (39, 7, 64), (37, 5, 80), (41, 3, 96), (131, 2, 128), (23, 3, 256)]
)
def test_codes_and_scales_are_those_of_xla(tokens, heads, dim, dtype, block, rng):
    dtype, page_size, num_pages = jnp.dtype(dtype), 8, tokens // 8 + 3
    slots_in = num_pages * page_size
    k, v = (rng.normal(size=(2, tokens, heads, dim)) * 10 ** rng.uniform(-2, 2, (2, tokens, heads, 1))).astype("f4")
    v[tokens // 2] = 0
    slots = rng.permutation(slots_in)[:tokens]
    skipped = rng.random(tokens) < (0.2 if tokens > 1 else 0)
    slots[skipped] = rng.choice([-1, slots_in, 2**31 - 1, -(2**31)], skipped.sum())
    units = dim // UNIT
    before = [rng.integers(-100, 100, (slots_in * heads * units, UNIT)).astype(dtype) for _ in range(2)]
    before += [rng.normal(size=slots_in * heads * n).astype(np.float16) for n in (units, 1)]
    after = [x.copy() for x in before]
    new = [Ref(x.reshape(-1, UNIT)) for x in (k, v)]
    for cta, wg in itertools.product(range(block.blocks), range(gpu_paged_write_codes.WARPGROUPS)):
        block.cta, block.wg = cta, wg
        gpu_paged_write_codes._kernel((tokens, heads, dim), slots_in, Ref(slots), *new, *map(Ref, after))

    there, others = slots[~skipped], np.setdiff1d(np.arange(slots_in), slots)
    for x, y in zip(before, after, strict=True):
        x, y = (z.reshape(slots_in, -1)[others] for z in (x, y))
        assert x.tobytes() == y.tobytes()
    for x, stored, scales in ((k, after[0], after[2]), (v, after[1], after[3])):
        turned = codes.rotate(jnp.asarray(x))
        groups = scales.size // slots_in // heads
        want = [np.asarray(y)[~skipped] for y in codes.compress(turned, dtype, groups)]
        got = [y.reshape(slots_in, heads, -1)[there] for y in (stored, scales)]
        check_compressed(np.asarray(turned)[~skipped], got, want)
