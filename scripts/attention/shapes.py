"""What is benchmarked: shapes as they are written, suites of them, their FLOPs and inputs."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

PASSES = ("fwd", "fwdbwd")
OURS, ANY_ORDER, CUDNN = "paxattn", "paxattn any order", "cuDNN"
DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
# Relative error that two right kernels of this dtype stay below: (out, gradients). float32 may be multiplied in TF32.
TOLERANCE = {"bfloat16": (1e-2, 2e-2), "float16": (2e-3, 4e-3), "float32": (2e-3, 4e-3)}
RESULTS = ("out", "dq", "dk", "dv")


@dataclass(frozen=True)
class Shape:
    batch: int
    q_len: int
    kv_len: int
    heads: int
    kv_heads: int
    dim: int
    v_dim: int
    causal: bool = False
    window: int | None = None
    docs: int = 0
    dtype: str = "bfloat16"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "B4 S4096 H32/8 D128 causal window1024"; the letters are those of CONTRIBUTING.md."""
        found: dict[str, Any] = {}
        for word in text.split():
            match = re.fullmatch(r"([BTS])(\d+)|([HD])(\d+)(?:/(\d+))?|(window|docs)(\d+)", word)
            if word in ("causal", "full"):
                found["causal"] = word == "causal"
            elif word in DTYPES:
                found["dtype"] = DTYPES[word]
            elif match is None:
                raise ValueError(
                    f"--shapes: {word!r} in {text!r} is none of B S T H D causal full window docs bf16 f16 f32"
                )
            else:
                found |= _numbers(*match.groups())
        missing = [letter for letter in "SHD" if letter not in found]
        if missing:
            raise ValueError(f"--shapes: {text!r} has no {missing[0]}")
        kv_len, (heads, kv_heads), (dim, v_dim) = found.pop("S"), found.pop("H"), found.pop("D")
        shape = cls(found.pop("B", 1), found.pop("T", kv_len), kv_len, heads, kv_heads, dim, v_dim, **found)
        if shape.docs and not (shape.q_len == kv_len and shape.docs < kv_len):
            raise ValueError(f"--shapes: {text!r}: docs needs T = S and fewer documents than tokens")
        return shape

    def __str__(self) -> str:
        words = [f"B{self.batch}", f"S{self.kv_len}", f"H{self.heads}/{self.kv_heads}"]
        if self.q_len != self.kv_len:
            words.insert(1, f"T{self.q_len}")
        words.append(f"D{self.dim}" if self.dim == self.v_dim else f"D{self.dim}/{self.v_dim}")
        words.append("causal" if self.causal else "full")
        words += [f"window{self.window}"] if self.window else []
        words += [f"docs{self.docs}"] if self.docs else []
        words += [name for name, dtype in DTYPES.items() if dtype == self.dtype != "bfloat16"]
        return " ".join(words)

    @property
    def scale(self) -> float:
        return self.dim**-0.5


def _numbers(letter: str, count: str, pair: str, first: str, second: str, option: str, size: str) -> dict[str, Any]:
    if letter:
        return {letter: int(count)}
    if pair:
        return {pair: (int(first), int(second or first))}
    return {option: int(size)}


class Row(NamedTuple):
    mode: str  # one of PASSES
    shape: Shape

    def __str__(self) -> str:
        return f"{'fwd+bwd' if self.mode == 'fwdbwd' else 'fwd'} {self.shape}"


def document_lengths(shape: Shape) -> np.ndarray:
    """[B,M], the same in every run: the token stream is cut at places drawn without replacement."""
    rng = np.random.default_rng(shape.docs)
    cuts = [np.sort(rng.choice(shape.kv_len - 1, shape.docs - 1, replace=False)) + 1 for _ in range(shape.batch)]
    return np.diff(np.array(cuts), axis=1, prepend=0, append=shape.kv_len)


def visible_pairs(shape: Shape) -> float:
    """Queries times the keys that each sees, over the batch; plain causal attention counts half of all pairs."""
    if shape.causal and shape.window is None and not shape.docs and shape.q_len == shape.kv_len:
        return shape.batch * shape.q_len * shape.kv_len / 2
    if shape.docs:
        return float(sum(_pairs(shape, n, n) for n in document_lengths(shape).flat))
    return float(shape.batch * _pairs(shape, shape.q_len, shape.kv_len))


def _pairs(shape: Shape, q_len: int, kv_len: int) -> int:
    at = np.arange(q_len) + kv_len - q_len
    last = np.minimum(at, kv_len - 1) if shape.causal else np.full(q_len, kv_len - 1)
    first = np.maximum(at - shape.window + 1, 0) if shape.window else np.zeros(q_len, int)
    return int(np.maximum(last - first + 1, 0).sum())


def flops(row: Row) -> float:
    shape = row.shape
    forward = visible_pairs(shape) * shape.heads * 2 * (shape.dim + shape.v_dim)
    return forward * (3.5 if row.mode == "fwdbwd" else 1)


FORWARD = [
    f"{shape} {mask}"
    for shape in (
        "B16 S1024 H16/16 D128",
        "B4 S4096 H16/16 D128",
        "B1 S16384 H16/16 D128",
        "B2 S8192 H32/8 D128",
        "B4 S4096 H32/32 D64",
        "B4 S4096 H8/8 D256",
    )
    for mask in ("causal", "full")
]
TRAINING = [FORWARD[i] for i in (0, 2, 3, 6, 8)]
ODD = [f"B4 S{s} H16/16 D128 {mask}" for mask in ("causal", "full") for s in (4096, 4095, 4097)]
DENSE = "B1 S16384 H16/16 D128 causal"
SMALL = "B1 S512 H32/8 D128 causal"
SWEEP = [f"B{max(1, 16384 // s)} S{s} H16/16 D128 causal" for s in (512, 1024, 2048, 4096, 8192, 16384, 32768)]
SMOKE = [
    "B2 S160 H4/2 D64 causal",
    "B1 T96 S224 H2/2 D64 full",
    "B2 S192 H2/1 D64 causal docs3",
    "B1 S320 H2/2 D64 causal window96",
]


def both(shapes: list[str]) -> dict[str, list[str]]:
    return dict.fromkeys(PASSES, shapes)


# What is measured in which suite: shapes by pass.
SUITES = {
    "anchors": {"fwd": FORWARD, "fwdbwd": TRAINING},
    "ragged": both([*ODD, DENSE, f"{DENSE} docs16", f"{DENSE} window1024"]),
    "small": both([SMALL]),
    "sweep": both(SWEEP),
    "smoke": both(SMOKE),
}


class Comparison(NamedTuple):
    """Our rate on `shape` over that on `base` (of the kernel `beside`, if not our own), and the least it should be."""

    shape: str
    base: str
    least: float
    beside: str | None = None


COMPARISONS = [
    *(
        Comparison(f"B4 S{s} H16/16 D128 {mask}", f"B4 S4096 H16/16 D128 {mask}", 0.95)
        for mask in ("causal", "full")
        for s in (4095, 4097)
    ),
    Comparison(f"{DENSE} docs16", DENSE, 0.80),
    Comparison(f"{DENSE} window1024", DENSE, 0.75),
    Comparison(SMALL, SMALL, 1.00, beside=CUDNN),
]


def rows_of(suites: Iterable[str], shapes: list[str], passes: Iterable[str] = PASSES) -> list[Row]:
    asked = [SUITES[name] for name in suites] + [both(shapes)]
    return list(dict.fromkeys(Row(mode, Shape.parse(text)) for mode in passes for one in asked for text in one[mode]))


class Documents(NamedTuple):
    segments: Array  # i32 [B,S]
    lengths: Array  # i32 [B,M]
    starts: Array  # i32 [B,M+1], within a row
    boundaries: Array  # i32 [B*M+1], over all rows


Attend = Callable[[Array, Array, Array, Documents | None], Array]
Make = Callable[[Shape], Attend]
# q [B,T,H,D], k [B,S,K,D], v [B,S,K,Dv], the cotangent of out, documents
Inputs = tuple[Array, Array, Array, Array, Documents | None]


@partial(jax.jit, static_argnums=0)
def inputs(shape: Shape) -> Inputs:
    b, t, s, h, kv_heads = shape.batch, shape.q_len, shape.kv_len, shape.heads, shape.kv_heads
    sizes = (b, t, h, shape.dim), (b, s, kv_heads, shape.dim), (b, s, kv_heads, shape.v_dim), (b, t, h, shape.v_dim)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, do = (jax.random.normal(key, size).astype(shape.dtype) for key, size in zip(keys, sizes, strict=True))
    return q, k, v, do, documents(shape) if shape.docs else None


def documents(shape: Shape) -> Documents:
    lengths = document_lengths(shape)
    segments = np.stack([np.repeat(np.arange(shape.docs), row) for row in lengths])
    starts = np.pad(np.cumsum(lengths, axis=1), ((0, 0), (1, 0)))
    boundaries = np.pad(np.cumsum(lengths), (1, 0))
    return Documents(*(jnp.asarray(x, jnp.int32) for x in (segments, lengths, starts, boundaries)))
