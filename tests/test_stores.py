"""Pages and the three stores behind one attend."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import STORES, TINY

from paxattn import KVPages, PagedKV, Sampling, copy_pages, flash_attention, init_pages, write_pages
from paxattn.engine import generate as engine


def test_write_pages_puts_tokens_where_slots_say_and_skips_negative_ones(rng):
    pages = init_pages(5, 4, 2, 3, jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(6, 2, 3)), jnp.float32) for _ in range(2))
    slots = np.array([7, -1, 0, 19, -5, 8])
    written = jax.jit(write_pages)(pages, k, v, jnp.asarray(slots))
    for x, new in ((written.k, k), (written.v, v)):
        want = np.zeros((20, 2, 3), np.float32)
        want[slots[slots >= 0]] = np.asarray(new)[slots >= 0]
        np.testing.assert_array_equal(x.reshape(20, 2, 3), want)


def test_write_pages_casts_to_the_pages_dtype():
    pages = write_pages(init_pages(2, 4, 1, 2), jnp.ones((1, 1, 2)), jnp.ones((1, 1, 2)), jnp.asarray([3]))
    assert pages.k.dtype == jnp.bfloat16
    assert float(pages.k[0, 3, 0, 0]) == 1.0


def test_copy_pages_reads_every_source_before_it_writes(rng):
    x = jnp.asarray(rng.normal(size=(4, 2, 1, 3)), jnp.float32)
    copied = copy_pages(KVPages(x, 2 * x), jnp.asarray([0, 1, -1]), jnp.asarray([1, 2, -1]))
    np.testing.assert_array_equal(copied.k, x[jnp.asarray([0, 0, 1, 3])])
    np.testing.assert_array_equal(copied.v, 2 * copied.k)


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_of_pages_are_named():
    pages, x = init_pages(2, 4, 1, 2), jnp.ones((3, 1, 2))
    slots = jnp.arange(3)
    for call, name in [
        (lambda: init_pages(0, 4, 1, 2), "num_pages"),
        (lambda: init_pages(2, 4, 1, 2, jnp.int4), "dtype"),
        (lambda: init_pages(2, 4, 1, 2, "foo"), "dtype"),
        (lambda: write_pages(None, x, x, slots), "pages"),
        (lambda: write_pages(KVPages(pages.k, pages.v[:1]), x, x, slots), "pages"),
        (lambda: write_pages(KVPages(*(x.astype(jnp.int8) for x in (pages.k, pages.v))), x, x, slots), "pages"),
        (lambda: write_pages(pages, x[0], x, slots), "k"),
        (lambda: write_pages(pages, jnp.ones((3, 2, 2)), x, slots), "k"),
        (lambda: write_pages(pages, x, x[:2], slots), "v"),
        (lambda: write_pages(pages, x.astype(jnp.complex64), x, slots), "k"),
        (lambda: write_pages(pages, x, x > 0, slots), "v"),
        (lambda: write_pages(pages, x, x, slots[:2]), "slots"),
        (lambda: write_pages(pages, x, x, slots.astype(jnp.float32)), "slots"),
        (lambda: copy_pages(pages, slots, slots[:1]), "dst"),
        (lambda: copy_pages(None, slots, slots), "pages"),
    ]:
        with pytest.raises(ValueError, match=f"^{name}: got"):
            call()


@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_arrays_of_numpy_are_written_and_a_slot_beyond_int32_is_none(dtype, tokens, rng):
    pages = init_pages(5, 4, 2, 16, dtype)
    k, v = rng.normal(size=(2, tokens, 2, 16)).astype(np.float32)
    slots = np.array([2**32 + 1, 7, 2])[:tokens]
    written = write_pages(jax.tree.map(np.asarray, pages), k, v, slots)
    want = write_pages(pages, *(jnp.asarray(x[1:]) for x in (k, v)), jnp.asarray(slots[1:]))
    jax.tree.map(np.testing.assert_array_equal, written, want)


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_of_a_step_are_named(new_store):
    store, x = new_store(TINY, max_seqs=2, max_len=16), jnp.zeros((3, 6, 16))
    lens = jnp.asarray([2, 1])
    under_way, _ = store.extend(lens, 3)
    attend = lambda layer: under_way.attend(layer, x, x[:, :2], x[:, :2])
    for call, name in [
        (lambda: store.extend(lens[:1], 3), "q_lens"),
        *((lambda n=n: store.extend(lens, n), "num_tokens") for n in (0, -1, 6.5)),
        *((lambda n=n: store.extend(lens, 3, n), "max_q_len") for n in (0, 1.5)),
        *((lambda layer=layer: attend(layer), "layer") for layer in (-1, 2, True, jnp.int32(0), None)),
        (lambda: under_way.extend(lens, 3), "store"),
        (lambda: under_way.release(lens > 1), "store"),
        *((lambda m=m: store.release(m), "mask") for m in ([True, False], True, jnp.bool_(True), lens)),
    ]:
        with pytest.raises(ValueError, match=f"^{name}: got"):
            call()


def test_a_row_never_shrinks_by_a_negative_length(new_store):
    store, _ = new_store(TINY, max_seqs=2, max_len=16).extend(jnp.asarray([2, 1]), 3)
    store, _ = store.end_step().extend(jnp.asarray([-1, 1]), 3)
    assert store.lens.tolist() == [2, 2]


def test_more_tokens_than_int32_holds_find_no_room(new_store):
    store, _ = new_store(TINY, max_seqs=2, max_len=16).extend(jnp.asarray([5, 0]), 5)
    store, ok = store.end_step().extend(np.asarray([2**40, 1]), 6)
    assert ok.tolist() == [False, True]
    assert store.end_step().lens.tolist() == [5, 1]


def test_steps_in_a_scan_with_x64(new_store):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        x = jnp.zeros((2, 6, 16), jnp.float32)

        def step(store, _):
            store, ok = store.extend(jnp.asarray([1, 1]), 2)
            out, store = store.attend(1, x, x[:, :2], x[:, :2])
            return store.end_step(), (out, ok)

        store, _ = jax.lax.scan(step, new_store(TINY, max_seqs=2, max_len=16), None, length=3)
        assert store.lens.tolist() == [3, 3]


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_attend_over_several_steps_equals_dense_attention(new_store, implementation, rng):
    """Three rows grow by different amounts a step, and one of them rests."""

    @jax.jit
    def step(store, q_lens, q, k, v):
        store, ok = store.extend(q_lens, num_tokens=len(q))
        out, store = store.attend(1, q, k, v, window=9, softcap=3.0)
        return out, ok, store.end_step()

    store = new_store(TINY, max_seqs=3, max_len=40, implementation=implementation)
    steps = [[5, 0, 11], [1, 1, 1], [0, 20, 2], [1, 1, 1]]
    history = [[np.zeros((0, n, 16), np.float32) for n in (6, 2, 2)] for _ in range(3)]
    for q_lens in steps:
        total = sum(q_lens)
        q, k, v = (jnp.asarray(rng.normal(size=(total + 3, n, 16)), jnp.float32) for n in (6, 2, 2))
        out, ok, store = step(store, jnp.asarray(q_lens), q, k, v)
        assert ok.all()
        assert (np.asarray(out[total:]) == 0).all()
        start = 0
        for row, q_len in enumerate(q_lens):
            new = [np.asarray(x[start : start + q_len]) for x in (q, k, v)]
            history[row] = [np.concatenate(pair) for pair in zip(history[row], new, strict=True)]
            if q_len:
                q_new, k_all, v_all = (jnp.asarray(x)[None] for x in (new[0], *history[row][1:]))
                want = flash_attention(
                    q_new, k_all, v_all, causal=True, window=9, softcap=3.0, implementation="reference"
                )
                np.testing.assert_allclose(out[start : start + q_len], want[0], rtol=1e-4, atol=1e-5)
            start += q_len
    assert store.lens.tolist() == [7, 22, 15]


def test_a_row_without_room_stays_as_it_was(new_store):
    store = new_store(TINY, max_seqs=2, max_len=16)
    store, ok = store.extend(jnp.asarray([3, store.capacity + 1]), num_tokens=300)
    assert ok.tolist() == [True, False]
    assert store.lens.tolist() == [3, 0]
    assert (store.batch.slots >= 0).sum() == 3
    store = store.end_step().release(jnp.asarray([True, False]))
    assert store.lens.tolist() == [0, 0]


def test_attend_outside_a_step_says_so(new_store):
    x = jnp.zeros((1, 6, 16))
    with pytest.raises(ValueError, match="call extend first"):
        new_store(TINY, max_seqs=1, max_len=16).attend(0, x, x[:, :2], x[:, :2])


@pytest.mark.parametrize("name", ["max_seqs", "max_len", "num_layers", "head_dim"])
@pytest.mark.parametrize("kind", STORES)
def test_bad_sizes_are_named(kind, name):
    sizes = dict(num_layers=1, num_kv_heads=1, head_dim=4, max_seqs=2, max_len=8)
    with pytest.raises(ValueError, match=f"^{name}: got 0"):
        STORES[kind].create(**{**sizes, name: 0})


def test_a_fork_goes_on_by_itself_and_shares_what_is_full(tiny):
    model, params = tiny
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    create = lambda rows: PagedKV.create(
        2, 2, 16, max_seqs=rows, max_len=32, page_size=4, num_pages=8, dtype=jnp.float32
    )

    @jax.jit
    def run(params, store, ids, q_lens):
        store, ok = store.extend(q_lens, num_tokens=len(ids))
        hidden, store = model(params, ids, store.batch.positions, store)
        return ok, hidden, store.end_step()

    def feed(store, ids, q_lens):
        ok, hidden, store = run(params, store, jnp.asarray(ids), jnp.asarray(q_lens))
        assert ok.all()
        return hidden, store

    _, store = feed(create(2), prompt, [10, 0])
    store, ok = store.fork(jnp.asarray([0]), jnp.asarray([1]))
    assert ok.all()
    assert int(store.table.num_free) == 8 - 3 - 1
    for _ in range(2):
        forked, store = feed(store, [7, 8], [1, 1])
    for row, token in enumerate((7, 8)):
        _, alone = feed(create(1), prompt, [10])
        for _ in range(2):
            hidden, alone = feed(alone, [token], [1])
        np.testing.assert_allclose(forked[row], hidden[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("function", ["_prefill", "_step", "_loop"])
def test_no_copy_of_a_page_array_stands_in_the_compiled_step(function, rows, new_store, tiny):
    """In-place: neither in the HLO, nor as temporary memory."""
    model, params = tiny
    store = new_store(TINY, max_seqs=rows, max_len=6144 // rows)
    size = store.layers[0].k.size
    inputs = engine._prepare(model, params, store, [[1, 2, 3], [4]][:rows], 5, Sampling(), ())
    prefill = engine._prefill.lower(model, params, store, *inputs)
    lowered = {
        "_prefill": lambda: prefill,
        "_step": lambda: engine._step.lower(model, params, prefill.out_info[0]),
        "_loop": lambda: engine._loop.lower(model, params, prefill.out_info[0], 16),
    }[function]()
    compiled = lowered.compile()
    copies = [
        line.strip()
        for line in compiled.as_text().splitlines()
        for shape in re.findall(r"= \(?\w+\[([\d,]+)\]\S* (?:copy|copy-start|transpose)\(", line)
        if math.prod(map(int, shape.split(","))) >= size
    ]
    assert copies == []
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 4 * size * 4
    assert memory.temp_size_in_bytes < 4 * size
