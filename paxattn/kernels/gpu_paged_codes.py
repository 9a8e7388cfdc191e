"""Compressed pages in the paged decode kernel: int8 and float8_e4m3fn codes and their scales.

A slot of a worker's ring has a block's codes, as TMA brings them, and its scales, which a warp of their own copies, as
TMA takes no less than sixteen bytes of a row. The consumer makes float16 tiles of the codes, keys with their scales.
Values get theirs from the weights, one factor for all columns. The products are of float16 whatever q is.
"""

from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from paxattn.kernels import hopper, hopper_codes, hopper_lanes, hopper_pages
from paxattn.kernels.gpu_blocks import ROWS, iota
from paxattn.kernels.gpu_paged_decode import Consumer, Kind, Producer, pages_in
from paxattn.kernels.gpu_paged_plan import SHARED_BYTES, Config, Item, Problem
from paxattn.kernels.hopper import COL, ROW, WGMMA
from paxattn.kernels.hopper_lanes import LANES

HALF = jnp.float16
LIFT = 64.0  # A factor of weights, so that small ones, times the scale of values, and large scales are float16 numbers.


def serves(pages: Any) -> bool:
    groups = pages.k_scale.shape[-1], pages.v_scale.shape[-1]
    return pages.k.dtype.name in hopper_codes.TO_HALVES and groups == (pages.head_dim // hopper_codes.UNIT, 1)


def scales_a_row(problem: Problem) -> tuple[int, int]:
    """Numbers of keys' and of values' scales in shared memory, which has room for one more where they are odd."""
    groups = scales_of_keys(problem)
    return groups + groups % 2, 2


def scales_of_keys(problem: Problem) -> int:
    """Of a key and a head."""
    return problem.head_dim // hopper_codes.UNIT


def q_in_registers(problem: Problem) -> bool:
    """Whether there are enough: room for another slot, and less for shared memory to serve."""
    return problem.columns <= 128


def config_for(problem: Problem) -> Config:
    columns = problem.columns
    warpgroups = 2 if columns <= 128 else 1
    block = 128 if columns < 128 else 64
    tiles = 2 * block + (0 if q_in_registers(problem) else ROWS)
    room = SHARED_BYTES // warpgroups - 2 * columns * tiles - 4 * block
    slot = block * (2 * problem.head_dim + 2 * sum(scales_a_row(problem)))
    return Config(block, room // slot, warpgroups)


def _scratch(problem: Problem, config: Config, dtype: Any) -> dict:
    wgs, slots, block, dim = config.warpgroups, config.slots, config.block, problem.head_dim
    ring = wgs, slots, block
    of_keys, of_values = scales_a_row(problem)
    queries = {} if q_in_registers(problem) else dict(q=hopper_pages.tile(wgs, ROWS, dim, dtype=HALF))
    return queries | dict(
        k=hopper_pages.tile(wgs, block, dim, dtype=HALF),
        v=hopper_pages.tile(wgs, block, dim, dtype=HALF),
        v_weights=plgpu.SMEM((wgs, block), jnp.float32),
        k_codes=plgpu.SMEM((*ring, dim), dtype),
        v_codes=plgpu.SMEM((*ring, dim), dtype),
        k_scales=plgpu.SMEM((*ring, of_keys), HALF),
        v_scales=plgpu.SMEM((*ring, of_values), HALF),
        landed=plgpu.SMEM((wgs, slots, 2), jnp.int32),
        full=plgpu.Barrier(num_arrivals=2 * pages_in(problem, config) + 1, num_barriers=wgs * slots),
        free=plgpu.Barrier(num_barriers=wgs * slots),
    )


class Codes(Producer):
    """A warp that streams a worker's codes."""

    slots_a_block: ClassVar[int] = 1

    def load(self, item: Item, j, count, entries, lane) -> None:
        slot, full = self.free_slot(count)
        for source, target in zip(self.pages[:2], ("k_codes", "v_codes"), strict=True):
            for start, to in self.page_rows(item, j, entries, lane):
                rows = source.at[pl.ds(start, to.size), item.head]
                plgpu.copy_gmem_to_smem(rows, self.smem[target].at[self.wg, slot, to], full)


class Scales(Producer):
    """A warp that streams a worker's scales. The copies themselves tell when they have landed: a warp that waited for
    them could have fewer blocks on their way than there are slots."""

    slots_a_block: ClassVar[int] = 1

    def run(self) -> None:
        hopper_lanes.prepare_landings(self.smem["landed"].at[self.wg])
        super().run()
        hopper_lanes.finish_copies()

    def load(self, item: Item, j, count, entries, lane) -> None:
        slot, full = self.free_slot(count)
        problem, config = self.plan.problem, self.plan.config
        rows = config.block // pages_in(problem, config)
        inside = lax.rem((item.block + j) * config.block, jnp.int32(problem.page_size))
        for start in range(0, config.block, LANES):
            row = hopper_lanes.lane() + start
            page = hopper_lanes.from_lane(entries, lane + lax.div(row, jnp.int32(rows)))
            at = page * problem.page_size + inside + lax.rem(row, jnp.int32(rows))
            for source, target in zip(self.pages[2:], ("k_scales", "v_scales"), strict=True):
                hopper_lanes.copy_halves(source.at[at, item.head], self.smem[target].at[self.wg, slot, row])
        hopper_lanes.land_at(self.smem["landed"].at[self.wg, slot])
        plgpu.barrier_arrive(full)  # The consumer may look at the landing, which was not there at first.


class CodeConsumer(Consumer):
    slots_a_block: ClassVar[int] = 1
    weight: ClassVar[float] = LIFT

    def run(self) -> None:
        if self.problem.head_dim < self.problem.columns:
            self.clear_tiles()
        super().run()

    def clear_tiles(self) -> None:
        """Columns past the head's stay 0."""
        for name in ("k", "v"):
            tile = self.smem[name][1].at[self.wg]
            tile[...] = plgpu.layout_cast(jnp.zeros(tile.shape, HALF), hopper.WGMMA)
        self.meet()

    def load_queries(self, item: Item) -> None:
        if not q_in_registers(self.problem):
            super().load_queries(item)

    def queries(self, item: Item) -> list[Array]:
        """Those in registers."""
        if not q_in_registers(self.problem):
            return []
        rows = self.query_rows(item, iota(ROWS, ROW))
        return [hopper_lanes.load_rows(self.q, rows, WGMMA, self.problem.columns).astype(HALF)]

    def steps(self, item: Item, count, state):
        o, m, l = state
        q = self.queries(item)
        self.take_keys(item, count, 0)
        state = self.weigh(item, count, 0, o, m, l, *q)
        o, m, l, p, *_ = lax.fori_loop(1, item.blocks, partial(self.step, item, count), state)
        return hopper.wait(0, hopper_pages.accumulate(o, p, self.tile_of("v"))), m, l

    def step(self, item: Item, count, j, state):
        """Weights of block j. Those of the block before meet their values while the keys of this one are expanded."""
        o, m, l, p, *q = state
        o, p, *q = hopper.settle(o, p, *q)
        o = hopper_pages.accumulate(o, p, self.tile_of("v"))
        self.take_keys(item, count, j)
        o, _ = hopper.wait(0, o, p)
        return self.weigh(item, count, j, o, m, l, *q)

    def take_keys(self, item: Item, count, j) -> None:
        slot = self.slot(count, j)
        self.wait_for(slot)
        turn = lax.div(count + j, jnp.int32(self.config.slots))
        hopper_lanes.wait_until_landed(self.smem["landed"].at[self.wg, slot], lax.rem(turn, jnp.int32(2)))
        codes, scales = (self.smem[name].at[self.wg, slot] for name in ("k_codes", "k_scales"))
        hopper_codes.expand_keys(codes, scales, self.odd(item, scales_of_keys(self.problem)), self.tile_of("k"))

    def weigh(self, item: Item, count, j, o, m, l, *q):
        slot, weights = self.slot(count, j), self.smem["v_weights"].at[self.wg]
        start = (item.block + j) * self.config.block
        seen = item.begin - start, item.kv_len - start
        hopper.fence()
        self.meet()  # All keys are there, and the values of the block before have been used.
        s = hopper_pages.scores(q[0] if q else self.tile_of("q"), self.tile_of("k"))
        codes, scales = (self.smem[name].at[self.wg, slot] for name in ("v_codes", "v_scales"))
        hopper_codes.expand_values(codes, *seen, self.tile_of("v"))
        hopper_codes.expand_scales(scales, self.odd(item, 1), *seen, LIFT, weights)
        hopper.fence()
        self.release(slot)
        p, m, l, alpha = self.softmax(hopper.wait(0, s), m, l, item, item.block + j)
        self.meet()
        p = p * lax.broadcast_in_dim(plgpu.load(weights, layout=COL, optimized=False), p.shape, [1])
        return o * lax.broadcast_in_dim(alpha, o.shape, [0]), m, l, p.astype(HALF), *q

    def mask(self, s, item: Item, block):
        """Nothing where all queries see all keys of the block."""
        start = block * self.config.block
        open_to_all = start + self.config.block <= item.kv_len - item.q_len + 1
        if self.problem.left is not None:
            open_to_all &= start >= item.kv_len - 1 - self.problem.left
        return lax.cond(open_to_all, lambda: s, lambda: super(CodeConsumer, self).mask(s, item, block))

    def slot(self, count, j) -> Array:
        return lax.rem(count + j, jnp.int32(self.config.slots))

    def tile_of(self, name: str) -> Any:
        return self.smem[name][1].at[self.wg]

    def odd(self, item: Item, scales: int) -> Array:
        """As `hopper_codes` takes it, of so many scales a row."""
        if scales % 2 == 0:
            return jnp.int32(0)
        of_head = lax.rem(item.head, jnp.int32(2))
        return of_head if self.problem.kv_heads % 2 == 0 else -1 - of_head


CODES = Kind(_scratch, (Codes, Scales), CodeConsumer)
