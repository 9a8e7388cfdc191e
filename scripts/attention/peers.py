"""The kernels that take part: each makes an Attend for a shape, or raises with the reason why not."""

import importlib
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import jax
from jax import Array

import paxattn
from scripts.attention.console import say
from scripts.attention.shapes import ANY_ORDER, CUDNN, OURS, PASSES, Attend, Documents, Make, Shape, document_lengths


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
