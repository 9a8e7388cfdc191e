"""The combinations that the GPU kernel of paged_attention is tried on: every pair of choices, and the hard ones."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from cases import PagedCase
from flash_cases import SHORT, covering

from paxattn import KVPages, init_pages, write_pages
from paxattn.kernels.codes import COMPRESSED as LARGEST
from paxattn.kernels.codes import TRIED_SCALES, rotate

NUM_COVERING = 190

# One below, at and one above the blocks of 64 and 128 keys; rows of nothing; one row for all workers, and more rows
# than there are workers.
LENGTHS = [
    (1,),
    (64,),
    (65, 3),
    (5, 130, 64),
    (0, 7, 128, 129),
    (1100, 611, 63, 127),
    (40, 0, 2, 2000, 0, 1, 17),
    (9000, 1, 40),
    (20000,),
    (300, 301, 302, 303, 304, 305, 306, 307, 308),
    tuple(1 + 7 * i % 260 for i in range(300)),
]

AXES: dict[str, Sequence[Any]] = {
    "dim": [64, 80, 96, 128, 256],
    "dtype": ["bfloat16", "float16"],
    "page_size": [8, 16, 32, 64, 128, 256],
    "group": [1, 2, 4, 7, 8, 16, 64],
    "queries": ["one", "one or none", "some", "many"],
    "kv_lens": LENGTHS,
    "window": [None, 1, 70, 128, (900, 3)],
    "dropped": [False, True],
    "softcap": [None, 2.5],
    "scale": [None, 0.3],
    "sinks": [False, True],
    "padding": [0, 5],
}


def _case(
    dim, dtype, page_size, group, queries, kv_lens, window, dropped, softcap, scale, sinks, padding, kv_heads=None
) -> PagedCase:
    kv_heads = kv_heads or (1 if group == 64 else 2 if group > 4 else 3)
    most = min(5, 64 // group) if queries == "some" else 1
    q_lens = tuple(_queries(queries, most, i, kv_len) for i, kv_len in enumerate(kv_lens))
    padding = padding or int(not sum(q_lens))  # Arrays of nothing are declined.
    dropped = dropped and isinstance(window, int)
    options = dict(window=window, softcap=softcap, scale=scale, max_q_len=None if queries == "many" else most)
    flags = dict(window=window is not None, dropped=dropped, softcap=softcap is not None, sinks=sinks)
    words = [
        f"d{dim}",
        SHORT[dtype],
        f"page{page_size}",
        f"g{group}",
        *(word for word, there in flags.items() if there),
    ]
    return PagedCase(
        "_".join(words),
        q_lens,
        kv_lens,
        (group * kv_heads, kv_heads, dim),
        page_size,
        padding,
        {name: x for name, x in options.items() if x is not None},
        sinks,
        dropped,
        dtype,
    )


def _queries(kind: str, most: int, row: int, kv_len: int) -> int:
    if kind == "one":
        return 1
    if kind == "one or none":
        return (row + kv_len) % 2
    if kind == "many":
        return 1 if row % 3 == 1 else min(kv_len, (57 * row + kv_len + 200) % 400)
    return min(1 + (row + kv_len) % most, max(kv_len, 1))


def _hard(name: str, **changes: Any) -> PagedCase:
    choices = dict(
        dim=128,
        dtype="bfloat16",
        page_size=16,
        group=4,
        queries="one",
        kv_lens=(5, 130, 64, 1000),
        window=None,
        dropped=False,
        softcap=None,
        scale=None,
        sinks=False,
        padding=0,
    )
    return replace(_case(**choices | changes), name=name)


HARD = [
    *(_hard(f"plain_d{dim}", dim=dim) for dim in AXES["dim"]),
    *(_hard(f"plain_page{page}", page_size=page, kv_lens=(300, 7, 1029, 64)) for page in AXES["page_size"]),
    *(_hard(f"one_long_row_g{group}", group=group, kv_lens=(40000,)) for group in (1, 8)),
    _hard("skewed", kv_lens=(30000, *(31 for _ in range(63)))),
    _hard("nothing_but_padding", kv_lens=(0, 4), queries="one or none", padding=3),
    _hard("rows_without_keys", kv_lens=(0, 0, 3, 0), sinks=True, dtype="float16"),
    _hard("sixteen_tokens", group=4, queries="some", kv_lens=(20, 300)),
    *(
        _hard(f"pairs_of_heads_g{group}_{queries}", dim=64, kv_heads=4, group=group, queries=queries, sinks=group == 2)
        for group in (1, 2, 4)
        for queries in ("one", "some")
    ),
    *(_hard(f"eight_heads_d{dim}", dim=dim, kv_heads=8, kv_lens=(3000, 40, 1000)) for dim in (64, 128)),
    _hard("scale_negative", scale=-0.2),
    _hard("scale_zero", scale=0.0, dtype="float16"),
    _hard("window_huge", window=2**31 - 1),
    _hard("window_beyond_int32", window=2**40),
    _hard("window_ends_in_a_block", window=65, dropped=True, page_size=8, kv_lens=(64, 65, 128, 129, 5000)),
    *(_hard(f"chunks_d{dim}", dim=dim, queries="many", kv_lens=(700, 5, 300, 3000)) for dim in AXES["dim"]),
    *(_hard(f"chunks_page{page}", page_size=page, queries="many", kv_lens=(700, 5, 300)) for page in AXES["page_size"]),
    _hard("chunks_of_windows", queries="many", kv_lens=(700, 5, 300, 3000), window=200, dropped=True, padding=7),
    _hard("chunks_with_sinks", queries="many", kv_lens=(700, 0, 300, 3000), sinks=True, softcap=3.0, group=7),
    _hard("chunks_beside_rows_of_nothing", queries="many", kv_lens=(0, 900, 0, 0, 128, 1), page_size=8),
    _hard("more_rows_than_a_warp_looks_at_at_once", kv_lens=tuple(i % 50 for i in range(1100)), kv_heads=1, dim=64),
]

ROWS = covering(AXES, NUM_COVERING, seed=4)
CASES = [
    replace(case, name=f"{i}_{case.name}") for i, case in enumerate([*HARD, *(_case(**row) for row in ROWS)], start=1)
]

# Of compressed pages: scales whose rows begin at odd places (an odd number of KV heads, or head dim 80), and all else
# that their tiles depend on.
COMPRESSED = [
    *(_hard(f"codes_d{dim}", dim=dim, kv_heads=2) for dim in AXES["dim"]),
    *(_hard(f"codes_d{dim}_three_heads", dim=dim, kv_heads=3, dtype="float16") for dim in (64, 80, 96, 256)),
    *(_hard(f"codes_page{page}", page_size=page, kv_lens=(300, 7, 1029, 64)) for page in AXES["page_size"]),
    *(_hard(f"codes_one_long_row_g{group}", group=group, kv_lens=(40000,), kv_heads=8) for group in (1, 8)),
    _hard("codes_skewed", kv_lens=(30000, *(31 for _ in range(63)))),
    _hard("codes_without_keys", kv_lens=(0, 0, 3, 0), sinks=True, padding=3),
    _hard("codes_window_dropped", window=65, dropped=True, page_size=8, kv_lens=(64, 65, 128, 129, 5000)),
    *(
        _hard(f"codes_chunks_d{dim}", dim=dim, queries="many", kv_lens=(700, 5, 300, 3000))
        for dim in (64, 80, 128, 256)
    ),
    _hard("codes_chunks_of_windows", queries="many", kv_lens=(700, 5, 300), window=200, dropped=True, padding=7),
    _hard(
        "codes_chunks_beside_nothing", queries="many", kv_lens=(0, 900, 0, 0, 128, 1), page_size=8, sinks=True, group=7
    ),
    _hard("codes_several", group=7, queries="some", kv_lens=(20, 300, 0, 77), softcap=2.5, scale=0.3, window=(90, 3)),
]


def compressed(pages: Any, dtype: str) -> Any:
    """Plain pages compressed; scales are NaN where keys are."""
    empty = init_pages(*pages.k.shape, dtype)
    tokens = (x.reshape(-1, *x.shape[2:]).astype(jnp.float32) for x in (pages.k, pages.v))
    slots = jnp.arange(pages.num_pages * pages.page_size)
    written = write_pages(empty, *tokens, slots, implementation="xla")
    unowned = jnp.isnan(pages.k[..., :1])
    scales = (jnp.where(unowned, jnp.nan, x) for x in (written.k_scale, written.v_scale))
    return KVPages(written.k, written.v, *scales)


def decompressed(pages: Any, dtype: str) -> Any:
    """Compressed pages as plain ones of dtype."""
    pairs = (pages.k, pages.k_scale), (pages.v, pages.v_scale)
    groups = (
        x.astype(jnp.float32).reshape(*scale.shape, -1) * scale.astype(jnp.float32)[..., None] for x, scale in pairs
    )
    return KVPages(*(rotate(x.reshape(pages.k.shape)).astype(dtype) for x in groups))


def check_compressed(exact, got, want):
    """Codes and scales of rotated keys or values [T,K,D] are those wanted, or others as good.

    Sums in another order find another one of two scales that are as good to the last bits of float32, and round a
    number that is in the middle of two codes to the other one. That may make a scale worse than it was, which a group
    then has, or does without.
    """
    dtype = got[0].dtype
    exact, *arrays = (np.asarray(x, np.float64) for x in (exact, *got, *want))
    exact, codes, wanted = (x.reshape(*arrays[1].shape, -1) for x in (exact, arrays[0], arrays[2]))
    scales, wanted_scales = arrays[1], arrays[3]
    others = np.abs(scales - wanted_scales) > np.abs(wanted_scales) * 2e-3 + 6e-8  # beyond the last bit of float16
    assert others.sum() <= 0.03 * others.size + 2
    assert (codes == wanted)[~others].mean() >= 0.999
    pairs = (codes, scales), (wanted, wanted_scales)
    error, floor = (((x * scale[..., None] - exact) ** 2).sum(axis=-1) for x, scale in pairs)
    worse = error > 1.2 * floor + 4e-6 * (exact**2).sum(axis=-1)
    assert worse.sum() <= 2 + 1e-5 * worse.size
    assert some_are_between_codes(exact[worse], dtype).all()
    error, floor = np.sqrt(error), np.sqrt(floor)
    assert error.sum() <= 1.0005 * floor.sum() + 0.1 * floor.max()


def some_are_between_codes(exact, dtype):
    """Of groups [n,C], whether in one of the units that are tried some number is in the middle of two codes."""
    tried = 2.0 ** (np.arange(TRIED_SCALES) / TRIED_SCALES) / LARGEST[np.dtype(dtype).name]
    x = np.abs(exact)[..., None] / (np.abs(exact).max(axis=-1)[..., None, None] * tried)
    step = 1.0 if dtype == np.int8 else np.maximum(2.0 ** np.floor(np.log2(np.maximum(x, 1e-30))), 2**-6) / 8
    return (np.abs(x / step % 1 - 0.5) < 1e-4).any(axis=(-2, -1))
