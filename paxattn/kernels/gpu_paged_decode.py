"""paged_attention of few queries a row on Hopper: Pallas Mosaic GPU, TMA and WGMMA (FlashDecoding, Dao et al. 2023).

All there is to do is to read keys and values at the speed of memory. Every block of the grid has two workers, each a
consumer warpgroup with a ring of tiles that its own producer warp fills page by page. A worker has an equal share of
all blocks of keys (`gpu_paged_plan`). The queries of a row that share a KV head are the rows of one tile of 64, most of
them unused: the tensor cores have time. Parts of an item that several workers share go to global memory, and the last
of them to be done merges them in a fixed order.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from paxattn.kernels import gpu_queue, hopper, hopper_lanes, hopper_pages, tiles
from paxattn.kernels.gpu_blocks import ROWS, divide, iota
from paxattn.kernels.gpu_paged_plan import FIELDS, Config, Item, Plan, Problem
from paxattn.kernels.hopper import CHUNK, COL, ROW, WGMMA
from paxattn.kernels.hopper_lanes import LANES
from paxattn.kernels.problem import LOG2E

NEVER = -1e30  # a maximum that nothing reaches; finite, so that differences are
TOGETHER = 32  # entries of the page table that come with one line of the cache
FEW = 4  # parts of an item that are on their way together where there are no more, and
MANY_REGISTERS = 96  # what more of them may fill: a round costs the latency of memory, however many are on their way
# Registers a thread of two consumers and a producer: the 3 x 168 that they start with, shared out. For more than there
# are a consumer would wait for ever.
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 216, 72


@dataclass(frozen=True)
class Kind:
    """What pages of a kind are read by: producers, of which a worker has one each, the first of which finds out what to
    read, and a consumer."""

    scratch: Callable[[Problem, Config, Any], dict]
    producers: tuple[type, ...]
    consumer: type


def decode(
    kind: Kind,
    problem: Problem,
    config: Config,
    num_sms: int,
    into: tuple[Array, Array, Array] | None,
    q,
    pages,
    page_table,
    kv_lens,
    cu_q_lens,
    skipped,
    sinks,
    more,
) -> tuple[Array, Array]:
    """q [T,H,D], pages [N,P,K,...] each, page_table [R,M] -> out [T,H,D], lse float32 [H,T].

    Rows of more than max_q_len queries are left out, and of all rows the first `skipped` [1] keys. What is found is
    merged with what is known of more keys, out [parts,T,H,D] and lse [H,parts,T]. These and sinks, float32 [H], may be
    None. If `into` is given, an out, an lse and counters that are 0, the results of other rows stay there.
    """
    workers = num_sms * config.warpgroups
    queries = q.reshape(-1, q.shape[-1])
    pages = [x.reshape(-1, problem.kv_heads, x.shape[-1] * problem.abreast) for x in pages]
    part_rows = 2 * workers * tiles.cdiv(problem.packed, merged_rows(problem)) * merged_rows(problem)
    out_type = (
        jax.ShapeDtypeStruct(queries.shape, q.dtype),
        jax.ShapeDtypeStruct((problem.heads * problem.tokens,), jnp.float32),
        jax.ShapeDtypeStruct((part_rows, problem.columns), jnp.float32),
        jax.ShapeDtypeStruct((part_rows,), jnp.float32),
    )
    more, more_lse = (None, None) if more is None else (more[0].reshape(-1, q.shape[-1]), more[1].reshape(-1))
    given = dict(skipped=skipped, sinks=sinks, more=more, more_lse=more_lse)
    given = {name: x for name, x in given.items() if x is not None}
    body = partial(_kernel, kind, problem, config, num_sms, len(pages), tuple(given))
    scratch = kind.scratch(problem, config, pages[0].dtype)
    scratch |= gpu_queue.scratch(len(kind.producers), FIELDS, config.warpgroups)
    inputs = queries, *pages, page_table, kv_lens, cu_q_lens, *given.values()
    if into is None:
        call = hopper.kernel(body, num_sms, config.warpgroups, scratch, out_type)
        run = lambda *inputs: call(*inputs, jax.new_ref(jnp.zeros(counters(workers), jnp.int32)))
        out, lse, *_ = hopper.apart(run)(*inputs)
    else:
        call = hopper.kernel(body, num_sms, config.warpgroups, scratch, out_type[2:])

        def run_into(inputs, *into):
            refs = [jax.new_ref(x) for x in into]
            call(*inputs, *refs)
            return [jax.freeze(ref) for ref in refs[1:]]

        shaped = into[2], into[0].reshape(out_type[0].shape), into[1].reshape(out_type[1].shape)
        # In a scan XLA would have the kernel write to a slice of a larger array, and loses what it wrote in place.
        out, lse = lax.optimization_barrier(hopper.apart(run_into)(inputs, *shaped))
    return out.reshape(q.shape), lse.reshape(problem.heads, problem.tokens)


def counters(workers: int) -> int:
    """Of each warp of a worker, how many have left a part."""
    return 4 * workers


def _scratch(problem: Problem, config: Config, dtype) -> dict:
    wgs, slots = config.warpgroups, config.slots
    return dict(
        q=hopper_pages.tile(wgs, ROWS, problem.head_dim, dtype=dtype),
        kv=hopper_pages.tile(wgs, slots, config.block, problem.head_dim, dtype=dtype),
        full=plgpu.Barrier(num_arrivals=arrivals(problem, config), num_barriers=wgs * slots),
        free=plgpu.Barrier(num_barriers=wgs * slots),
    )


def merged_rows(problem: Problem) -> int:
    """Rows that are merged at a time, a quarter of their columns by each warp."""
    return 4 if problem.packed <= 4 else 8


def merged(problem: Problem) -> Any:
    """The layout of those rows."""
    rows = merged_rows(problem)
    width = 128 if rows == 4 and problem.columns >= 128 * problem.abreast else 64
    vector = rows * width // 128
    return plgpu.Layout.TILED(plgpu.Tiling(((rows, width), (rows, width // 4), (vector,))), (-4,), (-3, -2), -1)


def pages_in(problem: Problem, config: Config) -> int:
    """Pages, or parts of them, in a block."""
    return max(1, config.block // problem.page_size)


def arrivals(problem: Problem, config: Config) -> int:
    """Copies that fill a tile."""
    pages = pages_in(problem, config)
    return pages * hopper_pages.copies(config.block // pages, problem.head_dim)


def _kernel(kind: Kind, problem: Problem, config: Config, num_sms: int, arrays: int, names: tuple, *refs, **smem):
    q, pages, refs = refs[0], refs[1 : 1 + arrays], refs[1 + arrays :]
    page_table, kv_lens, cu_q_lens, *extra, counters, out, lse, part, part_lse = refs
    given = dict(zip(names, extra, strict=True))
    wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
    plan = Plan(problem, config, num_sms * config.warpgroups, kv_lens, cu_q_lens, given.get("skipped"))
    worker = cta * config.warpgroups  # Those of a block start together, so they are of one team.

    @pl.when(wg < config.warpgroups)
    def _consumers():
        if config.warpgroups > 1:
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        outputs = out, lse, part, part_lse, counters
        extra = (given.get(name) for name in ("sinks", "more", "more_lse"))
        kind.consumer(plan, wg, worker + wg, smem, q, *extra, *outputs).run()

    @pl.when(wg == config.warpgroups)
    def _producer():
        if config.warpgroups > 1:
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

        @plgpu.warp_map
        def _(warp):
            for i, producer in enumerate(kind.producers):
                for which in range(config.warpgroups):
                    its = producer(plan, which, worker + which, smem, pages, page_table, i == 0)
                    pl.when(warp == i * config.warpgroups + which)(its.run)


@dataclass(frozen=True)
class Producer:
    """A warp that streams the keys and values of a worker's items through its ring, a block's keys and then values."""

    plan: Plan
    wg: int
    worker: Array
    smem: dict
    pages: Sequence[Any]  # [N*P,K,...]
    page_table: Any
    leads: bool  # whether it finds out what to read, and tells the others

    slots_a_block: ClassVar[int] = 2

    @property
    def ring(self) -> int:
        return self.wg

    def run(self) -> None:
        self.fill()

    def fill(self) -> Array:
        """Returns how many slots have been filled."""
        self.prefetch_table()
        nothing = Item(*(jnp.int32(0) for _ in range(FIELDS)))
        start = jnp.int32(0), nothing, jnp.int32(0)
        return lax.while_loop(lambda carry: (carry[0] == 0) | (carry[1].blocks > 0), self.one_item, start)[2]

    def item(self, turn, before: Item) -> Item:
        """The worker's item of that number; of no blocks where there is none."""
        if not self.leads:
            return Item(*gpu_queue.read(self.smem, turn, self.wg))
        following = lambda: self.plan.next(before)
        item = lax.cond(turn == 1, lambda: self.plan.start(self.worker), following)
        gpu_queue.leave(self.smem, turn, *jax.tree.leaves(item), ring=self.wg)
        return item

    def prefetch_table(self) -> None:
        """Have the table, or its first megabyte, on its way while the lengths tell which of its rows is needed."""
        rows, columns = self.page_table.shape
        at = (self.worker * LANES + hopper_lanes.lane()) * TOGETHER
        row, column = divide(at, columns)
        hopper_lanes.prefetch(self.page_table.at[jnp.minimum(row, rows - 1), column])

    def one_item(self, carry):
        # What is looked up here comes while the tiles of the item before wait to be read.
        turn, before, count = carry
        item = self.item(turn + 1, before)

        def one_block(j, held):
            batch, entries, more = held
            ahead = self.page(item, j) - self.page(item, 0)
            batch, entries, more = lax.cond(
                lax.div(ahead, LANES) == batch,
                lambda: (batch, entries, more),
                lambda: (batch + 1, more, self.entries(item, batch + 2)),
            )
            self.load(item, j, count + self.slots_a_block * j, entries, lax.rem(ahead, LANES))
            return batch, entries, more

        lax.fori_loop(0, item.blocks, one_block, (jnp.int32(0), self.entries(item, 0), self.entries(item, 1)))
        return turn + 1, item, count + self.slots_a_block * item.blocks

    def page(self, item: Item, j) -> Array:
        """The row's page in which block j of the item begins."""
        return lax.div((item.block + j) * self.plan.config.block, jnp.int32(self.plan.problem.page_size))

    def entries(self, item: Item, batch) -> Array:
        """A page of the item in each lane, of the batch-th 32; page 0 where no query sees any of it."""
        size = self.plan.problem.page_size
        page = self.page(item, 0) + batch * LANES + hopper_lanes.lane()
        there = (page * size < item.kv_len) & ((page + 1) * size > item.begin)
        entry = self.page_table[item.row, jnp.minimum(page, self.page_table.shape[1] - 1)]
        return jnp.where(there, entry, 0)

    def load(self, item: Item, j, count, entries, lane) -> None:
        """The item's block j of keys and of values, which are tiles `count` and `count + 1` in the ring."""
        for i, source in enumerate(self.pages):
            slot, full = self.free_slot(count + i)
            for rows, to in self.page_rows(item, j, entries, lane):
                hopper_pages.copy_rows(source, rows, item.head, self.smem["kv"], (self.wg, slot), to, full)

    def free_slot(self, count) -> tuple[Array, Any]:
        """Where the count-th tile goes, once the consumer is done with what is there, and who is told that it came."""
        slots = self.plan.config.slots
        slot = lax.rem(count, jnp.int32(slots))
        at = self.ring * slots + slot
        pl.when(count >= slots)(lambda: plgpu.barrier_wait(self.smem["free"].at[at]))
        return slot, self.smem["full"].at[at]

    def page_rows(self, item: Item, j, entries, lane) -> Iterator[tuple[Array, Any]]:
        """Of each page in the item's block j: the first of its rows in the arrays, and where they go in a tile."""
        problem, config = self.plan.problem, self.plan.config
        rows = config.block // pages_in(problem, config)
        inside = lax.rem((item.block + j) * config.block, jnp.int32(problem.page_size))
        for i in range(pages_in(problem, config)):
            yield hopper_lanes.from_lane(entries, lane + i) * problem.page_size + inside, pl.ds(i * rows, rows)


@dataclass(frozen=True)
class Consumer:
    """A warpgroup that computes a worker's items."""

    plan: Plan
    wg: Array
    worker: Array
    smem: dict
    q: Any  # [T*H,D]
    sinks: Any  # [H]
    more: Any  # [parts*T*H,D]
    more_lse: Any  # [H*parts*T]
    out: Any  # [T*H,D]
    lse: Any  # [H*T]
    part: Any  # [2*workers*rows,D]: of each worker the item that it goes on with, then the one that others go on with
    part_lse: Any
    counters: Any  # of the item that each worker begins and others go on with, how many have left a part

    slots_a_block: ClassVar[int] = 2
    weight: ClassVar[float] = 1.0  # of the weights that the sums are of

    @property
    def problem(self) -> Problem:
        return self.plan.problem

    @property
    def config(self) -> Config:
        return self.plan.config

    @property
    def ring(self) -> Array:
        return self.wg

    def run(self) -> None:
        start = jnp.int32(1), self.item(jnp.int32(1)), jnp.int32(0)
        lax.while_loop(lambda carry: carry[1].blocks > 0, self.one_item, start)
        self.clear_padding()

    def item(self, turn) -> Item:
        return Item(*gpu_queue.read(self.smem, turn, self.wg))

    def one_item(self, carry):
        turn, item, count = carry
        self.load_queries(item)
        o = plgpu.layout_cast(jnp.zeros((ROWS, self.problem.columns), jnp.float32), WGMMA)
        m = plgpu.layout_cast(jnp.full((ROWS,), NEVER, jnp.float32), ROW)
        l = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
        o, m, l = self.steps(item, count, (o, m, l))
        seen = l != 0  # NaN, too, is something
        o = o * lax.broadcast_in_dim(jnp.where(seen, 1 / (l * self.weight), 0.0), o.shape, [0])
        lse = jnp.where(seen, m + jnp.log2(l), -jnp.inf)
        lax.cond(
            item.whole,
            lambda: self.write(item, o, lse, iota(ROWS, ROW), WGMMA),
            lambda: self.leave_part(item, o, lse),
        )
        return turn + 1, self.item(turn + 1), count + self.slots_a_block * item.blocks

    def steps(self, item: Item, count, state):
        return lax.fori_loop(0, item.blocks, partial(self.step, item, count), state)

    def step(self, item: Item, count, j, state):
        o, m, l = state
        k_slot, v_slot = (lax.rem(count + 2 * j + i, jnp.int32(self.config.slots)) for i in range(2))
        self.wait_for(k_slot)
        s = hopper.wait(0, hopper_pages.scores(self.smem["q"][1].at[self.wg], self.tile(k_slot)))
        self.release(k_slot)
        p, m, l, alpha = self.softmax(s, m, l, item, item.block + j)
        self.wait_for(v_slot)
        start = (item.block + j) * self.config.block
        unseen = (start < item.begin) | (start + self.config.block > item.kv_len)
        pl.when(unseen)(partial(self.clear_unseen, item, start, self.tile(v_slot)))
        o = o * lax.broadcast_in_dim(alpha, o.shape, [0])
        o = hopper.wait(0, hopper_pages.accumulate(o, p.astype(self.q.dtype), self.tile(v_slot)))
        self.release(v_slot)
        return o, m, l

    def tile(self, slot) -> Any:
        return self.smem["kv"][1].at[self.wg, slot]

    def wait_for(self, slot) -> None:
        plgpu.barrier_wait(self.smem["full"].at[self.ring * self.config.slots + slot])

    def release(self, slot) -> None:
        plgpu.barrier_arrive(self.smem["free"].at[self.ring * self.config.slots + slot])

    def meet(self) -> None:
        hopper.bar_sync(hopper.FIRST_BARRIER + self.wg, 128)

    def load_queries(self, item: Item) -> None:
        packed, abreast = iota(ROWS, ROW), self.problem.abreast
        q = hopper_lanes.load_rows(self.q, self.query_rows(item, packed), WGMMA, self.problem.columns // abreast)
        if abreast > 1:
            # Each row has 0 for the other heads' columns, so its scores are those with the keys of its own.
            own = (lax.broadcast_in_dim(self.place_abreast(packed) == i, q.shape, [0]) for i in range(abreast))
            q = jnp.concatenate([jnp.where(mine, q, jnp.zeros_like(q)) for mine in own], axis=1)
        self.meet()  # The products of the item before are done in all warps.
        self.smem["q"][1][self.wg] = q.astype(self.smem["q"][1].dtype)
        hopper.fence()
        self.meet()

    def token(self, packed) -> Array:
        """Which of a row's queries stand in the packed rows."""
        if self.problem.max_q_len == 1:
            return 0 * packed
        return lax.div(packed, jnp.full_like(packed, self.problem.group))

    def query_rows(self, item: Item, packed) -> Array:
        """Where the packed rows stand in [T*H]; -1 for the unused."""
        problem = self.problem
        first = item.q_start * problem.heads + item.head * problem.group
        at = packed + first + self.token(packed) * (problem.heads - problem.group)
        return jnp.where(packed < item.q_len * problem.group, at, -1)

    def place_abreast(self, packed) -> Array:
        """Which of the KV heads that are read as one the packed rows look at."""
        problem = self.problem
        of_token = packed - self.token(packed) * problem.group
        return lax.div(of_token, jnp.full_like(packed, problem.group // problem.abreast))

    def lse_rows(self, item: Item, packed, part: int = 0, parts: int = 1) -> Array:
        """Where the packed rows stand in [H*T], or of [H*parts*T] in a part; -1 for the unused."""
        problem, token = self.problem, self.token(packed)
        head = packed - token * problem.group + item.head * problem.group
        at = (head * parts + part) * problem.tokens + token + item.q_start
        return jnp.where(packed < item.q_len * problem.group, at, -1)

    def softmax(self, s, m, l, item: Item, block):
        """Streaming softmax in base 2 -> weights, maximum, sum, and what the sums so far shrink by."""
        problem = self.problem
        if problem.shaped:
            s = s * problem.scale if problem.softcap is None else jnp.tanh(s * (problem.scale / problem.softcap))
        s = self.mask(s, item, block)
        higher = jnp.maximum(m, s.max(axis=1) * problem.exponent)
        alpha = jnp.exp2(m - higher)
        p = jnp.exp2(s * problem.exponent - lax.broadcast_in_dim(higher, s.shape, [0]))
        return p, higher, l * alpha + p.sum(axis=1), alpha

    def mask(self, s, item: Item, block):
        token = self.token(iota(ROWS, ROW))
        q_pos = jnp.minimum(token + (item.kv_len - item.q_len), item.kv_len - 1)
        kv_pos = lax.broadcast_in_dim(iota(s.shape[1], COL) + block * self.config.block, s.shape, [1])
        seen = kv_pos <= lax.broadcast_in_dim(q_pos, s.shape, [0])
        if self.problem.left is not None:
            seen &= kv_pos >= lax.broadcast_in_dim(q_pos - self.problem.left, s.shape, [0])
        if self.plan.skipped is not None:
            seen &= kv_pos >= item.begin
        return jnp.where(seen, s, -jnp.inf)

    def clear_unseen(self, item: Item, start, tile) -> None:
        """Zero the values that no query sees: they may be NaN, which a weight of 0 does not silence."""
        for first in range(0, self.config.block, ROWS):
            position = iota(ROWS, ROW) + (start + first)
            seen = (position >= item.begin) & (position < item.kv_len)
            for column in range(0, self.problem.columns, CHUNK):  # Few registers are free here.
                part = tile.at[pl.ds(first, ROWS), pl.ds(column, CHUNK)]
                v = part[...]
                part[...] = jnp.where(lax.broadcast_in_dim(seen, v.shape, [0]), v, jnp.zeros_like(v))
        hopper.fence()
        self.meet()

    def write(self, item: Item, o, lse, packed, layout) -> None:
        """Bring in the sink and what is known of more keys, and store the packed rows' result; lse in base 2."""
        if self.sinks is not None:
            head = packed - self.token(packed) * self.problem.group + item.head * self.problem.group
            used = packed < item.q_len * self.problem.group
            sink = hopper_lanes.load_rows(self.sinks, jnp.where(used, head, -1), layout) * LOG2E
            higher = jnp.maximum(lse, sink)
            seen = jnp.exp2(lse - higher)
            whole = seen + jnp.exp2(sink - higher)
            o = o * hopper_lanes.along(seen / whole, o.shape, layout)
            lse = jnp.where(lse == -jnp.inf, lse, higher + jnp.log2(whole))
        if self.more is not None:
            o, lse = self.bring_in_more(item, o, lse, packed, layout)
        rows, abreast, o = self.query_rows(item, packed), self.problem.abreast, o.astype(self.out.dtype)
        width = o.shape[1] // abreast
        for i in range(abreast):
            mine = rows if abreast == 1 else jnp.where(self.place_abreast(packed) == i, rows, -1)
            hopper_lanes.store_rows(self.out, mine, o[:, i * width : (i + 1) * width], layout)
        hopper_lanes.store_rows(self.lse, self.lse_rows(item, packed), lse / LOG2E, layout)

    def bring_in_more(self, item: Item, o, lse, packed, layout) -> tuple[Array, Array]:
        parts, rows = self.more.shape[0] // self.q.shape[0], self.query_rows(item, packed)
        places = [jnp.where(rows >= 0, rows + i * self.q.shape[0], -1) for i in range(parts)]
        # All are on their way together.
        others = [hopper_lanes.load_rows(self.more, at, layout, o.shape[1]) for at in places]
        of_others = [self.lse_rows(item, packed, i, parts) for i in range(parts)]
        lses = [lse, *(hopper_lanes.load_rows(self.more_lse, at, layout) * LOG2E for at in of_others)]
        higher = reduce(jnp.maximum, lses, jnp.full_like(lse, NEVER))
        weights = [jnp.exp2(x - higher) for x in lses]
        whole = reduce(jnp.add, weights)
        once = jnp.where(whole == 0, 0.0, 1 / whole)
        shares = [hopper_lanes.along(x * once, o.shape, layout) for x in weights]
        terms = (x.astype(jnp.float32) * share for x, share in zip(others, shares[1:], strict=True))
        return reduce(jnp.add, terms, o * shares[0]), higher + jnp.log2(whole)

    @property
    def part_rows(self) -> int:
        return tiles.cdiv(self.problem.packed, merged_rows(self.problem)) * merged_rows(self.problem)

    def leave_part(self, item: Item, o, lse) -> None:
        first, last = self.plan.parts(item)
        packed = iota(ROWS, ROW)
        at = self.place(item, lax.div(self.worker, jnp.int32(self.plan.team)), first)
        rows = jnp.where(packed < item.q_len * self.problem.group, packed + at, -1)
        hopper_lanes.store_rows(self.part, rows, o, WGMMA)
        hopper_lanes.store_rows(self.part_lse, rows, lse, WGMMA)
        self.meet()
        # Each warp finds out by itself whether its quarter of the columns is to be merged here.
        at = 4 * self.plan.worker(first, item) + hopper_lanes.warp()
        arrived = hopper_lanes.count_arrival(self.counters.at[at])
        pl.when(arrived == last - first)(partial(self.merge, item, first, last))

    def place(self, item: Item, team, first) -> Array:
        """Where the part of a team begins, of an item that team `first` begins."""
        return (2 * self.plan.worker(team, item) + jnp.where(team == first, 1, 0)) * self.part_rows

    def merge(self, item: Item, first, last) -> None:
        rows = merged_rows(self.problem)
        if self.part_rows == rows:
            return self.merge_rows(item, first, last, 0)
        used = lax.div(item.q_len * self.problem.group + (rows - 1), jnp.int32(rows))
        return lax.fori_loop(0, used, lambda i, _: self.merge_rows(item, first, last, rows * i), None)

    def merge_rows(self, item: Item, first, last, row) -> None:
        shape, layout = (merged_rows(self.problem), self.part.shape[1]), merged(self.problem)
        many = MANY_REGISTERS // (shape[0] * shape[1] // 128)
        rounds = lax.div(jnp.maximum(last - first - FEW, -1) + many, jnp.int32(many))
        rest = first + rounds * many
        some = partial(self.add_parts, item, first, last, row)
        of_rows = layout.reduce(1)
        o = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)
        m = plgpu.layout_cast(jnp.full(shape[:1], NEVER, jnp.float32), of_rows)
        l = plgpu.layout_cast(jnp.zeros(shape[:1], jnp.float32), of_rows)
        state = lax.fori_loop(0, rounds, lambda i, state: some(first + i * many, many, state), (o, m, l))
        o, m, l = lax.cond(rest <= last, lambda: some(rest, FEW, state), lambda: state)
        seen = l != 0
        o = o * hopper_lanes.along(jnp.where(seen, 1 / l, 0.0), shape, layout)
        lse = jnp.where(seen, m + jnp.log2(l), -jnp.inf)
        self.write(item, o, lse, iota(shape[0], of_rows) + row, layout)

    def add_parts(self, item: Item, first, last, row, team, count: int, state):
        o, m, l = state
        layout = merged(self.problem)
        parts = [self.read_part(item, first, last, team + n, row) for n in range(count)]
        higher = m
        for _, lse in parts:
            higher = jnp.maximum(higher, lse)
        alpha = jnp.exp2(m - higher)
        o, l = o * hopper_lanes.along(alpha, o.shape, layout), l * alpha
        for part, lse in parts:
            weight = jnp.exp2(lse - higher)
            o, l = o + part * hopper_lanes.along(weight, o.shape, layout), l + weight
        return o, higher, l

    def read_part(self, item: Item, first, last, team, row) -> tuple[Array, Array]:
        """What a team found for some rows; past the last one, something of no weight."""
        layout = merged(self.problem)
        at = pl.ds(self.place(item, jnp.minimum(team, last), first) + row, merged_rows(self.problem))
        part = plgpu.load(self.part.at[at], layout=layout, optimized=False)
        lse = plgpu.load(self.part_lse.at[at], layout=layout.reduce(1), optimized=False)
        return part, lse + jnp.where(team <= last, 0.0, -jnp.inf)

    def clear_padding(self) -> None:
        """Tokens that belong to no row give 0, and an lse of -inf."""
        problem, packed = self.problem, iota(ROWS, ROW)
        first = self.plan.cu_q_lens[self.plan.rows]
        zeros = plgpu.layout_cast(jnp.zeros((ROWS, self.out.shape[1]), self.out.dtype), WGMMA)
        nothing = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), ROW)

        def one_token(i, _):
            token = first + self.worker + i * self.plan.workers
            for start in range(0, problem.heads, ROWS):
                head = packed + start
                there = head < problem.heads
                hopper_lanes.store_rows(self.out, jnp.where(there, head + token * problem.heads, -1), zeros, WGMMA)
                hopper_lanes.store_rows(self.lse, jnp.where(there, head * problem.tokens + token, -1), nothing, WGMMA)

        mine = problem.tokens - first - self.worker + self.plan.workers - 1
        lax.fori_loop(0, lax.div(jnp.maximum(mine, 0), jnp.int32(self.plan.workers)), one_token, None)


PLAIN = Kind(_scratch, (Producer,), Consumer)
