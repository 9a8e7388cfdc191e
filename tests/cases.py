"""The cases that every implementation of an op is tried on, and plain attention to measure its error by."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import paxattn


@dataclass(frozen=True)
class FlashCase:
    name: str
    shape: tuple[int, ...]  # B T S H K D Dv, each different where it can be
    options: dict[str, Any] = field(default_factory=dict)
    sinks: bool = False
    segments: int = 0
    ids: str = "packed"  # how segments lie: packed, repeating, foreign
    dtype: str = "float32"

    def __str__(self) -> str:
        return self.name


FLASH = [
    FlashCase("full", (2, 301, 577, 6, 3, 16, 16)),
    FlashCase("causal", (2, 301, 301, 4, 2, 16, 16), dict(causal=True)),
    FlashCase("causal_longer_keys", (2, 301, 577, 6, 2, 16, 24), dict(causal=True)),
    FlashCase("causal_longer_queries", (1, 577, 301, 6, 3, 16, 8), dict(causal=True)),
    FlashCase("one_query", (3, 1, 519, 8, 2, 32, 32), dict(causal=True)),
    FlashCase("one_by_one", (7, 1, 1, 6, 3, 8, 8), dict(causal=True)),
    FlashCase("multi_query_7", (1, 65, 130, 7, 1, 24, 40)),
    FlashCase("no_groups", (1, 257, 255, 5, 5, 80, 80), dict(causal=True)),
    FlashCase("dims_192_128", (1, 33, 70, 2, 1, 192, 128), dict(causal=True)),
    FlashCase("window_int", (2, 300, 600, 4, 2, 16, 16), dict(causal=True, window=70)),
    FlashCase("window_one", (2, 300, 310, 4, 2, 16, 16), dict(causal=True, window=1)),
    FlashCase("window_int_not_causal", (1, 290, 280, 4, 2, 16, 16), dict(window=33)),
    FlashCase("window_pair", (1, 300, 520, 4, 2, 16, 16), dict(window=(90, 40))),
    FlashCase("window_right", (1, 270, 520, 4, 2, 16, 16), dict(window=(None, 0))),
    FlashCase("window_past_the_keys", (1, 600, 40, 4, 2, 16, 16), dict(window=(3, 5))),
    FlashCase("softcap", (2, 130, 270, 4, 2, 16, 16), dict(causal=True, softcap=2.5)),
    FlashCase("scale", (2, 130, 270, 4, 2, 16, 16), dict(scale=0.7)),
    FlashCase("sinks", (2, 300, 290, 6, 2, 16, 16), dict(causal=True), sinks=True),
    FlashCase("segments", (2, 280, 333, 4, 2, 16, 16), segments=4),
    FlashCase(
        "everything",
        (2, 280, 333, 6, 2, 16, 24),
        dict(causal=True, window=(60, None), softcap=5.0, scale=0.3),
        sinks=True,
        segments=3,
    ),
]


def flash_inputs(case: FlashCase, rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
    b, t, s, h, k, d, dv = case.shape
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    inputs = dict(q=normal(b, t, h, d), k=normal(b, s, k, d), v=normal(b, s, k, dv))
    inputs["sinks"] = jnp.asarray(rng.normal(size=h), jnp.float32) if case.sinks else None
    if case.segments:
        inputs["q_segment_ids"], inputs["kv_segment_ids"] = (
            jnp.asarray(x, jnp.int32) for x in SEGMENT_IDS[case.ids](rng, case.segments, (b, t), (b, s))
        )
    return inputs


def packed_ids(rng, count, q_shape, kv_shape):
    """Sorted, as packed documents are; no key has the first id."""
    return np.sort(rng.integers(0, count, q_shape)), np.sort(rng.integers(1, count, kv_shape))


def repeating_ids(rng, count, q_shape, kv_shape):
    """Runs of random length whose ids come back later: a block's lowest and highest id say too little."""
    return tuple(np.stack([_runs(rng, count, length) for _ in range(b)]) for b, length in (q_shape, kv_shape))


def _runs(rng, count, length):
    ids = np.repeat(rng.integers(0, count, length), rng.integers(1, 90, length))
    return ids[:length]


def foreign_ids(rng, count, q_shape, kv_shape):
    """Ids at both ends of int32 and below zero, which are no padding; some in q that no key has, and the reverse."""
    ids = np.array([-(2**31), -1, 0, *range(1, count), 2**31 - 1])
    return np.sort(rng.choice(ids[:-1], q_shape)), np.sort(rng.choice(ids[1:], kv_shape))


SEGMENT_IDS = {"packed": packed_ids, "repeating": repeating_ids, "foreign": foreign_ids}


def seen_keys(case: FlashCase, inputs: dict[str, Any]) -> Any:
    """bool [B,T,S], by the definition of the arguments."""
    b, t, s = case.shape[:3]
    distance = np.arange(s)[None, :] - (np.arange(t) + s - t)[:, None]
    window = case.options.get("window")
    left, right = window if isinstance(window, tuple) else (None if window is None else window - 1, None)
    seen = np.ones((t, s), bool)
    if case.options.get("causal"):
        seen &= distance <= 0
    if left is not None:
        seen &= distance >= -left
    if right is not None:
        seen &= distance <= right
    seen = np.broadcast_to(seen, (b, t, s))
    if case.segments:
        seen = seen & (np.asarray(inputs["q_segment_ids"])[:, :, None] == np.asarray(inputs["kv_segment_ids"])[:, None])
    return jnp.asarray(seen)


@dataclass(frozen=True)
class PagedCase:
    name: str
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    heads: tuple[int, int, int] = (6, 2, 16)  # H K D
    page_size: int = 8
    padding: int = 0  # tokens past cu_q_lens[-1]
    options: dict[str, Any] = field(default_factory=dict)
    sinks: bool = False
    dropped: bool = False  # pages behind the window are nobody's any more
    dtype: str = "float32"

    def __str__(self) -> str:
        return self.name

    def begin(self, row: int) -> int:
        """The first position that is there."""
        seen = self.kv_lens[row] - self.q_lens[row] - self.options["window"] + 1 if self.dropped else 0
        return max(seen, 0) // self.page_size * self.page_size


MIXED = ((5, 1, 0, 40, 1, 17), (5, 33, 9, 77, 1, 300))

PAGED = [
    PagedCase("decode", (1, 1, 1), (5, 130, 64), options=dict(max_q_len=1)),
    PagedCase("decode_without_the_hint", (1, 1, 1), (5, 130, 64)),
    PagedCase("decode_many_pages", (1, 1), (1100, 611), page_size=16, options=dict(max_q_len=1)),
    PagedCase("decode_idle_rows", (0, 1, 0, 1), (0, 7, 9, 12), padding=2, options=dict(max_q_len=1)),
    PagedCase("row_without_keys", (1, 1), (0, 3), options=dict(max_q_len=1)),
    PagedCase("prefill", (70, 3, 150), (70, 3, 150)),
    PagedCase("prefill_long", (400,), (700,), page_size=16),
    PagedCase("chunk_on_top", (33, 64), (90, 65)),
    PagedCase("mixed", *MIXED),
    PagedCase("mixed_padded", *MIXED, padding=13),
    PagedCase("nothing_but_padding", (0, 0), (4, 0), padding=5),
    PagedCase("page_of_one", (3, 9), (11, 9), page_size=1),
    PagedCase("page_of_256", (20, 1), (300, 700), page_size=256),
    PagedCase("page_larger_than_a_block", (20, 1), (300, 700), page_size=1536),
    PagedCase("page_that_does_not_split", (20, 1), (300, 700), page_size=1021),
    PagedCase("multi_query_7", (9, 1), (20, 31), heads=(7, 1, 80)),
    PagedCase("no_groups", (9, 1), (20, 31), heads=(3, 3, 24)),
    PagedCase("window", *MIXED, options=dict(window=19)),
    PagedCase("window_pair", *MIXED, options=dict(window=(40, 3))),
    PagedCase("window_decode", (1, 1), (700, 3), options=dict(window=20, max_q_len=1)),
    PagedCase("window_dropped", *MIXED, options=dict(window=19), dropped=True),
    PagedCase("window_decode_dropped", (1, 1), (700, 3), options=dict(window=20, max_q_len=1), dropped=True),
    PagedCase("softcap", *MIXED, options=dict(softcap=2.0)),
    PagedCase("scale", *MIXED, options=dict(scale=0.6)),
    PagedCase("sinks", *MIXED, sinks=True, padding=3),
    PagedCase("everything", *MIXED, padding=4, options=dict(window=60, softcap=4.0, max_q_len=40), sinks=True),
]


def paged_inputs(case: PagedCase, rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
    """Inputs whose every unowned page slot and padded query is NaN and every unreached table entry is garbage."""
    h, k, d = case.heads
    rows, p = len(case.q_lens), case.page_size
    pages = [-(-n // p) for n in case.kv_lens]
    num_pages, width = sum(pages) + 3, max(pages) + 2
    owned = np.split(rng.permutation(num_pages)[: sum(pages)], np.cumsum(pages)[:-1])
    table = rng.choice(np.array([-1, -7, num_pages, 2**31 - 1]), (rows, width)).astype(np.int32)
    k_pages, v_pages = (np.full((num_pages, p, k, d), np.nan, np.float32) for _ in range(2))
    for row, ids in enumerate(owned):
        behind = case.begin(row) // p
        table[row, behind : len(ids)] = ids[behind:]
        for at in range(case.begin(row), case.kv_lens[row]):
            k_pages[ids[at // p], at % p] = rng.normal(size=(k, d))
            v_pages[ids[at // p], at % p] = rng.normal(size=(k, d))
    tokens = sum(case.q_lens)
    q = np.full((tokens + case.padding, h, d), np.nan, np.float32)
    q[:tokens] = rng.normal(size=(tokens, h, d))
    return dict(
        q=jnp.asarray(q, dtype),
        pages=paxattn.KVPages(jnp.asarray(k_pages, dtype), jnp.asarray(v_pages, dtype)),
        page_table=jnp.asarray(table),
        kv_lens=jnp.asarray(case.kv_lens, jnp.int32),
        cu_q_lens=jnp.asarray(np.cumsum([0, *case.q_lens]), jnp.int32),
        sinks=jnp.asarray(rng.normal(size=h), jnp.float32) if case.sinks else None,
    )


def plain_attention(q, k, v, seen, **options):
    """Attention as one writes it down, every array in q's dtype; seen [B,T,S]. The measure for rounding error."""
    return plain_attention_and_lse(q, k, v, seen, **options)[0]


def plain_attention_and_lse(q, k, v, seen, *, sinks=None, scale=None, softcap=None):
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    s = jnp.einsum("bthd,bshd->bhts", q, k) * jnp.asarray(q.shape[-1] ** -0.5 if scale is None else scale, q.dtype)
    if softcap is not None:
        s = softcap * jnp.tanh(s / softcap)
    s = jnp.where(seen[:, None], s, -jnp.inf)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.astype(q.dtype)[:, None, None], (*s.shape[:3], 1))
        s = jnp.concatenate([s, sink], axis=-1)
    some = jnp.any(seen, axis=-1)[:, None, :, None]
    s = jnp.where(some, s, 0.0)
    p = jnp.where(some, jax.nn.softmax(s, axis=-1), 0.0)[..., : k.shape[1]]
    lse = jnp.where(some[..., 0], jax.nn.logsumexp(s, axis=-1), -jnp.inf)
    return jnp.einsum("bhts,bshd->bthd", p, v), lse


def dense(inputs: dict[str, Any], row: int, kv_len: int, page_size: int) -> list[Any]:
    """Keys and values [1,S,K,D] of one row, 0 where its pages were dropped."""
    at = np.arange(kv_len)
    page = np.asarray(inputs["page_table"])[row, at // page_size]
    there = (page >= 0) & (page < inputs["pages"].num_pages)
    arrays = (inputs["pages"].k, inputs["pages"].v)
    return [jnp.where(there[:, None, None], x[np.where(there, page, 0), at % page_size], 0)[None] for x in arrays]


def plain_row(case: PagedCase, inputs: dict[str, Any], row: int) -> Any:
    """Plain attention of one row's queries in the dtype of the inputs: out [T,H,D]."""
    q_len, kv_len, start = case.q_lens[row], case.kv_lens[row], sum(case.q_lens[:row])
    position, key = np.arange(q_len)[:, None] + kv_len - q_len, np.arange(kv_len)[None]
    window = case.options.get("window")
    left = window[0] if isinstance(window, tuple) else None if window is None else window - 1
    seen = (key <= position) & ((left is None) | (key >= position - (left or 0)))
    options = {name: x for name, x in case.options.items() if name in ("scale", "softcap")}
    k, v = dense(inputs, row, kv_len, case.page_size)
    q = inputs["q"][None, start : start + q_len]
    attend = once(partial(plain_attention, **options))
    return attend(q, k, v, jnp.asarray(seen)[None], sinks=inputs["sinks"])[0]


def once(fn: Callable[..., Any], **options: Any) -> Any:
    """jit for oracles, and for kernels interpreted: on a CPU most of their time would go into optimizing them."""
    quick = dict(xla_backend_optimization_level=0, xla_llvm_disable_expensive_passes=True)
    return jax.jit(fn, compiler_options=options | (quick if jax.default_backend() == "cpu" else {}) or None)


def error(x: Any, oracle: Any) -> float:
    """Root mean square error; infinite where a NaN or an infinity stands in one of them alone."""
    x, oracle = np.asarray(x, np.float64), np.asarray(oracle, np.float64)
    same = (x == oracle) | (np.isnan(x) & np.isnan(oracle))
    with np.errstate(invalid="ignore"):
        gap = np.where(same, 0.0, x - oracle)
    return float(np.sqrt(np.mean(gap**2))) if np.isfinite(gap).all() else float("inf")
