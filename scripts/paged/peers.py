"""The kernels that take part: each makes a step for a shape, or raises with the reason why not."""

import importlib
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

import paxattn
from scripts.paged.shapes import PLAIN, Inputs, Shape

type Step = Callable[[Inputs], Array]  # -> [R,H,D]
type Make = Callable[[Shape], Step]

OURS = "ours"
FA3_SPLITS = (1, 4, 16)


def paged(implementation: str) -> Make:
    def step(x: Inputs) -> Array:
        return paxattn.paged_attention(*x, max_q_len=1, implementation=implementation)

    return lambda _: step


def only_plain(shape: Shape) -> None:
    if shape.dtype not in PLAIN:
        raise ValueError(f"has no pages of {shape.dtype}")


def cudnn(shape: Shape) -> Step:
    """jax.nn does not reach cuDNN's page tables, which lie under it."""
    only_plain(shape)
    fused = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")

    def step(x: Inputs) -> Array:
        table = x.page_table[:, None, :, None]
        lens = jnp.ones_like(x.kv_lens), x.kv_lens
        options = dict(scale=shape.head_dim**-0.5, mask_type=fused.MaskType.PADDING)
        out = fused.paged_attention(x.q[:, None], x.pages.k, x.pages.v, *lens, table, table, **options)
        return jax.tree.leaves(out)[0][:, 0]

    return step


def fa3(splits: int, shape: Shape) -> Step:
    only_plain(shape)
    attend = importlib.import_module("flash_attn3_jax").flash_mha_with_kvcache

    def step(x: Inputs) -> Array:
        options = dict(cache_seqlens=x.kv_lens, page_table=x.page_table, num_splits=splits)
        return jax.tree.leaves(attend(x.q[:, None], x.pages.k, x.pages.v, **options))[0][:, 0]

    return step


PEERS: dict[str, Make] = {
    "cuDNN": cudnn,
    **{f"FA3, {splits} splits": partial(fa3, splits) for splits in FA3_SPLITS},
    "XLA gather": paged("xla"),
}
