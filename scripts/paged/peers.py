"""The kernels that take part: each makes a step for a shape, or raises with the reason why not."""

import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import paxattn
from paxattn import KVPages
from scripts.paged.shapes import PLAIN, Inputs, Shape

type Step = Callable[[Any], Array]  # of Inputs, or what PREPARED makes of them -> [T,H,D]
type Make = Callable[[Shape], Step]

OURS, UNTOLD = "ours", "ours, not told of the prefix"
FA3_SPLITS = (1, 4, 16)
TRITON_SPLITS = (1, 16)


def paged(implementation: str) -> Make:
    def make(shape: Shape) -> Step:
        longest, prefix = max(shape.q_lens), shape.prefix or None
        attend = partial(paxattn.paged_attention, max_q_len=longest, implementation=implementation)
        return lambda x: attend(*x, shared_prefix_len=prefix)

    return make


def untold(implementation: str) -> Make:
    def make(shape: Shape) -> Step:
        if not shape.prefix:
            raise ValueError("there is no prefix")
        return paged(implementation)(replace(shape, prefix=0))

    return make


def only_plain_decode(shape: Shape) -> None:
    if shape.dtype not in PLAIN:
        raise ValueError(f"has no pages of {shape.dtype}")
    if not shape.decodes:
        raise ValueError("is called with one query a row")


def cudnn(shape: Shape) -> Step:
    """jax.nn does not reach cuDNN's page tables, which lie under it."""
    only_plain_decode(shape)
    fused = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")

    def step(x: Inputs) -> Array:
        table = x.page_table[:, None, :, None]
        lens = jnp.ones_like(x.kv_lens), x.kv_lens
        options = dict(scale=shape.head_dim**-0.5, mask_type=fused.MaskType.PADDING)
        out = fused.paged_attention(x.q[:, None], x.pages.k, x.pages.v, *lens, table, table, **options)
        return jax.tree.leaves(out)[0][:, 0]

    return step


def fa3(splits: int, shape: Shape) -> Step:
    only_plain_decode(shape)
    attend = importlib.import_module("flash_attn3_jax").flash_mha_with_kvcache

    def step(x: Inputs) -> Array:
        options = dict(cache_seqlens=x.kv_lens, page_table=x.page_table, num_splits=splits)
        return jax.tree.leaves(attend(x.q[:, None], x.pages.k, x.pages.v, **options))[0][:, 0]

    return step


def triton(splits: int, shape: Shape, *, interpret: bool = False) -> Step:
    """The deprecated kernel of JAX, which takes queries that are scaled, and pages [K,N,P,D]."""
    only_plain_decode(shape)
    if jax.default_backend() != "gpu" and not interpret:
        raise ValueError("needs a GPU")
    attend = importlib.import_module("jax.experimental.pallas.ops.gpu.paged_attention").paged_attention

    def step(x: Inputs) -> Array:
        columns = x.page_table.shape[1]
        splits_of_all = math.gcd(columns, splits)
        together = math.gcd(columns // splits_of_all, 8)
        options = dict(k_splits=splits_of_all, pages_per_compute_block=together, interpret=interpret)
        q = x.q * jnp.asarray(shape.head_dim**-0.5, x.q.dtype)
        return attend(q, x.pages.k, x.pages.v, x.page_table, x.kv_lens, **options)

    return step


def heads_first(_: Shape, x: Inputs) -> Inputs:
    return x._replace(pages=KVPages(*(array.transpose(2, 0, 1, 3) for array in (x.pages.k, x.pages.v))))


def dense(shape: Shape) -> Step:
    """Our flash attention over keys and values that lie in one piece: what pages cost a chunk of a prompt."""
    if shape.decodes or len(shape.lens) > 1 or shape.dtype not in PLAIN:
        raise ValueError("is for one row of many queries, of plain keys and values")

    def step(x: tuple[Array, Array, Array]) -> Array:
        return paxattn.flash_attention(*x, causal=True)[0]

    return step


def one_piece(shape: Shape, x: Inputs) -> tuple[Array, ...]:
    """q, k and v [1,T,H,D] of the first row."""
    tokens = shape.kv_lens[0]
    of_row = (array[x.page_table[0]].reshape(-1, *array.shape[2:])[:tokens] for array in (x.pages.k, x.pages.v))
    return tuple(array[None] for array in (x.q[: shape.q_lens[0]], *of_row))


PEERS: dict[str, Make] = {
    "cuDNN": cudnn,
    **{f"FA3, {splits} splits": partial(fa3, splits) for splits in FA3_SPLITS},
    **{f"JAX Triton, {splits} splits": partial(triton, splits) for splits in TRITON_SPLITS},
    "dense": dense,
    "XLA gather": paged("xla"),
}

# What some of them are given, made before anything is timed.
PREPARED: dict[str, Callable[[Shape, Inputs], Any]] = {
    **{name: heads_first for name in PEERS if name.startswith("JAX Triton")},
    "dense": one_piece,
}
