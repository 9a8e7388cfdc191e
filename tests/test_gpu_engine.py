"""The serving loop in bfloat16, with the Hopper kernels: `XLA_FLAGS=... pytest -m gpu tests/test_gpu_engine.py`.

XLA_FLAGS is paxattn.XLA_FLAGS; without them the loop's conditions are read by the host, and a test is skipped.

Rounding depends on what else runs in a step, so that tokens may differ from those of a run alone. What is asked: where
a float32 model reads the text that was written, no token is further below the best than rounding explains.
"""

import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import at_rest

from models import decoder
from models.config import Config
from paxattn import Engine, EngineConfig, GenerationParams, Uncached
from paxattn.engine.slots import News
from scripts.profile_decode import host_operations, page_copies, profiled

CONFIG = Config(
    vocab_size=499, num_layers=2, embed_dim=192, mlp_dim=320, num_heads=6, num_kv_heads=2, head_dim=64, context=512
)
LONGEST = 192
SIZES = dict(max_seqs=6, max_len=LONGEST, num_pages=40, prefill_tokens=128, decode_steps=8)
KINDS = {
    "plain": {},
    "drafts": dict(draft_tokens=3, ngram=1, preemption="swap"),
    "int8": dict(kv_dtype="int8"),
}
IMPLEMENTATIONS = [pytest.param("xla", marks=pytest.mark.slow), pytest.param("mosaic_gpu", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def model():
    return decoder.random(CONFIG, dtype=jnp.bfloat16)


@partial(jax.jit, static_argnums=0)
def read(model, params, ids, length):
    """Float32 logits [LONGEST,V] of a padded text, of what the model computes in the parameters' dtype."""
    segments = (jnp.arange(LONGEST) >= length).astype(jnp.int32)
    hidden, _ = model(params, ids, jnp.arange(LONGEST), Uncached(segments, "xla"))
    return model.logits(params, hidden)


def below_the_best(model, params, prompt, ids):
    """How far each token lies below the best in float32 at most, and how far off bfloat16 puts any logit."""
    text = jnp.asarray(prompt + ids + [0] * (LONGEST - len(prompt) - len(ids)))
    length = len(prompt) + len(ids)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(read(model, exact, text, length))[len(prompt) - 1 : length - 1]
    rounded = np.asarray(read(model, params, text, length))[len(prompt) - 1 : length - 1]
    return (logits.max(axis=1) - logits[np.arange(len(ids)), ids]).max(), np.abs(rounded - logits).max()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_token_is_the_best_but_for_rounding(model, implementation, kind, compilations, rng):
    """More requests than rows and than pages, some alike, in the order that they come; nothing is compiled or read."""
    model, params = model
    served = Engine(model, params, EngineConfig(**SIZES | KINDS[kind], implementation=implementation))
    served.warmup()
    texts = rng.integers(0, CONFIG.vocab_size, (5, 100)).tolist()
    prompts = [texts[i % 5][: int(rng.integers(1, 101))] for i in range(20)]
    with compilations() as compiled, jax.transfer_guard_device_to_host("disallow"):
        done = served.generate(prompts, GenerationParams(max_new_tokens=80))
        while served.busy:
            served.step()
    assert compiled == []
    assert at_rest(served).preempted > 0
    told = [below_the_best(model, params, prompt, one.ids) for prompt, one in zip(prompts, done, strict=True)]
    rounding = max(error for _, error in told)
    # Two logits that are each off by twice what plain attention's are, as the kernels may be; int8 pages by more.
    most = (16 if kind == "int8" else 4) * rounding
    assert max(below for below, _ in told) <= most
    # And attention matters that much: the same tokens behind another prompt are no such thing.
    apart = [
        below_the_best(model, params, other, one.ids)[0] for other, one in zip(prompts[1:], done[:-1], strict=True)
    ]
    assert sorted(apart)[len(apart) // 2] > 2 * most


@pytest.mark.gpu
@pytest.mark.skipif("WHILE" not in os.environ.get("XLA_FLAGS", ""), reason="needs XLA_FLAGS as in paxattn.XLA_FLAGS")
def test_the_loop_stays_on_the_gpu(model, rng):
    """The host gets what a loop tells, once, however many steps it took; no page is copied."""
    served = Engine(*model, EngineConfig(**SIZES | dict(decode_steps=64, num_pages=1024), implementation="mosaic_gpu"))
    served.warmup()
    for program in served._programs.compiled.values():
        text = program.as_text()
        assert page_copies(text, served._slots.kv.layers[0].k.size) == []
        assert host_operations(text) == []

    def serve(_):
        nonlocal loops
        served.add_request(rng.integers(0, CONFIG.vocab_size, 20).tolist(), GenerationParams(max_new_tokens=150))
        while served.busy:
            served.step()
            loops += 1
        return served._slots.known

    loops = 0
    serve(None)
    before, loops = served.stats().steps, 0
    events = profiled(serve, None)
    copies = sum(count for name, count in events.items() if "d2h" in name.lower())
    assert served.stats().steps - before >= 150
    assert 0 < copies <= loops * len(News.__dataclass_fields__) < 150
