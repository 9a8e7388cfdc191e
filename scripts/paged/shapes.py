"""Decode steps: which rows there are, how long they are, and how much of keys and values they read."""

import re
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from paxattn import KVPages, init_pages, write_pages

PLAIN = ("bf16", "f16")
DTYPES = {"bf16": "bfloat16", "f16": "float16", "int8": "int8", "fp8": "float8_e4m3fn"}


class Inputs(NamedTuple):
    q: Array  # [R,H,D], one query a row
    pages: KVPages
    page_table: Array
    kv_lens: Array
    cu_q_lens: Array


@dataclass(frozen=True)
class Shape:
    """`rows` is a sum of lengths, "64x2048" for so many rows, "64x1..8192" for lengths drawn between these two."""

    rows: str
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: str = "bf16"

    def __str__(self) -> str:
        dtype = "" if self.dtype == "bf16" else f" {self.dtype}"
        return f"{self.rows} H{self.heads}/{self.kv_heads} D{self.head_dim} page{self.page_size}{dtype}"

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """As `str` gives it."""
        count = r"(?:\d+x)?\d+(?:\.\.\d+)?"
        match = re.fullmatch(rf"({count}(?:\+{count})*) H(\d+)/(\d+) D(\d+) page(\d+)(?: (\w+))?", text)
        if match is None or (match[6] or "bf16") not in DTYPES:
            raise ValueError(f'--shapes: got {text!r}, must be like "64x2048 H32/8 D128 page16" or "... int8"')
        heads, kv_heads, head_dim, page_size = map(int, match.groups()[1:5])
        return cls(match[1], heads, kv_heads, head_dim, page_size, match[6] or "bf16")

    @property
    def kv_lens(self) -> list[int]:
        rng, lens = np.random.default_rng(0), []
        for part in self.rows.split("+"):
            count, _, length = part.rpartition("x")
            low, _, high = length.partition("..")
            lens += rng.integers(int(low), int(high or low) + 1, int(count or 1)).tolist()
        return lens

    @property
    def bytes_read(self) -> int:
        """Of keys and values, and of their scales."""
        size = jnp.dtype(DTYPES[self.dtype]).itemsize * 2 * self.head_dim
        scales = 0 if self.dtype in PLAIN else 2 * (self.head_dim // 16 + 1)
        return sum(self.kv_lens) * self.kv_heads * (size + scales)


def inputs(shape: Shape) -> Inputs:
    """Pages lie in random order, as they do after a while."""
    lens, size = shape.kv_lens, shape.page_size
    counts = [-(-length // size) for length in lens]
    owned = np.random.default_rng(1).permutation(sum(counts)).astype(np.int32)
    table = np.zeros((len(lens), max(counts)), np.int32)
    for row, ids in enumerate(np.split(owned, np.cumsum(counts)[:-1])):
        table[row, : len(ids)] = ids
    kv = (sum(counts), size, shape.kv_heads, shape.head_dim)
    of_q, *of_kv = jax.random.split(jax.random.key(0), 3)
    q_dtype = DTYPES[shape.dtype] if shape.dtype in PLAIN else "bfloat16"
    q = jax.random.normal(of_q, (len(lens), shape.heads, shape.head_dim), q_dtype)
    steps = jnp.arange(len(lens) + 1, dtype=jnp.int32)
    return Inputs(q, pages(shape, of_kv, kv), jnp.asarray(table), jnp.asarray(lens, jnp.int32), steps)


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
    "smoke": ["3x40+7x1..90 H4/2 D64 page16"],
}
