"""Compressed pages in the paged decode kernel: int8 and float8_e4m3fn codes and their scales.

A slot of a ring has a block's codes, as TMA brings them, and its scales, which a warp of their own copies, as TMA takes
no less than sixteen bytes of a row. Workers of a block of the grid that read neighbouring heads share a
ring. The consumer makes float16 tiles of the codes, keys with their scales. Values get theirs from the weights, one
factor for all columns. The products are of float16 whatever q is.
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


def sharers(problem: Problem, config: Config) -> int:
    """Workers that share a ring: they always have the same blocks of two heads, and 128 bytes of a token, which is one
    head, are less than memory likes to be read by."""
    return config.warpgroups if problem.kv_heads % config.warpgroups == 0 else 1


def _scratch(problem: Problem, config: Config, dtype: Any) -> dict:
    wgs, slots, block, dim = config.warpgroups, config.slots, config.block, problem.head_dim
    scales, together = (wgs, slots, block), sharers(problem, config)
    rings = wgs // together
    codes = rings, slots, block, together
    of_keys, of_values = scales_a_row(problem)
    queries = {} if q_in_registers(problem) else dict(q=hopper_pages.tile(wgs, ROWS, dim, dtype=HALF))
    return queries | dict(
        k=hopper_pages.tile(wgs, block, dim, dtype=HALF),
        v=hopper_pages.tile(wgs, block, dim, dtype=HALF),
        v_weights=plgpu.SMEM((wgs, block), jnp.float32),
        k_codes=plgpu.SMEM((*codes, dim), dtype),
        v_codes=plgpu.SMEM((*codes, dim), dtype),
        k_scales=plgpu.SMEM((*scales, of_keys), HALF),
        v_scales=plgpu.SMEM((*scales, of_values), HALF),
        landed=plgpu.SMEM((wgs, slots, 2), jnp.int32),
        full=plgpu.Barrier(num_arrivals=2 * pages_in(problem, config) + together, num_barriers=rings * slots),
        free=plgpu.Barrier(num_arrivals=together, num_barriers=rings * slots),
    )


class Shared(Producer):
    """A warp that fills a ring, which is perhaps not its worker's alone."""

    slots_a_block: ClassVar[int] = 1

    @property
    def sharers(self) -> int:
        return sharers(self.plan.problem, self.plan.config)

    @property
    def ring(self) -> int:
        return self.wg // self.sharers


class Codes(Shared):
    """A warp that streams the codes of all workers that share a ring, if its worker is the first of them."""

    def load(self, item: Item, j, count, entries, lane) -> None:
        if self.wg % self.sharers:
            return
        slot, full = self.free_slot(count)
        heads = pl.ds(item.head, self.sharers)
        for source, target in zip(self.pages[:2], ("k_codes", "v_codes"), strict=True):
            for start, to in self.page_rows(item, j, entries, lane):
                tile = self.smem[target].at[self.ring, slot, to]
                plgpu.copy_gmem_to_smem(source.at[pl.ds(start, to.size), heads], tile, full)


class Scales(Shared):
    """A warp that streams a worker's scales. The copies themselves tell when they have landed: a warp that waited for
    them could have fewer blocks on their way than there are slots."""

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

    @property
    def sharers(self) -> int:
        return sharers(self.problem, self.config)

    @property
    def ring(self) -> Array:
        return self.wg if self.sharers == 1 else jnp.int32(0)

    def codes(self, name: str, slot) -> Any:
        """This worker's in a slot, [block, D]."""
        place = jnp.int32(0) if self.sharers == 1 else self.wg
        return self.smem[name].at[self.ring, slot, :, place]

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
        self.all_stored()
        s = self.scores(q)
        self.take_values(item, count, 0)
        state = o, m, l, hopper.wait(0, s), *q
        o, m, l, s, *_ = lax.fori_loop(1, item.blocks, partial(self.step, item, count), state)
        self.meet()  # The scales of the values are there.
        p, m, l, alpha = self.weigh(s, m, l, item, item.blocks - 1)
        o = o * lax.broadcast_in_dim(alpha, o.shape, [0])
        self.all_stored()
        return hopper.wait(0, hopper_pages.accumulate(o, p, self.tile_of("v"))), m, l

    def step(self, item: Item, count, j, state):
        """Scores of block j, and the sums with block j - 1, whose scores are there and whose values are expanded.

        Nothing waits for what was stored: keys are expanded before the softmax, values under the products.
        """
        o, m, l, s, *q = state
        self.meet()  # The keys of the block before have been used in all warps.
        self.take_keys(item, count, j)
        p, m, l, alpha = self.weigh(s, m, l, item, j - 1)
        o = o * lax.broadcast_in_dim(alpha, o.shape, [0])
        self.all_stored()
        o, p, *q = hopper.settle(o, p, *q)
        o = hopper_pages.accumulate(o, p, self.tile_of("v"))
        s = self.scores(q)
        o, p = hopper.wait(1, o, p)
        self.meet()  # The values have.
        self.take_values(item, count, j)
        return o, m, l, hopper.wait(0, s), *q

    def all_stored(self) -> None:
        hopper.fence()
        self.meet()

    def scores(self, q: list[Array]) -> Array:
        return hopper_pages.scores(q[0] if q else self.tile_of("q"), self.tile_of("k"))

    def take_keys(self, item: Item, count, j) -> None:
        slot = self.slot(count, j)
        self.wait_for(slot)
        turn = lax.div(count + j, jnp.int32(self.config.slots))
        hopper_lanes.wait_until_landed(self.smem["landed"].at[self.wg, slot], lax.rem(turn, jnp.int32(2)))
        codes, scales = self.codes("k_codes", slot), self.smem["k_scales"].at[self.wg, slot]
        hopper_codes.expand_keys(codes, scales, self.odd(item, scales_of_keys(self.problem)), self.tile_of("k"))

    def take_values(self, item: Item, count, j) -> None:
        slot, start = self.slot(count, j), (item.block + j) * self.config.block
        seen = item.begin - start, item.kv_len - start
        codes, scales = self.codes("v_codes", slot), self.smem["v_scales"].at[self.wg, slot]
        scale = hopper_codes.load_scale(scales, self.odd(item, 1))
        hopper_codes.expand_values(codes, *seen, self.tile_of("v"))
        hopper_codes.store_scale(scale, *seen, LIFT, self.smem["v_weights"].at[self.wg])
        self.release(slot)

    def weigh(self, s, m, l, item: Item, j):
        """Weights of block j, with the scales of its values, as `softmax` gives them."""
        p, m, l, alpha = self.softmax(s, m, l, item, item.block + j)
        weights = plgpu.load(self.smem["v_weights"].at[self.wg], layout=COL, optimized=False)
        return (p * lax.broadcast_in_dim(weights, p.shape, [1])).astype(HALF), m, l, alpha

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
