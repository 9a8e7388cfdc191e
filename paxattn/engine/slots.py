"""The engine's state on the device, one pure step of it, and the loop of steps.

A row is a list of known tokens, of which the store has the first. A step feeds each row some of those that the store
lacks, and draws another where none is lacking any more. So a chunk of a prompt, a token of decode and a draft to be
verified are the same thing, and rows of all kinds mix in one step.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from paxattn.engine.drafts import look_up
from paxattn.engine.generate import Model, hidden_at
from paxattn.engine.rules import Rules, log_probabilities
from paxattn.engine.sampling import sample
from paxattn.kv.page_table import PageTable
from paxattn.kv.stores import Batch, PagedKV

IDLE, RUNNING, STOP, LENGTH = range(4)
REASONS = ("idle", "running", "stop", "length")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """R rows.

    Fields:
      kv: the store
      tokens: i32 [R,S], what is known of each row
      known: i32 [R], how many those are
      state: i32 [R], IDLE, RUNNING or why the row ended
      order: i32 [R], whose prompt is fed first: the smallest
      fresh: bool [R], whether the row has not drawn a token since it was admitted
      paused: bool [R], whether the row only feeds what is known, and draws nothing
      rules: Rules
    """

    kv: PagedKV
    tokens: Array
    known: Array
    state: Array
    order: Array
    fresh: Array
    paused: Array
    rules: Rules

    @classmethod
    def create(cls, kv: PagedKV, stop_ids: int, biases: int) -> "Slots":
        """All rows idle; room for so many stop ids and logit biases a row."""
        rows = kv.max_seqs
        return cls(
            kv=kv,
            tokens=jnp.zeros((rows, kv.capacity), jnp.int32),
            known=jnp.zeros(rows, jnp.int32),
            state=jnp.full(rows, IDLE, jnp.int32),
            order=jnp.zeros(rows, jnp.int32),
            fresh=jnp.zeros(rows, bool),
            paused=jnp.zeros(rows, bool),
            rules=Rules.none(rows, stop_ids, biases),
        )

    @property
    def running(self) -> Array:
        return self.state == RUNNING

    @property
    def lacking(self) -> Array:
        """i32 [R]: known tokens that the store does not have yet."""
        return jnp.where(self.running, self.known - self.kv.lens, 0)


class Shape(NamedTuple):
    """What is static of a program.

    Fields:
      prefill: tokens of prompts in a step, besides a place for each that a row may draw; 0 = a program for decode.
      steps: most steps of a loop.
      drafts: D, most tokens guessed and verified at once.
      ngram: see `look_up`.
      top: log-probabilities of how many tokens besides the drawn one.
      cached: whether full pages are held for a prefix index.
    """

    prefill: int
    steps: int
    drafts: int
    ngram: int
    top: int
    cached: bool

    @property
    def width(self) -> int:
        """Most tokens that a row draws in a step."""
        return 1 + self.drafts


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class News:
    """What the host learns of a loop.

    Fields:
      tokens: i32 [steps,R,W] drawn, -1 = none
      logprobs: f32 [steps,R,W], their log-probabilities, where asked for
      top_ids, top_logprobs: [steps,R,W,top], the likeliest
      steps: i32 [], taken
      stalled: bool [], whether a row found no page
      state: i32 [R]; a row that ended was released
      lens: i32 [R], tokens in the store
      num_free, num_shared: i32 [], pages
      begun, ended: i32 [R], full pages that were held for the prefix index when the row had its prompt, and at its end
      pages: i32 [R,M], of each row, in order; of ended rows, too
    """

    tokens: Array
    logprobs: Array
    top_ids: Array
    top_logprobs: Array
    steps: Array
    stalled: Array
    state: Array
    lens: Array
    num_free: Array
    num_shared: Array
    begun: Array
    ended: Array
    pages: Array


class Drawn(NamedTuple):
    """One step's part of News."""

    tokens: Array
    logprobs: Array
    top_ids: Array
    top_logprobs: Array
    stalled: Array
    begun: Array
    ended: Array


@partial(jax.jit, static_argnames=("model", "shape"), donate_argnames=("slots",))
def run(model: Model, params: Any, slots: Slots, limit: Array, idle: Array, *, shape: Shape) -> tuple[Slots, News]:
    """Up to `limit` steps, without the host; one at least, where any row can take it.

    It ends early when more than `idle` rows run no more (there is then room for those that wait), a row finds no
    page, a row waits for its twins, or the program is not the one for what is left to do.
    """
    rows, width = len(slots.known), shape.width
    drawn = (shape.steps, rows, width)
    nothing = Drawn(
        tokens=jnp.full(drawn, -1, jnp.int32),
        logprobs=jnp.zeros(drawn, jnp.float32),
        top_ids=jnp.zeros((*drawn, shape.top), jnp.int32),
        top_logprobs=jnp.zeros((*drawn, shape.top), jnp.float32),
        stalled=jnp.zeros((), bool),
        begun=jnp.zeros(rows, jnp.int32),
        ended=jnp.zeros(rows, jnp.int32),
    )

    def goes_on(carry):
        at, slots, log = carry
        lacking = slots.lacking
        prompts = jnp.any(lacking > width)
        waits = jnp.any(slots.running & slots.paused & (lacking == 0))
        room = jnp.sum(~slots.running) > idle
        fits = prompts if shape.prefill else ~prompts
        return (at < limit) & jnp.any(lacking > 0) & ((at == 0) | (fits & ~waits & ~room & ~log.stalled))

    def advance(shape, carry):
        at, slots, log = carry
        slots, new = step(model, params, slots, shape)
        put = {name: getattr(log, name).at[at, :, : shape.width].set(getattr(new, name)) for name in Drawn._fields[:4]}
        log = log._replace(
            **put,
            stalled=new.stalled,
            begun=jnp.maximum(log.begun, new.begun),
            ended=jnp.maximum(log.ended, new.ended),
        )
        return at + 1, slots, log

    def body(carry):
        if not shape.drafts:
            return advance(shape, carry)
        wide = jnp.any(_guess(carry[1], shape)[2] > 0) | jnp.any(carry[1].lacking > 1)
        return lax.cond(wide, partial(advance, shape), partial(advance, shape._replace(drafts=0)), carry)

    steps, slots, log = lax.while_loop(goes_on, body, (jnp.int32(0), slots, nothing))
    table = slots.kv.table
    news = News(
        **log._asdict(),
        steps=steps,
        state=jnp.copy(slots.state),
        lens=jnp.copy(table.lens),
        num_free=jnp.copy(table.num_free),
        num_shared=jnp.sum(table.owners > 1, dtype=jnp.int32),
        pages=jnp.copy(table.page_table) if shape.cached else jnp.zeros((rows, 0), jnp.int32),
    )
    return slots, news


def step(model: Model, params: Any, slots: Slots, shape: Shape) -> tuple[Slots, Drawn]:
    """Feed what fits of the known tokens, draw where all are fed, end rows and give back their pages."""
    rows, width = len(slots.known), shape.width
    slots, drafts, guessed = _guess(slots, shape)
    room = rows * width + shape.prefill
    q_lens = guessed + _shares(slots, shape, room - jnp.sum(guessed, dtype=jnp.int32))
    kv, ok = slots.kv.extend(q_lens, num_tokens=room, max_q_len=None if shape.prefill else width)
    batch: Batch = kv.batch  # type: ignore[assignment]
    place = batch.cu_q_lens[1:, None] - 1 - guessed[:, None] + jnp.arange(width)[None, :]
    place, tokens = jnp.clip(place, 0, room - 1), slots.tokens[batch.rows, batch.positions]
    hidden, kv = hidden_at(place.reshape(-1), model, params, tokens, kv)

    fed = ok & (q_lens > 0) & slots.running & (kv.lens == slots.known + guessed)
    draws = fed & ~slots.paused
    drawn, told = _draw(model, params, slots, hidden, shape)
    count, state = _accept(slots, drafts, guessed, drawn)
    count = jnp.where(draws, count, 0)

    where = slots.known[:, None] + jnp.arange(width)[None, :]
    taken = jnp.arange(width)[None, :] < count[:, None]
    place = jnp.where(taken, where, slots.tokens.shape[1])
    tokens = slots.tokens.at[jnp.arange(rows)[:, None], place].set(drawn, mode="drop")
    known = slots.known + count
    if shape.drafts:
        kv = replace(kv, table=kv.table.truncate(jnp.where(draws, known - 1, kv.lens)))
    state = jnp.where(draws, state, slots.state)
    ends = draws & (state != RUNNING)
    begun = ended = jnp.zeros(rows, jnp.int32)
    if shape.cached:
        full = kv.lens // kv.table.page_size
        begun, ended = jnp.where(fed & slots.fresh & ~ends, full, 0), jnp.where(ends, full, 0)
    kv = replace(kv, table=_settle(kv.table, begun + ended, ends))
    slots = replace(slots, kv=kv, tokens=tokens, known=known, state=state, fresh=slots.fresh & ~fed)
    stalled = jnp.any((q_lens > 0) & ~ok)
    return slots, Drawn(jnp.where(taken, drawn, -1), *told, stalled, begun, ended)


def _settle(table: PageTable, offered: Array, ends: Array) -> PageTable:
    """Hold the first offered[r] pages of each row for the prefix index, then release the rows that end."""

    def change(table: PageTable) -> PageTable:
        column = jnp.arange(table.page_table.shape[1])[None, :]
        pages = jnp.where(column < offered[:, None], table.page_table, -1)
        return table.hold(pages.reshape(-1)).release(ends)

    # Most steps end no row, and to find that out is all that they pay.
    return lax.cond(jnp.any(ends) | jnp.any(offered > 0), change, lambda table: table, table)


def _guess(slots: Slots, shape: Shape) -> tuple[Slots, Array, Array]:
    """The slots with drafts behind what is known, drafts [R,D], and how many a row has of them [R].

    None for rows whose logits depend on the tokens before, and none that would outgrow the row's end or want the
    last pages.
    """
    rows = len(slots.known)
    if not shape.drafts:
        return slots, jnp.zeros((rows, 0), jnp.int32), jnp.zeros(rows, jnp.int32)
    drafts, count = look_up(slots.tokens, slots.known, shape.ngram, shape.drafts)
    free = (slots.lacking == 1) & ~slots.paused & ~slots.fresh & ~slots.rules.penalized
    pages = shape.drafts // slots.kv.table.page_size + 2
    roomy = slots.kv.table.num_free >= jnp.sum(slots.running) * pages
    left = jnp.maximum(slots.rules.most - slots.known - 1, 0)
    count = jnp.where(free & roomy, jnp.minimum(count, left), 0)
    index = jnp.arange(shape.drafts)[None, :]
    place = jnp.where(index < count[:, None], slots.known[:, None] + index, slots.tokens.shape[1])
    tokens = slots.tokens.at[jnp.arange(rows)[:, None], place].set(drafts, mode="drop")
    return replace(slots, tokens=tokens), drafts, count


def _shares(slots: Slots, shape: Shape, room: Array) -> Array:
    """i32 [R]: how many known tokens each row is fed: decode always, prompts in their order as far as room goes."""
    lacking = slots.lacking
    small = jnp.minimum(lacking, shape.width)
    if not shape.prefill:
        return small
    decode = lacking <= 1
    order = jnp.argsort(jnp.where(decode, jnp.iinfo(jnp.int32).max, slots.order))
    wanted = jnp.where(decode, 0, lacking)[order]
    before = jnp.cumsum(wanted, dtype=jnp.int32) - wanted
    share = jnp.clip(room - jnp.sum(decode & (lacking > 0), dtype=jnp.int32) - before, 0, wanted)
    return jnp.where(decode, lacking, jnp.zeros_like(lacking).at[order].set(share))


def _draw(model, params, slots: Slots, hidden: Array, shape: Shape) -> tuple[Array, tuple[Array, Array, Array]]:
    """Tokens i32 [R,W] from hidden states [R*W,E], and their log-probabilities."""
    rows, width = len(slots.known), shape.width
    rules, known = jax.tree.map(partial(_each, width), (slots.rules.of_running(slots.running), slots.known))
    known = known + jnp.tile(jnp.arange(width), rows)

    def by_rules(hidden: Array) -> tuple[Array, ...]:
        logits = model.logits(params, hidden)
        tokens = _each(width, slots.tokens)
        drawn = sample(rules.apply(logits, tokens, known), rules.sampling, known - rules.prompt, rules.stream)
        return drawn, *log_probabilities(logits, drawn, rules.logprobs, shape.top)

    def greedy(hidden: Array) -> tuple[Array, ...]:
        nothing = jnp.zeros((len(hidden), shape.top), jnp.float32)
        return (
            jnp.argmax(model.logits(params, hidden), axis=-1).astype(jnp.int32),
            jnp.zeros(len(hidden), jnp.float32),
            nothing.astype(jnp.int32),
            nothing,
        )

    # One branch for all that most steps do without. Each has logits of its own, as nothing that large should enter or
    # leave a branch: the greedy one's are then read as the matrix product leaves them, without a copy in float32.
    drawn, chosen, ids, best = lax.cond(rules.plain(known), greedy, by_rules, hidden)
    by_row = rows, width
    told = chosen.reshape(by_row), ids.reshape(*by_row, shape.top), best.reshape(*by_row, shape.top)
    return drawn.reshape(by_row), told


def _each(times: int, x: Array) -> Array:
    """Every row so many times."""
    return jnp.repeat(x, times, axis=0) if times > 1 else x


def _accept(slots: Slots, drafts: Array, guessed: Array, drawn: Array) -> tuple[Array, Array]:
    """How many of the drawn tokens [R,W] count, and the state after them, both i32 [R].

    The token behind a draft counts if what was drawn in its place is the draft. As every token is drawn with the key
    of its own place, rows get the tokens that they would get without drafts.
    """
    width = drawn.shape[1]
    index = jnp.arange(width)[None, :]
    right = (drafts == drawn[:, : width - 1]) & (index[:, : width - 1] < guessed[:, None])
    reached = jnp.cumprod(jnp.pad(right, ((0, 0), (1, 0)), constant_values=True), axis=1, dtype=jnp.int32) == 1
    stops = jnp.any(drawn[:, :, None] == slots.rules.stop_ids[:, None, :], axis=2)
    long = slots.known[:, None] + index + 1 >= slots.rules.most[:, None]
    ends = stops | long
    before = jnp.cumsum(ends, axis=1, dtype=jnp.int32) - ends.astype(jnp.int32)
    counted = reached & (before == 0)
    stopped, lengthy = jnp.any(counted & stops, axis=1), jnp.any(counted & long, axis=1)
    state = jnp.where(stopped, STOP, jnp.where(lengthy, LENGTH, RUNNING))
    return jnp.sum(counted, axis=1, dtype=jnp.int32), state.astype(jnp.int32)
