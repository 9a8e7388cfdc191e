"""What the host changes between loops: rows come, go and fork. Packed on the host, applied in one jitted call."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from paxattn.engine.packed import Packed
from paxattn.engine.rules import Rules
from paxattn.engine.scheduler import Request
from paxattn.engine.slots import IDLE, RUNNING, Slots


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Edit:
    """In this order: rows are emptied, pages let go, and A rows admitted.

    Fields:
      drop: bool [R]
      let_go: i32 [X], pages; -1 = none
      rows: i32 [A], to be filled; -1 = none
      tokens: i32 [C], those of the new rows, one row after the other
      known: i32 [A], how many each has; a paused row keeps the last one for later
      pages: i32 [A,M], counts i32 [A]: full pages that hold the first of them already
      order, paused: [A], as in Slots
      rules: of A rows
    """

    drop: Any
    let_go: Any
    rows: Any
    tokens: Any
    known: Any
    pages: Any
    counts: Any
    order: Any
    paused: Any
    rules: Rules


@dataclass(frozen=True)
class Admission:
    """A row to be filled: its tokens, the pages that hold the first of them, and its rules, of numbers or [X] each."""

    row: int
    tokens: Sequence[int]
    pages: Sequence[int]
    order: int
    paused: bool
    rules: Rules

    @classmethod
    def of(cls, request: Request, pages: Sequence[int]) -> "Admission":
        """Of a request that was given a row, and found these full pages there already."""
        rules = replace(request.options.rules, stream=request.options.index)
        order = max(-(2**31), min(2**31 - 1, request.key[0]))
        return cls(row_of(request), request.tokens, pages, order, bool(request.twins), rules)


def row_of(request: Request) -> int:
    assert request.row is not None
    return request.row


@dataclass(frozen=True)
class Room:
    """Static sizes of edits: A admissions, X pages let go, and C tokens, of which there are a few sizes."""

    admissions: int
    pages: int
    tokens: tuple[int, ...]

    @classmethod
    def of(cls, max_seqs: int, max_len: int) -> "Room":
        most = max(max_len, 16384)
        return cls(min(max_seqs, 64), 1024, tuple(sorted({min(most, 1024), most})))


def pack(
    room: Room, like: Slots, drop: Sequence[int], let_go: Sequence[int], admitted: Sequence[Admission]
) -> list[Edit]:
    """As many edits as it takes, of numpy arrays; the first empties all rows."""
    groups = _in_groups(room, admitted)
    parts = [let_go[i : i + room.pages] for i in range(0, len(let_go), room.pages)]
    count = max(len(groups), len(parts), 1)
    # Pages go back before rows come: what admits them may count on these.
    groups = [[]] * (count - len(groups)) + groups
    parts += [[]] * (count - len(parts))
    return [_pack(room, like, [] if i else drop, parts[i], groups[i]) for i in range(count)]


def _in_groups(room: Room, admitted: Sequence[Admission]) -> list[list[Admission]]:
    groups: list[list[Admission]] = []
    size = 0
    for one in admitted:
        size += len(one.tokens)
        if not groups or len(groups[-1]) == room.admissions or size > room.tokens[-1]:
            groups.append([])
            size = len(one.tokens)
        groups[-1].append(one)
    return groups


def _pack(room: Room, like: Slots, drop: Sequence[int], let_go: Sequence[int], group: Sequence[Admission]) -> Edit:
    rows, width = like.kv.page_table.shape
    mask = np.zeros(rows, bool)
    mask[list(drop)] = True
    pages = np.full((room.admissions, width), -1, np.int32)
    for i, one in enumerate(group):
        pages[i, : len(one.pages)] = one.pages
    total = sum(len(one.tokens) for one in group)
    tokens = [one.tokens for one in group]
    size = next(size for size in room.tokens if size >= total)

    def column(values: Sequence[Any], fill: int, dtype: Any = np.int32) -> np.ndarray:
        return _padded(np.asarray(values, dtype), room.admissions, fill)

    def rule(like: Array, *values: Any) -> np.ndarray:
        given = np.asarray(values, like.dtype).reshape(len(values), *like.shape[1:])
        return _padded(given, room.admissions, 0)

    return Edit(
        drop=mask,
        let_go=_padded(np.asarray(let_go, np.int32), room.pages, -1),
        rows=column([one.row for one in group], -1),
        tokens=_padded(np.concatenate([np.zeros(0, np.int32), *tokens]).astype(np.int32), size, 0),
        known=column([len(one.tokens) for one in group], 0),
        pages=pages,
        counts=column([len(one.pages) for one in group], 0),
        order=column([one.order for one in group], 0),
        paused=column([one.paused for one in group], 0, bool),
        rules=jax.tree.map(rule, like.rules, *[one.rules for one in group]),
    )


def _padded(x: np.ndarray, size: int, fill: int) -> np.ndarray:
    return np.concatenate([x, np.full((size - len(x), *x.shape[1:]), fill, x.dtype)])


def empty(room: Room, like: Slots, size: int) -> Packed:
    """An edit that changes nothing, of so many tokens."""
    [edit] = pack(room, like, [], [], [])
    return Packed.of(replace(edit, tokens=np.zeros(size, np.int32)))


def pack_forks(like: Slots, forks: Sequence[tuple[Request, list[Request]]]) -> tuple[np.ndarray, ...]:
    """What `fork` takes besides the slots, of the requests that are forked from, and those that go on from each."""
    rows = like.kv.max_seqs
    wakes, dst = np.zeros(rows, bool), np.full(rows, -1, np.int32)
    src, streams = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    wakes[[row_of(one) for one, _ in forks]] = True
    pairs = [(one, twin) for one, twins in forks for twin in twins]
    for i, (one, twin) in enumerate(pairs):
        src[i], dst[i], streams[i] = row_of(one), row_of(twin), twin.options.index
    return wakes, src, dst, streams


@partial(jax.jit, donate_argnames="slots")
def apply(slots: Slots, packed: Packed) -> Slots:
    """The slots after an Edit. Rows that are filled must be empty, or hold just what swap_in put there."""
    edit: Edit = packed.tree()
    kv = slots.kv.release(edit.drop).let_go(edit.let_go)
    kv, _ = kv.adopt(jnp.where(edit.counts > 0, edit.rows, -1), edit.pages, edit.counts)
    into = jnp.where(edit.rows >= 0, edit.rows, kv.max_seqs)

    ends = jnp.cumsum(edit.known, dtype=jnp.int32)
    index = jnp.arange(len(edit.tokens))
    which = jnp.minimum(jnp.searchsorted(ends, index, side="right", method="scan_unrolled"), len(ends) - 1)
    row = jnp.where(index < ends[-1], into[which], kv.max_seqs)
    tokens = slots.tokens.at[row, index - (ends - edit.known)[which]].set(edit.tokens, mode="drop")

    def put(x: Array, new: Array) -> Array:
        return x.at[into].set(new, mode="drop")

    return replace(
        slots,
        kv=kv,
        tokens=tokens,
        known=put(slots.known, edit.known - edit.paused.astype(jnp.int32)),
        state=put(jnp.where(edit.drop, IDLE, slots.state), jnp.full_like(edit.rows, RUNNING)),
        order=put(slots.order, edit.order),
        fresh=put(slots.fresh, jnp.ones_like(edit.paused)),
        paused=put(slots.paused, edit.paused),
        rules=jax.tree.map(put, slots.rules, edit.rules),
    )


@partial(jax.jit, donate_argnames="slots")
def fork(slots: Slots, wakes: Array, src: Array, dst: Array, streams: Array) -> Slots:
    """Paused rows go on, and others from the same prompts.

    Args:
      wakes: bool [R], the paused rows.
      src, dst: i32 [F], empty row dst[i] goes on from paused row src[i]; a negative dst is skipped.
      streams: i32 [F], of the new rows.
    """
    kv, ok = slots.kv.fork(src, dst)
    into = jnp.where(ok & (dst >= 0), dst, kv.max_seqs)
    slots = replace(slots, known=slots.known + wakes.astype(jnp.int32), paused=slots.paused & ~wakes)

    def copy(x: Array) -> Array:
        return x.at[into].set(x[jnp.maximum(src, 0)], mode="drop")

    rules = jax.tree.map(copy, slots.rules)
    rules = replace(rules, stream=rules.stream.at[into].set(streams, mode="drop"))
    return replace(
        slots,
        kv=kv,
        tokens=copy(slots.tokens),
        known=copy(slots.known),
        state=copy(slots.state),
        order=copy(slots.order),
        fresh=copy(slots.fresh),
        paused=copy(slots.paused),
        rules=rules,
    )
