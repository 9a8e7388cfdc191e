"""A real model against Hugging Face transformers' outputs in float32 (tests/goldens, see the note in it)."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import load, tokenizer
from paxattn import Engine, EngineConfig, GenerationParams, PagedKV, Uncached, generate

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "smollm2.json").read_text(encoding="utf-8"))
PROMPTS = [(one["prompt_ids"], one["out_ids"]) for one in GOLDENS["prompts"]]


@pytest.fixture(scope="module")
def smollm2():
    return load.load(None, jnp.float32)


REFERENCE = pytest.param("reference", marks=pytest.mark.slow)


@pytest.mark.parametrize("implementation", ["xla", REFERENCE])
def test_greedy_tokens_equal_transformers(smollm2, new_store, implementation):
    """All prompts as one batch, in every store."""
    model, params, tokens = smollm2
    store = new_store(model.config, len(PROMPTS), 160, implementation=implementation)
    prompts = [prompt for prompt, _ in PROMPTS]
    got = generate(model, params, store, prompts, max_new_tokens=64, stop_ids=tokens.stop_ids)
    for one, (_, want), golden in zip(got, PROMPTS, GOLDENS["prompts"], strict=True):
        assert one.ids == want, golden["name"]
        assert one.reason == ("length" if len(want) == 64 else "stop")


def test_the_engine_serves_them_in_a_third_of_the_pages(smollm2):
    """Prompts in chunks, requests that give way and come back."""
    model, params, tokens = smollm2
    config = EngineConfig(
        max_seqs=8, max_len=160, num_pages=28, prefill_tokens=64, decode_steps=8, max_stop_ids=len(tokens.stop_ids)
    )
    engine = Engine(model, params, config)
    how = GenerationParams(max_new_tokens=64, stop_ids=tokens.stop_ids)
    got = engine.generate([prompt for prompt, _ in PROMPTS], how)
    for one, (_, want), golden in zip(got, PROMPTS, GOLDENS["prompts"], strict=True):
        assert one.ids == want, golden["name"]
        assert one.reason == ("length" if len(want) == 64 else "stop")
    engine.drain()
    stats = engine.stats()
    assert stats.preempted > 0
    assert stats.num_free + stats.num_cached == stats.num_pages == 28


@pytest.mark.slow
def test_one_prompt_at_a_time_says_the_same(smollm2, new_store):
    model, params, tokens = smollm2
    for prompt, want in PROMPTS[::3]:
        store = new_store(model.config, 1, 160)
        [got] = generate(model, params, store, [prompt], max_new_tokens=64, stop_ids=tokens.stop_ids)
        assert got.ids == want


LONGEST = 96


def score(smollm2, kv, ids):
    """Logits [T,V] at every position of one text."""
    model, params, _ = smollm2
    return forward(model, params, kv, jnp.asarray(ids))


@partial(jax.jit, static_argnums=0)
def forward(model, params, kv, ids):
    hidden, _ = model(params, ids, jnp.arange(len(ids)), kv)
    return model.logits(params, hidden)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_final_position_logits_agree(smollm2, implementation):
    for golden in GOLDENS["prompts"]:
        ids = golden["prompt_ids"]
        segments = (jnp.arange(LONGEST) >= len(ids)).astype(jnp.int32)
        padded = ids + [0] * (LONGEST - len(ids))
        logits = score(smollm2, Uncached(segments, implementation), padded)[len(ids) - 1]
        top = golden["top20"]
        np.testing.assert_allclose(logits[jnp.asarray(top["ids"])], top["logits"], atol=2e-3)
        np.testing.assert_allclose(jax.nn.logsumexp(logits), top["logsumexp"], atol=2e-3)
        assert set(jax.lax.top_k(logits, 20)[1].tolist()) == set(top["ids"])


@pytest.mark.parametrize("implementation", ["xla", REFERENCE])
@pytest.mark.parametrize("cached", [True, False], ids=["paged", "uncached"])
def test_perplexity_agrees(smollm2, cached, implementation):
    golden = GOLDENS["perplexity"][0]
    ids, c = golden["ids"], smollm2[0].config
    kv = Uncached(jnp.zeros(len(ids), jnp.int32), implementation)
    if cached:
        kv = PagedKV.create(
            c.num_layers,
            c.num_kv_heads,
            c.head_dim,
            max_seqs=1,
            max_len=len(ids),
            dtype=jnp.float32,
            implementation=implementation,
        )
        kv, _ = kv.extend(jnp.asarray([len(ids)]), num_tokens=len(ids))
    logprobs = jax.nn.log_softmax(score(smollm2, kv, ids))
    chosen = np.asarray(logprobs[jnp.arange(len(ids) - 1), jnp.asarray(ids[1:])])
    np.testing.assert_allclose(chosen, golden["logprobs"], atol=5e-3)
    assert abs(np.exp(-chosen.mean()) / golden["ppl"] - 1) < 1e-3


@pytest.mark.parametrize(("dtype", "most"), [("int8", 0.003), ("float8_e4m3fn", 0.015)])
def test_compressed_pages_hardly_move_the_perplexity(smollm2, dtype, most):
    golden = GOLDENS["perplexity"][0]
    ids, c = golden["ids"], smollm2[0].config
    sizes = dict(max_seqs=1, max_len=len(ids), dtype=dtype)
    kv = PagedKV.create(c.num_layers, c.num_kv_heads, c.head_dim, **sizes)
    kv, _ = kv.extend(jnp.asarray([len(ids)]), num_tokens=len(ids))
    logprobs = jax.nn.log_softmax(score(smollm2, kv, ids))
    chosen = np.asarray(logprobs[jnp.arange(len(ids) - 1), jnp.asarray(ids[1:])])
    print(f"perplexity with {dtype}: {np.exp(-chosen.mean()) / golden['ppl'] - 1:+.3%}")
    assert abs(np.exp(-chosen.mean()) / golden["ppl"] - 1) < most


def test_the_tokenizer_reproduces_every_string_both_ways(smollm2):
    tokens = smollm2[2]
    for golden in GOLDENS["tokenizer"]:
        assert tokens.encode(golden["text"]) == golden["ids"], golden["text"]
        assert tokens.encode(golden["text"], parse_special=False) == golden["ids_without_special"], golden["text"]
        assert tokens.decode(golden["ids"]) == golden["text"]
        assert tokens.continuation([], golden["ids_without_special"]) == golden["text"]
    for golden in GOLDENS["prompts"]:
        assert tokens.encode(golden["prompt"]) == golden["prompt_ids"]
        assert tokens.decode(golden["out_ids"]) == golden["out_text"]


def test_the_chat_template_gives_the_golden_chats(smollm2):
    tokens = smollm2[2]
    golden = {one["name"]: one for one in GOLDENS["prompts"]}
    question = [{"role": "user", "content": "What is the capital of France?"}]
    assert tokens.encode_chat(question) == golden["chat00"]["prompt_ids"]
    terse = [
        {"role": "system", "content": "You are a terse assistant. Answer in one word."},
        {"role": "user", "content": "What colour is the sky on a clear day?"},
    ]
    assert tokens.encode_chat(terse) == golden["chat04"]["prompt_ids"]


def test_streamed_text_never_shows_half_a_character(smollm2):
    tokens = smollm2[2]
    text = "naïve 😀👨‍👩‍👧‍👦 こんにちは"
    stream = tokenizer.TextStream(tokens)
    pieces = [stream.put(token) for token in tokens.encode(text)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.end() == text
    half = tokenizer.TextStream(tokens)
    cut = tokens.encode("😀")[:-1]
    assert "".join(half.put(token) for token in cut) == ""
    assert half.end() == tokens.decode(cut)
