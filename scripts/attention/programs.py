"""What is compiled: a program for each row and kernel, on several threads at once."""

import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
from jax import Array
from jax.stages import Compiled

from scripts.attention.console import say
from scripts.attention.peers import kernels_of, ours
from scripts.attention.shapes import CUDNN, Documents, Make, Row, inputs


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


# What kernels raise that do not serve a shape; XLA's errors are RuntimeErrors.
DECLINES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def compile_all[Key: Hashable](jobs: Mapping[Key, Callable[[], Compiled]], threads: int) -> dict[Key, Compiled | str]:
    """What each job compiles to, or why it does not; on several threads at once."""

    def attempt(job: Callable[[], Compiled]) -> Compiled | str:
        try:
            return job()
        except DECLINES as error:  # it is told, and the others go on
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
