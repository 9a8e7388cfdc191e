"""What an engine is given: a bad value is named and nothing runs, and num_pages="auto" fits the memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from engine_cases import SIZES, at_rest, collect

from paxattn import Engine, EngineConfig, GenerationParams, InvalidParamsError, Sampling
from paxattn.engine import memory


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
