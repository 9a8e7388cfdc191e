"""The serving loop on a tiny decoder: whatever else runs, a request gets the tokens that it gets alone."""

import random
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from engine_cases import KINDS, SIZES, Windowed, at_rest, collect
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import paxattn
from paxattn import Engine, EngineConfig, GenerationParams, Sampling, TooLongError, Uncached, UnknownRequestError

PROMPTS = st.tuples(st.integers(1, 40), st.integers(0, 2))
REQUESTS = st.lists(st.tuples(PROMPTS, st.integers(1, 24), st.integers(1, 3)), min_size=1, max_size=12)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(requests=REQUESTS, seed=st.integers(0, 10**6))
def test_any_requests_get_what_they_get_alone(engine, alone, kind, requests, seed):
    """Arrivals, common prefixes, samples that fork, cancellations, and too few pages for all that runs."""
    served, chance = engine(kind), random.Random(seed)
    source = np.random.default_rng(5)
    texts = [source.integers(0, TINY.vocab_size, 40).tolist() for _ in range(2)]
    texts += [texts[0][:20] + texts[1][:20]]
    want, got, cancelled = {}, {}, set()
    for (size, which), new, samples in requests:
        prompt = texts[which][:size]
        number = served.add_request(prompt, GenerationParams(max_new_tokens=new, num_samples=samples))
        want |= {(number, i): alone(prompt)[:new] for i in range(samples)}
        for _ in range(chance.randrange(3)):
            collect(served, served.step(), got)
        if chance.random() < 0.2 and number in served._live:
            served.cancel(number)
            cancelled.add(number)
    while served.busy:
        collect(served, served.step(), got)
    for key, ids in want.items():
        if key[0] in cancelled:
            assert got.get(key, []) == ids[: len(got.get(key, []))]
        else:
            assert got[key] == ids
    at_rest(served)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_two_hundred_requests_in_a_tenth_of_the_pages(tiny, alone, rng, preemption):
    """16 rows of 10 pages have 16 pages for all of them."""
    config = EngineConfig(
        max_seqs=16, max_len=40, page_size=4, num_pages=16, prefill_tokens=32, decode_steps=6, preemption=preemption
    )
    served = Engine(*tiny, config)
    base = rng.integers(0, TINY.vocab_size, (4, 20)).tolist()
    prompts = [base[rng.integers(4)][: rng.integers(1, 21)] for _ in range(200)]
    params = [GenerationParams(max_new_tokens=int(rng.integers(1, 21))) for _ in prompts]
    done = served.generate(prompts, params)
    for prompt, one, result in zip(prompts, params, done, strict=True):
        assert result.ids == alone(prompt)[: one.max_new_tokens]
        assert result.reason == "length"
    stats = at_rest(served)
    assert stats.preempted > 0
    with pytest.raises(TooLongError, match="a row holds 40"):
        served.add_request([1] * 30, GenerationParams(max_new_tokens=11))


def test_a_seed_draws_the_same_whatever_else_runs(engine, rng):
    served = engine()
    prompts = [rng.integers(0, TINY.vocab_size, n).tolist() for n in (5, 9, 14, 20, 3, 11)]
    params = [
        GenerationParams(max_new_tokens=12, sampling=Sampling(0.9, top_p=0.95, seed=i), num_samples=1 + i % 3)
        for i in range(6)
    ]
    together = served.generate(prompts, params)
    apart = [one for prompt, how in zip(prompts, params, strict=True) for one in served.generate([prompt], how)]
    assert [one.ids for one in together] == [one.ids for one in apart]
    # Samples of one prompt and seed differ.
    assert together[1].ids != together[2].ids
    at_rest(served)


def test_drafts_change_no_random_draw_and_save_steps_on_repeated_text(engine, tiny, rng):
    plain, drafting = engine(), engine("drafts")
    prompt = rng.integers(0, TINY.vocab_size, 8).tolist() * 3
    for sampling in (Sampling(), Sampling(0.7, seed=3)):
        params = GenerationParams(max_new_tokens=40, sampling=sampling)
        [want], [got] = plain.generate([prompt], params), drafting.generate([prompt], params)
        assert got == want
    # Logits that always favour one token repeat it, which is soon guessed.
    before = drafting.stats()
    [one] = drafting.generate([prompt], GenerationParams(max_new_tokens=40, logit_bias={5: 100.0}))
    after = at_rest(drafting)
    assert one.ids == [5] * 40
    assert after.steps - before.steps < 25


def test_a_stop_token_is_the_last_and_none_comes_before_the_least(engine, alone, rng):
    served = engine()
    prompt = rng.integers(0, TINY.vocab_size, 7).tolist()
    want = alone(prompt)
    first = want.index(want[4]) + 1
    [one] = served.generate([prompt], GenerationParams(max_new_tokens=20, stop_ids=[want[4], 96]))
    assert (one.ids, one.reason) == (want[:first], "stop")
    everything = GenerationParams(max_new_tokens=20, stop_ids=want[:8], min_new_tokens=5)
    [one] = served.generate([prompt], everything)
    assert len(one.ids) > 5
    assert not set(one.ids[:5]) & set(want[:8])
    at_rest(served)


@pytest.mark.parametrize("kind", ["recompute", "drafts"])
def test_a_stop_string_ends_a_request_where_it_is_complete(engine, alone, kind, rng):
    served = engine(kind)
    prompt = rng.integers(0, TINY.vocab_size, 7).tolist()
    want = alone(prompt)
    string = f" {want[8]} {want[9]} "
    text = [" ".join(map(str, want[:n])) + " " for n in range(20)]
    count = next(n for n in range(20) if string in text[n])
    [one] = served.generate([prompt], GenerationParams(max_new_tokens=20, stop_strings=["never", string]))
    assert (one.ids, one.reason) == (want[:count], "stop")
    at_rest(served)


@pytest.mark.parametrize(("start", "least"), [(2, 4), (8, 6)])
def test_no_stop_string_ends_a_request_before_the_least(engine, alone, start, least, rng):
    """Not even one that is complete by then, and stays in the text; nor does it end one that begins the string."""
    served, text = engine(), engine().detokenize
    prompt = rng.integers(0, TINY.vocab_size, 7).tolist()
    want = alone(prompt)
    string = text(want[start : start + 2])
    [one] = served.generate([prompt], GenerationParams(20, stop_strings=[string], min_new_tokens=least))
    behind = max(0, len(text(want[:least])) - len(string) + 1)
    ends = [n for n in range(least + 1, 21) if string in text(want[:n])[behind:]]
    assert one.ids == want[: ends[0] if ends else 20]
    at_rest(served)


def test_statistics_count_the_tokens_that_were_told(engine, alone, rng):
    served = engine()
    prompt = rng.integers(0, TINY.vocab_size, 7).tolist()
    before = served.stats().tokens
    string = " ".join(map(str, alone(prompt)[:2])) + " "
    [one] = served.generate([prompt], GenerationParams(20, stop_strings=[string]))
    assert len(one.ids) == 2
    assert at_rest(served).tokens - before == 2


def test_generate_ends_when_its_requests_are_cancelled(engine, alone, rng):
    served = engine()
    prompts = [rng.integers(0, TINY.vocab_size, n).tolist() for n in (5, 8)]
    first = served._next_id

    def progress(done, total):
        if first in served._live:
            served.cancel(first)

    gone, other = served.generate(prompts, GenerationParams(30), progress)
    assert gone.reason == "cancelled"
    assert gone.ids == alone(prompts[0])[: len(gone.ids)]
    assert other.ids == alone(prompts[1])[:30]
    at_rest(served)


def test_log_probabilities_are_those_of_the_model(tiny, rng):
    model, params = tiny
    served = Engine(*tiny, EngineConfig(**SIZES | dict(max_logprobs=3)))
    prompt = rng.integers(0, TINY.vocab_size, 7).tolist()
    how = GenerationParams(max_new_tokens=9, logprobs=2, logit_bias={1: 50.0, 2: 50.0})
    done = served.generate([prompt, prompt], [how, GenerationParams(max_new_tokens=9)])
    assert done[1].logprobs is None
    assert set(done[0].ids) <= {1, 2}
    ids = jnp.asarray(prompt + done[0].ids)
    hidden, _ = model(params, ids, jnp.arange(len(ids)), Uncached(jnp.zeros(len(ids), jnp.int32), "reference"))
    want = np.asarray(jax.nn.log_softmax(model.logits(params, hidden)))[len(prompt) - 1 : -1]
    for told, row, token in zip(done[0].logprobs, want, done[0].ids, strict=True):
        np.testing.assert_allclose(told.logprob, row[token], atol=1e-4)
        best = np.argsort(-row)[:2]
        assert [i for i, _ in told.top] == best.tolist()
        np.testing.assert_allclose([x for _, x in told.top], row[best], atol=1e-4)
    at_rest(served)


def test_penalties_follow_their_definition(engine, tiny, rng):
    """Against a model that reads the whole text for each token, with the penalties in numpy."""
    model, params = tiny
    served, prompt = engine(), rng.integers(0, TINY.vocab_size, 10).tolist()
    repetition, presence, frequency = 1.6, 0.4, 0.7

    @jax.jit
    def logits(tokens, length):
        segments = (jnp.arange(64) >= length).astype(jnp.int32)
        hidden, _ = model(params, tokens, jnp.arange(64), Uncached(segments, "reference"))
        return model.logits(params, hidden)[length - 1]

    ids = []
    for _ in range(25):
        text = prompt + ids
        row = np.array(logits(jnp.asarray(text + [0] * (64 - len(text))), len(text)))
        seen = sorted(set(text))
        row[seen] = np.where(row[seen] > 0, row[seen] / repetition, row[seen] * repetition)
        for token in set(ids):
            row[token] -= presence + frequency * ids.count(token)
        ids.append(int(row.argmax()))
    penalties = dict(repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency)
    others = [rng.integers(0, TINY.vocab_size, 10).tolist() for _ in range(3)]
    got = served.generate(
        [prompt, *others], [GenerationParams(25, **penalties), *[GenerationParams(25, Sampling(1.0))] * 3]
    )
    assert got[0].ids == ids
    assert engine("drafts").generate([prompt], GenerationParams(25, **penalties))[0].ids == ids
    at_rest(served)


def test_a_prompt_seen_before_is_not_computed_again(engine, alone, rng):
    served = engine()
    prompt = rng.integers(0, TINY.vocab_size, 37).tolist()
    served.generate([prompt], GenerationParams(max_new_tokens=4))
    number = served.add_request(prompt, GenerationParams(max_new_tokens=4))
    served.step()
    [request] = served._live[number]
    assert request.stored == 36
    while served.busy:
        served.step()
    assert request.output == alone(prompt)[:4]
    served.add_request(prompt, GenerationParams(max_new_tokens=4, salt="another tenant"))
    served.step()
    assert next(iter(served._scheduler.running.values())).stored == 0
    at_rest(served)


def test_samples_share_the_pages_of_their_prompt(engine, alone, rng):
    served = engine()
    prompt = rng.integers(0, TINY.vocab_size, 35).tolist()
    before = served.stats().preempted
    done = served.generate([prompt], GenerationParams(max_new_tokens=9, num_samples=4))
    # Four times eleven pages would be more than there are.
    assert [one.ids for one in done] == [alone(prompt)[:9]] * 4
    assert at_rest(served).preempted == before


def test_an_engine_at_rest_waits_for_nobody(engine, rng):
    """Not even where pages are still to be let go, as those of a prompt that the index has already."""
    served = engine()
    prompts = [rng.integers(0, TINY.vocab_size, 20).tolist()] * 2
    for _ in range(2):
        before, start = served.stats().host_gap, time.perf_counter()
        served.generate(prompts, GenerationParams(max_new_tokens=9))
        served.drain()
        assert served.stats().host_gap - before < time.perf_counter() - start
        assert served._scheduler.busy
        time.sleep(time.perf_counter() - start + 0.5)
    at_rest(served)


def test_a_cancelled_request_gives_its_pages_back(engine, rng):
    served = engine("no prefixes")
    number = served.add_request(rng.integers(0, TINY.vocab_size, 40).tolist(), GenerationParams(max_new_tokens=50))
    for _ in range(4):
        served.step()
    assert served.stats().num_free < 30
    served.cancel(number)
    served.step()
    served.drain()
    assert served.stats().num_free == 30
    with pytest.raises(UnknownRequestError, match=f"^number: got {number}"):
        served.cancel(number)
    at_rest(served)


def test_generate_leaves_the_updates_of_others_to_step(engine, alone, rng):
    served = engine()
    mine, other = (rng.integers(0, TINY.vocab_size, n).tolist() for n in (6, 9))
    number = served.add_request(other, GenerationParams(max_new_tokens=10))
    [one] = served.generate([mine], GenerationParams(max_new_tokens=10))
    assert one.ids == alone(mine)[:10]
    got = {}
    while served.busy:
        collect(served, served.step(), got)
    assert got == {(number, 0): alone(other)[:10]}
    at_rest(served)


def test_compressed_pages_serve_too(tiny, rng):
    served = Engine(*tiny, EngineConfig(**SIZES | dict(kv_dtype="int8")))
    done = served.generate([rng.integers(0, TINY.vocab_size, 9).tolist()] * 3, GenerationParams(max_new_tokens=8))
    assert {len(one.ids) for one in done} == {8}
    assert served._slots.kv.layers[0].k.dtype == jnp.int8
    at_rest(served)


def test_an_engine_works_where_floats_have_64_bits(tiny, alone, rng):
    """With every rule at once; what it works with has 32 all the same."""
    prompt = rng.integers(0, TINY.vocab_size, 9).tolist()
    rich = GenerationParams(
        max_new_tokens=5, sampling=Sampling(0.8, 5, 0.9, 3, 0.01), min_new_tokens=2, stop_ids=[4], logprobs=1,
        repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1, logit_bias={3: 1.0},
    )  # fmt: skip
    want = alone(prompt)[:5]
    jax.config.update("jax_enable_x64", True)
    try:
        with jax.numpy_dtype_promotion("standard"):
            served = Engine(*tiny, EngineConfig(**SIZES | dict(max_logprobs=1)))
            plain, _ = served.generate([prompt, prompt], [GenerationParams(5), rich])
    finally:
        jax.config.update("jax_enable_x64", False)
    assert plain.ids == want


def test_a_windowed_model_gives_back_what_is_behind(tiny, rng):
    """Every layer attends to 8 tokens: no more than a few pages a row, however long it gets."""
    model, params = tiny
    served = Engine(Windowed(model), params, EngineConfig(**SIZES | dict(num_pages=8, max_seqs=1)))
    assert not served.config.prefix_cache
    with pytest.raises(TooLongError):
        served.add_request([1] * 40, GenerationParams(max_new_tokens=40))
    [one] = served.generate([rng.integers(0, TINY.vocab_size, 9).tolist()], GenerationParams(max_new_tokens=20))
    assert len(one.ids) == 20
    at_rest(served)


def test_guesses_do_not_push_what_a_window_sees_out_of_the_pages(tiny, rng):
    """A text that repeats itself is guessed, and guesses that are wrong are taken back."""
    model, params = Windowed(tiny[0]), tiny[1]
    config = EngineConfig(**SIZES)
    prompts = [rng.integers(0, TINY.vocab_size, 6).tolist() * 3 for _ in range(12)]
    plain, guessing = (Engine(model, params, replace(config, draft_tokens=n, ngram=1)) for n in (0, 5))
    how = GenerationParams(max_new_tokens=40)
    assert guessing.generate(prompts, how) == plain.generate(prompts, how)
    at_rest(guessing)


def test_names_are_public():
    assert {"Engine", "EngineConfig", "GenerationParams", "Stats", "Update"} <= set(paxattn.__all__)
