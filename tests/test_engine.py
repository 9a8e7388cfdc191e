"""The serving loop on a tiny decoder: whatever else runs, a request gets the tokens that it gets alone."""

import asyncio
import importlib
import random
import signal
import time
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_gpu_lowering import module_for_cuda

import paxattn
from models import decoder
from paxattn import (
    Engine,
    EngineConfig,
    GenerationParams,
    InvalidParamsError,
    PagedKV,
    Sampling,
    TooLongError,
    Uncached,
    UnknownRequestError,
    dispatch,
    generate,
)
from paxattn.engine import edits, memory, program_file, programs, slots
from paxattn.engine.engine import BrokenEngineError
from paxattn.engine.interrupts import postponed
from scripts.profile_decode import host_operations, page_copies

SIZES = dict(max_seqs=4, max_len=96, page_size=4, num_pages=30, prefill_tokens=16, decode_steps=6)
KINDS = {
    "recompute": {},
    "swap": dict(preemption="swap"),
    "drafts": dict(draft_tokens=3, ngram=1, prefill_tokens=5),
    "no prefixes": dict(prefix_cache=False, prefill_tokens=5),
}
LONGEST = 64  # tokens of a request in the random programs: more than half of the pages


@pytest.fixture(scope="module")
def engine(tiny):
    """The engine of a kind, the same for all tests of this file; each leaves it at rest."""
    made = {}

    def get(kind="recompute"):
        if kind not in made:
            text = lambda ids: " ".join(map(str, ids)) + " "
            made[kind] = Engine(*tiny, EngineConfig(**SIZES | KINDS[kind]), detokenize=text)
        return made[kind]

    return get


@pytest.fixture(scope="module")
def alone(tiny):
    """Greedy tokens of a prompt that has a store to itself."""
    known = {}

    def run(prompt):
        key = tuple(prompt)
        if key not in known:
            kv = PagedKV.create(2, 2, 16, max_seqs=1, max_len=96, page_size=4, dtype=jnp.float32)
            [one] = generate(*tiny, kv, [prompt], max_new_tokens=LONGEST - len(prompt))
            known[key] = one.ids
        return known[key]

    return run


def at_rest(engine):
    """Nothing runs, nobody but the prefix index owns a page."""
    while engine.busy:
        engine.step()
    stats, table = engine.stats(), engine._slots.kv.table
    assert stats.num_free + stats.num_cached == stats.num_pages
    assert int(table.num_free) == stats.num_free
    assert int((table.owners > 0).sum()) == stats.num_cached
    assert not bool((table.lens > 0).any())
    return stats


def collect(engine, updates, got):
    for update in updates:
        got.setdefault((update.id, update.index), []).extend(update.ids)


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


def test_nothing_is_compiled_after_warmup_and_nothing_read_inside_the_loop(tiny, compilations, rng):
    """A swapping engine, which has the most programs, under pressure; other sizes than any other test's."""
    config = EngineConfig(
        max_seqs=3,
        max_len=48,
        page_size=4,
        num_pages=17,
        prefill_tokens=256,
        decode_steps=5,
        preemption="swap",
        draft_tokens=2,
        ngram=1,
    )
    served = Engine(*tiny, config)
    ready = []
    served.warmup(lambda done, total: ready.append((done, total)))
    assert ready == [(i, len(ready)) for i in range(1, len(ready) + 1)]
    prompts = [rng.integers(0, TINY.vocab_size, int(n)).tolist() for n in rng.integers(1, 30, 12)]
    rich = GenerationParams(
        max_new_tokens=17, sampling=Sampling(0.8, 5, 0.9, 3, 0.01), stop_ids=[4], min_new_tokens=2, num_samples=3,
        repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1, logit_bias={3: 1.0}, logprobs=0,
    )  # fmt: skip
    with compilations() as compiled, jax.transfer_guard_device_to_host("disallow"):
        for i, prompt in enumerate(prompts):
            served.add_request(prompt, rich if i % 3 == 0 else GenerationParams(max_new_tokens=18))
            served.step()
        served.cancel(11)
        stats = at_rest_without_reading(served)
    assert compiled == []
    assert stats.preempted > 0
    at_rest(served)
    # So many pages that no other array of a step is as large.
    large = jax.eval_shape(lambda: served._create(4096))
    for shape in (config.shapes[0], config.shapes[-1]):
        program = served._programs.lower(shape, served.params, large).compile().as_text()
        assert host_operations(program) == []
        assert page_copies(program, large.kv.layers[0].k.size) == []


def test_programs_are_kept_in_a_file(tiny, alone, monkeypatch, tmp_path, rng):
    """None is traced again, and what was compiled for something else is refused by name."""
    file, config = tmp_path / "programs.zip", EngineConfig(**SIZES | dict(max_len=80))
    with pytest.raises(ValueError, match=r"^export: got an engine without programs"):
        Engine(*tiny, config).export(file)
    first = Engine(*tiny, config)
    first.warmup()
    first.export(file)
    second = Engine(*tiny, config)
    prompt = rng.integers(0, TINY.vocab_size, 30).tolist()
    with monkeypatch.context() as patch:
        for module, name in ((programs, "run"), (edits, "apply"), (edits, "fork")):
            patch.setattr(module, name, None)
        second.restore(file)
        [one] = second.generate([prompt], GenerationParams(max_new_tokens=12))
        many = second.generate([prompt], GenerationParams(max_new_tokens=5, num_samples=3))
    assert one.ids == alone(prompt)[:12]
    assert [each.ids for each in many] == [alone(prompt)[:5]] * 3
    at_rest(second)
    with pytest.raises(ValueError, match=r"programs\.zip: programs for config EngineConfig\(max_seqs=4.*export"):
        Engine(*tiny, replace(config, decode_steps=7)).restore(file)
    model, params = tiny
    other = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    with pytest.raises(ValueError, match=r"programs for (model|params)"):
        Engine(model, other, config).restore(file)
    with (
        jax.default_matmul_precision("highest"),
        pytest.raises(ValueError, match=r"programs for jax_default_matmul_precision None, not highest"),
    ):
        second.restore(file)


def test_programs_that_cannot_be_kept_are_not_written(tiny, tmp_path):
    """Those of a CPU that have run a sort, or that JAX may have taken from its own cache."""
    file = tmp_path / "programs.zip"
    file.write_bytes(b"an older one")
    served = Engine(*tiny, EngineConfig(**SIZES | dict(max_len=80)))
    served.warmup()
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        with pytest.raises(ValueError, match=r"programs\.zip: .* jax_enable_compilation_cache=False, warm up"):
            served.export(file)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    served.generate([[1, 2, 3]], GenerationParams(max_new_tokens=3))
    with pytest.raises(ValueError, match=r"programs\.zip: .* export right after warmup"):
        served.export(file)
    assert file.read_bytes() == b"an older one"
    assert list(tmp_path.iterdir()) == [file]


def test_an_engine_is_as_it_was_after_programs_that_do_not_run(tiny, alone, monkeypatch, tmp_path, rng):
    file, config = tmp_path / "programs.zip", EngineConfig(**SIZES | dict(max_len=80))
    served, prompt = Engine(*tiny, config), rng.integers(0, TINY.vocab_size, 20).tolist()
    want = alone(prompt)[:6]
    assert served.generate([prompt], GenerationParams(6))[0].ids == want
    at_rest(served)
    file.write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"programs\.zip: programs that do not run here"):
        served.restore(file)
    at_rest(served)

    def fail(*arguments):
        """As a program that has taken the pages and lacks a function."""
        for x in jax.tree.leaves(arguments[:2]):
            x.delete()
        raise jax.errors.JaxRuntimeError("INTERNAL: Function sort not found")

    monkeypatch.setattr(program_file, "load", lambda path, about, trees: dict.fromkeys(trees, lambda *x: fail(x[1])))
    with pytest.raises(ValueError, match=r"programs\.zip: programs that do not run here .*sort not found"):
        served.restore(file)
    assert served.generate([prompt], GenerationParams(6))[0].ids == want
    at_rest(served)
    served.add_request(prompt, GenerationParams(6))
    with pytest.raises(ValueError, match=r"^restore: got an engine with steps to take"):
        served.restore(file)
    at_rest(served)


def test_a_model_is_known_by_what_it_computes(tiny):
    model, params = tiny
    digest = memory.digest(Windowed(model), params)
    assert digest == memory.digest(Windowed(model), params)
    assert len({digest, memory.digest(model, params), memory.digest(Windowed(model, window=4), params)}) == 3


def test_the_loop_lowers_for_a_gpu(monkeypatch):
    """With the Hopper kernels by name, each lowered once for all layers: as far as a machine without a GPU can tell."""
    kernels = importlib.import_module(dispatch.MODULES["paged_attention"]["mosaic_gpu"])
    monkeypatch.setattr(kernels, "on_hopper", lambda: True)
    model, params = decoder.random(replace(TINY, head_dim=64), dtype=jnp.bfloat16)
    config = EngineConfig(max_seqs=4, max_len=64, num_pages=16, prefill_tokens=128, implementation="mosaic_gpu")
    served = Engine(model, params, config)

    def lowered(shape):
        run = partial(slots.run, model, shape=shape, limit=jnp.int32(3), idle=jnp.int32(1))
        return module_for_cuda(lambda params, state: run(params, state), params, served._slots)

    for shape in config.shapes:
        # One reads rows of few queries, the other those of many.
        assert lowered(shape).count("custom_call @mosaic_gpu") == (2 if shape.prefill else 1)
    # The loop itself, and those in which top-k and top-p look for their thresholds: each round of one is many launches.
    # Not seen in what is exported, which has a loop for each cumsum.
    loop = slots.run.trace(model, params, served._slots, np.int32(3), np.int32(1), shape=config.shapes[0])
    assert loop.lower(lowering_platforms=("cuda",)).as_text().count("stablehlo.while") == 3


def at_rest_without_reading(engine):
    while engine.busy:
        engine.step()
    return engine.stats()


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


def test_what_detokenize_raises_ends_its_request_alone(engine, alone, monkeypatch, rng):
    """Others lose no token, and no page is lost, whenever it comes: also where others end in the same loop."""
    served, text = engine(), engine().detokenize
    for calls in (1, 2, 3):
        left = iter(range(calls - 1, -1, -1))

        def fail(ids, left=left):
            if next(left, 1) == 0:
                raise RuntimeError("no such token")
            return text(ids)

        monkeypatch.setattr(served, "detokenize", fail)
        prompts = [rng.integers(0, TINY.vocab_size, 9).tolist() for _ in range(4)]
        lengths = (12, 3, 20, 6)
        numbers = [
            served.add_request(prompt, GenerationParams(new, stop_strings=["zz"] if new == 12 else ()))
            for prompt, new in zip(prompts, lengths, strict=True)
        ]
        got, raised = {}, 0
        while served.busy:
            try:
                collect(served, served.step(), got)
            except RuntimeError:
                raised += 1
        assert raised == 1
        for number, prompt, new in list(zip(numbers, prompts, lengths, strict=True))[1:]:
            assert got[number, 0] == alone(prompt)[:new]
        at_rest(served)
        assert served._live == {}


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


def test_an_interrupt_comes_between_steps(engine, alone, monkeypatch, rng):
    """Wherever it strikes: every other request gets its tokens, and no page is lost."""
    served, strike = engine(), random.Random(int(rng.integers(2**31)))
    prompts = [rng.integers(0, TINY.vocab_size, n).tolist() for n in (5, 30, 12)]
    served.generate(prompts, GenerationParams(24, num_samples=2))
    monkeypatch.setattr(signal, "SIGINT", signal.SIGALRM)
    old = signal.signal(signal.SIGALRM, signal.default_int_handler)
    interrupted = 0
    try:
        for _ in range(20):
            number = served.add_request(prompts[0], GenerationParams(24))
            signal.setitimer(signal.ITIMER_REAL, 0.001 + 0.02 * strike.random())
            got = {}
            try:
                served.generate(prompts, GenerationParams(24, num_samples=2))
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
            collect(served, served.drain(), got)
            while served.busy:
                collect(served, served.step(), got)
            assert got == {(number, 0): alone(prompts[0])[:24]}
            at_rest(served)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert interrupted > 0
    assert served._live == {}


def test_an_interrupt_waits_for_the_end_of_a_block_and_a_second_does_not():
    done = []

    def until_the_end():
        with postponed():
            signal.raise_signal(signal.SIGINT)
            done.append("whole")

    def until_let_in():
        with postponed() as let_in:
            signal.raise_signal(signal.SIGINT)
            let_in()
            done.append("never")

    def impatient():
        with postponed(), postponed():
            for _ in range(4):
                signal.raise_signal(signal.SIGINT)
            done.append("never")

    for run in (until_the_end, until_let_in, impatient):
        with pytest.raises(KeyboardInterrupt):
            run()
    assert done == ["whole"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_step_that_fails_halfway_is_the_last(tiny):
    """And what failed is the cause of what is raised afterwards."""
    served = Engine(*tiny, EngineConfig(**SIZES | dict(implementation="mosaic_gpu")))
    with pytest.raises(Exception, match="mosaic_gpu") as first:
        served.generate([[1, 2]], GenerationParams(3))
    for call in (served.step, served.drain, lambda: served.add_request([1])):
        with pytest.raises(BrokenEngineError, match="make another engine") as later:
            call()
        assert later.value.__cause__ is first.value


def test_what_was_checked_is_what_runs(engine, alone, rng):
    """Params that are changed behind an engine's back, and texts that can be gone through once."""
    served = engine()
    prompt = rng.integers(0, TINY.vocab_size, 9).tolist()
    biases, stops, got = {5: 100.0}, [96], {}
    number = served.add_request(prompt, GenerationParams(4, logit_bias=biases, stop_ids=stops))
    biases[6] = 200.0
    stops += range(60, 80)
    while served.busy:
        collect(served, served.step(), got)
    assert got[number, 0] == [5] * 4
    want = alone(prompt)
    string = f" {want[3]} "
    once, twice = (
        served.generate([prompt], GenerationParams(20, stop_strings=strings, num_samples=2))
        for strings in ((x for x in [string]), [string])
    )
    assert once == twice
    assert {one.reason for one in once} == {"stop"}
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


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(min_new_tokens=9), "min_new_tokens"),
        (dict(num_samples=0), "num_samples"),
        (dict(sampling=Sampling(-1.0)), "temperature"),
        (dict(sampling=Sampling(top_p=0.0)), "top_p"),
        (dict(sampling=Sampling(min_p=1.5)), "min_p"),
        (dict(sampling=0.7), "sampling"),
        (dict(sampling=Sampling(None)), "temperature"),
        (dict(sampling=Sampling("0.7")), "temperature"),
        (dict(sampling=Sampling(np.ones(1))), "temperature"),
        (dict(sampling=Sampling(1e-50)), "temperature"),
        (dict(sampling=Sampling(top_k=None)), "top_k"),
        (dict(sampling=Sampling(top_k=float("inf"))), "top_k"),
        (dict(sampling=Sampling(top_k=2.7)), "top_k"),
        (dict(sampling=Sampling(top_p=1e-50)), "top_p"),
        (dict(sampling=Sampling(seed=None)), "seed"),
        (dict(sampling=Sampling(seed=1.9)), "seed"),
        (dict(stop_ids=[1.5]), "stop_ids"),
        (dict(stop_ids=range(9)), "stop_ids"),
        (dict(stop_strings="end"), "stop_strings"),
        (dict(stop_strings=[""]), "stop_strings"),
        (dict(stop_strings=None), "stop_strings"),
        (dict(stop_strings=5), "stop_strings"),
        (dict(stop_ids=[[1], [2, 3]]), "stop_ids"),
        (dict(stop_ids=[97]), "stop_ids"),
        (dict(logit_bias=None), "logit_bias"),
        (dict(logit_bias=[1, 2]), "logit_bias"),
        (dict(logit_bias={97: 1.0}), "logit_bias"),
        (dict(logit_bias={1: 1e39}), "logit_bias"),
        (dict(repetition_penalty=1e-50), "repetition_penalty"),
        (dict(presence_penalty=1e39), "presence_penalty"),
        (dict(logit_bias={-1: 1.0}), "logit_bias"),
        (dict(logit_bias={1: float("nan")}), "logit_bias"),
        (dict(logit_bias=dict.fromkeys(range(17), 1.0)), "logit_bias"),
        (dict(repetition_penalty=0.0), "repetition_penalty"),
        (dict(presence_penalty=float("inf")), "presence_penalty"),
        (dict(frequency_penalty="much"), "frequency_penalty"),
        (dict(logprobs=1), "logprobs"),
        (dict(priority=0.5), "priority"),
        (dict(salt=3), "salt"),
    ],
    ids=str,
)
def test_a_bad_value_is_named_and_nothing_runs(engine, change, name):
    served = engine()
    with pytest.raises(InvalidParamsError, match=f"^{name}: got"):
        served.generate([[1, 2], [3]], [GenerationParams(9), GenerationParams(**dict(max_new_tokens=8) | change)])
    at_rest(served)
    assert served.stats().waiting == 0


@pytest.mark.parametrize("prompt", [[], [-1], [1.5], [[1]], [2**31], [97], [[1], [2, 3]], "text", None], ids=str)
def test_what_is_no_prompt_is_refused(engine, prompt):
    with pytest.raises(ValueError, match=r"^prompt: got"):
        engine().add_request(prompt)


def test_what_is_no_request_is_refused(engine):
    served = engine()
    served.add_request([1], GenerationParams(3))
    for params in ({}, dict(max_new_tokens=3), Sampling()):
        with pytest.raises(InvalidParamsError, match=r"^params: got .* a GenerationParams or None"):
            served.add_request([1], params)
    for number in ([1], 0.0, True, "1"):
        with pytest.raises(ValueError, match=r"^number: got .* an id that add_request gave"):
            served.cancel(number)
    for prompts in (None, 5, "text", iter([[1]])):
        with pytest.raises(ValueError, match=r"^prompts: got"):
            served.generate(prompts)
    at_rest(served)


def test_stop_strings_need_a_way_to_make_text(tiny):
    served = Engine(*tiny, EngineConfig(**SIZES))
    with pytest.raises(InvalidParamsError, match=r"^stop_strings: got .* empty without detokenize"):
        served.add_request([1], GenerationParams(stop_strings=["x"]))


@pytest.mark.parametrize(
    "change",
    [
        dict(max_seqs=0), dict(num_pages=0), dict(memory_fraction=0.0), dict(preemption="hope"), dict(draft_tokens=-1),
        dict(decode_steps=1.5), dict(patience=0), dict(max_logprobs=-1), dict(max_logprobs=98), dict(prefix_cache="no"),
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_config_is_named(tiny, change):
    with pytest.raises(ValueError, match=f"^{next(iter(change))}: got"):
        Engine(*tiny, EngineConfig(**SIZES | change))


def test_a_config_is_no_dict(tiny):
    with pytest.raises(ValueError, match=r"^config: got .* an EngineConfig"):
        Engine(*tiny, SIZES)


def test_a_model_tells_what_it_keeps(tiny):
    layout = memory.layout(*tiny)
    assert layout.vocabulary == TINY.vocab_size
    assert (layout.num_layers, layout.num_kv_heads, layout.head_dim, layout.dtype) == (2, 2, 16, jnp.float32)
    assert layout.window is None
    assert layout.page_bytes(4, jnp.float32) == 2 * 2 * 4 * 2 * 16 * 4
    assert layout.page_bytes(4, "int8") == 2 * 4 * 2 * (16 + 16 + 2 + 2)


def test_auto_takes_what_the_memory_has_room_for(monkeypatch, tiny):
    """Of 1000 bytes: the fraction, less what is there and what the program takes."""

    class Device:
        def memory_stats(self):
            return dict(bytes_limit=1000, bytes_in_use=300)

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert memory.room_for_pages(20, 50, 0.9, lambda: 200) == 8
    assert memory.room_for_pages(7, 50, 0.9, lambda: 200) == 7
    with pytest.raises(ValueError, match=r"^num_pages: got 'auto'"):
        memory.room_for_pages(20, 50, 0.5, lambda: 200)


def test_the_program_is_not_compiled_to_see_that_few_pages_fit(monkeypatch):
    """Half of the 600 bytes that are left are enough."""

    class Device:
        def memory_stats(self):
            return dict(bytes_limit=1000, bytes_in_use=300)

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert memory.room_for_pages(6, 50, 0.9, lambda: pytest.fail("compiled")) == 6


def test_auto_takes_no_more_than_rows_can_hold(tiny):
    served = Engine(*tiny, EngineConfig(**SIZES | dict(num_pages="auto")))
    assert served.num_pages == 4 * 24


def test_streams_run_together(engine, alone, rng):
    served = engine()
    prompts = [rng.integers(0, TINY.vocab_size, n).tolist() for n in (5, 30, 12)]

    async def read(prompt, samples):
        ids = [[] for _ in range(samples)]
        async for update in served.stream(prompt, GenerationParams(max_new_tokens=15, num_samples=samples)):
            ids[update.index] += update.ids
        return ids

    async def all_of_them():
        return await asyncio.gather(*(read(prompt, 1 + i) for i, prompt in enumerate(prompts)))

    for _ in range(2):  # each in an event loop of its own
        got = asyncio.run(all_of_them())
        assert got == [[alone(prompt)[:15]] * (1 + i) for i, prompt in enumerate(prompts)]
    at_rest(served)


def test_who_leaves_a_stream_cancels_it(engine, alone, rng):
    served = engine()
    prompts = [rng.integers(0, TINY.vocab_size, n).tolist() for n in (5, 12)]

    async def leave():
        stream = served.stream(prompts[0], GenerationParams(max_new_tokens=60))
        async for _ in stream:
            break
        await stream.aclose()

    async def read():
        return [
            i async for update in served.stream(prompts[1], GenerationParams(max_new_tokens=20)) for i in update.ids
        ]

    async def both():
        return await asyncio.gather(leave(), read())

    assert asyncio.run(both())[1] == alone(prompts[1])[:20]
    at_rest(served)
    assert served._live == {}


def test_streams_hear_of_a_failure(engine, monkeypatch):
    served = engine()

    async def read():
        return [update async for update in served.stream([1, 2], GenerationParams(max_new_tokens=3))]

    def fail():
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(served, "step", fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        asyncio.run(read())
    monkeypatch.undo()
    at_rest(served)


def test_all_streams_hear_the_same_failure(engine, monkeypatch):
    """Also those that come to it after the first has left, and nothing is left of any."""
    served, step, failures = engine(), engine().step, iter([RuntimeError("no such token")])

    def fail_once():
        for error in failures:
            raise error
        return step()

    async def read(prompt):
        return [update async for update in served.stream(prompt, GenerationParams(max_new_tokens=30))]

    async def all_of_them():
        return await asyncio.gather(*(read([i] * 9) for i in range(3)), return_exceptions=True)

    monkeypatch.setattr(served, "step", fail_once)
    assert [str(error) for error in asyncio.run(all_of_them())] == ["no such token"] * 3
    monkeypatch.undo()
    at_rest(served)
    assert served._live == {}


def test_a_stream_may_be_left_after_its_request_has_ended(engine):
    served = engine()

    async def leave_late():
        stream = served.stream([1, 2, 3], GenerationParams(max_new_tokens=20))
        async for _ in stream:
            while served._live:
                await asyncio.sleep(0.01)
            break
        await stream.aclose()

    asyncio.run(leave_late())
    at_rest(served)


def test_no_step_goes_on_beside_another_when_streams_are_cancelled(engine, monkeypatch):
    """At the end of an event loop, which cancels the task that waits for a step, but not the thread that takes it."""
    served, inside = engine(), []

    def alone(name):
        call = getattr(served, name)

        def guarded(*args):
            assert not inside
            inside.append(name)
            time.sleep(0.02)
            try:
                return call(*args)
            finally:
                inside.pop()

        return guarded

    for name in ("step", "cancel"):
        monkeypatch.setattr(served, name, alone(name))
    failures = []

    async def read(number):
        try:
            async for _ in served.stream([number] * 5, GenerationParams(max_new_tokens=60)):
                pass
        except AssertionError as error:
            failures.append(error)
            raise

    async def leave(seconds):
        tasks = [asyncio.create_task(read(i)) for i in range(4)]
        await asyncio.sleep(seconds)
        assert not any(task.done() for task in tasks)

    for seconds in (0.03, 0.05, 0.06):
        asyncio.run(leave(seconds))
        assert not inside
        assert not failures
        assert served._live == {}
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


class Windowed:
    """A model whose layers all have a window."""

    def __init__(self, model, window=8):
        self.model, self.window = model, window

    def __call__(self, params, tokens, positions, kv):
        hidden, kv = self.model(params, tokens, positions, _WindowedKV(kv, self.window))
        return hidden, kv.kv

    def logits(self, params, hidden):
        return self.model.logits(params, hidden)


class _WindowedKV:
    def __init__(self, kv, window):
        self.kv, self.window = kv, window

    def attend(self, layer, q, k, v, **options):
        out, kv = self.kv.attend(layer, q, k, v, window=self.window, **options)
        return out, _WindowedKV(kv, self.window)


def test_names_are_public():
    assert {"Engine", "EngineConfig", "GenerationParams", "Stats", "Update"} <= set(paxattn.__all__)
