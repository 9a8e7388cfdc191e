"""PrefixIndex against a plain model that knows every prefix by its tokens, through random programs."""

from collections import Counter
from time import perf_counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paxattn.kv.prefix import Lease, PrefixIndex

P = 2
SALTS = ("", "a", b"a")


class Model:
    """Pages by (salt, all tokens up to their end); whatever is asked is found by looking at all of them."""

    def __init__(self):
        self.pages, self.released, self.leases, self.clock = {}, {}, {}, 0

    @staticmethod
    def prefixes(tokens, salt, count):
        return [(salt, tuple(tokens[: (i + 1) * P])) for i in range(count)]

    def covered(self):
        return {prefix for prefixes in self.leases.values() for prefix in prefixes}

    def match(self, row, tokens, salt):
        prefixes = self.prefixes(tokens, salt, max(len(tokens) - 1, 0) // P)
        known = max(n for n in range(len(prefixes) + 1) if all(p in self.pages for p in prefixes[:n]))
        self.leases[row] = prefixes[:known]
        return [self.pages[p] for p in prefixes[:known]]

    def insert(self, row, tokens, salt, pages):
        prefixes = self.prefixes(tokens, salt, len(tokens) // P)
        taken = [page for p, page in zip(prefixes, pages, strict=False) if p not in self.pages]
        for p, page in zip(prefixes, pages, strict=False):
            self.pages.setdefault(p, page)
        own = [n for n, p in enumerate(prefixes, 1) if self.pages[p] == pages[n - 1]]
        self.leases[row] = prefixes[: max([len(self.leases[row]), *own])]
        return taken

    def release(self, row):
        self.clock += 1
        self.released |= dict.fromkeys(self.leases.pop(row), self.clock)

    def evict(self, count):
        given_up = []
        while len(given_up) < count:
            parents = {(salt, tokens[:-P]) for salt, tokens in self.pages}
            ends = self.pages.keys() - parents - self.covered()
            if not ends:
                break
            given_up.append(self.pages.pop(min(ends, key=self.released.__getitem__)))
        return given_up


class Pool:
    """Pages as the device counts them: one owner for each row and one for the index."""

    def __init__(self):
        self.owners, self.free, self.fresh = Counter(), [], 0

    def take(self, count):
        while len(self.free) < count:
            self.free.append(self.fresh)
            self.fresh += 1
        taken = [self.free.pop() for _ in range(count)]
        self.own(taken)
        return taken

    def own(self, pages):
        self.owners.update(pages)

    def let_go(self, pages):
        self.owners.subtract(pages)
        freed = [page for page in pages if self.owners[page] == 0]
        self.free += freed
        return freed


TOKENS = st.lists(st.integers(0, 1), max_size=9)
NUMBER = st.integers(0, 9)
OPS = st.one_of(
    st.tuples(st.just("start"), TOKENS, st.sampled_from(SALTS)),
    st.tuples(st.just("insert"), NUMBER, TOKENS),
    st.tuples(st.just("insert"), NUMBER, st.just([])),
    st.tuples(st.just("end"), NUMBER, st.none()),
    st.tuples(st.just("evict"), st.integers(0, 5), st.none()),
)


@settings(max_examples=500, deadline=None)
@given(st.lists(OPS, max_size=30))
def test_any_program_agrees_with_the_model(program):
    index, model, pool, rows = PrefixIndex(P), Model(), Pool(), {}
    for number, (name, first, second) in enumerate(program):
        row = list(rows)[first % len(rows)] if name in ("insert", "end") and rows else None
        if name == "start":
            lease = index.match(first, second)
            assert list(lease.pages) == model.match(number, first, second)
            pool.own(lease.pages)
            rows[number] = lease, first, second, list(lease.pages)
        elif name == "evict":
            out = index.evict(first)
            assert out == model.evict(first)
            assert pool.let_go(out) == out, "a page was given up that a row still owns"
        elif name == "insert" and row is not None:
            lease, tokens, salt, pages = rows[row]
            tokens = tokens + second
            pages += pool.take(-(-len(tokens) // P) - len(pages))
            taken = index.insert(lease, tokens, pages)
            assert taken == model.insert(row, tokens, salt, pages)
            assert index.insert(lease, tokens, pages) == [], "known already"
            pool.own(taken)
            rows[row] = lease, tokens, salt, pages
        elif name == "end" and row is not None:
            lease, _, _, pages = rows.pop(row)
            index.release(lease)
            model.release(row)
            pool.let_go(pages)
        check(index, model, pool, rows)
    for lease, *_ in rows.values():
        index.release(lease)
    assert len(index.evict(pool.fresh)) == len(model.pages)
    assert len(index) == index.cached == 0


def check(index, model, pool, rows):
    assert len(index) == len(model.pages)
    assert index.cached == len(model.pages.keys() - model.covered())
    assert all(p[1][:-P] == () or (p[0], p[1][:-P]) in model.pages for p in model.pages), "a chain with a hole"
    owned = Counter(page for *_, pages in rows.values() for page in pages) + Counter(model.pages.values())
    assert +pool.owners == owned
    cached = {page for p, page in model.pages.items() if p not in model.covered()}
    assert not cached & {page for *_, pages in rows.values() for page in pages}


def serve(index, tokens, pages, salt=""):
    """A row that comes, makes its pages known, and goes."""
    lease = index.match(tokens, salt)
    taken = index.insert(lease, tokens, pages)
    index.release(lease)
    return taken


def found(index, tokens, salt=""):
    lease = index.match(tokens, salt)
    index.release(lease)
    return list(lease.pages)


def test_a_token_is_left_to_compute():
    index, tokens = PrefixIndex(4), np.arange(12)
    assert serve(index, tokens, [5, 6, 7]) == [5, 6, 7]
    assert [len(found(index, tokens[:n])) for n in range(13)] == [0] * 5 + [1] * 4 + [2] * 4
    assert found(index, [*tokens, 99]) == [5, 6, 7]


def test_less_than_a_page_is_never_known():
    index = PrefixIndex(4)
    assert serve(index, [1, 2, 3], [8]) == serve(index, [], []) == []
    assert (len(index), index.cached, index.evict(3)) == (0, 0, [])


def test_the_last_partly_filled_page_and_pages_behind_it_are_not_taken():
    index = PrefixIndex(2)
    assert serve(index, [1, 2, 3, 4, 5], [3, 1, 4, -1, -1]) == [3, 1]


@pytest.mark.parametrize("dtype", ["uint8", "int16", ">i4", "<i4", "int64", "uint64"])
def test_all_integer_dtypes_are_the_same_tokens(dtype):
    index, tokens = PrefixIndex(2), [1, 2, 3, 4, 5]
    serve(index, tokens, [0, 1])
    assert found(index, np.array(tokens, dtype)) == [0, 1]
    assert found(index, np.repeat(np.array(tokens, dtype), 2)[::2]) == [0, 1]
    assert found(index, tuple(tokens)) == [0, 1]


def test_a_page_is_found_only_behind_the_pages_it_was_computed_behind():
    index = PrefixIndex(2)
    serve(index, [1, 2, 3, 4], [0, 1])
    assert found(index, [3, 4, 5]) == found(index, [2, 1, 3, 4, 5]) == []
    assert found(index, [1, 2, 5, 6, 7]) == [0]


def test_tenants_are_kept_apart():
    index, tokens = PrefixIndex(2), [1, 2, 3]
    tenants = ["", "a", b"a", "ab", b"", b"\x00", "\udc80"]
    assert [serve(index, tokens, [page], salt) for page, salt in enumerate(tenants)] == [[n] for n in range(7)]
    assert [found(index, tokens, salt) for salt in tenants] == [[n] for n in range(7)]


def test_a_salt_cannot_pass_for_the_content_of_a_page():
    index = PrefixIndex(1)
    serve(index, [7, 8], [0, 1], "victim")
    forged = index.match([], "victim").root + np.array([7], "<i8").tobytes()
    assert found(index, [8, 9], forged) == []


def test_matching_makes_recent_and_long_prefixes_go_from_their_end():
    index = PrefixIndex(2)
    serve(index, [1, 1, 2, 2, 3, 3], [0, 1, 2])
    serve(index, [1, 1, 4, 4], [0, 3])
    serve(index, [5, 5], [4])
    assert found(index, [1, 1, 2, 2, 9]) == [0, 1]
    assert index.cached == 5
    assert [index.evict(1) for _ in range(6)] == [[2], [3], [4], [1], [0], []]


def test_pages_under_lease_stay():
    index, tokens = PrefixIndex(2), [1, 2, 3, 4, 5]
    first = index.match(tokens)
    index.insert(first, tokens, [7, 8])
    second = index.match(tokens[:4])
    assert (second.pages, index.cached, index.evict(9)) == ((7,), 0, [])
    index.release(first)
    assert (index.cached, index.evict(9)) == (1, [8])
    index.release(second)
    assert index.evict(9) == [7]


def test_content_that_two_rows_computed_is_known_once():
    index = PrefixIndex(2)
    first, second = index.match([1, 2, 3]), index.match([1, 2, 3])
    assert index.insert(first, [1, 2, 3], [0]) == [0]
    assert index.insert(second, [1, 2, 3], [1]) == []
    index.release(first)
    assert index.cached == 1, "the second row uses its own page"
    assert index.insert(second, [1, 2, 3, 4], [1, 2]) == [2]
    assert index.cached == 0, "the second row's next page stands behind it"
    index.release(second)
    assert index.evict(2) == [2, 0]


@pytest.mark.parametrize(
    "tokens",
    [[1, -2], [1.0, 2.0], [[1, 2]], 3, "12", [None], [True, False], np.array([2**63], "uint64"), [2**70]],
    ids=repr,
)
def test_tokens_that_are_no_ids_are_refused(tokens):
    index = PrefixIndex(2)
    with pytest.raises(ValueError, match=r"^tokens: got .*, must be "):
        index.match(tokens)
    with pytest.raises(ValueError, match=r"^tokens: got .*, must be "):
        index.insert(index.match([]), tokens, [0, 1])


@pytest.mark.parametrize("pages", [[], [0], [0, -1], [0.0, 1.0], [[0, 1]], 1, [3, 3], [9, 3]], ids=repr)
def test_pages_that_cannot_be_the_rows_are_refused(pages):
    index = PrefixIndex(2)
    serve(index, [8, 8], [9])
    lease = index.match([])
    with pytest.raises(ValueError, match=r"^pages: got .*, must be "):
        index.insert(lease, [1, 2, 3, 4], pages)
    assert (len(index), index.cached) == (1, 1)
    assert index.insert(lease, [1, 2, 3, 4], [3, 4]) == [3, 4]


def test_other_bad_arguments_are_named():
    for size in (0, -1, 2.0, True, None):
        with pytest.raises(ValueError, match=r"^page_size: got .*, must be a positive int"):
            PrefixIndex(size)
    index = PrefixIndex(2)
    for count in (-1, 1.0, None):
        with pytest.raises(ValueError, match=r"^count: got .*, must be an int >= 0"):
            index.evict(count)
    for salt in (None, 3, ("a",)):
        with pytest.raises(ValueError, match=r"^salt: got .*, must be a str or bytes"):
            index.match([1], salt)


def test_a_lease_is_released_once_and_holds_one_prompt():
    index = PrefixIndex(2)
    lease = index.match([1, 2, 3, 4])
    index.insert(lease, [1, 2, 3, 4], [0, 1])
    for tokens in ([1, 2, 3], [2, 1, 3, 4, 5, 6], []):
        with pytest.raises(ValueError, match=r"^tokens: got .*, must be "):
            index.insert(lease, tokens, [5, 6, 7])
    index.release(lease)
    assert (len(index), index.cached) == (2, 2)
    for stranger in (lease, PrefixIndex(2).match([]), Lease((0, 1), b""), [0, 1]):
        with pytest.raises(ValueError, match=r"^lease: got .*, must be "):
            index.release(stranger)
        with pytest.raises(ValueError, match=r"^lease: got .*, must be "):
            index.insert(stranger, [1, 2], [0])


def test_no_operation_looks_at_all_pages(rng):
    index, size, prompts = PrefixIndex(16), 1000, 100
    tokens = rng.integers(0, 200_000, (prompts, size * 16 + 1))
    pages = rng.permutation(size * prompts).reshape(prompts, size)
    began = perf_counter()
    for row in range(prompts):
        serve(index, tokens[row], pages[row])
    assert all(found(index, tokens[row]) == pages[row].tolist() for row in reversed(range(prompts)))
    out = [index.evict(1)[0] for _ in range(size * prompts)]
    assert perf_counter() - began < 10, "a scan over all pages at each eviction would take minutes"
    assert out == pages[::-1, ::-1].ravel().tolist()
