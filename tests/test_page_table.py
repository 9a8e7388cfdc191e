"""PageTable against a plain Python model, through random programs, contents included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paxattn import PageTable

N, P, R, M = 11, 3, 4, 5

reserve = jax.jit(PageTable.reserve, static_argnums=2)
release = jax.jit(PageTable.release)
fork = jax.jit(PageTable.fork)


class Model:
    """Rows are lists of page objects; an object that no row has any more is free."""

    def __init__(self):
        self.rows = [[] for _ in range(R)]
        self.lens = [0] * R

    def used(self):
        return len({id(page) for row in self.rows for page in row})

    def reserve(self, lens, each=M):
        ok = []
        for r, want in enumerate(lens):
            need = -(-max(want, self.lens[r]) // P) - len(self.rows[r])
            ok.append(want <= M * P and need <= min(each, N - self.used()))
            if ok[r]:
                self.rows[r] += [[None] * P for _ in range(need)]
                self.lens[r] = max(want, self.lens[r])
        return ok

    def release(self, mask):
        for r in range(R):
            if mask[r]:
                self.rows[r], self.lens[r] = [], 0

    def fork(self, src, dst):
        rows, lens, left, ok = list(self.rows), list(self.lens), N - self.used(), []
        for s, d in zip(src, dst, strict=True):
            partial = d >= 0 and s != d and lens[s] % P != 0
            ok.append(not partial or left > 0)
            if d < 0 or s == d or not ok[-1]:
                continue
            left -= partial
            row = list(rows[s])
            if partial:
                row[-1] = list(row[-1])
            self.rows[d], self.lens[d] = row, lens[s]
        return ok


class Device:
    """The table under test with an array of contents, written through it as a store would."""

    def __init__(self):
        self.table = PageTable.create(N, P, R, M)
        self.contents = np.full((N, P), -1)

    def row(self, r):
        at = np.arange(int(self.table.lens[r]))
        return [int(self.contents[np.asarray(self.table.page_table)[r, i // P], i % P]) for i in at]


lens = st.lists(st.integers(-1, M * P + 2), min_size=R, max_size=R)
OPS = st.one_of(
    st.tuples(st.just("reserve"), lens),
    st.tuples(st.just("grow"), st.lists(st.integers(0, 4), min_size=R, max_size=R)),
    st.tuples(st.just("a page each"), st.lists(st.integers(0, P + 2), min_size=R, max_size=R)),
    st.tuples(st.just("release"), st.lists(st.booleans(), min_size=R, max_size=R)),
    st.tuples(
        st.just("fork"),
        st.tuples(
            st.lists(st.integers(0, R - 1), min_size=R, max_size=R),
            st.permutations(range(R)),
            st.lists(st.booleans(), min_size=R, max_size=R),
        ),
    ),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(OPS, max_size=14))
def test_any_program_agrees_with_the_model(program):
    model, device, stamp = Model(), Device(), 0
    for name, argument in program:
        before = list(model.lens)
        if name in ("reserve", "grow"):
            want = argument if name == "reserve" else [n + a for n, a in zip(model.lens, argument, strict=True)]
            device.table, ok = reserve(device.table, jnp.asarray(want, jnp.int32))
            assert ok.tolist() == model.reserve(want)
            stamp = write(model, device, before, stamp)
        elif name == "a page each":
            want = [n + a for n, a in zip(model.lens, argument, strict=True)]
            device.table, ok = reserve(device.table, jnp.asarray(want, jnp.int32), 1)
            assert ok.tolist() == model.reserve(want, 1)
            stamp = write(model, device, before, stamp)
        elif name == "release":
            device.table = release(device.table, jnp.asarray(argument))
            model.release(argument)
        else:
            src, dst, used = argument
            dst = [d if u else -1 for d, u in zip(dst, used, strict=True)]
            device.table, copies = fork(device.table, jnp.asarray(src), jnp.asarray(dst))
            for a, b in zip(copies.src.tolist(), copies.dst.tolist(), strict=True):
                assert (a < 0) == (b < 0)
                if b >= 0:
                    device.contents[b] = device.contents[a]
            assert copies.ok.tolist() == model.fork(src, dst)
        check(model, device)


def write(model, device, before, stamp):
    """Give every new token of every row a number of its own, in both worlds."""
    table = np.asarray(device.table.page_table)
    for r in range(R):
        for i in range(before[r], model.lens[r]):
            stamp += 1
            model.rows[r][i // P][i % P] = stamp
            device.contents[table[r, i // P], i % P] = stamp
    return stamp


def check(model, device):
    table = device.table
    assert table.lens.tolist() == model.lens
    assert int(table.num_free) == N - model.used()
    pages = np.asarray(table.page_table)
    owned = [tuple(pages[r, : len(model.rows[r])].tolist()) for r in range(R)]
    counts = np.bincount([page for row in owned for page in row], minlength=N)
    assert table.owners.tolist() == counts.tolist()
    assert int(table.num_free) + int((counts > 0).sum()) == N
    free = table.free[: int(table.num_free)].tolist()
    assert sorted(free) == [page for page in range(N) if counts[page] == 0]
    for r in range(R):
        assert device.row(r) == [model.rows[r][i // P][i % P] for i in range(model.lens[r])]
        if model.lens[r] % P:
            assert counts[owned[r][-1]] == 1


def test_a_row_that_cannot_grow_changes_nothing_and_later_rows_that_fit_are_served():
    table = PageTable.create(num_pages=4, page_size=2, max_seqs=3, max_pages_per_seq=8)
    table, ok = table.reserve(jnp.asarray([2, 9, 5]))
    assert ok.tolist() == [True, False, True]
    assert table.lens.tolist() == [2, 0, 5]
    assert int(table.num_free) == 0
    after, ok = table.reserve(jnp.asarray([3, 1, 6]))
    assert ok.tolist() == [False, False, True]
    assert after.lens.tolist() == [2, 0, 6]
    np.testing.assert_array_equal(after.owners, table.owners)


def test_inside_a_while_loop_with_donation():
    table = PageTable.create(8, 2, 3, 4)

    def loop(table):
        def body(table):
            table, _ = table.reserve(table.lens + 1)
            return table

        return jax.lax.while_loop(lambda table: table.num_free > 1, body, table)

    table = jax.jit(loop, donate_argnums=0)(table)
    assert table.lens.tolist() == [5, 5, 4]


@pytest.mark.parametrize("name", ["num_pages", "page_size", "max_seqs", "max_pages_per_seq"])
@pytest.mark.usefixtures("unchecked")
def test_bad_sizes_are_named(name):
    sizes = dict(num_pages=8, page_size=2, max_seqs=3, max_pages_per_seq=4)
    for bad in (0, -1, 2.5):
        with pytest.raises(ValueError, match=f"^{name}: got {bad}"):
            PageTable.create(**{**sizes, name: bad})


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_named():
    table = PageTable.create(8, 2, 3, 4)
    for call, name in [
        (lambda: table.reserve(jnp.zeros(2, jnp.int32)), "lens"),
        (lambda: table.reserve(jnp.zeros(3)), "lens"),
        *((lambda each=each: table.reserve(jnp.zeros(3, jnp.int32), each), "each") for each in (0, -1, 1.5, "a")),
        (lambda: table.release(jnp.zeros(3, jnp.int32)), "mask"),
        (lambda: table.fork(jnp.zeros((1, 1), jnp.int32), jnp.zeros(1, jnp.int32)), "src"),
        (lambda: table.fork(jnp.zeros(2, jnp.int32), jnp.zeros(1, jnp.int32)), "dst"),
    ]:
        with pytest.raises(ValueError, match=f"^{name}: got"):
            call()


def test_a_length_that_int32_does_not_hold_is_refused():
    table = PageTable.create(8, 2, 3, 4)
    for lens in (np.array([1, 2**32 + 4, 3]), np.array([1, 3_000_000_000, 3], np.uint32)):
        table, ok = table.reserve(lens)
        assert ok.tolist() == [True, False, True]
        assert table.lens.tolist() == [1, 0, 3]
