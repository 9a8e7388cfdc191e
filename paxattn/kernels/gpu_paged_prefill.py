"""paged_attention of many queries a row on Hopper: the forward of flash attention, its keys and values read from pages.

Tiles of 128 queries of a row and head are what `gpu_flash_fwd` works on (FlashAttention-3, Shah et al. 2024); here the
producer fetches a block of 128 keys page by page, and what a tile shares with the next row is not stored.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from paxattn.kernels import gpu_queue, hopper, hopper_lanes
from paxattn.kernels.gpu_blocks import ROWS, iota
from paxattn.kernels.gpu_flash_fwd import LOOK_UP, Consumer, Producer, Taken, scratch_of, take_items
from paxattn.kernels.gpu_flash_fwd_plan import Config, Item
from paxattn.kernels.gpu_paged_ahead import Following
from paxattn.kernels.gpu_paged_prefill_plan import FIELDS, PagedPlan, most_tiles
from paxattn.kernels.hopper import ROW
from paxattn.kernels.problem import Problem


def prefill(
    problem: Problem,
    config: Config,
    num_sms: int,
    page_size: int,
    few: int,
    following: Following | None,
    inputs: tuple[Array, ...],
    skipped: Array | None,
    sinks: Array | None,
    counters: Any,
) -> tuple[Array, Array]:
    """Of the rows of more than `few` queries -> out [1,T,H,D], lse float32 [1,H,T].

    inputs: q [1,T,H,D], k, v [N,P,K,D], page_table [R,M], kv_lens [R] and cu_q_lens [R+1]; skipped int32 [1], how many
    of every row's first keys to leave out; sinks float32 [1,H]; counters, a ref of int32, of which the last is 0. What
    the kernel that follows reads first is brought to the cache.
    """
    rows = len(inputs[-2])
    ctas = min(num_sms, problem.heads * most_tiles(problem.q_len, rows, config.block_q))
    pieces = max(1, config.block_kv // page_size)
    scratch = scratch_of(problem, config, inputs[0].dtype, pieces)
    scratch |= gpu_queue.scratch(config.warpgroups + 2, FIELDS) | gpu_queue.on_demand()
    given = {name: x for name, x in dict(skipped=skipped, sinks=sinks).items() if x is not None}
    body = partial(_kernel, problem, config, ctas, page_size, few, following, tuple(given))
    lse = jax.ShapeDtypeStruct((1, problem.heads, problem.q_len), jnp.float32)
    call = hopper.kernel(body, ctas, config.warpgroups, scratch, (jax.typeof(inputs[0]), lse))
    return call(*inputs, *given.values(), counters)


def _kernel(
    problem: Problem,
    config: Config,
    ctas: int,
    page_size: int,
    few: int,
    following: Following | None,
    names: tuple,
    *refs,
    **smem,
):
    q, k, v, page_table, kv_lens, cu_q_lens, *extra, counters, out, lse = refs
    given, counter = dict(zip(names, extra, strict=True)), counters.at[counters.shape[0] - 1]
    plan = PagedPlan(problem, config, ctas, few, kv_lens, cu_q_lens, given.get("skipped"))
    wg, feed = lax.axis_index("wg"), Taken(plan, smem)

    @pl.when(wg < config.warpgroups)
    def _consumers():
        plgpu.set_max_registers(240 if config.warpgroups == 2 else 160, action="increase")
        PagedConsumer(problem, config, wg, smem, given.get("sinks"), None, out, lse, "skipped" in given).run(feed)

    @pl.when(wg == config.warpgroups)
    def _producer():
        plgpu.set_max_registers(24 if config.warpgroups == 2 else 32, action="decrease")

        @plgpu.warp_map
        def _(warp):
            @pl.when(warp == 0)
            def _():
                take_items(plan, smem, counter)
                if following is not None:  # What is left to do here takes longer than to find out what that needs.
                    following.bring_near(k, v, page_table, kv_lens, cu_q_lens, given.get("skipped"))

            # Pages are many copies: keys and values have a warp each.
            for number, name in enumerate("kv", 1):
                producer = PagedProducer(problem, config, feed, smem, q, k, v, page_table, page_size, name)
                pl.when(warp == number)(producer.run)


@dataclass(frozen=True)
class PagedProducer(Producer):
    """A warp that finds the pages of a block in the table, and loads their keys, and all queries, or their values."""

    page_table: Any
    page_size: int
    name: str  # "k" or "v"

    def stream(self, item: Item, turn, count) -> None:
        source = self.k if self.name == "k" else self.v

        def one_block(j, entries):
            # Looked up a block ahead, while this one waits for its slot.
            ahead = self.entries(item, jnp.minimum(j + 1, item.blocks - 1))
            self.load(source, item, count, j, *self.ring(self.name), entries)
            if self.name == "k":
                pl.when(j == jnp.maximum(item.blocks - LOOK_UP, 0))(self.feed.want)
                pl.when(j == 0)(lambda: self.load_queries(item, turn))
            return ahead

        lax.fori_loop(0, item.blocks, one_block, self.entries(item, jnp.int32(0)))

    def entries(self, item: Item, j) -> Array:
        """Of the j-th block that is visited the page of a piece in each lane; page 0 where no query sees any of it."""
        size, place = self.page_size, item.place
        assert place is not None
        piece = min(size, self.config.block_kv)
        start = (item.lo + item.blocks - 1 - j) * self.config.block_kv + hopper_lanes.lane() * piece
        page = lax.div(start, jnp.int32(size))
        seen = (page * size < place.end) & ((page + 1) * size > place.begin)
        entry = self.page_table[place.row, jnp.minimum(page, self.page_table.shape[1] - 1)]
        return jnp.where(seen, entry, 0)

    def load_block(self, source, item: Item, block, tile, full, *found) -> None:
        (entries,) = found
        kv_head = lax.div(item.head, self.problem.heads // self.problem.kv_heads)
        piece = min(self.page_size, self.config.block_kv)
        inside = lax.rem(block * self.config.block_kv, jnp.int32(self.page_size))
        for i in range(self.config.block_kv // piece):
            page = source.at[hopper_lanes.from_lane(entries, jnp.int32(i)), :, kv_head]
            hopper.load_tile(page, inside, tile.at[:, pl.ds(i * piece, piece)], full)


@dataclass(frozen=True)
class PagedConsumer(Consumer):
    """A warpgroup's work on its 64 rows of every item, some of which may be the next row's."""

    skips: bool  # whether the first keys of all rows are left out

    def position(self, item: Item):
        assert item.place is not None
        return item.place.position + self.wg * ROWS

    def keys_of(self, item: Item) -> tuple[Any, Any]:
        assert item.place is not None
        return (item.place.begin if self.skips else None), item.place.end

    def right_edge_exists(self) -> bool:
        return True

    def right_edge_spans_blocks(self) -> bool:
        return self.problem.right is not None

    def await_values(self, item: Item, j, slot) -> None:
        super().await_values(item, j, slot)
        assert item.place is not None
        start = (item.lo + item.blocks - 1 - j) * self.config.block_kv
        begin, end = item.place.begin - start, item.place.end - start
        pl.when((begin > 0) | (end < self.config.block_kv))(lambda: self.clear(slot, begin, end))

    def clear(self, slot, begin, end) -> None:
        """Zero the values that no query sees: they may be NaN, which a weight of 0 does not silence.

        Either warpgroup writes the same zeros, so none waits for the other.
        """
        tile = self.smem["v"][1].at[slot]
        for c in range(tile.shape[0]):
            for first in range(0, self.config.block_kv, ROWS):
                row = iota(ROWS, ROW) + first
                seen = (row >= begin) & (row < end)
                part = tile.at[c, pl.ds(first, ROWS)]
                v = part[...]
                part[...] = jnp.where(lax.broadcast_in_dim(seen, v.shape, [0]), v, jnp.zeros_like(v))
        plgpu.commit_smem()

    def leave(self, item: Item, o, lse) -> None:
        assert item.place is not None
        rows, start = item.place.rows - self.wg * ROWS, item.q_start + self.wg * ROWS
        hopper.store_rows(self.lse.at[0, item.head], lse, start, rows)
        out = self.out.at[0, :, item.head]
        partly = lambda: hopper.store_rows(out, o.astype(self.out.dtype), start, rows)
        lax.cond(rows >= ROWS, lambda: self.send(item, o, None), partly)
