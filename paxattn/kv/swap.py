"""Rows to host memory and back, so that a scheduler can preempt a sequence without computing it again."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from paxattn import checks
from paxattn.kv.pages import KVPages, put_pages, take_pages
from paxattn.kv.stores import PagedKV


@dataclass(frozen=True)
class SwappedRow:
    """One row's pages in host memory, pinned where the backend has that.

    Fields:
      layers: L x KVPages of C pages, the row's and then zeros up to a power of two.
      length: tokens of the row, those on dropped pages included.
      dropped: pages that a sliding window had given back.
      window: the store's.
    """

    layers: tuple[KVPages, ...]
    length: int
    dropped: int
    window: int | None


def swap_out(store: PagedKV, row: int) -> tuple[PagedKV, SwappedRow]:
    """Move a row to host memory: the store without it, and what `swap_in` takes. The store is consumed (donated).

    Pages that others own, too, stay for them. It waits for the device.

    Raises:
      ValueError: there is no such row, or a step is under way.
    """
    _check(store, row)
    length, dropped = _on_host(store.table.lens, row), _on_host(store.table.dropped, row)
    count = -(-length // store.table.page_size) - dropped
    layers = _take(store.layers, store.table.page_table, row, dropped, count, _bucket(count))
    host = jax.block_until_ready(jax.tree.map(_to_host, layers))
    return _release(store, row), SwappedRow(host, length, dropped, store.window)


def swap_in(store: PagedKV, swapped: SwappedRow, row: int) -> tuple[PagedKV, bool]:
    """Bring a row back bit for bit, as any row that is empty: the store (the old one is consumed), and whether it fit.

    Where too few pages are free, nothing changes. `swapped` stays valid.

    Raises:
      ValueError: there is no such row or it is not empty, a step is under way, or swapped is another store's.
    """
    _check(store, row)
    checks.require(_on_host(store.table.lens, row) == 0, "row", f"{row}, which holds tokens", "an empty row")
    _check_kind(store, swapped)
    layers = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), swapped.layers, store.layers)
    store, ok = _put(store, layers, row, swapped.length, swapped.dropped)
    return store, bool(jax.device_get(ok))


def _check(store: PagedKV, row: int) -> None:
    checks.require(isinstance(store, PagedKV), "store", type(store).__name__, "a PagedKV")
    store.check_at_rest()
    known = checks.is_int(row) and 0 <= row < store.max_seqs
    checks.require(known, "row", repr(row), f"an int from 0 to {store.max_seqs - 1}")


def _check_kind(store: PagedKV, swapped: SwappedRow) -> None:
    def kind(layers):
        return jax.tree.map(lambda x: (x.shape[1:], x.dtype.name), layers, is_leaf=lambda x: hasattr(x, "dtype"))

    checks.require(isinstance(swapped, SwappedRow), "swapped", type(swapped).__name__, "a SwappedRow")
    checks.require(kind(swapped.layers) == kind(store.layers), "swapped", "pages of another kind", "the store's own")
    there = swapped.dropped == 0 or (store.window or store.capacity) <= (swapped.window or 0)
    checks.require(there, "swapped", f"a row without what lies behind {swapped.window}", "of a window as large")


def _bucket(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


def _on_host(x: Array, row: int) -> int:
    """x[row]; indexed on the host, as on the device every row would compile a program of its own."""
    return int(jax.device_get(x)[row])


def _to_host(x: Array) -> Array:
    kinds = {memory.kind for memory in next(iter(x.devices())).addressable_memories()}
    return jax.device_put(x, x.sharding.with_memory_kind("pinned_host")) if "pinned_host" in kinds else x


@partial(jax.jit, static_argnames="width")
def _take(layers, page_table, row, dropped, count, width):
    return tuple(take_pages(layer, _ids(page_table[row], dropped, count, width)) for layer in layers)


@partial(jax.jit, donate_argnames="store")
def _release(store, row):
    return store.release(jnp.arange(store.max_seqs) == row)


@partial(jax.jit, donate_argnames="store")
def _put(store, layers, row, length, dropped):
    table = store.table
    here = jnp.arange(store.max_seqs) == row
    # A row that begins behind its dropped pages owns none yet, and grows from there to its length.
    begun = replace(
        table,
        lens=jnp.where(here, dropped * table.page_size, table.lens),
        dropped=jnp.where(here, dropped, table.dropped),
    )
    grown, ok = begun.reserve(jnp.where(here, length, 0))
    table = jax.tree.map(lambda new, old: jnp.where(ok[row], new, old), grown, table)
    count = jnp.where(ok[row], -(-length // table.page_size) - dropped, 0)
    ids = _ids(table.page_table[row], dropped, count, layers[0].num_pages)
    pages = tuple(put_pages(into, ids, layer) for into, layer in zip(store.layers, layers, strict=True))
    return replace(store, table=table, layers=pages), ok[row]


def _ids(pages: Array, dropped: Array, count: Array, width: int) -> Array:
    """i32 [width]: the `count` pages of a row [M] behind its dropped ones, then -1."""
    index = jnp.arange(width)
    return jnp.where(index < count, pages[jnp.minimum(dropped + index, len(pages) - 1)], -1)
