"""TFLOP/s of flash_attention beside cuDNN (through jax.nn) and, where installed, FlashAttention-3, jla and tokamax.

python scripts/bench_attention.py --json bench.json                         # the 12 forward and 5 fwd+bwd anchors
python scripts/bench_attention.py --suite ragged small                      # odd lengths, packed documents, a window
python scripts/bench_attention.py --suite sweep --plot sweep.png            # over sequence length
python scripts/bench_attention.py --shapes "B2 T1 S8192 H32/8 D128 causal" "S16384 H16 D192/128 docs16" --passes fwd
python scripts/bench_attention.py --quick                                   # tiny shapes; runs on a CPU, too

A shape is B, S, H (query/key heads) and D (key/value head dim), then as needed T (if not S), causal or full, window1024
(the query's own key and the 1023 before it), docs16 (so many packed documents of uneven length) and bf16, f16 or f32.

Every kernel is checked first, against cuDNN in the same run or, where cuDNN does not serve the call, against
implementation="xla"; a wrong one is reported and not timed. The kernels of a shape then take turns, several rounds of
them, and the figure is the median of their time on the GPU as CUPTI tells it (wall time where there is no GPU).
CUPTI counts kernels alone: not the gaps between them, nor a memset.

FLOPs: 2 (D + Dv) for each query and key that it sees; causal with T = S counts half of T x S, windows and documents
count what they leave; fwd+bwd counts 3.5 times the forward. The peers, where they are not what pip installs by itself:
flash_attn3_jax, jax_linear_attention and tokamax (its profiler xprof is not needed).
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shlex
import statistics
import sys
import time
import types
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.stages import Compiled
from rich.console import Console
from rich.table import Table

import paxattn

PASSES = ("fwd", "fwdbwd")
OURS, ANY_ORDER, CUDNN = "paxattn", "paxattn any order", "cuDNN"
DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
# Relative error that two right kernels of this dtype stay below: (out, gradients). float32 may be multiplied in TF32.
TOLERANCE = {"bfloat16": (1e-2, 2e-2), "float16": (2e-3, 4e-3), "float32": (2e-3, 4e-3)}
RESULTS = ("out", "dq", "dk", "dv")

# --- shapes ---


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


# --- suites ---

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


# --- inputs ---


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


# --- kernels: each makes an Attend for a shape, or raises with the reason why not ---


def ours(implementation: str, deterministic: bool = True) -> Make:
    def make(shape: Shape) -> Attend:
        def attend(q: Array, k: Array, v: Array, docs: Documents | None) -> Array:
            segments = None if docs is None else docs.segments
            return paxattn.flash_attention(
                q,
                k,
                v,
                causal=shape.causal,
                window=shape.window,
                q_segment_ids=segments,
                kv_segment_ids=segments,
                deterministic=deterministic,
                implementation=implementation,
            )

        return attend

    return make


def cudnn(shape: Shape) -> Attend:
    only(shape.q_len == shape.kv_len or not shape.causal, "causal is aligned top-left")
    only(shape.causal or not shape.window, "a window needs causal")
    if shape.docs:
        return cudnn_packed(shape)
    window = (shape.window - 1, 0) if shape.window else None
    return lambda q, k, v, _: jax.nn.dot_product_attention(
        q, k, v, is_causal=shape.causal, local_window_size=window, implementation="cudnn"
    )


def cudnn_packed(shape: Shape) -> Attend:
    """jax.nn does not reach cuDNN's packed layout, which lies under it."""
    fused = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    mask = fused.MaskType.PADDING_CAUSAL if shape.causal else fused.MaskType.PADDING

    def attend(q: Array, k: Array, v: Array, docs: Documents | None) -> Array:
        assert docs is not None
        return fused.dot_product_attention(
            q,
            k,
            v,
            q_seqlen=docs.lengths,
            kv_seqlen=docs.lengths,
            q_offsets=docs.starts,
            kv_offsets=docs.starts,
            scale=shape.scale,
            mask_type=mask,
            sliding_window_length=shape.window,
        )

    return attend


def fa3(shape: Shape) -> Attend:
    only(shape.dim == shape.v_dim, "one head dim for keys and values")
    flash = importlib.import_module("flash_attn3_jax")
    window = (-1, -1) if shape.window is None else (shape.window - 1, 0 if shape.causal else -1)
    options = dict(is_causal=shape.causal, window_size=window)
    if not shape.docs:
        return lambda q, k, v, _: flash.flash_mha(q, k, v, **options)
    longest = int(document_lengths(shape).max())

    def packed(q: Array, k: Array, v: Array, docs: Documents | None) -> Array:
        assert docs is not None
        flat = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
        at = docs.boundaries
        return flash.flash_mha_varlen(*flat, at, at, max_seqlen_q=longest, max_seqlen_k=longest, **options).reshape(
            *q.shape[:3], -1
        )

    return packed


def jla(shape: Shape, backward: str = "ranged") -> Attend:
    only(shape.causal and shape.q_len == shape.kv_len, "causal self-attention alone")
    flash_attention = importlib.import_module("jla.ops.mosaic_gpu.attention").flash_attention
    return lambda q, k, v, docs: flash_attention(
        q, k, v, segment_ids=docs and docs.segments, sliding_window=shape.window, backward=backward
    )


def tokamax(shape: Shape) -> Attend:
    only(shape.q_len == shape.kv_len or not shape.causal, "causal is aligned top-left")
    only(shape.causal or not shape.window, "a window needs causal")
    only(not shape.docs, "documents need a mask of T x S")
    for name in ("xprof", "xprof.cli", "xprof.cli.tools"):  # a profiler that it imports and does not need here
        sys.modules.setdefault(name, types.ModuleType(name))
    vars(sys.modules["xprof.cli.tools"]).setdefault("get_kernel_stats_tool", None)
    attention = importlib.import_module("tokamax").dot_product_attention
    window = (shape.window - 1, 0) if shape.window else None
    return lambda q, k, v, _: attention(
        q, k, v, is_causal=shape.causal, local_window_size=window, implementation="mosaic"
    )


def only(ok: bool, reason: str) -> None:
    if not ok:
        raise NotImplementedError(reason)


class Peer(NamedTuple):
    module: str
    make: Make
    modes: tuple[str, ...] = PASSES


PEERS = {
    CUDNN: Peer("jax", cudnn),
    "FA3": Peer("flash_attn3_jax", fa3),
    "jla": Peer("jla", jla),
    "jla fused": Peer("jla", partial(jla, backward="fused"), ("fwdbwd",)),
    "tokamax": Peer("tokamax", tokamax),
}


def kernels_of(mode: str, implementation: str, peers: Iterable[str]) -> dict[str, Make]:
    """The kernels of a row by name; the order of dq's sum is a matter of the backward alone."""
    mine = {OURS: ours(implementation)}
    if mode == "fwdbwd":
        mine[ANY_ORDER] = ours(implementation, deterministic=False)
    return mine | {name: PEERS[name].make for name in peers if mode in PEERS[name].modes}


def peers_here() -> list[str]:
    """Names of the peers that can be timed; says which ones are left out and why."""
    if jax.default_backend() != "gpu":
        say("no GPU: wall time, and no peers")
        return []
    for module in dict.fromkeys(peer.module for peer in PEERS.values()):
        if not importlib.util.find_spec(module):
            say(f"{module} is not installed: left out")
    return [name for name, peer in PEERS.items() if importlib.util.find_spec(peer.module)]


# --- programs ---


def program(row: Row, make: Make) -> Callable[..., tuple[Array, ...]]:
    """(q, k, v, do, docs) -> (out,) or (out, dq, dk, dv)."""
    attend = make(row.shape)

    def forward(q: Array, k: Array, v: Array, do: Array, docs: Documents | None) -> tuple[Array, ...]:
        return (attend(q, k, v, docs),)

    def backward(q: Array, k: Array, v: Array, do: Array, docs: Documents | None) -> tuple[Array, ...]:
        out, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, docs), q, k, v)
        return (out, *pullback(do))

    return backward if row.mode == "fwdbwd" else forward


def compiled(row: Row, make: Make) -> Compiled:
    return jax.jit(program(row, make)).lower(*jax.eval_shape(partial(inputs, row.shape))).compile()


def compile_all[Key: Hashable](jobs: Mapping[Key, Callable[[], Compiled]], threads: int) -> dict[Key, Compiled | str]:
    """What each job compiles to, or why it does not; on several threads at once."""

    def attempt(job: Callable[[], Compiled]) -> Compiled | str:
        try:
            return job()
        except Exception as error:  # a peer may raise anything; it is told and the others go on
            return first_line(error)

    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(jobs, pool.map(attempt, jobs.values()), strict=True))


def first_line(error: Exception) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:200]}"


Programs = dict[Row, dict[str, Compiled | str]]


def compile_kernels(rows: list[Row], implementation: str, peers: list[str], threads: int) -> Programs:
    jobs = {
        (row, name): partial(compiled, row, make)
        for row in rows
        for name, make in kernels_of(row.mode, implementation, peers).items()
    }
    start = time.perf_counter()
    done = compile_all(jobs, threads)
    say(f"compiled {len(jobs)} programs in {time.perf_counter() - start:.0f} s on {threads} threads")
    return {row: {name: one for (at, name), one in done.items() if at == row} for row in rows}


def compile_references(programs: Programs, implementation: str, choice: str | None, threads: int) -> Programs:
    """By row, the one program that the others are checked against: (its name, the program)."""
    fallback = choice if choice not in (None, CUDNN) else "reference" if implementation == "xla" else "xla"

    def served(row: Row) -> bool:
        # cuDNN's packed layout is reached through private functions, so it is checked itself.
        return choice in (None, CUDNN) and not row.shape.docs and isinstance(programs[row].get(CUDNN), Compiled)

    jobs = {row: partial(compiled, row, ours(fallback)) for row in programs if not served(row)}
    done = compile_all(jobs, threads)
    return {row: {CUDNN: programs[row][CUDNN]} if served(row) else {fallback: done[row]} for row in programs}


# --- measuring ---


@dataclass(frozen=True)
class Figure:
    """Of one kernel on one row; ms are medians. Where `note` says why, there are no times."""

    kernel_ms: float | None = None
    wall_ms: float | None = None
    tflops: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Result:
    row: Row
    reference: str
    figures: dict[str, Figure]

    def rate(self, name: str) -> float | None:
        return self.figures.get(name, Figure()).tflops

    def best_peer(self) -> float | None:
        return max((rate for name in PEERS if (rate := self.rate(name))), default=None)

    def ratio(self, name: str) -> float | None:
        mine, best = self.rate(name), self.best_peer()
        return mine / best if mine and best else None


@jax.jit
def relative_errors(got: tuple[Array, ...], expected: tuple[Array, ...]) -> list[Array]:
    """|x - y| / |y| of each; NaN anywhere gives NaN."""

    def error(x: Array, y: Array) -> Array:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return jnp.linalg.norm((x - y).ravel()) / jnp.maximum(jnp.linalg.norm(y.ravel()), 1e-30)

    return [error(x, y) for x, y in zip(got, expected, strict=True)]


def check(run: Compiled, args: Inputs, expected: tuple[Array, ...], dtype: str) -> tuple[dict[str, float], str]:
    """The error of each result by name, and what is wrong with them, if anything."""
    try:
        found = relative_errors(run(*args), expected)
        errors = {name: float(x) for name, x in zip(RESULTS, found, strict=False)}
    except (jax.errors.JaxRuntimeError, TypeError) as error:  # a failed launch, or results of another shape
        return {}, f"fails: {first_line(error)}"
    forward, gradients = TOLERANCE[dtype]
    wrong = [f"{name} {x:.1e}" for name, x in errors.items() if not x <= (forward if name == "out" else gradients)]
    return errors, f"wrong: {', '.join(wrong)}" if wrong else ""


class Times(NamedTuple):
    kernel_ms: float | None
    wall_ms: float


def time_in_turns[Key: Hashable](
    programs: Mapping[Key, Compiled], args: Inputs, rounds: int, iterations: int
) -> dict[Key, Times]:
    """Medians; each round starts with another one, so that none always runs on the clocks another left behind."""
    names = list(programs)
    on_gpu: dict[Key, list[float]] = {name: [] for name in names}
    wall: dict[Key, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        at = turn % max(len(names), 1)
        for name in names[at:] + names[:at]:
            on_gpu[name] += cupti_ms(programs[name], args, iterations)
            wall[name].append(wall_ms(programs[name], args, iterations))
    return {
        name: Times(statistics.median(on_gpu[name]) if on_gpu[name] else None, statistics.median(wall[name]))
        for name in names
    }


@cache
def cupti() -> Any:
    """JAX's CUPTI profiler, or None where there is no GPU."""
    return importlib.import_module("jax.experimental.mosaic.gpu.profiler") if jax.default_backend() == "gpu" else None


def cupti_ms(run: Compiled, args: Inputs, iterations: int) -> list[float]:
    """The time of all kernels of each iteration, after a warm-up; empty where CUPTI tells none."""
    if cupti() is None:
        return []
    try:
        _, ms = cupti().measure(run, aggregate=True, iterations=iterations)(*args)
    except RuntimeError:  # CUPTI is missing, taken by another profiler, or lost a kernel
        return []
    return [] if ms is None else ms if isinstance(ms, list) else [ms]


def wall_ms(run: Compiled, args: Inputs, iterations: int) -> float:
    jax.block_until_ready(run(*args))
    start = time.perf_counter()
    jax.block_until_ready([run(*args) for _ in range(iterations)])
    return (time.perf_counter() - start) / iterations * 1e3


def measure(
    row: Row, programs: dict[str, Compiled | str], reference: dict[str, Compiled | str], options: Any
) -> Result:
    (name, oracle), args = next(iter(reference.items())), inputs(row.shape)
    if isinstance(oracle, str):
        return Result(row, name, {kernel: Figure(note=f"no reference: {oracle}") for kernel in programs})
    expected = oracle(*args)
    checked = {
        kernel: ({}, f"declines: {one}") if isinstance(one, str) else check(one, args, expected, row.shape.dtype)
        for kernel, one in programs.items()
    }
    del expected
    right = {kernel: one for kernel, one in programs.items() if isinstance(one, Compiled) and not checked[kernel][1]}
    times = time_in_turns(right, args, options.rounds, options.iterations)
    return Result(row, name, {kernel: figure(row, *checked[kernel], times.get(kernel)) for kernel in programs})


def figure(row: Row, errors: dict[str, float], note: str, times: Times | None) -> Figure:
    if times is None:
        return Figure(errors=errors, note=note)
    note = "wall time" if times.kernel_ms is None and cupti() else ""
    tflops = flops(row) / (times.kernel_ms or times.wall_ms) / 1e9
    return Figure(times.kernel_ms, times.wall_ms, tflops, errors, note)


# --- telling ---


def say(text: str) -> None:
    print(text, flush=True)


def say_row(result: Result) -> None:
    told = [f"{result.row}"]
    for name, one in result.figures.items():
        if one.tflops is not None:
            ms = one.kernel_ms or one.wall_ms
            worst = max(one.errors.values(), default=0.0)
            told.append(f"{name} {number(one.tflops)} ({ms:.4g} ms, err {worst:.0e})")
        elif not one.note.startswith("declines") or name in (OURS, ANY_ORDER):
            told.append(f"{name} {one.note}")
    say(" | ".join(told))


def number(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"


def table(results: list[Result], names: list[str]) -> Table:
    told = Table("TFLOP/s", *names, "ours / best peer", "any order / best peer")
    for result in results:
        cells = []
        for name in names:
            one = result.figures.get(name, Figure())
            cells.append("wrong" if one.note.startswith("wrong") else number(one.tflops) if one.tflops else "-")
        ratios = (result.ratio(name) for name in (OURS, ANY_ORDER))
        told.add_row(str(result.row), *cells, *(f"{x:.3f}" if x else "-" for x in ratios))
    return told


def summary(results: list[Result], suites: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Geometric mean and lowest of ours over the best peer, over the rows of each pass of each suite."""
    groups = {"fwd": ("fwd", OURS), "fwd+bwd": ("fwdbwd", OURS), "fwd+bwd, any order": ("fwdbwd", ANY_ORDER)}
    told = {}
    for suite in suites:
        rows = set(rows_of([suite], []))
        for title, (mode, name) in groups.items():
            mine = [r for r in results if r.row in rows and r.row.mode == mode]
            ratios = {str(r.row): ratio for r in mine if (ratio := r.ratio(name))}
            if ratios:
                told[f"{suite}, {title}"] = mean_and_lowest(ratios)
    return told


def mean_and_lowest(ratios: dict[str, float]) -> dict[str, Any]:
    lowest = min(ratios, key=lambda row: ratios[row])
    mean = math.exp(statistics.fmean(map(math.log, ratios.values())))
    return dict(rows=len(ratios), geometric_mean=mean, lowest=ratios[lowest], lowest_row=lowest)


def comparisons(results: list[Result]) -> list[dict[str, Any]]:
    by_row = {result.row: result for result in results}
    told = []
    for one in COMPARISONS:
        for mode in PASSES:
            rows = [by_row.get(Row(mode, Shape.parse(text))) for text in (one.shape, one.base)]
            for name in (OURS, ANY_ORDER):
                mine, base = rows[0] and rows[0].rate(name), rows[1] and rows[1].rate(one.beside or name)
                if mine and base:
                    told.append(dict(one._asdict(), mode=mode, kernel=name, ratio=mine / base))
    return told


def say_summary(results: list[Result], suites: Iterable[str], console: Console) -> None:
    for title, one in summary(results, suites).items():
        say(
            f"ours / best peer, {title}: geometric mean {one['geometric_mean']:.3f} over {one['rows']} rows, "
            f"lowest {one['lowest']:.3f} ({one['lowest_row']})"
        )
    ratios = Table("rate of", "on", "over that", "ratio", "at least")
    for told in comparisons(results):
        base = f"of {told['beside']}" if told["beside"] else f"on {told['base']}"
        kernel = f"{told['kernel']}, {told['mode']}"
        ratios.add_row(kernel, told["shape"], base, f"{told['ratio']:.3f}", f"{told['least']:.2f}")
    if ratios.row_count:
        console.print(ratios)


def say_notes(results: list[Result]) -> None:
    notes: dict[str, list[str]] = {}
    for result in results:
        for name, one in result.figures.items():
            if one.note:
                notes.setdefault(f"{name}: {one.note}", []).append(str(result.row))
    for note, rows in notes.items():
        say(f"{note}  [{rows[0]}{f' and {len(rows) - 1} more' if rows[1:] else ''}]")


def machine() -> dict[str, str]:
    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")
    about = dict(device=device.device_kind, platform=" ".join(device.client.platform_version.split()))
    about |= dict(processor=platform.processor() or platform.machine(), python=platform.python_version())
    for name in (*packages, "flash-attn3-jax", "jax-linear-attention", "tokamax"):
        try:
            about[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return about | {"paxattn": paxattn.__version__}


def command(words: list[str]) -> str:
    """As typed, without the names of the files it writes."""
    output = [i for i, word in enumerate(words) if re.match("--(json|plot)", word)]
    output += [i + 1 for i in output if "=" not in words[i]]
    kept = [shlex.quote(word) for i, word in enumerate(words) if i not in output]
    return " ".join(["python scripts/bench_attention.py", *kept])


def write_json(path: Path, results: list[Result], options: argparse.Namespace) -> None:
    rows = [
        {
            "pass": one.row.mode,
            "shape": str(one.row.shape),
            "flops": flops(one.row),
            "reference": one.reference,
            "kernels": {name: asdict(figure) for name, figure in one.figures.items()},
            "over_best_peer": {name: one.ratio(name) for name in (OURS, ANY_ORDER)},
        }
        for one in results
    ]
    told = {
        "machine": machine(),
        "command": command(sys.argv[1:]),
        "rounds": options.rounds,
        "iterations": options.iterations,
        "rows": rows,
        "summary": summary(results, options.suite),
        "comparisons": comparisons(results),
    }
    path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def draw(results: list[Result], names: list[str], path: Path) -> None:
    """TFLOP/s over sequence length, a panel a pass, a line a kernel."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    modes = [mode for mode in PASSES if any(r.row.mode == mode for r in results)]
    figure, axes = plt.subplots(1, len(modes), figsize=(6 * len(modes), 4.2), squeeze=False, layout="constrained")
    for mode, panel in zip(modes, axes[0], strict=True):
        for index, name in enumerate(names):
            points = [(r.row.shape.kv_len, rate) for r in results if r.row.mode == mode and (rate := r.rate(name))]
            style = dict(linewidth=2.2, zorder=3) if name in (OURS, ANY_ORDER) else dict(linewidth=1.2, linestyle="--")
            if points:
                panel.plot(*zip(*sorted(points), strict=True), marker="o", color=f"C{index}", label=name, **style)
        lengths = sorted({r.row.shape.kv_len for r in results})
        panel.set_xscale("log", base=2)
        panel.set_xticks(lengths, map(str, lengths))
        panel.set(title="forward" if mode == "fwd" else "forward + backward", xlabel="sequence length")
        panel.set(ylabel="TFLOP/s", ylim=(0, None))
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(machine()["device"])
    figure.savefig(path, dpi=110)


# --- the command ---


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what is measured")
    what.add_argument("--shapes", nargs="+", default=[], metavar="SHAPE")
    what.add_argument(
        "--suite", nargs="+", choices=SUITES, default=[], help="default: anchors, unless --shapes is given"
    )
    what.add_argument("--sweep", action="store_true", help="the same as --suite sweep")
    what.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    what.add_argument("--implementation", help="ours; default: mosaic_gpu on a GPU, xla elsewhere")
    what.add_argument(
        "--reference", choices=(CUDNN, "xla", "reference"), help="default: cuDNN, or xla where it declines"
    )
    what.add_argument("--no-peers", action="store_true", help="ours alone, and cuDNN to check against")
    how = parser.add_argument_group("how")
    how.add_argument("--rounds", type=int, default=4, help="turns of each kernel (%(default)s)")
    how.add_argument("--iterations", type=int, default=4, help="calls in a turn, after a warm-up (%(default)s)")
    how.add_argument("--threads", type=int, default=os.cpu_count(), help="that compile (%(default)s)")
    how.add_argument("--quick", action="store_true", help="--suite smoke, one round")
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="rewritten after each row")
    output.add_argument("--plot", type=Path, metavar="FILE", help="TFLOP/s over sequence length (needs matplotlib)")
    return parser


def completed(options: argparse.Namespace) -> argparse.Namespace:
    options.suite += ["sweep"] if options.sweep else []
    if options.quick:
        options.suite, options.rounds = ["smoke"], 1
    if not (options.suite or options.shapes):
        options.suite = ["anchors"]
    options.implementation = options.implementation or ("mosaic_gpu" if jax.default_backend() == "gpu" else "xla")
    if min(options.rounds, options.iterations, options.threads) < 1:
        raise ValueError("--rounds, --iterations, --threads: must be at least 1")
    for name in ("json", "plot"):
        path = getattr(options, name)
        if path and not path.parent.is_dir():
            raise ValueError(f"--{name}: {path.parent} is no folder")
    if options.plot and not importlib.util.find_spec("matplotlib"):
        raise ValueError("--plot: needs matplotlib, which is not installed")
    return options


def run(options: argparse.Namespace, rows: list[Row]) -> list[Result]:
    say(", ".join(f"{name} {value}" for name, value in machine().items()))
    peers = [name for name in peers_here() if not options.no_peers or name == CUDNN]
    programs = compile_kernels(rows, options.implementation, peers, options.threads)
    references = compile_references(programs, options.implementation, options.reference, options.threads)
    results: list[Result] = []
    for row in rows:
        results.append(measure(row, programs[row], references[row], options))
        say_row(results[-1])
        if options.json:
            write_json(options.json, results, options)
    return results


def main() -> int:
    parser = arguments()
    options = parser.parse_args()
    try:
        options = completed(options)
        rows = rows_of(options.suite, options.shapes, options.passes)
    except ValueError as error:
        parser.error(str(error))
    start = time.perf_counter()
    results = run(options, rows)
    names = [name for name in (OURS, ANY_ORDER, *PEERS) if any(r.rate(name) for r in results)]
    console = Console(width=None if sys.stdout.isatty() else 170)
    console.print(table(results, names))
    say_summary(results, options.suite, console)
    say_notes(results)
    say(f"done in {time.perf_counter() - start:.0f} s")
    if options.plot:
        sweep = {Shape.parse(text) for text in SWEEP} if "sweep" in options.suite else {row.shape for row in rows}
        draw([r for r in results if r.row.shape in sweep], names, options.plot)
    mine = [one for r in results for name, one in r.figures.items() if name in (OURS, ANY_ORDER)]
    return int(any(one.tflops is None for one in mine))


if __name__ == "__main__":
    sys.exit(main())
