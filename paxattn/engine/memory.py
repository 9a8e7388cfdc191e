"""What a model keeps and computes, found by tracing it, and how many pages of that a device has room for."""

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from paxattn import checks
from paxattn.engine.config import EngineConfig
from paxattn.engine.generate import Model
from paxattn.kv.pages import init_pages
from paxattn.kv.stores import PagedKV


@dataclass(frozen=True)
class Layout:
    """Layers, KV heads, head dim and dtype of what a model keeps; the largest window, if all layers have one.

    And its vocabulary: how many logits it gives.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: Any
    window: int | None
    vocabulary: int

    def page_bytes(self, page_size: int, dtype: Any) -> int:
        pages = jax.eval_shape(lambda: init_pages(1, page_size, self.num_kv_heads, self.head_dim, dtype))
        return self.num_layers * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pages))

    def store(self, config: EngineConfig, num_pages: int) -> PagedKV:
        # Guesses count as stored until they are found wrong, so that pages go back as many tokens too early.
        window = None if self.window is None else self.window + config.draft_tokens
        return PagedKV.create(
            self.num_layers,
            self.num_kv_heads,
            self.head_dim,
            max_seqs=config.max_seqs,
            max_len=config.max_len,
            page_size=config.page_size,
            num_pages=num_pages,
            dtype=config.kv_dtype or self.dtype,
            implementation=config.implementation,
            window=window,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Probe:
    """A store that notes what each layer brings, and keeps nothing."""

    seen: dict[int, tuple] = field(default_factory=dict, metadata=dict(static=True))

    def attend(self, layer: int, q: Array, k: Array, v: Array, **options: Any) -> tuple[Array, "_Probe"]:
        left, _ = checks.window_bounds(options.get("window"), causal=True)
        self.seen[layer] = *k.shape[1:], k.dtype, left
        return jnp.zeros(q.shape, q.dtype), self


def layout(model: Model, params: Any) -> Layout:
    """Trace the model over one token; nothing runs.

    Raises:
      ValueError: its layers differ in KV heads, head dim or dtype.
    """
    probe = _Probe()
    token = jax.ShapeDtypeStruct((1,), jnp.int32)
    logits = jax.eval_shape(lambda params, x: model.logits(params, model(params, x, x, probe)[0]), params, token)
    kinds = {(heads, dim, dtype.name) for heads, dim, dtype, _ in probe.seen.values()}
    checks.require(len(kinds) == 1, "model", f"layers of {sorted(kinds)}", "one whose layers keep the same")
    heads, dim, dtype, _ = probe.seen[0]
    lefts = [left for *_, left in probe.seen.values()]
    windows = [left + 1 for left in lefts if left is not None]
    window = max(windows) if len(windows) == len(lefts) else None
    return Layout(len(probe.seen), heads, dim, dtype, window, logits.shape[-1])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Record:
    """A store that notes all that layers attend with, and keeps nothing."""

    attended: list[Any] = field(metadata=dict(static=True))

    def attend(self, layer: int, q: Array, k: Array, v: Array, **options: Any) -> tuple[Array, "_Record"]:
        self.attended.append((layer, q, k, v, options))
        return jnp.zeros(q.shape, q.dtype), self


def digest(model: Model, params: Any) -> str:
    """Of what a model computes: its trace over two tokens, with its constants. Nothing runs.

    What it is called does not tell: by default that is an address, and a name of its own may leave anything out.
    """

    def trace(params: Any, tokens: Array) -> tuple[Array, list[Any]]:
        record = _Record([])
        hidden, _ = model(params, tokens, tokens, record)
        return model.logits(params, hidden), record.attended

    told, results = jax.make_jaxpr(trace, return_shape=True)(params, jax.ShapeDtypeStruct((2,), jnp.int32))
    text = f"{told} {jax.tree.structure(results)}"
    constants = [np.asarray(x).tobytes() for x in told.consts]
    return hashlib.sha256(b"".join([re.sub(r" at 0x\w+", "", text).encode(), *constants])).hexdigest()


def num_pages(layout: Layout, config: EngineConfig, workspace: Callable[[], int]) -> int:
    """As many as config says, or "auto": what `room_for_pages` finds for rows as long as they may get."""
    if config.num_pages != "auto":
        return config.num_pages
    most = config.max_seqs * -(-config.max_len // config.page_size)
    page_bytes = layout.page_bytes(config.page_size, config.kv_dtype or layout.dtype)
    return room_for_pages(most, page_bytes, config.memory_fraction, workspace)


def room_for_pages(most: int, page_bytes: int, fraction: float, workspace: Callable[[], int]) -> int:
    """Up to `most` pages that fit `fraction` of the memory, beside what is there already and what programs need to run.

    What they need is looked into where `most` pages leave less than half of the memory to them. A device that does not
    tell its memory is a CPU, whose free memory the system tells.

    Raises:
      ValueError: there is room for none.
    """
    told = jax.local_devices()[0].memory_stats()
    if told is None:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * fraction
    else:
        free = told["bytes_limit"] * fraction - told["bytes_in_use"]
    if most * page_bytes <= free / 2:
        return most
    left = free - workspace()
    checks.require(
        left >= page_bytes,
        "num_pages",
        f"'auto', for which {left / 2**20:.0f} MiB are left",
        "a number, or memory free",
    )
    return min(most, int(left // page_bytes))
