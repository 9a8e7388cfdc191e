"""paged_attention in plain XLA: a gather of pages and a streaming softmax, block by block; runs anywhere.

The packed queries are cut into tiles that never cross a row, so that a tile reads one row of the page table.
All tiles go through their KV blocks in step. How many tiles there can be is known from the static shapes:
ceil(T / tile) whole ones and a rest for each row.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from paxattn.kernels import online_softmax, tiles

Q_TILE = 128
CPU_BLOCK = 128
LONGEST_BLOCK = 512


class Sizes(NamedTuple):
    """Tokens in a tile of queries, in a block of keys, and in a group of tiles that go in step.

    A CPU gains from small blocks, which stay in its cache and leave out most of what lies after the query;
    other devices from few large steps.
    """

    tile: int
    block: int
    group: int

    @classmethod
    def of(cls, num_tokens: int, rows: int, max_q_len: int | None) -> "Sizes":
        """A tile is about a row's mean length, so that padding to whole tiles costs a constant factor at most."""
        mean = tiles.cdiv(num_tokens, rows)
        tile = min(Q_TILE, 1 << (mean - 1).bit_length(), max_q_len or Q_TILE)
        if jax.default_backend() == "cpu":
            return cls(tile, CPU_BLOCK, CPU_BLOCK)
        return cls(tile, LONGEST_BLOCK, 4096)


class Tiles(NamedTuple):
    """W tiles of Q tokens: whose they are and where they lie."""

    row: Array  # [W]
    token: Array  # [W,Q] index in the packed queries
    position: Array  # [W,Q] place in the row's keys; negative where the tile has no token
    first: Array  # [R] each row's first tile


def paged_attention(
    q, pages, page_table, kv_lens, cu_q_lens, sinks, *, left, scale, softcap, max_q_len, shared_prefix_len
) -> tuple[Array, Array]:
    del shared_prefix_len  # a hint
    num_tokens, heads, head_dim = q.shape
    if 0 in (*q.shape, *page_table.shape):
        return jnp.zeros_like(q), jnp.full((heads, num_tokens), -jnp.inf, jnp.float32)
    kv_heads = pages.num_kv_heads
    sizes = Sizes.of(num_tokens, kv_lens.shape[0], max_q_len)
    work = _cut(kv_lens, cu_q_lens, num_tokens, sizes.tile, max_q_len)
    pages, page_table = _split_large_pages(pages, page_table, sizes.block)
    table = page_table[work.row]
    q_tiles = q[jnp.minimum(work.token, num_tokens - 1)].reshape(
        *work.token.shape, kv_heads, heads // kv_heads, head_dim
    )
    per_head = None if sinks is None else sinks.astype(jnp.float32).reshape(1, kv_heads, -1, 1)

    def attend(group):
        q_tiles, table, position = group
        state = _stream(q_tiles, pages, table, position, sizes.block, left, scale, softcap)
        out, lse = online_softmax.finish(state, per_head)
        return out.astype(q.dtype), lse

    group = (q_tiles.transpose(0, 2, 3, 1, 4), table, work.position)
    out, lse = _in_groups(attend, group, max(1, sizes.group // sizes.tile))
    return _unpack(out, lse, work, cu_q_lens, num_tokens)


def _in_groups(attend, tiles_of, size):
    """attend over `size` tiles at a time; the work arrays are padded with tiles of no tokens."""
    count = len(tiles_of[0])
    if count <= size:
        return attend(tiles_of)
    groups = tiles.cdiv(count, size)

    def split(x, fill):
        x = jnp.pad(x, [(0, groups * size - count)] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
        return x.reshape(groups, size, *x.shape[1:])

    q_tiles, table, position = tiles_of
    done = lax.map(attend, (split(q_tiles, 0), split(table, 0), split(position, -1)))
    return tuple(x.reshape(groups * size, *x.shape[2:])[:count] for x in done)


def _stream(q_tiles, pages, table, position, block, left, scale, softcap):
    """Take the tiles through their KV blocks in step, from the first that any query sees to the last."""
    page_size = pages.k.shape[1]
    pages_per_block = max(1, min(block // page_size, table.shape[1]))
    block = pages_per_block * page_size
    reach = position.max(axis=1) + 1
    begin = jnp.zeros_like(reach) if left is None else jnp.maximum(_first(position) - left, 0)
    start = begin // block
    stop = tiles.cdiv(reach, block)

    def visit(i, state):
        first_page = (start + i) * pages_per_block
        k, v, kv_pos = _gather(pages, table, first_page, pages_per_block, (begin, reach), q_tiles.dtype)
        mask = tiles.in_window(position[:, :, None], kv_pos[:, None, :], left, 0)
        s = online_softmax.scores(q_tiles, k, scale, softcap)
        s = jnp.where(mask[:, None, None], s, -jnp.inf)
        return online_softmax.update(state, s, v)

    state = online_softmax.vary_like(online_softmax.init(q_tiles, q_tiles), pages.v)  # D is Dv here
    if table.shape[1] <= pages_per_block:
        return visit(0, state)
    return lax.fori_loop(0, jnp.max(stop - start, initial=0), visit, state)


def _cut(kv_lens: Array, cu_q_lens: Array, num_tokens: int, tile: int, max_q_len: int | None) -> Tiles:
    rows = kv_lens.shape[0]
    most = min(num_tokens, tiles.cdiv(num_tokens, tile) + rows)
    if max_q_len is not None:
        most = min(most, rows * tiles.cdiv(max_q_len, tile))
    q_lens = jnp.diff(cu_q_lens)
    counts = tiles.cdiv(q_lens, tile)
    ends = jnp.cumsum(counts)
    index = jnp.arange(most)
    row = jnp.minimum(jnp.searchsorted(ends, index, side="right", method="scan_unrolled"), rows - 1)
    offset = (index - (ends - counts)[row])[:, None] * tile + jnp.arange(tile)[None, :]
    exists = (index < ends[-1])[:, None] & (offset < q_lens[row][:, None])
    position = jnp.where(exists, (kv_lens - q_lens)[row][:, None] + offset, -1)
    return Tiles(row, cu_q_lens[row][:, None] + offset, position, ends - counts)


def _first(position: Array) -> Array:
    """The smallest position of each tile's tokens."""
    return jnp.where(position < 0, jnp.iinfo(jnp.int32).max, position).min(axis=1)


def _split_large_pages(pages: Any, page_table: Array, block: int) -> tuple[Any, Array]:
    """A page larger than a block is read as several smaller ones, where its size allows."""
    num_pages, page_size = pages.k.shape[:2]
    parts = tiles.cdiv(page_size, block)
    while page_size % parts:
        parts += 1
    if parts == 1 or pages.scales_turned:  # which are in no order to be cut in
        return pages, page_table
    table = page_table[:, :, None] * parts + jnp.arange(parts)[None, None, :]
    split = (num_pages * parts, page_size // parts)
    return jax.tree.map(lambda x: x.reshape(*split, *x.shape[2:]), pages), table.reshape(len(page_table), -1)


def _gather(pages, table, first_page, count, seen, dtype):
    """Keys and values [W,K,S,D] of `count` pages a tile from first_page [W] on, and their positions [W,S].

    What lies before seen[0] or at or past seen[1], both [W], comes back as 0, and the entries of pages that hold
    nothing else are not looked at: they may be anything.
    """
    begin, reach = seen
    page_size = pages.k.shape[1]
    index = first_page[:, None] + jnp.arange(count)[None, :]
    entry = jnp.take_along_axis(table, jnp.minimum(index, table.shape[1] - 1), axis=1)
    held = (index * page_size < reach[:, None]) & ((index + 1) * page_size > begin[:, None])
    page = jnp.where(held, entry, 0)
    position = (index[:, :, None] * page_size + jnp.arange(page_size)[None, None, :]).reshape(len(table), -1)
    valid = ((position >= begin[:, None]) & (position < reach[:, None]))[:, None, :, None]

    here = jax.tree.map(lambda x: x[page.reshape(-1)], pages).apart()

    def take(x, scale):
        x = x.reshape(*position.shape, *x.shape[2:])
        if scale is not None:
            scale = scale.reshape(*x.shape[:-1], -1)
            x = x.astype(jnp.float32) * jnp.repeat(scale.astype(jnp.float32), x.shape[-1] // scale.shape[-1], axis=-1)
        return jnp.where(valid, x.astype(dtype).transpose(0, 2, 1, 3), 0)

    return take(here.k, here.k_scale), take(here.v, here.v_scale), position


def _unpack(out: Array, lse: Array, work: Tiles, cu_q_lens: Array, num_tokens: int) -> tuple[Array, Array]:
    """Tiles [W,K,G,Q,Dv] back to packed tokens [T,H,Dv] and lse [H,T]; 0 and -inf past the last token."""
    tile = work.token.shape[1]
    token = jnp.arange(num_tokens)
    row = jnp.minimum(jnp.searchsorted(cu_q_lens[1:], token, side="right", method="scan_unrolled"), len(work.first) - 1)
    offset = token - cu_q_lens[row]
    where = jnp.minimum(work.first[row] + offset // tile, len(work.row) - 1), offset % tile
    exists = token < cu_q_lens[-1]
    out = out.transpose(0, 3, 1, 2, 4)[where].reshape(num_tokens, -1, out.shape[-1])
    lse = lse.transpose(0, 3, 1, 2)[where].reshape(num_tokens, -1)
    return jnp.where(exists[:, None, None], out, 0), jnp.where(exists[:, None], lse, -jnp.inf).T
