"""Calls: which rows there are, how long they are, how much of keys and values they read, and what they compute."""

import re
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from paxattn import KVPages, init_pages, write_pages

PLAIN = ("bf16", "f16")
DTYPES = {"bf16": "bfloat16", "f16": "float16", "int8": "int8", "fp8": "float8_e4m3fn"}


class Inputs(NamedTuple):
    q: Array  # [T,H,D]
    pages: KVPages
    page_table: Array
    kv_lens: Array
    cu_q_lens: Array


@dataclass(frozen=True)
class Shape:
    """`rows` is a sum of lengths, "64x2048" for so many rows, "64x1..8192" for lengths drawn between these two, and
    "512@2048" for a row of 512 queries, the last of 2048 tokens; others have one query. All rows have their first
    `prefix` tokens in the same pages."""

    rows: str
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: str = "bf16"
    prefix: int = 0

    def __str__(self) -> str:
        dtype = "" if self.dtype == "bf16" else f" {self.dtype}"
        prefix = f" prefix{self.prefix}" if self.prefix else ""
        return f"{self.rows} H{self.heads}/{self.kv_heads} D{self.head_dim} page{self.page_size}{dtype}{prefix}"

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """As `str` gives it."""
        count = r"(?:[1-9]\d*x)?(?:[1-9]\d*@)?\d+(?:\.\.\d+)?"
        rows = rf"({count}(?:\+{count})*) H(\d+)/(\d+) D(\d+) page([1-9]\d*)"
        match = re.fullmatch(rf"{rows}(?: ({'|'.join(DTYPES)}))?(?: prefix(\d+))?", text)
        if match is None:
            like = '"64x2048 H32/8 D128 page16", "... int8" or "... prefix1024"'
            raise ValueError(f"--shapes: got {text!r}, must be like {like}")
        heads, kv_heads, head_dim, page_size, prefix = (int(match[i] or 0) for i in (2, 3, 4, 5, 7))
        if any(int(low) > int(high) for low, high in re.findall(r"(\d+)\.\.(\d+)", match[1])):
            raise ValueError(f"--shapes: got {text!r}, lengths must be from a smaller one to a larger one")
        shape = cls(match[1], heads, kv_heads, head_dim, page_size, match[6] or "bf16", prefix)
        if prefix % page_size or prefix > min(length - queries for queries, length in shape.lens):
            raise ValueError(
                f"--shapes: got {text!r}, the prefix must be whole pages that every row has before its queries"
            )
        return shape

    @cached_property
    def lens(self) -> list[tuple[int, int]]:
        """Of each row, its queries and its tokens."""
        rng, lens = np.random.default_rng(0), []
        for part in self.rows.split("+"):
            count, _, row = part.rpartition("x")
            queries, _, length = row.rpartition("@")
            low, _, high = length.partition("..")
            drawn = rng.integers(int(low), int(high or low) + 1, int(count or 1)).tolist()
            lens += [(min(int(queries or 1), n), n) for n in drawn]
        return lens

    @property
    def q_lens(self) -> list[int]:
        return [queries for queries, _ in self.lens]

    @property
    def kv_lens(self) -> list[int]:
        return [tokens for _, tokens in self.lens]

    @property
    def decodes(self) -> bool:
        return max(self.q_lens) == 1

    @property
    def flops(self) -> int:
        """Of both products, where a query sees all tokens up to its own."""
        pairs = sum(q * n - q * (q - 1) // 2 for q, n in self.lens)
        return 4 * pairs * self.heads * self.head_dim

    @property
    def bytes_read(self) -> int:
        """Of keys and values, and of their scales, where a prefix is read once."""
        size = jnp.dtype(DTYPES[self.dtype]).itemsize * 2 * self.head_dim
        scales = 0 if self.dtype in PLAIN else 2 * (self.head_dim // 16 + 1)
        tokens = sum(self.kv_lens) - self.prefix * (len(self.lens) - 1)
        return tokens * self.kv_heads * (size + scales)


def inputs(shape: Shape) -> Inputs:
    """Pages lie in random order, as they do after a while."""
    lens, size = shape.kv_lens, shape.page_size
    counts = [-(-length // size) for length in lens]
    owned = np.random.default_rng(1).permutation(sum(counts)).astype(np.int32)
    table = np.zeros((len(lens), max(counts)), np.int32)
    for row, ids in enumerate(np.split(owned, np.cumsum(counts)[:-1])):
        table[row, : len(ids)] = ids
    table[:, : shape.prefix // size] = table[0, : shape.prefix // size]
    kv = (sum(counts), size, shape.kv_heads, shape.head_dim)
    of_q, *of_kv = jax.random.split(jax.random.key(0), 3)
    q_dtype = DTYPES[shape.dtype] if shape.dtype in PLAIN else "bfloat16"
    q = jax.random.normal(of_q, (sum(shape.q_lens), shape.heads, shape.head_dim), q_dtype)
    ends = jnp.asarray(np.cumsum([0, *shape.q_lens]), jnp.int32)
    return Inputs(q, pages(shape, of_kv, kv), jnp.asarray(table), jnp.asarray(lens, jnp.int32), ends)


def pages(shape: Shape, keys: Any, kv: tuple[int, int, int, int]) -> KVPages:
    make = partial(init_pages, *kv, DTYPES[shape.dtype])
    if shape.dtype in PLAIN:
        as_here = jax.eval_shape(make)
        k, v = (jax.random.normal(key, as_here.k.shape, as_here.k.dtype) for key in keys)
        return replace(as_here, k=k, v=v)
    empty = make()
    write = jax.jit(write_pages, donate_argnums=0)
    tokens, some = kv[0] * kv[1], 1 << 16
    for start in range(0, tokens, some):
        slots = jnp.arange(start, min(start + some, tokens))
        k, v = (jax.random.normal(jax.random.fold_in(key, start), (len(slots), *kv[2:])) for key in keys)
        empty = write(empty, k, v, slots)
    return empty


ANCHORS = [
    *(f"64x2048 H32/8 D128 page{size}" for size in (16, 64, 128)),
    "256x1024 H32/8 D128 page64",
    "8x16384 H32/8 D128 page64",
    "131072 H32/8 D128 page64",
    "64x2048 H32/32 D128 page64",
    "64x2048 H32/8 D64 page64",
]

SUITES = {
    "anchors": ANCHORS,
    "rows": [f"{rows} H32/8 D128 page16" for rows in ("2x65536", "4x32768", "512x512", "64x1..8192")],
    "groups": [f"64x2048 H{8 * group}/8 D128 page16" for group in (1, 4, 7, 8, 16)],
    "dims": [f"64x2048 H32/8 D{dim} page16" for dim in (64, 80, 96, 256)],
    "pages": [f"64x2048 H32/8 D128 page{size}" for size in (8, 32, 256)],
    "skew": ["131072+63x512 H32/8 D128 page16"],
    "compressed": [f"64x8192 H32/8 D128 page16{dtype}" for dtype in ("", " int8", " fp8")],
    "prefill": [
        *(f"2048@10240 H32/8 D128 page{size}" for size in (16, 64)),
        "2048@10240+32x2048 H32/8 D128 page16",
    ],
    "prefix": ["64x4224 H32/8 D128 page16 prefix4096"],
    "smoke": ["3x40+7x1..90 H4/2 D64 page16"],
}
