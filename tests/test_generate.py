"""The generate loop on a tiny decoder: the loop, the stream and one prompt at a time all say the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY

from paxattn import PagedKV, Sampling, Uncached, generate, prefill, stream, warmup
from paxattn.engine.generate import bucket
from paxattn.engine.sampling import sample

LENGTHS = (3, 17, 1, 40, 8, 2, 29, 5, 11, 64, 7, 1, 33, 4, 20, 13)


def prompts_of(rng, lengths=LENGTHS):
    return [rng.integers(0, TINY.vocab_size, n).tolist() for n in lengths]


def greedy_by_definition(tiny, prompt, count):
    """Run the whole text again for every token, with no store."""
    model, params = tiny
    ids = list(prompt)
    padded = 128

    @jax.jit
    def next_token(tokens, length):
        segments = jnp.where(jnp.arange(padded) < length, 0, 1)
        hidden, _ = model(params, tokens, jnp.arange(padded), Uncached(segments, "reference"))
        return jnp.argmax(model.logits(params, hidden)[length - 1])

    for _ in range(count):
        tokens = jnp.zeros(padded, jnp.int32).at[: len(ids)].set(jnp.asarray(ids))
        ids.append(int(next_token(tokens, len(ids))))
    return ids[len(prompt) :]


def test_sixteen_prompts_of_different_lengths(tiny, new_store, rng):
    model, params = tiny
    prompts = prompts_of(rng)
    batch = generate(model, params, new_store(TINY, 16, 96), prompts, max_new_tokens=12)
    for i in (0, 3, 9, 11):
        assert batch[i].ids == greedy_by_definition(tiny, prompts[i], 12)
    assert {one.reason for one in batch} == {"length"}
    steps = list(stream(model, params, new_store(TINY, 16, 96), prompts, max_new_tokens=12))
    assert [list(row) for row in zip(*steps, strict=True)] == [one.ids for one in batch]


def test_stop_tokens_end_a_row_on_the_device_and_others_go_on(tiny, new_store, rng):
    model, params = tiny
    prompts = prompts_of(rng, (5, 9, 14))
    free = generate(model, params, new_store(TINY, 4, 64), prompts, max_new_tokens=20)
    stop = (free[1].ids[3], 96)
    rows = [one.ids for one in free]
    want = [ids[: min((ids.index(s) + 1 for s in stop if s in ids), default=20)] for ids in rows]
    got = generate(model, params, new_store(TINY, 4, 64), prompts, max_new_tokens=20, stop_ids=stop)
    assert [one.ids for one in got] == want
    assert [one.reason for one in got] == ["stop" if ids[-1] in stop else "length" for ids in want]
    steps = list(stream(model, params, new_store(TINY, 4, 64), prompts, max_new_tokens=20, stop_ids=stop))
    assert [[i for i in row if i is not None] for row in zip(*steps, strict=True)] == want


def test_one_token_and_the_longest_row(tiny, new_store, rng):
    model, params = tiny
    store = new_store(TINY, 1, 128)
    prompt = prompts_of(rng, (store.capacity - 1,))
    assert len(generate(model, params, store, prompt, max_new_tokens=1)[0].ids) == 1
    assert len(list(stream(model, params, new_store(TINY, 1, 128), prompt, max_new_tokens=1))) == 1


def test_rows_that_find_no_page_keep_what_they_have(tiny, rng):
    model, params = tiny
    store = PagedKV.create(2, 2, 16, max_seqs=3, max_len=32, page_size=4, num_pages=4, dtype=jnp.float32)
    prompts = prompts_of(rng, (4, 5, 9))
    got = generate(model, params, store, prompts, max_new_tokens=6)
    assert [one.reason for one in got] == ["no_room"] * 3
    for one, prompt in zip(got, prompts, strict=True):
        assert one.ids == greedy_by_definition((model, params), prompt, 6)[: len(one.ids)]


def test_no_compilation_after_the_first_call_of_abucket(tiny, new_store, rng, compilations):
    model, params = tiny

    def both(lengths, sampling, stop_ids, count):
        prompts = prompts_of(rng, lengths)
        options = dict(max_new_tokens=count, sampling=sampling, stop_ids=stop_ids)
        generate(model, params, new_store(TINY, 4, 64), prompts, **options)
        list(stream(model, params, new_store(TINY, 4, 64), prompts, **options))

    both((5, 9, 14), None, (), 13)
    with compilations() as compiled:
        both((20, 8), Sampling(0.7, 5, 0.9, 3), (1, 2), 9)
        both((1, 1, 1, 29), Sampling(1.0), (3,), 16)
    assert compiled == []


def test_warmup_compiles_all_that_stream_needs(tiny, new_store, rng, compilations):
    model, params = tiny
    prompts = prompts_of(rng, (31, 50))
    store = new_store(TINY, 2, 96)
    warmup(model, params, store, prompts, max_new_tokens=4)
    with compilations() as compiled:
        assert len(list(stream(model, params, store, prompts, max_new_tokens=4))) == 4
    assert compiled == []


def test_buckets_are_at_least_sixteen_and_waste_little_more_than_a_quarter():
    for n in range(1, 5000):
        assert n <= bucket(n) <= 1.25 * n + 16
    assert len({bucket(n) for n in range(1, 8193)}) < 40


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(prompts=[]), "prompts"),
        (dict(prompts=[[1], []]), r"prompts\[1\]"),
        (dict(prompts=[[1]] * 3), "prompts"),
        (dict(prompts=[[1] * 60]), r"prompts\[0\]"),
        (dict(prompts=None), "prompts"),
        (dict(prompts="text"), "prompts"),
        (dict(prompts={1: [1]}), "prompts"),
        (dict(prompts=[1, 2]), r"prompts\[0\]"),
        (dict(prompts=[[1], [1.5]]), r"prompts\[1\]"),
        (dict(prompts=[["1"]]), r"prompts\[0\]"),
        (dict(prompts=["text"]), r"prompts\[0\]"),
        (dict(prompts=[[True, False]]), r"prompts\[0\]"),
        (dict(prompts=[[-1]]), r"prompts\[0\]"),
        (dict(prompts=[[2**31]]), r"prompts\[0\]"),
        (dict(prompts=[[1], [96, 97]]), r"prompts\[1\]"),
        (dict(prompts=[[[1], [2, 3]]]), r"prompts\[0\]"),
        (dict(sampling=0.7), "sampling"),
        (dict(sampling=Sampling(temperature=-1.0)), "temperature"),
        (dict(sampling=Sampling(temperature="0.7")), "temperature"),
        (dict(sampling=Sampling(top_k=2.7)), "top_k"),
        (dict(sampling=Sampling(seed=None)), "seed"),
        (dict(sampling=Sampling(top_p=0.0)), "top_p"),
        (dict(sampling=Sampling(top_p=1.5)), "top_p"),
        (dict(sampling=Sampling(top_k=-1)), "top_k"),
        (dict(sampling=Sampling(seed=-1)), "seed"),
        (dict(stop_ids=[5.7]), "stop_ids"),
        (dict(stop_ids=5), "stop_ids"),
        (dict(stop_ids=[2**31]), "stop_ids"),
        (dict(stop_ids=[-1]), "stop_ids"),
    ],
    ids=str,
)
def test_a_bad_argument_is_named_before_the_store_is_touched(tiny, change, name):
    model, params = tiny
    store = PagedKV.create(2, 2, 16, max_seqs=2, max_len=64, page_size=8, dtype=jnp.float32)
    options = {"prompts": [[1, 2]], "max_new_tokens": 6, **change}
    for run in (generate, stream):
        with pytest.raises(ValueError, match=rf"^{name}: got"):
            run(model, params, store, **options)
    generate(model, params, store, [[1, 2]], max_new_tokens=1)


def test_only_an_empty_store_is_taken(tiny):
    model, params = tiny
    create = lambda: PagedKV.create(2, 2, 16, max_seqs=2, max_len=64, page_size=8, dtype=jnp.float32)
    under_way, _ = create().extend(jnp.asarray([3, 0], jnp.int32), num_tokens=3)
    state = prefill(model, params, create(), [[1, 2]], max_new_tokens=2)
    consumed = create()
    consumed.lens.delete()  # as donation does, but on a CPU
    stores = {
        "a store with a step under way": under_way,
        "a store whose rows hold tokens": state.kv,
        "a store that was consumed": consumed,
        "an object of .*Uncached": Uncached(jnp.zeros(3, jnp.int32)),
        "an object of .*type": PagedKV,
    }
    for run in (generate, stream, prefill):
        for got, store in stores.items():
            with pytest.raises(ValueError, match=f"^kv: got {got}"):
                run(model, params, store, [[1, 2]], max_new_tokens=3)


def test_integers_of_numpy_are_integers(tiny):
    model, params = tiny
    prompts, count = np.asarray([[1, 2], [3, 4]]), np.int64(3)
    ids = []
    for given in (prompts, prompts.tolist()):
        store = PagedKV.create(2, 2, 16, max_seqs=2, max_len=64, page_size=8, dtype=jnp.float32)
        ids.append([one.ids for one in generate(model, params, store, given, max_new_tokens=count)])
    assert ids[0] == ids[1]


def test_what_is_checked_already_stays_as_it_is():
    once = Sampling(temperature=0.7, top_k=3, top_p=0.9, seed=2**32 - 1).checked()
    twice = once.checked()
    assert [(x.dtype, x.item()) for x in jax.tree.leaves(twice)] == [(x.dtype, x.item()) for x in jax.tree.leaves(once)]


def draw(logits, count, **options):
    return jax.vmap(lambda n: sample(logits, Sampling(**options).checked(), n))(jnp.arange(count))


def test_greedy_takes_the_largest():
    logits = jnp.asarray([[0.0, 3.0, 1.0], [2.0, -1.0, 0.0]])
    assert sample(logits, Sampling().checked(), jnp.int32(0)).tolist() == [1, 0]


def test_draws_follow_the_softmax_of_temperature():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    drawn = np.asarray(draw(logits, 20_000, temperature=0.5, seed=11)).ravel()
    p = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 20_000, p / p.sum(), atol=0.015)


def test_top_k_and_top_p_keep_what_they_say():
    logits = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1]]))
    kept = lambda **options: set(np.asarray(draw(logits, 3000, temperature=1.0, **options)).ravel().tolist())
    assert kept() == {0, 1, 2, 3}
    assert kept(top_k=2) == {0, 1}
    assert kept(top_k=100) == {0, 1, 2, 3}
    assert kept(top_p=0.65) == {0, 1}
    assert kept(top_p=0.75) == {0, 1, 2}
    assert kept(top_p=1e-6) == {0}
    # Of the top three, 4/9 and 3/9 reach 0.75 together; of all four it takes a third.
    assert kept(top_k=3, top_p=0.75) == {0, 1}


def test_a_seed_repeats_and_another_does_not(tiny, rng):
    model, params = tiny
    prompts = prompts_of(rng, (5, 5))
    prompts[1] = prompts[0]

    def ids(seed):
        store = PagedKV.create(2, 2, 16, max_seqs=2, max_len=64, page_size=8, dtype=jnp.float32)
        got = generate(model, params, store, prompts, max_new_tokens=24, sampling=Sampling(1.0, seed=seed))
        return [one.ids for one in got]

    first = ids(5)
    assert first == ids(5)
    assert first != ids(6)
    assert first[0] != first[1]
