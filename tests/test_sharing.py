"""Sharing of pages: parallel samples, beams, prefixes found again, windows that let go, rows swapped out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY

import paxattn
from paxattn import PagedKV, PrefixIndex, Sampling, Uncached, beam_search, generate
from paxattn.engine import generate as engine
from paxattn.kernels.codes import COMPRESSED, compress, rotate

P = 4


def new_store(**options):
    sizes = dict(max_seqs=4, max_len=128, page_size=P, dtype=jnp.float32) | options
    return PagedKV.create(TINY.num_layers, TINY.num_kv_heads, TINY.head_dim, **sizes)


@pytest.fixture
def prompt(rng):
    return rng.integers(0, TINY.vocab_size, 21).tolist()


def owned(store):
    return int((store.table.owners > 0).sum())


@pytest.fixture
def feed(tiny):
    """Feed packed tokens, q_lens of each row, and return the last row's logits for every token."""
    model, params = tiny

    @jax.jit
    def run(store, tokens, q_lens):
        store, ok = store.extend(q_lens, len(tokens))
        hidden, store = model(params, tokens, store.batch.positions, store)
        return model.logits(params, hidden), store.end_step(), ok

    def feed(store, tokens, q_lens):
        logits, store, ok = run(store, jnp.asarray(tokens), jnp.asarray(q_lens, jnp.int32))
        assert bool(ok.all())
        return np.asarray(logits), store

    return feed


@pytest.fixture
def log_probs(tiny):
    """Of the next token after a text, computed with no store."""
    model, params = tiny

    @jax.jit
    def run(tokens, length):
        segments = jnp.where(jnp.arange(len(tokens)) < length, 0, 1)
        hidden, _ = model(params, tokens, jnp.arange(len(tokens)), Uncached(segments, "reference"))
        return jax.nn.log_softmax(model.logits(params, hidden)[length - 1])

    return lambda ids: np.asarray(run(jnp.asarray(ids + [0] * (64 - len(ids))), len(ids)), np.float64)


def test_samples_of_a_prompt_are_those_of_a_store_without_sharing(tiny, prompt, rng):
    model, params = tiny
    prompts = [prompt, rng.integers(0, TINY.vocab_size, 8).tolist()]
    options = dict(max_new_tokens=9, sampling=Sampling(temperature=1.5, seed=5))
    shared = generate(model, params, new_store(), prompts, num_samples=2, **options)
    # Row i + j * 2 is sample j of prompt i, and a row's draws depend on its number alone.
    alone = generate(model, params, new_store(), [*prompts, *prompts], **options)
    assert [one.ids for one in shared] == [alone[i].ids for i in (0, 2, 1, 3)]
    assert shared[0].ids != shared[1].ids


def test_greedy_samples_are_equal(tiny, prompt):
    model, params = tiny
    (want,) = generate(model, params, new_store(), [prompt], max_new_tokens=9)
    assert generate(model, params, new_store(), [prompt], max_new_tokens=9, num_samples=4) == [want] * 4


def test_four_samples_of_1024_tokens_hold_hardly_more_than_one(tiny, rng):
    model, params = tiny
    long = rng.integers(0, TINY.vocab_size, 1024).tolist()
    store = new_store(max_len=1100, page_size=16, num_pages=100)
    inputs = engine._prepare(model, params, store, [long], 33, Sampling(1.0), (), num_samples=4)
    state, *_ = engine._prefill(model, params, store, *inputs)
    _, state = engine._loop(model, params, state, 40)
    new = 4 * -(-32 // 16)
    assert owned(state.kv) <= 1.02 * 1024 // 16 + new
    assert state.kv.lens.tolist() == [1056] * 4


def test_samples_that_find_no_page_say_so(tiny, prompt):
    model, params = tiny
    store = new_store(num_pages=7)
    got = generate(model, params, store, [prompt], max_new_tokens=3, num_samples=4)
    assert [one.reason for one in got] == ["length", "length", "no_room", "no_room"]
    assert [len(one.ids) for one in got] == [3, 3, 0, 0]


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_fork_declines(tiny):
    model, params = tiny
    store = paxattn.ContiguousKV.create(2, 2, 16, max_seqs=4, max_len=32, dtype=jnp.float32)
    with pytest.raises(NotImplementedError, match=r"num_samples.*ContiguousKV cannot fork"):
        generate(model, params, store, [[1]], max_new_tokens=1, num_samples=2)
    with pytest.raises(NotImplementedError, match=r"beam_search.*ContiguousKV cannot fork"):
        beam_search(model, params, store, [[1]], max_new_tokens=1, num_beams=2)
    for change, name in [
        (dict(num_beams=0), "num_beams"),
        (dict(num_beams=5), "prompts"),
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(length_penalty=-1.0), "length_penalty"),
        (dict(prompts=[]), "prompts"),
    ]:
        arguments = dict(prompts=[[1]], max_new_tokens=1, num_beams=2) | change
        with pytest.raises(ValueError, match=f"^{name}: got"):
            beam_search(model, params, new_store(), arguments.pop("prompts"), **arguments)


def beams_by_definition(log_probs, prompt, width, most, stops, penalty):
    alive, done = [(0.0, [])], []
    for count in range(1, most + 1):
        every = [
            (score + chance, [*ids, token])
            for score, ids in alive
            for token, chance in enumerate(log_probs(prompt + ids))
        ]
        best = sorted(every, reverse=True)[: 2 * width]
        ends = [ids[-1] in stops or count == most for _, ids in best]
        done += [(score / count**penalty, ids) for (score, ids), end in zip(best, ends, strict=True) if end]
        done = sorted(done, reverse=True)[:width]
        alive = [one for one, end in zip(best, ends, strict=True) if not end][:width]
    return done


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5])
def test_beam_search_finds_what_its_definition_finds(tiny, log_probs, rng, penalty):
    model, params = tiny
    prompts = [rng.integers(0, TINY.vocab_size, n).tolist() for n in (7, 12)]
    stops = rng.choice(TINY.vocab_size, 25, replace=False).tolist()
    got = beam_search(
        model, params, new_store(max_seqs=7), prompts,
        num_beams=3, max_new_tokens=6, stop_ids=stops, length_penalty=penalty,
    )  # fmt: skip
    for prompt, beams in zip(prompts, got, strict=True):
        want = beams_by_definition(log_probs, prompt, 3, 6, stops, penalty)
        assert [beam.ids for beam in beams] == [ids for _, ids in want]
        np.testing.assert_allclose([beam.score for beam in beams], [score for score, _ in want], rtol=1e-4)


def test_one_beam_is_greedy(tiny, prompt):
    model, params = tiny
    (want,) = generate(model, params, new_store(), [prompt], max_new_tokens=7)
    ((beam,),) = beam_search(model, params, new_store(), [prompt], max_new_tokens=7, num_beams=1)
    assert beam.ids == want.ids


def test_beams_that_find_no_page_end_and_the_others_go_on(tiny, prompt):
    model, params = tiny
    (beams,) = beam_search(model, params, new_store(num_pages=7), [prompt], max_new_tokens=4, num_beams=4)
    assert beams
    assert all(len(beam.ids) == 4 for beam in beams)
    assert beam_search(model, params, new_store(num_pages=5), [prompt], max_new_tokens=5, num_beams=4) == [[]]


def test_a_prompt_is_found_again_and_read_as_if_it_were_computed(feed, prompt, rng):
    index = PrefixIndex(P)
    lease = index.match(prompt, "tenant")
    assert lease.pages == ()
    _, store = feed(new_store(), prompt, [21, 0, 0, 0])
    taken = index.insert(lease, prompt, np.asarray(store.table.page_table[0]))
    store = store.hold(jnp.asarray(taken))
    index.release(lease)
    store = store.release(jnp.arange(4) == 0)
    assert owned(store) == index.cached == 5
    assert index.match(prompt, "another tenant").pages == ()

    other = [*prompt[:18], *rng.integers(0, TINY.vocab_size, 9).tolist()]
    lease = index.match(other, "tenant")
    assert list(lease.pages) == taken[:4]
    store, ok = store.adopt(jnp.asarray([2]), jnp.asarray([lease.pages]), jnp.asarray([4]))
    assert ok.tolist() == [True]
    got, store = feed(store, other[16:], [0, 0, 11, 0])
    want, _ = feed(new_store(), other, [0, 0, 27, 0])
    np.testing.assert_allclose(got, want[16:], rtol=1e-4, atol=1e-4)
    assert index.evict(10) == taken[4:]
    store = store.let_go(jnp.asarray(taken[4:]))
    assert owned(store) == 4 + 3


def test_adopt_refuses_what_does_not_fit(prompt, feed):
    _, store = feed(new_store(), prompt, [21, 0, 0, 0])
    pages = store.table.page_table[0][None, :5]
    free = pages.at[0, 3].set(store.table.free[0])
    for rows, ids, counts in [([0], pages, [5]), ([1], free, [4]), ([1], pages, [33])]:
        after, ok = store.adopt(jnp.asarray(rows), ids, jnp.asarray(counts))
        assert ok.tolist() == [False]
        assert all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), after, store)))
    after, ok = store.adopt(jnp.asarray([-1]), pages, jnp.asarray([5]))
    assert owned(after) == owned(store)
    assert after.lens.tolist() == store.lens.tolist()


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_window_bounds_the_memory_and_changes_nothing(implementation, rng):
    """120 tokens in uneven steps through a window of 10: as in a store that keeps all, in a few pages."""
    window, steps = 10, [17, *rng.integers(1, 9, 13).tolist()]

    @jax.jit
    def step(store, q_lens, q, k, v):
        store, ok = store.extend(q_lens, len(q))
        out, store = store.attend(0, q, k, v, window=window)
        return out, store.end_step(), ok

    def create(**options):
        sizes = dict(max_seqs=2, max_len=160, page_size=P, dtype=jnp.float32)
        return PagedKV.create(1, 2, 8, **sizes, implementation=implementation, **options)

    whole, bounded = create(), create(num_pages=9, window=window)
    for count in steps:
        q, k, v = (jnp.asarray(rng.normal(size=(20, heads, 8)), jnp.float32) for heads in (6, 2, 2))
        q_lens = jnp.asarray([0, count])
        want, whole, _ = step(whole, q_lens, q, k, v)
        got, bounded, ok = step(bounded, q_lens, q, k, v)
        assert bool(ok.all())
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        assert owned(bounded) <= -(-(window - 1) // P) + 1
        poison = (bounded.table.owners == 0)[:, None, None, None]
        layer = jax.tree.map(lambda x, poison=poison: jnp.where(poison, jnp.nan, x), bounded.layers[0])
        bounded = paxattn.PagedKV(**{**vars(bounded), "layers": (layer,)})
    assert owned(bounded.release(jnp.asarray([False, True]))) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e4m3fn"])
def test_a_row_comes_back_from_the_host_bit_for_bit(tiny, prompt, feed, dtype):
    """Generation with a row swapped out and in again, elsewhere, draws what it draws without."""
    _, store = feed(new_store(dtype=dtype, zero_on_release=True), prompt, [21, 0, 0, 0])
    before = contents(store, 0)
    free = int(store.table.num_free)
    store, swapped = paxattn.swap_out(store, 0)
    assert all((np.asarray(x.astype(jnp.float32)) == 0).all() for x in jax.tree.leaves(store.layers))
    assert int(store.table.num_free) == store.table.num_pages
    _, store = feed(store, prompt[:9], [0, 9, 0, 0])
    store, ok = paxattn.swap_in(store, swapped, 3)
    assert ok
    assert int(store.table.num_free) == free - 3
    for x, y in zip(before, contents(store, 3), strict=True):
        np.testing.assert_array_equal(x, y)


def contents(store, row):
    pages = np.asarray(store.table.page_table[row, : -(-int(store.lens[row]) // P)])
    return [np.asarray(x.astype(jnp.float32))[pages] for x in jax.tree.leaves(store.layers)]


def test_a_row_that_does_not_fit_stays_on_the_host(prompt, feed):
    _, store = feed(new_store(num_pages=8), prompt, [21, 0, 0, 0])
    store, swapped = paxattn.swap_out(store, 0)
    _, store = feed(store, prompt, [0, 21, 0, 0])
    lens, table = store.lens.tolist(), np.asarray(store.table.page_table)
    store, ok = paxattn.swap_in(store, swapped, 0)
    assert not ok
    assert store.lens.tolist() == lens
    np.testing.assert_array_equal(store.table.page_table, table)
    store, ok = paxattn.swap_in(store.release(jnp.arange(4) == 1), swapped, 0)
    assert ok
    assert store.lens.tolist() == [21, 0, 0, 0]


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_of_swapping_are_named(prompt, feed):
    store = new_store()
    begun, _ = store.extend(jnp.asarray([1, 0, 0, 0]), 1)
    other, swapped = paxattn.swap_out(new_store(dtype="int8"), 0)
    for call, name in [
        (lambda: paxattn.swap_out(store, 4), "row"),
        (lambda: paxattn.swap_out(store, -1), "row"),
        (lambda: paxattn.swap_out(begun, 0), "store"),
        (lambda: paxattn.swap_out(store.table, 0), "store"),
        (lambda: paxattn.swap_in(store, swapped, 0), "swapped"),
        (lambda: paxattn.swap_in(begun.end_step(), swapped, 0), "row"),
    ]:
        with pytest.raises(ValueError, match=f"^{name}: got"):
            call()
    assert other.lens.tolist() == [0] * 4


def test_compressed_pages_take_half_the_memory_of_bfloat16():
    def size(dtype):
        return sum(x.nbytes for x in jax.tree.leaves(paxattn.init_pages(8, 16, 3, 64, dtype)))

    assert size("int8") <= 0.54 * size("bfloat16")
    assert size("float8_e4m3fn") <= 0.54 * size("bfloat16")


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-3, 1.0, 3e4])
def test_compression_keeps_any_magnitude(dtype, scale, rng):
    x = jnp.asarray(rng.normal(size=(5, 2, 16)) * scale, jnp.float32)
    pages = paxattn.write_pages(paxattn.init_pages(2, 4, 2, 16, dtype), x, -x, jnp.arange(5))
    for values, scales, want in ((pages.k, pages.k_scale, rotate(x)), (pages.v, pages.v_scale, rotate(-x))):
        got = (values.astype(jnp.float32) * scales.astype(jnp.float32)).reshape(8, 2, 16)[:5]
        largest = np.abs(np.asarray(want)).max(axis=-1, keepdims=True)
        bound = largest * (1 / 100 if dtype == "int8" else 1 / 14) + 1e-7
        assert (np.abs(np.asarray(got) - np.asarray(want)) <= bound).all()


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize("size", [1e8, 1e37])
def test_what_no_scale_reaches_is_cut_off(dtype, size):
    codes, scales = compress(jnp.full((1, 1, 16), -size), jnp.dtype(dtype), 1)
    assert (codes.astype(jnp.float32) * scales.astype(jnp.float32) == -65504 * COMPRESSED[codes.dtype.name]).all()


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_no_scale_that_is_tried_is_better_than_the_one_that_is_stored(dtype, rng):
    most = COMPRESSED[jnp.dtype(dtype).name]
    x = (rng.normal(size=(40, 3, 4, 16)) * 10 ** rng.uniform(-2, 2, (40, 3, 4, 1))).astype(np.float32)
    codes, scales = compress(jnp.asarray(x.reshape(40, 3, 64)), jnp.dtype(dtype), 4)

    def error(codes, scales):
        return ((codes.astype(np.float64).reshape(x.shape) * scales.astype(np.float64)[..., None] - x) ** 2).sum(-1)

    def error_of(tried):
        unit = np.abs(x).max(axis=-1) / most * tried
        scaled = np.clip(x / unit[..., None], -most, most)
        rounded = np.round(scaled) if dtype == jnp.int8 else scaled.astype(dtype).astype(np.float32)
        scale = (rounded * x).sum(-1) / (rounded * rounded).sum(-1)
        return error(rounded, scale.astype(np.float16))

    best = np.min([error_of(2 ** (i / 8)) for i in range(8)], axis=0)
    # What all errors have in common is left out, and in float32 they are not known to the last bit.
    assert (error(np.asarray(codes), np.asarray(scales)) <= best * 1.05 + 1e-6 * (x * x).sum(-1)).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.uint16])
def test_a_rotation_is_exact_in_every_dtype(dtype, rng):
    x = jnp.asarray(rng.integers(0, 60, (5, 2, 64)), dtype)
    assert rotate(x).dtype == jnp.float32
    np.testing.assert_allclose(rotate(x), rotate(x.astype(jnp.float32)), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dim", [1, 16, 24, 64, 80])
def test_rotation_is_orthogonal_and_its_own_inverse(dim, rng):
    x, y = (jnp.asarray(rng.normal(size=(3, dim)), jnp.float32) for _ in range(2))
    np.testing.assert_allclose(rotate(rotate(x)), x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose((rotate(x) * rotate(y)).sum(-1), (x * y).sum(-1), rtol=1e-4, atol=1e-4)
    if dim == 64:
        spike = jnp.zeros((1, dim)).at[0, 5].set(8.0)
        np.testing.assert_allclose(jnp.abs(rotate(spike)), 1.0, rtol=1e-5)


def test_ten_thousand_requests_leave_every_page_free(rng):
    """Arrivals in order, as many at once as fit; every row grows by a token a step, some in chunks."""
    table = paxattn.PageTable.create(600, 16, 64, 40)
    lens = np.minimum(rng.lognormal(4.0, 1.0, 10_000).astype(int) + 1, 600)
    reserve, release = jax.jit(paxattn.PageTable.reserve), jax.jit(paxattn.PageTable.release)
    waiting, row, left = iter(lens.tolist()), np.zeros(64, int), 0
    finished = 0
    while finished < 10_000:
        for r in np.flatnonzero(row == 0):
            row[r] = next(waiting, 0)
        table, ok = reserve(table, jnp.asarray(row))
        served = np.asarray(ok) & (row > 0)
        assert served.any()
        finished += int(served.sum())
        row[served] = 0
        table = release(table, jnp.asarray(served))
        left = int(table.num_free)
    assert left == 600
    assert table.owners.tolist() == [0] * 600
    assert sorted(table.free.tolist()) == list(range(600))


@pytest.mark.parametrize("page_size", [4, 16, 64])
def test_beams_fit_the_default_store(tiny, log_probs, rng, page_size):
    """As many pages as rows can fill are enough, whatever the beams do."""
    model, params = tiny
    text = rng.integers(0, TINY.vocab_size, 7).tolist()
    store = new_store(max_len=16, page_size=page_size)
    (got,) = beam_search(model, params, store, [text], num_beams=4, max_new_tokens=9)
    want = beams_by_definition(log_probs, text, 4, 9, [], 1.0)
    assert [beam.ids for beam in got] == [ids for _, ids in want]


def test_a_prompts_beams_do_not_depend_on_the_others(tiny, rng):
    model, params = tiny
    prompts = [rng.integers(0, TINY.vocab_size, n).tolist() for n in (5, 11)]
    options = dict(num_beams=2, max_new_tokens=8, stop_ids=list(range(0, 97, 3)))
    both = beam_search(model, params, new_store(), prompts, **options)
    for prompt, beams in zip(prompts, both, strict=True):
        (alone,) = beam_search(model, params, new_store(), [prompt], **options)
        assert [beam.ids for beam in beams] == [beam.ids for beam in alone]


def test_fork_and_adopt_refuse_rows_and_pages_that_are_not_there(prompt, feed):
    _, store = feed(new_store(), prompt, [21, 0, 0, 0])
    same = lambda other: all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), other, store)))
    for src, dst in [(0, 4), (4, 1), (-1, 1)]:
        after, ok = store.fork(jnp.asarray([src]), jnp.asarray([dst]))
        assert ok.tolist() == [False]
        assert same(after)
    page = store.table.page_table[:1, :1]
    for row, count in [(4, 1), (1, 2), (1, -1)]:
        after, ok = store.adopt(jnp.asarray([row]), page, jnp.asarray([count]))
        assert ok.tolist() == [False]
        assert same(after)


def test_nothing_to_do_is_no_error(prompt, feed):
    _, store = feed(new_store(), prompt, [21, 0, 0, 0])
    nothing = jnp.asarray([])
    assert owned(store.hold(nothing).let_go(nothing)) == owned(store)
    after, ok = store.fork(nothing, nothing)
    assert ok.shape == (0,)
    assert owned(after) == owned(store)
    empty = jnp.zeros((0, 2, 16))
    assert paxattn.write_pages(store.layers[0], empty, empty, nothing).k.shape == store.layers[0].k.shape


@pytest.mark.usefixtures("unchecked")
def test_what_would_read_or_write_anothers_pages_is_refused(rng):
    def create(**options):
        return PagedKV.create(1, 2, 8, max_seqs=2, max_len=64, page_size=P, dtype=jnp.float32, **options)

    x = jnp.ones((24, 2, 8))
    begun, _ = create(window=8).extend(jnp.asarray([24, 0]), 24)
    for window in (None, 9, (8, 0)):
        with pytest.raises(ValueError, match=r"^window: got .*at most 8"):
            begun.attend(0, x, x, x, window=window)
    for call in (
        lambda: begun.release(jnp.asarray([True, False])),
        lambda: begun.fork(jnp.asarray([0]), jnp.asarray([1])),
        lambda: begun.adopt(jnp.asarray([1]), jnp.asarray([[0]]), jnp.asarray([1])),
        lambda: begun.let_go(jnp.asarray([0])),
    ):
        with pytest.raises(ValueError, match=r"^store: got one with a step under way"):
            call()
    _, store = begun.attend(0, x, x, x, window=8)
    _, swapped = paxattn.swap_out(store.end_step(), np.int64(0))
    assert swapped.dropped > 0
    for other in (create(), create(window=9)):
        with pytest.raises(ValueError, match=r"^swapped: got"):
            paxattn.swap_in(other, swapped, 1)
    assert paxattn.swap_in(create(window=5), swapped, 1)[1]


def test_half_precision_keys_of_any_size_are_compressed():
    x = jnp.full((1, 2, 64), 20000, jnp.float16)
    pages = paxattn.write_pages(paxattn.init_pages(1, 4, 2, 64, "int8"), x, x, jnp.arange(1))
    assert all(bool(jnp.isfinite(leaf.astype(jnp.float32)).all()) for leaf in jax.tree.leaves(pages))
