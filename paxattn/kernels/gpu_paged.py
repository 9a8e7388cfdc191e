"""paged_attention and write_pages on Hopper GPUs: what joins the kernels to JAX, and what they decline."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from paxattn.kernels import (
    gpu_flash_fwd_plan,
    gpu_paged_codes,
    gpu_paged_decode,
    gpu_paged_plan,
    gpu_paged_prefill,
    gpu_paged_write,
    gpu_paged_write_codes,
    hopper,
    online_softmax,
    tiles,
    xla_pages,
)
from paxattn.kernels.gpu_blocks import ROWS
from paxattn.kernels.gpu_flash import multiprocessors, on_hopper
from paxattn.kernels.gpu_paged_ahead import Following
from paxattn.kernels.problem import Problem

HEAD_DIMS = (64, 80, 96, 128, 256)
PAGE_SIZES = (8, 16, 32, 64, 128, 256)
MOST_PARTS = 8  # of a shared prefix
PART_STEP = 128  # keys: a block of the kernel that reads them


def paged_attention(
    q, pages, page_table, kv_lens, cu_q_lens, sinks, *, left, scale, softcap, max_q_len, shared_prefix_len
) -> tuple[Array, Array]:
    _decline(q, pages, page_table)
    tokens, heads, head_dim = q.shape
    _, page_size, kv_heads, _ = pages.k.shape
    longest, few = min(max_q_len or tokens, tokens), ROWS * kv_heads // heads
    left = None if left is None else min(left, page_table.shape[1] * page_size)  # all there is
    shape = tokens, heads, kv_heads, head_dim, page_size, min(longest, few)
    problem = gpu_paged_plan.Problem(*shape, left, scale, softcap)
    sinks = None if sinks is None else sinks.astype(jnp.float32)
    compressed = pages.k_scale is not None
    if compressed and longest > few:
        page_table, kv_lens, cu_q_lens = _in_pieces(few, tokens, page_table, kv_lens, cu_q_lens)
        longest = few
    # Of a window the prefix may be no part, and what reads a prefix reads no compressed pages.
    shared = shared_prefix_len is not None and left is None and not compressed
    skipped = _before_all(shared_prefix_len, kv_lens, cu_q_lens)[None] if shared else None
    arrays = q, jax.tree.leaves(pages), page_table, kv_lens, cu_q_lens, skipped, sinks
    given = jax.tree.leaves(arrays)
    arrays = online_softmax.vary_like(arrays, *given)
    attend = jax.custom_batching.sequential_vmap(functools.partial(_attend, problem, compressed, longest > few))
    return online_softmax.vary_like(attend(*arrays), *given)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _attend(problem: gpu_paged_plan.Problem, compressed: bool, some_are_long: bool, *arrays: Any) -> Any:
    # Under jit the layers of a model share what it lowers to, which for a kernel takes a second or two.
    if arrays[-2] is None:
        return _rows(problem, compressed, some_are_long, *arrays, None)
    prefix = _prefix(problem, *arrays[:-1])
    if not some_are_long:
        return _rows(problem, compressed, some_are_long, *arrays, prefix)
    return _merge(_rows(problem, compressed, some_are_long, *arrays, None), prefix, arrays[4][-1])


def _in_pieces(few: int, tokens: int, page_table: Array, kv_lens: Array, cu_q_lens: Array) -> tuple[Array, ...]:
    """Every row as rows of at most `few` queries, whose keys end with their last one; how many there are is not static,
    so that some have no queries.

    The kernel for many queries reads no compressed pages. The other one reads them again for each of these rows, but
    most of that from the cache.
    """
    rows = jnp.arange(len(kv_lens), dtype=jnp.int32)
    ends = lax.div(cu_q_lens[1:], jnp.int32(few)) + rows + 1  # Of the rows' pieces: each has one more than it may need.
    index = jnp.arange(tokens // few + len(kv_lens), dtype=jnp.int32)
    row = jnp.minimum((ends[None, :] <= index[:, None]).sum(axis=1, dtype=jnp.int32), rows[-1])
    before = index - lax.div(cu_q_lens[row], jnp.int32(few)) - row
    end = cu_q_lens[row + 1]
    starts = jnp.append(jnp.minimum(cu_q_lens[row] + before * few, end), end[-1])
    return page_table[row], jnp.maximum(kv_lens[row] - end + jnp.minimum(starts[:-1] + few, end), 0), starts


def _before_all(prefix_len: Array, kv_lens: Array, cu_q_lens: Array) -> Array:
    """prefix_len, or less where new tokens of some row would be in the prefix, of which every query sees all."""
    q_lens = jnp.diff(cu_q_lens)
    old = jnp.where(q_lens > 0, kv_lens - q_lens, jnp.iinfo(jnp.int32).max).min()
    return jnp.clip(prefix_len, 0, jnp.where(cu_q_lens[-1] > 0, jnp.maximum(old, 0), 0))


def _rows(problem: gpu_paged_plan.Problem, compressed: bool, some_are_long: bool, *arrays: Any) -> tuple[Array, Array]:
    """Rows by themselves: those of few queries in one kernel, and with it a prefix; those of many in another."""
    plainly = compressed or arrays[-1] is not None
    read_as, blocks = problem if plainly else gpu_paged_plan.abreast(problem), gpu_paged_plan.blocks(multiprocessors())
    if compressed:
        kind, config = gpu_paged_codes.CODES, gpu_paged_codes.config_for(problem)
    else:
        kind, config = gpu_paged_decode.PLAIN, gpu_paged_plan.config_for(read_as)
    results = None
    if some_are_long:
        following = Following(read_as, config, blocks)
        counters = jnp.zeros(gpu_paged_decode.counters(blocks * config.warpgroups) + 1, jnp.int32)
        dense = _dense(problem, arrays[2], causal=True)
        results = _prefill(dense, problem.page_size, problem.max_q_len, following, arrays[:-1], counters)
    return gpu_paged_decode.decode(kind, read_as, config, blocks, results, *arrays)


def _prefix(problem: gpu_paged_plan.Problem, q, pages, page_table, kv_lens, cu_q_lens, prefix_len):
    """All queries over the keys that all rows begin with (cascade, Ye et al. 2024).

    They see all of it, as rows of their own, one for each of a few parts of the prefix, so that there is work for all
    multiprocessors -> [parts,T,H,D] and [H,parts,T], of the padding whatever it gives.
    """
    dense = _dense(problem, page_table, causal=False)
    tokens, size, block_q = problem.tokens, problem.page_size, gpu_flash_fwd_plan.config_for(dense).block_q
    parts = max(1, min(MOST_PARTS, multiprocessors() // (problem.heads * tiles.cdiv(tokens, block_q))))
    step = max(PART_STEP, size)
    part = tiles.cdiv(prefix_len[0], parts * step) * step
    most = tiles.cdiv(page_table.shape[1] * size, parts * step) * step // size
    rows = jnp.arange(len(kv_lens), dtype=jnp.int32)
    row = jnp.where(jnp.diff(cu_q_lens) > 0, rows, rows[-1]).min()
    index = jnp.arange(parts, dtype=jnp.int32)
    columns = (index * lax.div(part, jnp.int32(size)))[:, None] + jnp.arange(most, dtype=jnp.int32)[None]
    table = page_table.at[row, columns].get(mode="clip")
    lens = jnp.clip(prefix_len[0] - index * part, 0, part)
    ends = jnp.arange(parts + 1, dtype=jnp.int32) * tokens
    every = replace(dense, q_len=parts * tokens)
    all_q = jnp.tile(q, (parts, 1, 1))
    arrays = all_q, pages, table, lens, ends, None, None
    out, lse, _ = _prefill(every, size, 0, None, arrays, jnp.zeros(1, jnp.int32))
    return out.reshape(parts, *q.shape), lse.reshape(problem.heads, parts, tokens)


def _dense(problem: gpu_paged_plan.Problem, page_table: Array, causal: bool) -> Problem:
    """The same as the forward of flash attention knows it."""
    most_keys, dim = page_table.shape[1] * problem.page_size, problem.head_dim
    shape = 1, problem.tokens, most_keys, problem.heads, problem.kv_heads, dim, dim
    return Problem(*shape, problem.left, 0 if causal else None, problem.scale, problem.softcap)


def _prefill(
    problem: Problem, page_size: int, few: int, following: Following | None, arrays: tuple, counters: Array
) -> tuple[Array, Array, Array]:
    """Of the rows of more than `few` queries -> out, lse, and the counters, of which the last one is used."""
    q, pages, page_table, kv_lens, cu_q_lens, skipped, sinks = arrays
    config = gpu_flash_fwd_plan.config_for(problem)
    inputs = q[None], *pages, page_table, kv_lens, cu_q_lens
    sinks = None if sinks is None else sinks[None]

    def run(inputs, skipped, sinks, counters):
        fixed = problem, config, multiprocessors(), page_size, few, following
        counters = jax.new_ref(counters)
        out, lse = gpu_paged_prefill.prefill(*fixed, inputs, skipped, sinks, counters)
        return out[0], lse[0], jax.freeze(counters)

    return hopper.apart(run)(inputs, skipped, sinks, counters)


def _merge(one: tuple[Array, Array], others: tuple[Array, Array], tokens: Array) -> tuple[Array, Array]:
    """Attention over several sets of keys from that over each: out [T,H,D] and lse [H,T], others as of `_prefix`."""
    there = jnp.arange(one[0].shape[0], dtype=jnp.int32) < tokens
    outs = jnp.concatenate([one[0][None], others[0]]).astype(jnp.float32)
    lse = jnp.concatenate([one[1][None], jnp.where(there[None, None], others[1].swapaxes(0, 1), -jnp.inf)])
    whole = jax.nn.logsumexp(lse, axis=0)
    weights = jnp.exp(lse - jnp.where(jnp.isneginf(whole), 0.0, whole)[None]).swapaxes(1, 2)[..., None]
    return jnp.where(weights == 0, 0.0, weights * outs).sum(axis=0).astype(one[0].dtype), whole


def lay_out(q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """The same as slices of one array, which XLA makes by one kernel.

    It would make one for each of q, k and v, though they come of one matrix product. With `paxattn.XLA_FLAGS` these
    kernels read a slice where it lies. The barrier keeps XLA from slicing first.
    """
    _need_hopper()
    arrays = q, k, v
    if not _are_alike(arrays):
        return arrays
    together = lax.optimization_barrier(jnp.concatenate([x.reshape(-1) for x in arrays]))
    parts = jnp.split(together, [q.size, q.size + k.size])
    q, k, v = (part.reshape(x.shape) for part, x in zip(parts, arrays, strict=True))
    return q, k, v


def _are_alike(arrays: Sequence[Any]) -> bool:
    """Whether they are of one dtype that kernels serve, and none is cut over a mesh, or varies where others do not."""
    if not all(isinstance(x, Array) for x in arrays):
        return False
    kinds = [jax.typeof(x) for x in arrays]
    known = {(x.dtype, x.manual_axis_type) for x in kinds}
    return len(known) == 1 and kinds[0].dtype in (jnp.bfloat16, jnp.float16) and not any(map(_is_cut, kinds))


def _is_cut(kind: Any) -> bool:
    return any(axes is not None for axes in kind.sharding.spec)


def write_pages(pages: Any, new: Any, slots: Array) -> Any:
    """As in `xla_pages`."""
    _need_hopper()
    into, structure = jax.tree.flatten(pages)
    tokens = jax.tree.leaves(new)
    if 0 in into[0].shape or not len(slots):
        raise NotImplementedError("an axis of nothing: 'mosaic_gpu' serves none, 'xla' does")
    given = *into, *tokens, slots
    arrays = online_softmax.vary_like((into, tokens, slots), *given)
    write = jax.custom_batching.custom_vmap(functools.partial(_write, multiprocessors()))
    write.def_vmap(functools.partial(_write_under_vmap, xla_pages.write_pages))
    written = write(*arrays)
    return jax.tree.unflatten(structure, online_softmax.vary_like(written, *given))


_write = jax.jit(gpu_paged_write.write, static_argnums=0)  # for the same reason as _attend


def _write_under_vmap(write: Any, size: int, batched: Any, *arrays: Any) -> tuple[Any, Any]:
    """By XLA, which writes all of them in place at once; a kernel call after the other would copy each."""
    axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, tuple(batched))
    written = jax.vmap(write, axes, axis_size=size)(*arrays)
    return written, jax.tree.map(lambda _: True, written)


def write_compressed_pages(pages: Any, k: Array, v: Array, slots: Array) -> Any:
    """As in `xla_pages`."""
    _need_hopper()
    _decline_rows(pages)
    _decline_codes(pages)
    _decline_head_dim(k.shape[2])
    for name, x in dict(k=k, v=v).items():
        if x.dtype.name not in ("bfloat16", "float16", "float32"):
            raise NotImplementedError(f"{name} of {x.dtype}: 'mosaic_gpu' compresses bfloat16, float16 and float32")
    if 0 in pages.k.shape or not len(slots):
        raise NotImplementedError("an axis of nothing: 'mosaic_gpu' serves none, 'xla' does")
    if pages.k.size // gpu_paged_write_codes.UNIT > jnp.iinfo(jnp.int32).max:
        raise NotImplementedError(f"pages of {pages.k.size} codes: 'mosaic_gpu' counts units of them in 32 bits")
    if k.dtype != v.dtype:
        k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    given = jax.tree.leaves((pages, k, v, slots))
    arrays = online_softmax.vary_like((pages, k, v, slots), *given)
    write = jax.custom_batching.custom_vmap(functools.partial(_write_codes, multiprocessors()))
    write.def_vmap(functools.partial(_write_under_vmap, xla_pages.write_compressed_pages))
    return online_softmax.vary_like(write(*arrays), *given)


@functools.partial(jax.jit, static_argnums=0)  # for the same reason as _attend
def _write_codes(num_sms: int, pages: Any, k: Array, v: Array, slots: Array) -> Any:
    into, structure = jax.tree.flatten(pages)
    return jax.tree.unflatten(structure, gpu_paged_write_codes.write(num_sms, into, k, v, slots))


def _need_hopper() -> None:
    if not on_hopper():
        kind = jax.devices()[0].device_kind
        raise NotImplementedError(f"device {kind}: 'mosaic_gpu' needs a Hopper GPU (compute capability 9.0)")


def _decline(q: Array, pages: Any, page_table: Array) -> None:
    _need_hopper()
    if q.dtype.name not in ("bfloat16", "float16"):
        raise NotImplementedError(f"dtype {q.dtype}: 'mosaic_gpu' serves bfloat16 and float16, 'xla' float32, too")
    _decline_rows(pages)
    if pages.k.dtype != q.dtype and pages.k_scale is None:
        raise NotImplementedError(f"pages of {pages.k.dtype} for {q.dtype}: 'mosaic_gpu' serves pages of q's dtype")
    if pages.k_scale is not None:
        _decline_codes(pages)
    _decline_head_dim(q.shape[-1])
    if pages.k.shape[1] not in PAGE_SIZES:
        served = ", ".join(map(str, PAGE_SIZES))
        raise NotImplementedError(f"page size {pages.k.shape[1]}: 'mosaic_gpu' serves {served}")
    if q.shape[1] > ROWS * pages.k.shape[2]:
        raise NotImplementedError(f"groups of {q.shape[1] // pages.k.shape[2]} heads: 'mosaic_gpu' serves up to {ROWS}")
    if 0 in q.shape or 0 in pages.k.shape or 0 in page_table.shape:
        raise NotImplementedError("an axis of nothing: 'mosaic_gpu' serves none, 'xla' does")


def _decline_rows(pages: Any) -> None:
    if pages.heads_a_row != 1:
        raise NotImplementedError(f"{pages.heads_a_row} heads a row: 'mosaic_gpu' serves pages as a GPU has them")


def _decline_codes(pages: Any) -> None:
    if not gpu_paged_codes.serves(pages):
        scales = f"{pages.k_scale.shape[-1]} and {pages.v_scale.shape[-1]} a head"
        raise NotImplementedError(f"scales of {pages.k.dtype}, {scales}: 'mosaic_gpu' serves what `init_pages` makes")


def _decline_head_dim(head_dim: int) -> None:
    if head_dim not in HEAD_DIMS:
        raise NotImplementedError(f"head dim {head_dim}: 'mosaic_gpu' serves {', '.join(map(str, HEAD_DIMS))}")
