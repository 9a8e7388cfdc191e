"""Correctness first, then kernel time and wall time, the kernels of a row in turns."""

import importlib
import importlib.metadata
import importlib.util
import statistics
import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.stages import Compiled

from scripts.attention.peers import PEERS
from scripts.attention.programs import first_line
from scripts.attention.shapes import RESULTS, TOLERANCE, Inputs, Row, flops, inputs


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
    programs: Mapping[Key, Compiled], args: Mapping[Key, tuple[Any, ...]], rounds: int, iterations: int
) -> dict[Key, Times]:
    """Medians, each program with its arguments.

    Each round starts with another one, so that none always runs on the clocks another left behind.
    """
    names = list(programs)
    on_gpu: dict[Key, list[float]] = {name: [] for name in names}
    wall: dict[Key, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        at = turn % max(len(names), 1)
        for name in names[at:] + names[:at]:
            on_gpu[name] += cupti_ms(programs[name], args[name], iterations)
            wall[name].append(wall_ms(programs[name], args[name], iterations))
    return {
        name: Times(statistics.median(on_gpu[name]) if on_gpu[name] else None, statistics.median(wall[name]))
        for name in names
    }


@cache
def cupti() -> Any:
    """JAX's CUPTI profiler, or None where there is no GPU."""
    return importlib.import_module("jax.experimental.mosaic.gpu.profiler") if jax.default_backend() == "gpu" else None


def cupti_ms(run: Compiled, args: tuple[Any, ...], iterations: int) -> list[float]:
    """The time of all kernels of each iteration, after a warm-up; empty where CUPTI tells none."""
    if cupti() is None:
        return []
    try:
        _, ms = cupti().measure(run, aggregate=True, iterations=iterations)(*args)
    except RuntimeError:  # CUPTI is missing, taken by another profiler, or lost a kernel
        return []
    return [] if ms is None else ms if isinstance(ms, list) else [ms]


def wall_ms(run: Compiled, args: tuple[Any, ...], iterations: int) -> float:
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
    times = time_in_turns(right, dict.fromkeys(right, args), options.rounds, options.iterations)
    return Result(row, name, {kernel: figure(row, *checked[kernel], times.get(kernel)) for kernel in programs})


def figure(row: Row, errors: dict[str, float], note: str, times: Times | None) -> Figure:
    if times is None:
        return Figure(errors=errors, note=note)
    note = "wall time" if times.kernel_ms is None and cupti() else ""
    tflops = flops(row) / (times.kernel_ms or times.wall_ms) / 1e9
    return Figure(times.kernel_ms, times.wall_ms, tflops, errors, note)
