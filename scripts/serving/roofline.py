"""The least time that a device can take for a workload: matrix products of prompts, and what decode must read."""

import time
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from models.config import Config
from scripts.attention.measuring import time_in_turns
from scripts.serving.workloads import Workload

SECONDS = 3  # of products one after another, after which a card is at the clock that its power allows


@dataclass(frozen=True)
class Rates:
    """What the device was seen to do: bytes read and floating point operations, a second.

    `compute` is what it reaches for milliseconds, `kept_up` what its power lets it keep up for seconds.
    """

    read: float
    compute: float
    kept_up: float


def measured(dtype: Any) -> Rates:
    big = jax.default_backend() == "gpu"
    x = jnp.ones(2**30 if big else 2**25, jnp.bfloat16)
    n = 8192 if big else 1024
    # Of random numbers: a GPU multiplies ones faster, as they take less power.
    a = jax.random.normal(jax.random.key(0), (n, n), dtype)
    runs = {
        "read": (jax.jit(lambda x: x.astype(jnp.float32).sum()).lower(x).compile(), (x,)),
        "compute": (jax.jit(lambda a: a @ a).lower(a).compile(), (a,)),
    }
    seconds = {}
    for name, (run, args) in runs.items():
        times = time_in_turns({name: run}, {name: args}, 3, 5)[name]
        seconds[name] = (times.kernel_ms or times.wall_ms) / 1e3
    compute = 2 * n**3 / seconds["compute"]
    return Rates(x.nbytes / seconds["read"], compute, kept_up(a, compute) if big else compute)


def kept_up(a: Array, compute: float) -> float:
    """Floating point operations a second of products of a [n,n] with itself, one after another for some seconds."""
    n = len(a)
    count = max(1, int(SECONDS * compute / (2 * n**3)))

    run = jax.jit(products, static_argnums=1).lower(a, count).compile()
    start = time.perf_counter()
    jax.block_until_ready(run(a))
    return 2 * n**3 * count / (time.perf_counter() - start)


def products(a: Array, count: int) -> Array:
    """The last of so many."""

    def again(_: Any, state: tuple[Array, Array]) -> tuple[Array, Array]:
        x, _ = state
        return lax.optimization_barrier((x, x @ x))  # Else XLA would multiply once, before the loop.

    return lax.fori_loop(0, count, again, (a, a))[1]


def for_seconds(rates: Rates) -> Rates:
    """The rates of what takes seconds. Where memory is waited for in between, products may be a little faster."""
    return replace(rates, compute=rates.kept_up)


def seconds(work: Workload, config: Config, rows: int, weight_bytes: int, token_bytes: float, rates: Rates) -> float:
    """Prompts at the rate of matrix products, then every step reads all weights, and each row its keys and values.

    As many steps as the longest output, or as all of them take in `rows` rows. Embedding rows count as weights where
    they are the head, too.
    """
    matrices = (
        config.num_layers
        * config.embed_dim
        * ((config.num_heads * 2 + config.num_kv_heads * 2) * config.head_dim + 3 * config.mlp_dim)
    )
    head = config.vocab_size * config.embed_dim
    prompt = work.prompt.astype(np.float64)
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * prompt**2
    flops = (2 * matrices * prompt + 2 * head + attention).sum()
    output = work.output.astype(np.float64)
    steps = max(output.max(), output.sum() / rows) - 1
    kept = ((prompt + output / 2) * (output - 1)).sum() * token_bytes
    return float(flops / rates.compute + (steps * weight_bytes + kept) / rates.read)
