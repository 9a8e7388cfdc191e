"""KV stores: the pages of all layers and who owns them, behind one `attend`.

A step of any model is `store, ok = store.extend(q_lens, T)`, which finds room for the step's tokens,
`out, store = store.attend(layer, q, k, v)` in each layer, and `store = store.end_step()`. The three stores that keep
anything differ only in how they allot pages to rows:

- ContiguousKV: a row is one stretch of memory of the full length.
- BlockwiseKV: a row is a fixed run of blocks; attention visits the blocks that are filled.
- PagedKV: rows take pages from a common pool as they grow, and may share them.

Their pages hold keys and values plain (bfloat16, float16, float32) or compressed (int8, float8_e4m3fn).
"""

from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array, lax

from paxattn import checks
from paxattn.flash_attention import flash_attention
from paxattn.kv.page_table import PageTable
from paxattn.kv.pages import KVPages, clear_pages, copy_pages, init_pages, lay_out, write_pages
from paxattn.paged_attention import paged_attention

_STATIC = dict(static=True)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """The packed tokens of one step. Tokens past cu_q_lens[-1] are padding.

    Fields:
      rows: i32 [T], whose token it is.
      positions: i32 [T], its place in the row.
      slots: i32 [T], page * P + offset; -1 where nothing is to be written.
      kv_lens: i32 [R], tokens of each row, this step's included.
      cu_q_lens: i32 [R+1]
      max_q_len: static; no row has more tokens in this step. None = unknown.
      wanted: i32 [W], the tokens of which anybody looks at the hidden states; None = all.
    """

    rows: Array
    positions: Array
    slots: Array
    kv_lens: Array
    cu_q_lens: Array
    max_q_len: int | None = field(metadata=_STATIC)
    wanted: Array | None = None


@dataclass(frozen=True)
class _Store:
    """What the stores share; a subclass has the fields layers, batch, implementation and allots pages."""

    layers: tuple[KVPages, ...]
    batch: Batch | None
    implementation: str | None

    @property
    def page_table(self) -> Array:
        raise NotImplementedError

    @property
    def lens(self) -> Array:
        raise NotImplementedError

    @property
    def max_seqs(self) -> int:
        return self.lens.shape[0]

    @property
    def capacity(self) -> int:
        """Tokens that one row can hold at most."""
        return self.page_table.shape[1] * self.layers[0].page_size

    def _grow(self, lens: Array, by: int | None) -> tuple[Self, Array]:
        """Room for lens [R] tokens, at most `by` more than there are, where it is known."""
        raise NotImplementedError

    def extend(self, q_lens: Array, num_tokens: int, max_q_len: int | None = None) -> tuple[Self, Array]:
        """Find room for a step of q_lens[r] new tokens in row r, packed in this order.

        Args:
          q_lens: i32 [R]; 0 where a row takes no part.
          num_tokens: T, the length of the packed arrays, at least the sum of q_lens; static.
          max_q_len: static upper bound of q_lens; 1 = pure decode.

        Returns:
          The store, and ok [R]: False where no room was left. Such a row stays as it was; its tokens
          are not written.

        Raises:
          ValueError: an argument does not fit, or a step is under way; the message names it.
        """
        self.check_at_rest()
        checks.check_ints("q_lens", q_lens, (self.max_seqs,), "R")
        checks.check_positive_int("num_tokens", num_tokens)
        if max_q_len is not None:
            checks.check_positive_int("max_q_len", max_q_len)
        q_lens = jnp.clip(checks.int32(q_lens), 0, self.capacity + 1)  # More would overflow, added to what is there.
        before = self.lens
        store, ok = self._grow(before + q_lens, max_q_len)
        batch = _lay_out(store.page_table, before, q_lens, ok, self.layers[0].page_size, num_tokens, max_q_len)
        return replace(store, batch=batch), ok

    def attend(
        self,
        layer: int,
        q: Array,
        k: Array,
        v: Array,
        *,
        scale: float | None = None,
        window: Any = None,
        softcap: float | None = None,
        sinks: Array | None = None,
    ) -> tuple[Array, Self]:
        """Write the step's k, v [T,K,D] and attend from q [T,H,D] to all that the rows hold: out [T,H,D].

        layer is an int from 0 to L - 1; the options are those of `paged_attention`.

        Raises:
          ValueError: an argument does not fit, or no step is under way; the message names it.
          NotImplementedError: the store's implementation cannot serve the call.
        """
        batch = self.batch
        if batch is None:
            raise ValueError("attend: no step is under way, call extend first")
        known = checks.is_int(layer) and 0 <= layer < len(self.layers)
        checks.require(known, "layer", repr(layer), f"an int from 0 to {len(self.layers) - 1}")
        if batch.max_q_len:  # A step of decode, in which kernels are many and small.
            q, k, v = lay_out(q, k, v, self.implementation)
        pages = write_pages(self.layers[layer], k, v, batch.slots)
        out = paged_attention(
            q,
            pages,
            self.page_table,
            batch.kv_lens,
            batch.cu_q_lens,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            max_q_len=batch.max_q_len,
            implementation=self.implementation,
        )
        layers = (*self.layers[:layer], pages, *self.layers[layer + 1 :])
        return out, replace(self, layers=layers)

    def want(self, places: Array) -> Self:
        """Say of which tokens of the step under way hidden states are looked at, as places i32 [W] among them."""
        if self.batch is None:
            raise ValueError("want: no step is under way, call extend first")
        return replace(self, batch=replace(self.batch, wanted=places))

    @property
    def wanted(self) -> Array | None:
        """What `want` was told, None = of all. Behind its last attention a model may leave all others out."""
        return None if self.batch is None else self.batch.wanted

    def end_step(self) -> Self:
        """The store at rest, the same pytree structure after a step of any size."""
        return replace(self, batch=None)

    def check_at_rest(self) -> None:
        """Raise a ValueError between `extend` and `end_step`: the batch knows where its tokens go."""
        checks.require(self.batch is None, "store", "one with a step under way", "one after end_step")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedKV(_Store):
    """Rows take pages from a common pool as they grow. A pytree.

    Fields:
      layers: L x KVPages
      table: PageTable
      batch: the step under way, None between steps
      implementation: of paged_attention, static
      window: static; no token further than this, its own included, is attended to, so that pages behind it are
        given back. None = all are kept.
      zero_on_release: static; pages are zeroed before another row can have them.
    """

    layers: tuple[KVPages, ...]
    table: PageTable
    batch: Batch | None
    implementation: str | None = field(metadata=_STATIC)
    window: int | None = field(metadata=_STATIC)
    zero_on_release: bool = field(metadata=_STATIC)

    @classmethod
    def create(
        cls,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        max_seqs: int,
        max_len: int,
        page_size: int = 16,
        num_pages: int | None = None,
        dtype: Any = jnp.bfloat16,
        implementation: str | None = None,
        window: int | None = None,
        zero_on_release: bool = False,
    ) -> "PagedKV":
        """An empty store of R = max_seqs rows of up to max_len tokens; by default every row can be full.

        Args:
          dtype: of the pages; int8 and float8_e4m3fn are compressed on write and read with a scale.
          window: the largest of the model's layers, where every layer has one.
          zero_on_release: nothing that a row wrote outlives it in memory.

        Raises:
          ValueError: a size is not a positive int, or dtype is none that `init_pages` knows; the message names it.
        """
        checks.check_bool("zero_on_release", zero_on_release)
        _check_sizes(num_layers=num_layers, max_seqs=max_seqs, max_len=max_len, page_size=page_size)
        if window is not None:
            checks.check_positive_int("window", window)
        pages_per_seq = -(-max_len // page_size)
        num_pages = max_seqs * pages_per_seq if num_pages is None else num_pages
        return cls(
            layers=_layers(num_layers, num_pages, page_size, num_kv_heads, head_dim, dtype),
            table=PageTable.create(num_pages, page_size, max_seqs, pages_per_seq),
            batch=None,
            implementation=implementation,
            window=window,
            zero_on_release=zero_on_release,
        )

    @property
    def page_table(self) -> Array:
        return self.table.page_table

    @property
    def lens(self) -> Array:
        return self.table.lens

    def attend(self, layer: int, q: Array, k: Array, v: Array, **options: Any) -> tuple[Array, Self]:
        """As every store's; a `window` of the store bounds the layer's."""
        left, _ = checks.window_bounds(options.get("window"), causal=True)
        bounded = self.window is None or (left is not None and left < self.window)
        checks.require(bounded, "window", options.get("window"), f"at most {self.window}, the store's")
        return super().attend(layer, q, k, v, **options)

    def _grow(self, lens: Array, by: int | None) -> tuple["PagedKV", Array]:
        table, ok = self.table.reserve(lens, None if by is None else -(-by // self.table.page_size))
        return replace(self, table=table), ok

    def end_step(self) -> "PagedKV":
        """The store at rest; pages behind its `window` have been given back."""
        store = replace(self, batch=None)
        if self.window is None:
            return store
        return store._given_back(self.table.release_before(self.lens - self.window + 1))

    def release(self, mask: Array) -> "PagedKV":
        """Drop the rows where mask [R] is True."""
        self.check_at_rest()
        return self._given_back(self.table.release(mask))

    def fork(self, src: Array, dst: Array) -> tuple["PagedKV", Array]:
        """Row dst[i] goes on from row src[i], sharing its full pages; ok [F] as in PageTable.fork."""
        self.check_at_rest()
        table, copies = self.table.fork(src, dst)
        layers = tuple(copy_pages(pages, copies.src, copies.dst) for pages in self.layers)
        taken = jnp.sum(copies.dst >= 0, dtype=jnp.int32)
        return replace(self, layers=layers)._given_back(table, taken), copies.ok

    def adopt(self, rows: Array, pages: Array, counts: Array) -> tuple["PagedKV", Array]:
        """Empty rows go on from full pages that are in memory; as PageTable.adopt."""
        self.check_at_rest()
        table, ok = self.table.adopt(rows, pages, counts)
        return replace(self, table=table), ok

    def hold(self, pages: Array) -> "PagedKV":
        """Keep pages beyond the life of their rows; as PageTable.hold."""
        return replace(self, table=self.table.hold(pages))

    def let_go(self, pages: Array) -> "PagedKV":
        """Undo `hold`."""
        self.check_at_rest()
        return self._given_back(self.table.let_go(pages))

    def _given_back(self, table: PageTable, taken: Array | int = 0) -> Self:
        """With a table to whose stack pages went back, after `taken` came off it."""
        if not self.zero_on_release:
            return replace(self, table=table)
        layers = _clear(self.layers, table.free, self.table.num_free - taken, table.num_free)
        return replace(self, table=table, layers=layers)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _RowsKV(_Store):
    """Row r has the pages r * M to r * M + M - 1 for good. Fields as in PagedKV, row_lens i32 [R]."""

    layers: tuple[KVPages, ...]
    row_lens: Array
    batch: Batch | None
    implementation: str | None = field(metadata=_STATIC)

    @property
    def page_table(self) -> Array:
        return jnp.arange(self.layers[0].num_pages, dtype=jnp.int32).reshape(self.max_seqs, -1)

    @property
    def lens(self) -> Array:
        return self.row_lens

    def _grow(self, lens: Array, by: int | None) -> tuple[Self, Array]:
        ok = lens <= self.capacity
        return replace(self, row_lens=jnp.where(ok, lens, self.row_lens)), ok

    def release(self, mask: Array) -> Self:
        """Empty the rows where mask [R] is True."""
        self.check_at_rest()
        checks.check_mask("mask", mask, self.max_seqs)
        return replace(self, row_lens=jnp.where(mask, 0, self.row_lens))

    @classmethod
    def _create(cls, num_layers, num_kv_heads, head_dim, max_seqs, page_size, pages_per_seq, dtype, implementation):
        return cls(
            layers=_layers(num_layers, max_seqs * pages_per_seq, page_size, num_kv_heads, head_dim, dtype),
            row_lens=jnp.zeros(max_seqs, jnp.int32),
            batch=None,
            implementation=implementation,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ContiguousKV(_RowsKV):
    """A row is one stretch of max_len tokens, reserved for good. A pytree."""

    @classmethod
    def create(
        cls,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        max_seqs: int,
        max_len: int,
        dtype: Any = jnp.bfloat16,
        implementation: str | None = None,
    ) -> "ContiguousKV":
        """An empty store of R = max_seqs rows of up to max_len tokens.

        Raises:
          ValueError: a size is not a positive int, or dtype is none that `init_pages` knows.
        """
        _check_sizes(num_layers=num_layers, max_seqs=max_seqs, max_len=max_len)
        return cls._create(num_layers, num_kv_heads, head_dim, max_seqs, max_len, 1, dtype, implementation)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockwiseKV(_RowsKV):
    """A row is a fixed run of blocks of block_size tokens, reserved for good. A pytree."""

    @classmethod
    def create(
        cls,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        max_seqs: int,
        max_len: int,
        block_size: int = 128,
        dtype: Any = jnp.bfloat16,
        implementation: str | None = None,
    ) -> "BlockwiseKV":
        """An empty store of R = max_seqs rows of up to max_len tokens, in blocks of block_size.

        Raises:
          ValueError: a size is not a positive int, or dtype is none that `init_pages` knows.
        """
        _check_sizes(num_layers=num_layers, max_seqs=max_seqs, max_len=max_len, block_size=block_size)
        blocks = -(-max_len // block_size)
        return cls._create(num_layers, num_kv_heads, head_dim, max_seqs, block_size, blocks, dtype, implementation)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Uncached:
    """Keeps nothing: a step's tokens see each other alone, through `flash_attention`. For training and scoring.

    Fields:
      segments: i32 [T], equal for the tokens of one row, in order.
      implementation: of flash_attention, static
    """

    segments: Array
    implementation: str | None = field(metadata=_STATIC, default=None)

    def attend(self, layer: int, q: Array, k: Array, v: Array, **options: Any) -> tuple[Array, "Uncached"]:
        """A step's attention, from q [T,H,D] to its own k, v [T,K,D]: out [T,H,D]; errors as of `flash_attention`."""
        del layer
        segments = self.segments[None]
        out = flash_attention(
            q[None],
            k[None],
            v[None],
            causal=True,
            q_segment_ids=segments,
            kv_segment_ids=segments,
            implementation=self.implementation,
            **options,
        )
        return out[0], self


def _check_sizes(**sizes: Any) -> None:
    for name, size in sizes.items():
        checks.check_positive_int(name, size)


def _layers(num_layers, num_pages, page_size, num_kv_heads, head_dim, dtype) -> tuple[KVPages, ...]:
    return tuple(init_pages(num_pages, page_size, num_kv_heads, head_dim, dtype) for _ in range(num_layers))


def _clear(layers: tuple[KVPages, ...], free: Array, begin: Array, end: Array) -> tuple[KVPages, ...]:
    """Zero the pages free[begin:end], some at a time, so that the cost is theirs and not the pool's."""
    some = jnp.arange(64, dtype=jnp.int32)

    def body(carry):
        at, layers = carry
        ids = jnp.where(at + some < end, free[jnp.minimum(at + some, len(free) - 1)], -1)
        return at + len(some), tuple(clear_pages(pages, ids) for pages in layers)

    return lax.while_loop(lambda carry: carry[0] < end, body, (begin, layers))[1]


def _lay_out(page_table, before, q_lens, ok, page_size, num_tokens, max_q_len) -> Batch:
    """Where the packed tokens of rows that held `before` tokens belong."""
    cu_q_lens = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(q_lens, dtype=jnp.int32)])
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    # Unrolled it is one kernel on a GPU, as a loop a few for every round.
    rows = jnp.searchsorted(cu_q_lens[1:], token, side="right", method="scan_unrolled")
    rows = jnp.minimum(rows, len(before) - 1).astype(jnp.int32)
    written = (token < cu_q_lens[-1]) & ok[rows]
    positions = jnp.where(written, before[rows] + token - cu_q_lens[rows], 0)
    page = page_table[rows, positions // page_size]
    slots = jnp.where(written, page * page_size + positions % page_size, -1)
    kv_lens = before + jnp.where(ok, q_lens, 0)
    return Batch(rows, positions, slots, kv_lens, cu_q_lens, max_q_len)
