"""PagedKV, PrefixIndex and swapping together against a plain Python model, through random programs.

What a token writes names its tenant and all tokens up to it, so that what a row reads back tells whose page it was.
Pages that nobody owns are filled with NaN before each operation.
"""

from dataclasses import dataclass, replace
from itertools import takewhile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paxattn import PagedKV, PrefixIndex, swap_in, swap_out
from paxattn.kv.pages import write_pages
from paxattn.kv.prefix import Lease

L, K, D, N, P, R, M = 2, 1, 2, 9, 3, 4, 5
T = 16  # tokens of a step
SHAPE = (L, 2, K, D)  # what a token writes: keys and values in all layers
WINDOW = 8

release = jax.jit(PagedKV.release)
fork = jax.jit(PagedKV.fork)
adopt = jax.jit(PagedKV.adopt)
hold = jax.jit(PagedKV.hold)
let_go = jax.jit(PagedKV.let_go)


@jax.jit
def grow(store, q_lens, contents):
    """A step as a model makes it, without the attention."""
    store, ok = store.extend(q_lens, len(contents))
    layers = tuple(
        write_pages(pages, contents[:, layer, 0], contents[:, layer, 1], store.batch.slots)
        for layer, pages in enumerate(store.layers)
    )
    return replace(store, layers=layers).end_step(), ok


@jax.jit
def poison(store):
    """NaN in all pages that nobody owns."""
    free = (store.table.owners == 0)[:, None, None, None]
    return replace(store, layers=jax.tree.map(lambda x: jnp.where(free, jnp.nan, x), store.layers))


def encode(stamps):
    """f32 [S, *SHAPE]: numbers that no other stamp has, each a different one."""
    size = np.prod(SHAPE)
    numbers = np.asarray(stamps, np.int64)[:, None] * size + np.arange(size)
    return numbers.reshape(-1, *SHAPE).astype(np.float32)


def padded(values, size):
    return np.asarray([*values, *[-1] * (size - len(values))], np.int32)


@dataclass
class Row:
    """Tokens of one tenant. `pages` are the model's, those that the window left behind included."""

    salt: str = ""
    tokens: tuple[int, ...] = ()
    pages: tuple[int, ...] = ()
    dropped: int = 0
    lease: Lease | None = None
    covered: int = 0  # pages that the lease protects from eviction

    @property
    def kept(self):
        return self.pages[self.dropped :]

    def prefixes(self):
        return [(self.salt, self.tokens[:end]) for end in range(P, len(self.tokens) + 1, P)]


class Model:
    """Rows, and the pages that the index knows by all that their tokens continue. A page is a number, never reused."""

    def __init__(self, window):
        self.window = window
        self.rows = [Row() for _ in range(R)]
        self.known = {}
        self.pages = 0

    def owned(self):
        """Every page as often as it has owners."""
        return [page for row in self.rows for page in row.kept] + list(self.known.values())

    def num_free(self):
        return N - len(set(self.owned()))

    def fresh(self, count):
        self.pages += count
        return tuple(range(self.pages - count, self.pages))

    def grow(self, tokens):
        ok = []
        for row, new in zip(self.rows, tokens, strict=True):
            length = len(row.tokens) + len(new)
            need = -(-length // P) - len(row.pages)
            ok.append(length <= M * P and need <= self.num_free())
            if ok[-1]:
                row.tokens += new
                row.pages += self.fresh(need)
        for row in self.rows:
            if self.window is not None:
                row.dropped = max(row.dropped, (len(row.tokens) - self.window + 1) // P)
        return ok

    def fork(self, src, dst):
        """As PagedKV.fork, and the rows that were overwritten."""
        before, left, ok, gone = list(self.rows), self.num_free(), [], []
        for s, d in zip(src, dst, strict=True):
            moves = d >= 0 and s != d
            partial = moves and len(before[s].tokens) % P != 0
            ok.append(not partial or left > 0)
            if not moves or not ok[-1]:
                continue
            left -= partial
            pages = before[s].pages
            self.rows[d] = replace(before[s], lease=None, covered=0)
            self.rows[d].pages = pages[:-1] + self.fresh(1) if partial else pages
            gone.append(before[d])
        return ok, gone

    def match(self, tokens, salt):
        prefixes = Row(salt, tokens).prefixes()[: (len(tokens) - 1) // P]
        return tuple(self.known[prefix] for prefix in takewhile(self.known.__contains__, prefixes))

    def insert(self, row):
        """The pages that the index takes from the row."""
        full = list(zip(row.prefixes(), row.pages, strict=False))
        taken = [page for prefix, page in full if prefix not in self.known]
        self.known = dict(full) | self.known
        own = [n for n, (prefix, page) in enumerate(full, 1) if self.known[prefix] == page]
        row.covered = max([row.covered, *own])
        return taken

    def first(self, start, empty):
        """The first row from `start` on, all around, that is empty or not; None where there is none."""
        around = [(start + r) % R for r in range(R)]
        return next((r for r in around if (not self.rows[r].tokens) == empty), None)


class Pair:
    """The library and the model, driven together and compared after every operation."""

    def __init__(self, window, zero_on_release):
        self.store = PagedKV.create(
            L,
            K,
            D,
            max_seqs=R,
            max_len=M * P,
            page_size=P,
            num_pages=N,
            dtype=jnp.float32,
            window=window,
            zero_on_release=zero_on_release,
        )
        self.index = PrefixIndex(P)
        self.model = Model(window)
        self.away = []  # (SwappedRow, Row)
        self.place = {}  # the model's page: the store's
        self.stamps = {}
        self.unique = 1000
        self.check()

    def run(self, program):
        for name, *arguments in program:
            getattr(self, name)(*arguments)
        self.end()

    def grow(self, q_lens):
        self.step([tuple(self.next_token() for _ in range(n)) for n in q_lens])

    def step(self, tokens):
        """Rows grow by these tokens, as far as they fit."""
        q_lens = [len(new) for new in tokens]
        # One token alone is written in another way (pages._put).
        contents = np.zeros((1 if sum(q_lens) <= 1 else T, *SHAPE), np.float32)
        contents[: sum(q_lens)] = encode(
            [
                stamp
                for row, new in zip(self.model.rows, tokens, strict=True)
                for stamp in self.stamped(row.salt, row.tokens + new)[len(row.tokens) :]
            ]
        )
        self.store, ok = grow(self.store, np.asarray(q_lens, np.int32), contents)
        expected = self.model.grow(tokens)
        assert ok.tolist() == expected
        self.check()
        return expected

    def release(self, mask):
        self.store = release(self.store, np.asarray(mask))
        for r in np.flatnonzero(mask):
            self.end_lease(self.model.rows[r])
            self.model.rows[r] = Row()
        self.check()

    def fork(self, src, dst, used):
        pairs = [(s, d) for s, d, u in zip(src, dst, used, strict=True) if u]
        if len(pairs) != 1:  # which is copied in another way (pages._put)
            pairs = [(s, d if u else -1) for s, d, u in zip(src, dst, used, strict=True)]
        src, dst = np.asarray(pairs, np.int32).T
        self.store, ok = fork(self.store, src, dst)
        expected, gone = self.model.fork(src.tolist(), dst.tolist())
        assert ok.tolist() == expected
        for row in gone:
            self.end_lease(row)
        self.check()

    def admit(self, tokens, salt, start):
        """A prompt begins with the pages that are known, writes the rest and makes it known."""
        lease = self.index.match(tokens, salt)
        hits = self.model.match(tokens, salt)
        assert list(lease.pages) == [self.place[page] for page in hits]
        at = self.model.first(start, empty=True)
        row = start if at is None else at
        pages = padded(lease.pages, M)[None]
        self.store, ok = adopt(self.store, np.asarray([row], np.int32), pages, np.asarray([len(hits)], np.int32))
        assert ok.tolist() == [at is not None]
        if at is None:
            self.index.release(lease)
            return self.check()
        self.model.rows[at] = Row(salt, tokens[: len(hits) * P], hits, lease=lease, covered=len(hits))
        self.check()
        rest = [tokens[len(hits) * P :] if r == at else () for r in range(R)]
        if self.step(rest)[at]:
            return self.publish(at)
        return self.release([r == at for r in range(R)])

    def publish(self, r):
        """A row's full pages become known, those that it has decoded included."""
        row = self.model.rows[r]
        if row.lease is None or row.dropped:
            return
        pages = [self.place[page] for page in row.pages]
        taken = self.index.insert(row.lease, row.tokens, pages)
        assert taken == [self.place[page] for page in self.model.insert(row)]
        self.store = hold(self.store, padded(taken, M))
        self.check()

    def evict(self, count):
        known = self.model.known
        rows = [*self.model.rows, *(row for _, row in self.away)]
        covered = {prefix for row in rows for prefix in row.prefixes()[: row.covered]}
        idle = {self.place[known[prefix]]: prefix for prefix in known.keys() - covered}
        pages = self.index.evict(count)
        assert len(pages) == min(count, len(idle))
        assert idle.keys() >= set(pages), "a page that a lease protects"
        for page in pages:
            del known[idle[page]]
        self.store = let_go(self.store, padded(pages, N))
        self.check()

    def swap_out(self, start):
        at = self.model.first(start, empty=False)
        if at is None:
            return
        row = self.model.rows[at]
        self.store, swapped = swap_out(self.store, at)
        assert (swapped.length, swapped.dropped) == (len(row.tokens), row.dropped)
        self.away.append((swapped, row))
        self.model.rows[at] = Row()
        self.check()

    def swap_in(self, number, start, again):
        """A row comes back where it fits; with `again` it can come back a second time."""
        at = self.model.first(start, empty=True)
        if at is None or not self.away:
            return
        swapped, row = self.away[number % len(self.away)]
        need, left = len(row.kept), self.model.num_free()
        self.store, ok = swap_in(self.store, swapped, at)
        assert ok == (need <= left)
        if ok:
            self.model.rows[at] = replace(row, pages=row.pages[: row.dropped] + self.model.fresh(need))
            row.lease, row.covered = None, 0
        if ok and not again:
            self.away.pop(number % len(self.away))
        self.check()

    def end(self):
        """When all rows have ended and all is evicted, no page is lost."""
        self.release([True] * R)
        for _, row in self.away:
            self.end_lease(row)
        self.away.clear()
        self.evict(N)
        assert (len(self.index), self.model.num_free()) == (0, N)

    def end_lease(self, row):
        if row.lease is not None:
            self.index.release(row.lease)

    def next_token(self):
        self.unique += 1
        return self.unique

    def stamped(self, salt, tokens):
        """For each token a number that stands for the salt and all tokens up to this one."""
        prefixes = [(salt, tokens[: i + 1]) for i in range(len(tokens))]
        return [self.stamps.setdefault(prefix, len(self.stamps) + 1) for prefix in prefixes]

    def check(self):
        if not self.store.zero_on_release:
            self.store = poison(self.store)
        layers, table = jax.device_get((self.store.layers, self.store.table))
        contents = np.stack([x for pages in layers for x in (pages.k, pages.v)], axis=2)
        self.check_rows(table, contents.reshape(N * P, *SHAPE))
        self.check_owners(table)
        if self.store.zero_on_release:
            assert not contents[table.owners == 0].any()

    def check_rows(self, table, contents):
        for r, row in enumerate(self.model.rows):
            assert (table.lens[r], table.dropped[r]) == (len(row.tokens), row.dropped)
            for page, at in zip(row.kept, table.page_table[r, row.dropped :].tolist(), strict=False):
                assert self.place.setdefault(page, at) == at, "a page has moved"
            positions = np.arange(row.dropped * P, len(row.tokens))
            slots = table.page_table[r, positions // P] * P + positions % P
            expected = encode(self.stamped(row.salt, row.tokens)[row.dropped * P :])
            np.testing.assert_array_equal(contents[slots], expected)
            if len(row.tokens) % P:
                assert table.owners[table.page_table[r, len(row.pages) - 1]] == 1, "two would write it"

    def check_owners(self, table):
        owned = self.model.owned()
        pages = [self.place[page] for page in owned]
        assert len(set(pages)) == len(set(owned)), "two of the model's pages in one"
        assert table.owners.tolist() == np.bincount(pages, minlength=N).tolist()
        of_rows = {self.place[page] for row in self.model.rows for page in row.kept}
        cached = {self.place[page] for page in self.model.known.values()} - of_rows
        assert table.num_free + len(of_rows) + len(cached) == N
        assert sorted(table.free[: table.num_free].tolist()) == sorted(set(range(N)) - set(pages))


def of_each_row(strategy):
    return st.lists(strategy, min_size=R, max_size=R)


def prompt(size, other):
    """Prompts that differ in one token at most, so that they often begin alike."""
    return tuple(int(i == other) for i in range(size))


ROW = st.integers(0, R - 1)
PROMPT = st.builds(prompt, st.integers(1, T), st.sampled_from([T, 10, 7, 4, 1]))
ARGUMENTS = {
    "grow": (of_each_row(st.integers(0, T // R)),),
    "release": (of_each_row(st.booleans()),),
    "fork": (of_each_row(ROW), st.permutations(range(R)), of_each_row(st.booleans())),
    "admit": (PROMPT, st.sampled_from("aab"), ROW),
    "publish": (ROW,),
    "evict": (st.integers(1, 6),),
    "swap_out": (ROW,),
    "swap_in": (ROW, ROW, st.booleans()),
}
# Those more often without which others have nothing to do.
NAMES = [*ARGUMENTS, "grow", *["admit"] * 4, *["release"] * 2, "evict", "swap_out", "swap_in"]
OPS = st.sampled_from(NAMES).flatmap(lambda name: st.tuples(st.just(name), *ARGUMENTS[name]))
PROGRAMS = st.lists(OPS, min_size=10, max_size=14)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, WINDOW])
@settings(max_examples=1000, deadline=None)
@given(program=PROGRAMS)
def test_any_program_agrees_with_the_model(window, program):
    Pair(window, zero_on_release=False).run(program)


@settings(max_examples=200, deadline=None)
@given(program=PROGRAMS)
def test_with_zero_on_release_pages_that_nobody_owns_are_zero(program):
    Pair(WINDOW, zero_on_release=True).run(program)
