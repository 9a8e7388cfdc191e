"""flash_attention forward on Hopper: Pallas Mosaic GPU, TMA and WGMMA (FlashAttention-3, Shah et al. 2024).

One persistent block an SM takes (batch, head, query tile) items in a fixed order, the longest first. A producer
warp streams K and V through a ring of slots, without a break from one item to the next; two or three consumer
warpgroups of 64 query rows take turns on the tensor cores, so that the softmax of one runs under the products of
the others, and each issues QK^T of a block together with PV of the block before.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from paxattn.kernels import gpu_queue, hopper, tiles
from paxattn.kernels.gpu_blocks import ROWS, iota, load_segments, pad_segments
from paxattn.kernels.gpu_flash_fwd_plan import Config, Item, Plan, open_range, segment_bounds
from paxattn.kernels.hopper import CHUNK, COL, ROW, WGMMA
from paxattn.kernels.problem import LOG2E, Problem

LOOK_UP = 4  # blocks of keys that are visited while the next item is looked up
NEVER = -1e30  # a maximum that nothing reaches; finite, so that differences are


def forward(problem: Problem, config: Config, num_sms: int, q, k, v, sinks, q_seg, kv_seg) -> tuple[Array, Array]:
    """q [B,T,H,D], k [B,S,K,D], v [B,S,K,Dv] -> out [B,T,H,Dv], lse float32 [B,H,T padded to whole tiles]."""
    q_tiles = tiles.cdiv(problem.q_len, config.block_q)
    padded = q_tiles * config.block_q
    out_type = (
        jax.ShapeDtypeStruct((problem.batch, problem.q_len, problem.heads, problem.v_dim), q.dtype),
        jax.ShapeDtypeStruct((problem.batch, problem.heads, padded), jnp.float32),
    )
    bounds = kv_ends = None
    if q_seg is not None:
        q_seg = pad_segments(q_seg, padded)
        kv_seg = pad_segments(kv_seg, tiles.cdiv(problem.kv_len, config.block_kv) * config.block_kv)
        bounds, kv_ends = segment_bounds(problem, config, q_seg, kv_seg)
    extra = [x for x in (sinks, q_seg, kv_seg, bounds, kv_ends) if x is not None]
    ctas = min(num_sms, problem.batch * problem.heads * q_tiles)
    body = partial(_kernel, problem, config, ctas, sinks is not None, q_seg is not None)
    scratch, dealt = scratch_of(problem, config, q.dtype), Plan(problem, config, ctas, bounds).dealt
    scratch |= {} if dealt else gpu_queue.scratch(config.warpgroups)
    call = hopper.kernel(body, ctas, config.warpgroups, scratch, out_type)
    run = call if dealt else lambda *inputs: call(*inputs, jax.new_ref(jnp.zeros(1, jnp.int32)))
    return hopper.apart(run)(q, k, v, *extra)


def scratch_of(problem: Problem, config: Config, dtype, pieces: int = 1) -> dict:
    """Shared memory, where a block of keys or values comes in so many pieces."""
    qk, vo = tiles.cdiv(problem.head_dim, CHUNK), tiles.cdiv(problem.v_dim, CHUNK)
    wgs, stages = config.warpgroups, config.stages
    return dict(
        q=hopper.tile(wgs, qk, ROWS, CHUNK, dtype=dtype),
        k=hopper.tile(stages, qk, config.block_kv, CHUNK, dtype=dtype),
        v=hopper.tile(stages, vo, config.block_kv, CHUNK, dtype=dtype),
        out=hopper.tile(wgs, min(vo, 1 if qk + vo == 5 else 2), ROWS, CHUNK, dtype=dtype),
        lse=plgpu.SMEM((wgs, ROWS), jnp.float32),
        q_full=plgpu.Barrier(num_arrivals=qk, num_barriers=wgs),
        q_free=plgpu.Barrier(num_barriers=wgs),
        k_full=plgpu.Barrier(num_arrivals=qk * pieces, num_barriers=stages),
        v_full=plgpu.Barrier(num_arrivals=vo * pieces, num_barriers=stages),
    )


def _kernel(problem: Problem, config: Config, ctas: int, has_sinks: bool, has_segments: bool, *refs, **smem):
    q, k, v, *given, out, lse = refs
    optional = iter(given)
    sinks = next(optional) if has_sinks else None
    segments = tuple(next(optional) for _ in range(4)) if has_segments else None
    counter = next(optional, None)
    wg = lax.axis_index("wg")
    plan = Plan(problem, config, ctas, segments and segments[2])
    feed = Dealt(plan) if plan.dealt else Queued(plan, smem)

    def consume(which):
        plgpu.set_max_registers(240 if config.warpgroups == 2 else 160, action="increase")
        Consumer(problem, config, which, smem, sinks, segments, out, lse).run(feed)

    if not has_segments and halves_diagonal(problem, config):
        # The code of either warpgroup apart, as the shapes of its first products differ.
        for which in range(config.warpgroups):
            pl.when(wg == which)(partial(consume, which))
    else:
        pl.when(wg < config.warpgroups)(partial(consume, wg))

    @pl.when(wg == config.warpgroups)
    def _producer():
        plgpu.set_max_registers(24 if config.warpgroups == 2 else 32, action="decrease")

        taking = feed if plan.dealt else Queued(plan, smem, counter)

        @plgpu.warp_map
        def _(warp):
            pl.when(warp == 0)(Producer(problem, config, taking, smem, q, k, v).run)


def halves_diagonal(problem: Problem, config: Config) -> bool:
    """Whether the first warpgroup sees no more than the first half of the first block that an item visits."""
    if problem.right != 0 or config.block_kv != config.block_q or config.warpgroups != 2:
        return False
    return problem.offset % config.block_kv == 0


@dataclass(frozen=True)
class Dealt:
    """The items of a block in a fixed order, each known by its index."""

    plan: Plan
    first = 0
    late = False  # whether the next item is known only when this one is nearly done

    def begin(self):
        return self.plan.index(jnp.int32(0))

    def after(self, turn):
        return self.plan.index(turn + 1)

    def item(self, index) -> Item:
        return self.plan.item(index)

    def exists(self, index):
        return index < self.plan.items

    def done(self, _) -> None:
        pass

    def want(self) -> None:
        pass


@dataclass(frozen=True)
class Queued(Dealt):
    """The items that the producer takes for its block, by the counter that it alone has; the others read the index."""

    smem: dict
    counter: Any = None

    def after(self, turn):
        if self.counter is None:
            (index,) = gpu_queue.read(self.smem, turn + 1)
        else:
            index = gpu_queue.take(self.counter, self.plan.ctas)
            gpu_queue.leave(self.smem, turn + 1, index)
        return index


@dataclass(frozen=True)
class Taken:
    """The items that a warp takes for its block, each known by its number in the ring; the last one has no blocks."""

    plan: Any
    smem: dict
    first = 1
    late = True

    def begin(self):
        return self.after(jnp.int32(0))

    def after(self, turn):
        gpu_queue.await_item(self.smem, turn + 1)
        return turn + 1

    def item(self, turn) -> Item:
        return self.plan.read(gpu_queue.look(self.smem, turn))

    def exists(self, turn):
        return self.item(turn).blocks > 0

    def done(self, turn) -> None:
        gpu_queue.free(self.smem, turn)

    def want(self) -> None:
        gpu_queue.want(self.smem)


def take_items(plan: Any, smem: dict, counter) -> None:
    """Take items for this block and leave them in the ring, each a little before it is needed.

    To look one up takes long, but what is taken too early may be what another block would be ready for first.
    """

    def leave(turn, item):
        gpu_queue.leave(smem, turn, *jax.tree.leaves(item))
        return turn + 1

    def one_item(carry):
        turn = leave(*carry)
        gpu_queue.await_want(smem)
        return turn, plan.item(gpu_queue.take(counter, plan.ctas))

    start = jnp.int32(1), plan.item(lax.axis_index("cta"))
    leave(*lax.while_loop(lambda carry: carry[1].blocks > 0, one_item, start))


@dataclass(frozen=True)
class Producer:
    """The warp that loads the queries of every item and streams its KV blocks, last block first."""

    problem: Problem
    config: Config
    feed: Any
    smem: dict
    q: Any
    k: Any
    v: Any

    def run(self) -> None:
        at = self.feed.begin()
        start = jnp.int32(self.feed.first), jnp.int32(0), at, self.feed.item(at)
        lax.while_loop(lambda carry: self.feed.exists(carry[2]), self.one_item, start)

    def one_item(self, carry):
        turn, count, at, item = carry
        if not self.feed.late:
            # Looked up while this one's blocks wait for their slots.
            following_at = self.feed.after(turn)
            following = self.feed.item(following_at)
        self.stream(item, turn, count)
        if self.feed.late:
            self.feed.done(at)
            following_at = self.feed.after(turn)
            following = self.feed.item(following_at)
        return turn + 1, count + item.blocks, following_at, following

    def stream(self, item: Item, turn, count) -> None:
        def one_block(j, _):
            pl.when(j == jnp.maximum(item.blocks - LOOK_UP, 0))(self.feed.want)
            self.load_k(item, count, j)
            pl.when(j == 0)(lambda: self.load_queries(item, turn))
            self.load_v(item, count, j)

        def keys_ahead(j, _):
            self.load_k(item, count, j + 1)
            self.load_v(item, count, j)

        if self.config.keys_ahead:
            self.load_k(item, count, jnp.int32(0))
            self.load_queries(item, turn)
            lax.fori_loop(0, item.blocks - 1, keys_ahead, None)
            self.load_v(item, count, item.blocks - 1)
        else:
            lax.fori_loop(0, item.blocks, one_block, None)

    def load_queries(self, item: Item, turn) -> None:
        for w in range(self.config.warpgroups):
            pl.when(turn > self.feed.first)(partial(plgpu.barrier_wait, self.smem["q_free"].at[w]))
            tile = self.smem["q"][0].at[w]
            hopper.load_tile(
                self.q.at[item.batch, :, item.head], item.q_start + w * ROWS, tile, self.smem["q_full"].at[w]
            )

    def load_k(self, item: Item, count, j) -> None:
        self.load(self.k, item, count, j, *self.ring("k"))

    def load_v(self, item: Item, count, j) -> None:
        self.load(self.v, item, count, j, *self.ring("v"))

    def ring(self, name: str) -> tuple:
        """Of keys or values the barriers of free slots, the slots, and the barriers of full ones."""
        return dict(k=k_free, v=v_free)[name], self.smem[name][0], self.smem[f"{name}_full"]

    def load(self, source, item: Item, count, j, free, tiles, full, *found) -> None:
        config = self.config
        slot = lax.rem(count + j, config.stages)
        threads = 128 * config.warpgroups + 32
        pl.when(count + j >= config.stages)(lambda: hopper.bar_sync(free(config, slot), threads))
        self.load_block(source, item, item.lo + item.blocks - 1 - j, tiles.at[slot], full.at[slot], *found)

    def load_block(self, source, item: Item, block, tile, full, *found) -> None:
        kv_head = lax.div(item.head, self.problem.heads // self.problem.kv_heads)
        hopper.load_tile(source.at[item.batch, :, kv_head], block * self.config.block_kv, tile, full)


def k_free(config: Config, slot):
    return hopper.FIRST_BARRIER + config.warpgroups + slot


def v_free(config: Config, slot):
    return hopper.FIRST_BARRIER + config.warpgroups + config.stages + slot


@dataclass(frozen=True)
class Consumer:
    """A warpgroup's work on its 64 rows of every item."""

    problem: Problem
    config: Config
    wg: Any  # its number; known while tracing where the warpgroups differ in their code
    smem: dict
    sinks: Any
    segments: tuple | None  # ids of queries and keys, what `segment_bounds` gives
    out: Any
    lse: Any

    def run(self, feed: Any) -> None:
        at = feed.begin()
        if feed.late:
            # How many items there are is known only on the device: they may be fewer than blocks.
            pl.when(feed.exists(at))(partial(self.run_from, feed, at))
        else:
            self.run_from(feed, at)

    def run_from(self, feed: Any, at) -> None:
        pl.when(self.wg == self.config.warpgroups - 1)(lambda: hopper.bar_arrive(hopper.FIRST_BARRIER, 256))

        def one_item(carry):
            turn, at, count, *state = carry
            item = feed.item(at)
            state = self.steps(item, count, tuple(state))
            count += item.blocks
            following = feed.after(turn)
            # A taken item is looked at again: what it takes to store it would be held in registers all the while.
            item = feed.item(at) if feed.late else item
            state = lax.cond(
                feed.exists(following),
                lambda: self.join(item, feed.item(following), count, state),
                lambda: self.end(item, count, state),
            )
            feed.done(at)
            return turn + 1, following, count, *state

        start = jnp.int32(feed.first), at, jnp.int32(0), *self.start(feed.item(at))
        if type(feed) is Dealt and self.problem.right is None:
            # Around blocks that need no mask ptxas makes the better loop of a counted one, elsewhere of the other.
            plan = feed.plan
            lax.fori_loop(0, plan.count(), lambda turn, rest: one_item((turn, plan.index(turn), *rest))[2:], start[2:])
        else:
            lax.while_loop(lambda carry: feed.exists(carry[1]), one_item, start)
        plgpu.wait_smem_to_gmem(0)

    def position(self, item: Item):
        """Where this warpgroup's first query stands among the keys."""
        return item.q_start + self.wg * ROWS + self.problem.offset

    def keys_of(self, item: Item) -> tuple[Any, Any]:
        """The first key that the item may see, None where that is the very first, and where its keys end."""
        return item.run[:2] if item.run is not None else (None, self.problem.kv_len)

    def steps(self, item: Item, count, state):
        """All blocks but the first: those on the right edge under a mask, the open ones, those on the left edge."""
        problem, size = self.problem, self.config.block_kv
        first, last = self.keys_of(item)
        lo, hi = open_range(problem, size, self.position(item), ROWS, last)
        end = item.lo + item.blocks
        if first is not None:
            lo = jnp.maximum(lo, -(-first // size))
        if item.run is not None:
            lo = jnp.where(item.run[2], end, lo)
        edge = jnp.clip(end - hi, 1, item.blocks)
        inside = jnp.clip(end - jnp.maximum(lo, item.lo), edge, item.blocks)
        if self.right_edge_spans_blocks():
            state = lax.fori_loop(1, edge, partial(self.step, item, count, True), state)
        state = lax.fori_loop(edge, inside, partial(self.step, item, count, False), state)
        if problem.left is not None or first is not None:
            state = lax.fori_loop(inside, item.blocks, partial(self.step, item, count, True), state)
        return state

    def right_edge_spans_blocks(self) -> bool:
        problem, config = self.problem, self.config
        if problem.right is None:
            return False
        return (problem.offset + problem.right) % config.block_kv != 0 or config.block_kv % config.block_q != 0

    def start(self, item: Item):
        """Scores and softmax of the first block of the first item."""
        slot = jnp.int32(0)
        q = self.queries()
        plgpu.barrier_wait(self.smem["k_full"].at[slot])
        self.take_turn()
        s = self.scores(q, slot, self.first_keys)
        self.pass_turn()
        s = hopper.wait(0, s)
        self.scores_done(item, 0, slot)
        p, m, l = self.first_softmax(s, item)
        return self.nothing(), m, l, self.first_weights(p), *q

    @property
    def first_keys(self) -> int:
        """How many keys of an item's first block this warpgroup looks at."""
        return ROWS if isinstance(self.wg, int) and self.wg == 0 else self.config.block_kv

    def first_weights(self, p):
        """Weights of the first block as an operand of the whole block."""
        p = p.astype(self.out.dtype)
        unseen = self.config.block_kv - p.shape[1]
        if not unseen:
            return p
        return jnp.concatenate([p, plgpu.layout_cast(jnp.zeros((ROWS, unseen), p.dtype), WGMMA)], axis=1)

    def join(self, item: Item, following: Item, count, state):
        """As `step`, between two items: QK^T of the next one's first block with PV of this one's last."""
        o, m, l, p, *_ = state
        before = lax.rem(count - 1, self.config.stages)
        slot = lax.rem(count, self.config.stages)
        q = self.queries()
        self.await_values(item, item.blocks - 1, before)
        s, o, p, *q = self.both(o, p, q, slot, before, self.first_keys)
        self.scores_done(following, 0, slot)
        weights, new_m, new_l = self.first_softmax(s, following)
        o, weights = hopper.wait(0, o, weights)
        self.release(v_free(self.config, before))
        self.finish(item, o, m, l)
        return self.nothing(), new_m, new_l, self.first_weights(weights), *q

    def end(self, item: Item, count, state):
        """PV of the last block of the last item."""
        o, m, l, p, *q = state
        before = lax.rem(count - 1, self.config.stages)
        self.await_values(item, item.blocks - 1, before)
        self.take_turn()
        o, p = hopper.settle(o, p)
        o = hopper.accumulate(o, p, self.smem["v"][1].at[before])
        self.pass_turn()
        self.finish(item, hopper.wait(0, o), m, l)
        return self.nothing(), m, l, p, *q

    def step(self, item: Item, count, masked, j, state):
        """QK^T of block j and PV of the block before it are in flight together; softmax runs under the latter."""
        o, m, l, p, *q = state
        slot, before = (lax.rem(count + j - back, self.config.stages) for back in range(2))
        self.await_values(item, j - 1, before)
        s, o, p, *q = self.both(o, p, q, slot, before, self.config.block_kv)
        self.scores_done(item, j, slot)
        weights, m, l, alpha = self.softmax(s, m, l, item, j, masked)
        # Rounded only after the wait: until then PV reads the registers of the weights before.
        o, weights = hopper.wait(0, o, weights)
        self.release(v_free(self.config, before))
        return o * lax.broadcast_in_dim(alpha, o.shape, [0]), m, l, weights.astype(self.out.dtype), *q

    def await_values(self, item: Item, j, slot) -> None:
        """Wait for the values of the item's block j."""
        plgpu.barrier_wait(self.smem["v_full"].at[slot])

    def both(self, o, p, q: list[Array], slot, before, keys: int):
        """Issue QK^T and PV, whose values are there, in this warpgroup's turn and wait for the scores.

        Returns scores, o in flight, p, *q.
        """
        plgpu.barrier_wait(self.smem["k_full"].at[slot])
        self.take_turn()
        o, p, *q = hopper.settle(o, p, *q)
        s = self.scores(q, slot, keys)
        o = hopper.accumulate(o, p, self.smem["v"][1].at[before])
        self.pass_turn()
        return hopper.wait(1, s), o, p, *q

    def queries(self) -> list[Array]:
        """Wait for the item's queries; their registers, where they stay in registers."""
        plgpu.barrier_wait(self.smem["q_full"].at[self.wg])
        if not self.config.q_in_registers:
            return []
        return [hopper.load(self.smem["q"][1].at[self.wg])]

    def scores(self, q: list[Array], slot, keys: int) -> Array:
        queries = q[0] if q else self.smem["q"][1].at[self.wg]
        k = self.smem["k"][1].at[slot]
        return hopper.products_t((queries, k if keys == self.config.block_kv else k.at[:, pl.ds(0, keys)]))[0]

    def scores_done(self, item: Item, j, slot) -> None:
        """Give back the keys, and the queries' tile after its last use.

        That is the first block where queries are in registers. To give it back as soon as they are loaded is too early:
        nothing waits for the loads, and now and then TMA was there first.
        """
        self.release(k_free(self.config, slot))
        free = lambda: plgpu.barrier_arrive(self.smem["q_free"].at[self.wg])
        if not self.config.q_in_registers:
            pl.when(j == item.blocks - 1)(free)
        elif isinstance(j, int):
            free()

    def nothing(self) -> Array:
        width = tiles.cdiv(self.problem.v_dim, CHUNK) * CHUNK
        return plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), WGMMA)

    def first_softmax(self, s, item: Item):
        m = plgpu.layout_cast(jnp.full((ROWS,), NEVER, jnp.float32), ROW)
        l = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
        p, m, l, _ = self.softmax(s, m, l, item, 0, self.right_edge_exists())
        return p, m, l

    def right_edge_exists(self) -> bool:
        problem = self.problem
        bounded = problem.right is not None or problem.left is not None or self.segments is not None
        return bounded or problem.kv_len % self.config.block_kv != 0

    def softmax(self, s, m, l, item: Item, j, masked):
        """Streaming softmax in base 2 -> weights, maximum, sum, and what the sums so far shrink by."""
        problem = self.problem
        if problem.shaped:
            s = s * problem.scale if problem.softcap is None else jnp.tanh(s * (problem.scale / problem.softcap))
        if masked:
            s = self.mask(s, item, item.lo + item.blocks - 1 - j)
        higher = jnp.maximum(m, s.max(axis=1) * problem.exponent)
        alpha = jnp.exp2(m - higher)
        p = jnp.exp2(s * problem.exponent - lax.broadcast_in_dim(higher, s.shape, [0]))
        l = l * alpha + p.sum(axis=1)
        return p, higher, l, alpha

    def mask(self, s, item: Item, block):
        problem, shape = self.problem, s.shape
        q_pos = iota(shape[0], ROW) + self.position(item)
        kv_pos = lax.broadcast_in_dim(iota(shape[1], COL) + block * self.config.block_kv, shape, [1])
        first, end = self.keys_of(item)
        if problem.right is None:
            seen = kv_pos < end
        else:
            seen = kv_pos <= lax.broadcast_in_dim(jnp.minimum(q_pos + problem.right, end - 1), shape, [0])
        if problem.left is not None:
            start = q_pos - problem.left if first is None else jnp.maximum(q_pos - problem.left, first)
            seen &= kv_pos >= lax.broadcast_in_dim(start, shape, [0])
        elif first is not None:
            seen &= kv_pos >= first
        s = jnp.where(seen, s, -jnp.inf)
        if item.run is None:
            return s
        return lax.cond(item.run[2] != 0, lambda: self.compare_segments(s, item, block), lambda: s)

    def compare_segments(self, s, item: Item, block):
        assert self.segments is not None
        q_ids, kv_ids, _, kv_ends = self.segments
        low, high = (kv_ends[item.batch, block, i] for i in range(2))
        q_seg = load_segments(q_ids, item.batch, item.q_start + self.wg * ROWS, ROWS, ROW)

        def by_key():
            kv_seg = load_segments(kv_ids, item.batch, block * self.config.block_kv, self.config.block_kv, COL)
            of_row, of_key = (lax.broadcast_in_dim(x, s.shape, [axis]) for axis, x in enumerate((q_seg, kv_seg)))
            return jnp.where(of_row == of_key, s, -jnp.inf)

        def by_row():
            return jnp.where(lax.broadcast_in_dim(q_seg == low, s.shape, [0]), s, -jnp.inf)

        return lax.cond(low == high, by_row, by_key)

    def finish(self, item: Item, o, m, l) -> None:
        """Bring in the sink, divide, and send the rows away; the stores run under the next item."""
        seen = l != 0  # NaN, too, is something
        if self.sinks is not None:
            sink = self.sinks[item.batch, item.head] * LOG2E
            higher = jnp.maximum(m, sink)
            alpha = jnp.exp2(m - higher)
            l = l * alpha + jnp.exp2(sink - higher)
            o, m = o * lax.broadcast_in_dim(alpha, o.shape, [0]), higher
        o = o * lax.broadcast_in_dim(jnp.where(seen, 1 / l, 0.0), o.shape, [0])
        self.leave(item, o, jnp.where(seen, (m + jnp.log2(l)) / LOG2E, -jnp.inf))

    def leave(self, item: Item, o, lse) -> None:
        self.send(item, o, lse)

    def send(self, item: Item, o, lse) -> None:
        """Send the rows away by TMA, and their lse if it is given; the stores run under the next item."""
        start = item.q_start + self.wg * ROWS
        copied, written = (x.at[self.wg] for x in self.smem["out"])
        slots = written.shape[0]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if lse is not None:
            self.smem["lse"][self.wg] = lse
        for i in range(o.shape[1] // CHUNK):
            if i >= slots:
                plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
            written[i % slots] = o[:, i * CHUNK : (i + 1) * CHUNK].astype(self.out.dtype)
            plgpu.commit_smem()
            columns = hopper.columns(i, self.problem.v_dim, start)
            plgpu.copy_smem_to_gmem(
                copied.at[i % slots], self.out.at[item.batch, pl.ds(start, ROWS), item.head, columns]
            )
        if lse is not None:
            target = self.lse.at[item.batch, item.head, pl.ds(start, ROWS)]
            plgpu.copy_smem_to_gmem(self.smem["lse"].at[self.wg], target)

    def take_turn(self) -> None:
        hopper.bar_sync(hopper.FIRST_BARRIER + self.wg, 256)

    def pass_turn(self) -> None:
        hopper.bar_arrive(hopper.FIRST_BARRIER + lax.rem(self.wg + 1, self.config.warpgroups), 256)

    def release(self, barrier) -> None:
        hopper.bar_arrive(barrier, 128 * self.config.warpgroups + 32)
