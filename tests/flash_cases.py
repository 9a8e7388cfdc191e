"""The combinations that the GPU kernel of flash_attention is tried on: every pair of choices, and the hard ones.

Not the product of all choices, which has millions: a greedy list in which each choice of an axis meets each
choice of every other axis at least once (pairwise covering). It is the same list on every machine, so a name
in a failure stays a name.
"""

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from cases import FlashCase

from paxattn import flash_attention

NUM_COVERING = 208

# T < S, T = S and T > S; one below, at and one above the block sizes 64 and 128; none a multiple of another.
LENGTHS = [
    (1, 1),
    (1, 385),
    (5, 63),
    (5, 1000),
    (63, 64),
    (64, 65),
    (65, 129),
    (127, 385),
    (129, 257),
    (128, 385),
    (200, 257),
    (257, 1100),
    (129, 129),
    (256, 256),
    (385, 385),
    (64, 1),
    (63, 5),
    (200, 63),
    (257, 65),
    (129, 127),
    (385, 200),
    (1000, 385),
]

AXES: dict[str, Sequence[Any]] = {
    "dims": [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (192, 128)],
    "dtype": ["bfloat16", "float16"],
    "causal": [False, True],
    "window": [None, 1, 70, (90, 40), (33, None), (None, 20), (0, 0), (130, 257)],
    "lengths": LENGTHS,
    "group": [1, 2, 4, 7, 8],
    "batch": [1, 2, 3],
    "softcap": [None, 2.5],
    "scale": [None, 0.3],
    "sinks": [False, True],
    "ids": [None, "packed", "repeating", "foreign"],
    "deterministic": [True, False],
}


WRT = ("q", "k", "v", "sinks")
SHORT = {"bfloat16": "bf16", "float16": "f16"}


def covering(axes: dict[str, Sequence[Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """At least `count` rows of choices, one an axis, that hold every pair of choices of any two axes."""
    draw = random.Random(seed)
    missing = {pair for a, b in itertools.combinations(axes, 2) for pair in _product(axes, a, b)}
    rows = []
    while missing or len(rows) < count:
        first = draw.choice(sorted(missing, key=repr)) if missing else ()
        tries = [{name: draw.choice(choices) for name, choices in axes.items()} | dict(first) for _ in range(40)]
        best = max(tries, key=lambda row: len(pairs(row) & missing))
        missing -= pairs(best)
        rows.append(best)
    return rows


def _product(axes: dict[str, Sequence[Any]], a: str, b: str) -> Iterable[tuple[Any, ...]]:
    return (((a, x), (b, y)) for x in axes[a] for y in axes[b])


def pairs(row: dict[str, Any]) -> set[tuple[Any, ...]]:
    return set(itertools.combinations(row.items(), 2))


def _case(dims, dtype, causal, window, lengths, group, batch, softcap, scale, sinks, ids, deterministic) -> FlashCase:
    kv_heads = _kv_heads(group, batch)
    options = dict(causal=causal, window=window, softcap=softcap, scale=scale, deterministic=deterministic)
    flags = dict(causal=causal, window=window is not None, softcap=softcap is not None, sinks=sinks)
    words = [f"d{dims[0]}", SHORT[dtype], *(word for word, there in flags.items() if there), *([ids] if ids else [])]
    return FlashCase(
        "_".join(words),
        (batch, *lengths, group * kv_heads, kv_heads, *dims),
        {name: x for name, x in options.items() if x is not None},
        sinks=sinks,
        segments=0 if ids is None else 4,
        ids=ids or "packed",
        dtype=dtype,
    )


def _kv_heads(group: int, batch: int) -> int:
    """As few as keep the axes apart: an axis read for another must show."""
    if group == 8:  # multi-query
        return 1
    return next(k for k in (2, 3, 5) if k != batch and k * group != batch)


def _hard(name: str, shape: tuple[int, ...], dtype: str = "bfloat16", **changes: Any) -> FlashCase:
    fields = {key: changes.pop(key) for key in ("sinks", "segments", "ids") if key in changes}
    return FlashCase(name, shape, changes, dtype=dtype, **fields)


def _plain(i: int, dims: tuple[int, int], causal: bool) -> FlashCase:
    """Nothing but lengths and heads, the rest in turn."""
    lengths = ((257, 385), (320, 320), (385, 200))[i // 2 % 3]
    name, dtype = f"plain_d{dims[0]}{'_causal' * causal}", AXES["dtype"][i // 2 % 2]
    return _hard(name, (2, *lengths, 6, 3, *dims), dtype, causal=causal, deterministic=i % 3 > 0)


HARD = [
    *(_plain(i, *choice) for i, choice in enumerate(itertools.product(AXES["dims"], (False, True)))),
    # A scale below zero turns the order of the scores round, and one of zero makes them all equal.
    _hard("scale_negative", (2, 129, 257, 6, 3, 64, 64), causal=True, scale=-0.2),
    _hard("scale_zero", (2, 129, 257, 6, 3, 128, 128), "float16", scale=0.0),
    _hard("scale_negative_softcap", (1, 200, 129, 4, 2, 96, 96), scale=-0.2, softcap=3.0, sinks=True),
    # Windows beyond what int32 positions can be added to.
    _hard("window_huge", (1, 129, 200, 4, 2, 64, 64), window=(2**31 - 1, 2**31 - 1)),
    _hard("window_beyond_int32", (1, 129, 200, 4, 2, 64, 64), causal=True, window=2**40),
    # Windows that leave whole blocks of keys, or of queries, with nothing.
    _hard("keys_nobody_sees", (2, 63, 1000, 6, 3, 80, 80), causal=True, window=17),
    _hard("window_past_the_keys", (1, 1000, 63, 4, 2, 64, 64), window=(3, 5), sinks=True),
    _hard("whole_blocks_of_queries_see_nothing", (2, 1000, 65, 6, 3, 128, 128), "float16", causal=True),
    _hard("nothing_seen_but_one_row", (1, 385, 1, 4, 2, 256, 256), causal=True, sinks=True, deterministic=False),
    _hard("causal_by_the_window", (2, 200, 257, 6, 3, 128, 128), window=(None, 0)),
    _hard("diagonal", (2, 385, 385, 6, 3, 128, 128), window=(0, 0), softcap=3.0),
    _hard("diagonal_below_zero", (2, 385, 200, 6, 3, 192, 128), causal=True, window=1, sinks=True),
    # Segments: one all over, one a token, and none that q and k share.
    _hard("one_segment", (2, 257, 385, 6, 3, 128, 128), causal=True, segments=2, ids="repeating"),
    _hard("many_segments", (2, 257, 385, 6, 3, 64, 64), causal=True, segments=150),
    _hard("many_segments_scattered", (2, 385, 257, 6, 3, 64, 64), segments=90, ids="repeating", sinks=True),
    _hard("foreign_window_sinks", (3, 200, 385, 14, 2, 96, 96), window=(60, 30), segments=5, ids="foreign", sinks=True),
    # Odd ratios, and more heads than a cluster or a block of threads would take at once.
    _hard("multi_query_7", (2, 129, 257, 7, 1, 80, 80), causal=True, deterministic=False),
    _hard("multi_query_24", (1, 65, 129, 24, 1, 64, 64), causal=True),
    _hard("group_3", (2, 127, 130, 15, 5, 128, 128), "float16", causal=True, sinks=True),
    _hard("batch_5", (5, 65, 66, 4, 2, 64, 64), causal=True),
    # All there is.
    *(
        _hard(
            f"everything_d{d}",
            (2, 385, 513, 14, 7, d, dv),
            dtype,
            causal=True,
            window=(150, None),
            softcap=4.0,
            scale=0.2,
            deterministic=deterministic,
            sinks=True,
            segments=3,
            ids="repeating",
        )
        for (d, dv), dtype, deterministic in zip(
            AXES["dims"], itertools.cycle(("float16", "bfloat16")), itertools.cycle((True, True, False)), strict=False
        )
    ),
]

ROWS = covering(AXES, NUM_COVERING, seed=4)
CASES = [
    replace(case, name=f"{i}_{case.name}") for i, case in enumerate([*HARD, *(_case(**row) for row in ROWS)], start=1)
]


def representatives(cases: Sequence[FlashCase], features: Callable[[FlashCase], dict[str, Any]]) -> list[FlashCase]:
    """Few of the cases, greedily, that hold every pair of features which the whole list holds."""
    held = [pairs(features(case)) for case in cases]
    missing = set().union(*held)
    chosen = []
    while missing:
        best = max(range(len(cases)), key=lambda i: len(held[i] & missing))
        missing -= held[best]
        chosen.append(cases[best])
    return chosen


def split(inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is differentiated, and the rest."""
    moving = {name: inputs[name] for name in WRT if inputs.get(name) is not None}
    return moving, {name: x for name, x in inputs.items() if name not in WRT}


def cotangent_shapes(case: FlashCase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    b, t, _, h, _, _, dv = case.shape
    return (b, t, h, dv), (b, h, t)


def everything(op: Callable[..., Any], moving: dict[str, Any], fixed: dict[str, Any], cotangents: tuple[Any, Any]):
    """out, lse and the gradients of both in all that is differentiated, by name; op gives (out, lse)."""
    (out, lse), pull = jax.vjp(lambda moving: op(**moving, **fixed), moving)
    (grads,) = pull((cotangents[0].astype(out.dtype), cotangents[1].astype(lse.dtype)))
    return {"out": out, "lse": lse} | {f"d{name}": grad for name, grad in grads.items()}


def attend(case: FlashCase, implementation: str) -> Callable[..., Any]:
    """`everything` of flash_attention with the case's options."""
    return partial(everything, partial(flash_attention, **case.options, return_lse=True, implementation=implementation))
