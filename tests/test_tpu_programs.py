"""What XLA makes of whole programs with the TPU kernels in them: steps of a decoder, and calls of several chips."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tpu import GENERATIONS, chips, compile_for, compile_over, slow_but

import paxattn
from models import decoder
from models.config import Config
from paxattn.engine import generate, slots
from paxattn.engine.sampling import Sampling
from paxattn.kv import stores

TPU = "mosaic_tpu"
LLAMA_8B = Config(128256, 32, 4096, 14336, 32, 8, 128, context=8192, rope_theta=5e5)
ROWS, LENGTH = 32, 2048  # which fit beside the weights


@pytest.fixture
def written_by_name(monkeypatch):
    """Stores leave the choice of write_pages' kernel to the platform."""
    monkeypatch.setattr(stores, "write_pages", partial(paxattn.write_pages, implementation=TPU))


@pytest.mark.slow
@pytest.mark.usefixtures("written_by_name")
def test_steps_of_a_decoder_copy_no_pages():
    model, params = decoder.abstract(LLAMA_8B, jnp.bfloat16)
    create = partial(paxattn.PagedKV.create, 32, 8, 128, max_seqs=ROWS, max_len=LENGTH, implementation=TPU)
    kv = jax.eval_shape(lambda: create(dtype=jnp.bfloat16))
    rules = jax.eval_shape(lambda: (Sampling().checked(), generate.stopping((), 128)))
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    prefill, step = (partial(f.__wrapped__, model) for f in (generate._prefill, generate._step))
    prompts = (params, kv, ints(2048), ints(ROWS), None, *rules)
    state = jax.eval_shape(prefill, *prompts)[0]
    for program, args in ((prefill, prompts), (step, (params, state))):
        check_in_place(kv.layers[0].k, compile_for("v6e", jax.jit(program, donate_argnums=1), *args))


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, -1], ids=["decode", "prompts"])
@pytest.mark.usefixtures("written_by_name")
def test_loops_of_an_engine_copy_no_pages(which):
    config = replace(LLAMA_8B, num_layers=1, vocab_size=1024)  # larger ones take minutes
    engine = paxattn.EngineConfig(max_seqs=64, max_len=LENGTH, implementation=TPU, draft_tokens=4)

    def state():
        size = dict(max_seqs=engine.max_seqs, max_len=engine.max_len, dtype=jnp.bfloat16, implementation=TPU)
        kv = paxattn.PagedKV.create(config.num_layers, config.num_kv_heads, config.head_dim, **size)
        return slots.Slots.create(kv, engine.max_stop_ids, engine.max_logit_bias)

    model, params = decoder.abstract(config, jnp.bfloat16)
    number, state = jax.ShapeDtypeStruct((), jnp.int32), jax.eval_shape(state)
    run = partial(slots.run.__wrapped__, model, shape=engine.shapes[which])
    compiled = compile_for("v6e", jax.jit(run, donate_argnums=1), params, state, number, number)
    check_in_place(state.kv.layers[0].k, compiled)
    assert ("paged_attention_many" in compiled.as_text()) == (which == -1)


def check_in_place(pages, compiled):
    shape = re.escape(str(list(pages.shape)).replace(" ", ""))
    made = set(re.findall(rf"= \w+{shape}\S* ([\w-]+)\(", compiled.as_text()))
    assert made <= {"parameter", "get-tuple-element", "bitcast"}
    assert "write_pages" in compiled.as_text()
    assert "paged_attention_few" in compiled.as_text()


P = PartitionSpec
HEADS, PAGES, WHOLE = P(None, "h"), P(None, None, "h"), P()


@pytest.mark.parametrize("generation", GENERATIONS)
def test_decode_compiles_for_four_chips_that_share_the_heads(generation):
    mesh = jax.sharding.Mesh(np.array(chips(generation)[:4]), ("h",))

    def step(q, k, v, pages, slots, table, lens, ends):
        pages = paxattn.write_pages(pages, k, v, slots, implementation=TPU)
        return paxattn.paged_attention(q, pages, table, lens, ends, max_q_len=1, implementation=TPU), pages

    specs = (HEADS, HEADS, HEADS, PAGES, WHOLE, WHOLE, WHOLE, WHOLE)
    sharded = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=(HEADS, PAGES))
    numbers = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    pages = paxattn.KVPages(numbers(4096, 16, 8, 128), numbers(4096, 16, 8, 128))
    args = (numbers(ROWS, 32, 128), *[numbers(ROWS, 8, 128)] * 2, pages, ints(ROWS), ints(ROWS, 128))
    args += (ints(ROWS), ints(ROWS + 1))
    text = compile_over(mesh, jax.jit(sharded, donate_argnums=3), specs, args).as_text()
    assert not re.search(r"all-gather|all-reduce|collective|all-to-all", text)
    assert not re.search(r"= \w+\[4096,16,2,128\]\S* (?:copy|fusion|transpose)\(", text)


@pytest.mark.parametrize("generation", slow_but(GENERATIONS, ["v6e"]))
def test_gradients_compile_for_four_chips_that_share_the_heads(generation):
    mesh = jax.sharding.Mesh(np.array(chips(generation)[:4]), ("h",))
    attend = partial(paxattn.flash_attention, causal=True, implementation=TPU)
    spec = P(None, None, "h")
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    loss = lambda *x: sharded(*x).astype(jnp.float32).sum()
    q, kv = (jax.ShapeDtypeStruct((1, 4096, n, 128), jnp.bfloat16) for n in (32, 8))
    text = compile_over(mesh, jax.grad(loss, (0, 1, 2)), (spec,) * 3, (q, kv, kv)).as_text()
    assert "flash_attention_bwd" in text
    assert not re.search(r"all-gather|collective|all-to-all", text)
