"""The TPU kernels of paged_attention and write_pages: their numbers in interpret mode, and that they compile."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PAGED, error, paged_inputs
from test_paged_attention import LOW, run
from tpu import GENERATIONS, compile_for, interpreted

from paxattn import KVPages, init_pages, paged_attention, write_pages
from paxattn.kernels import tpu_paged_write

TPU = "mosaic_tpu"


def interpret(case, inputs):
    with interpreted():
        return jax.block_until_ready(run(case, inputs, TPU))


@pytest.mark.parametrize("case", PAGED, ids=str)
def test_float32_equals_the_oracle(case, rng):
    inputs = paged_inputs(case, rng, jnp.float32)
    out, lse = interpret(case, inputs)
    want_out, want_lse = run(case, inputs, "reference")
    np.testing.assert_allclose(out, want_out, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(lse, want_lse, rtol=2e-5, atol=2e-5)
    tokens = sum(case.q_lens)
    assert (np.asarray(out[tokens:]) == 0).all()
    assert np.isneginf(lse[:, tokens:]).all()


@pytest.mark.parametrize("case", LOW, ids=str)
def test_bfloat16_is_as_near_as_the_xla_implementation(case, rng):
    inputs = paged_inputs(case, rng, jnp.bfloat16)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, inputs)
    want, _ = run(case, exact, "reference")
    got, _ = interpret(case, inputs)
    plainly, _ = run(case, inputs, "xla")
    assert got.dtype == jnp.bfloat16
    assert error(got, want) <= 2 * error(plainly, want) + 1e-6


SLOTS = {
    "scattered": lambda rng, tokens, room: np.where(rng.random(tokens) < 0.2, -1, rng.permutation(room)[:tokens]),
    "in_order": lambda rng, tokens, room: np.arange(tokens) + rng.integers(0, room - tokens + 1),
    "beyond": lambda rng, tokens, room: rng.permutation(room)[:tokens] + room // 2,
    "nowhere": lambda rng, tokens, room: np.full(tokens, -1) - rng.integers(0, 9, tokens),
}


@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS)
@pytest.mark.parametrize(("tokens", "page_size"), [(1, 16), (61, 8), (300, 16), (70, 1), (60, 64), (1700, 128)])
def test_writes_what_xla_writes(slots, tokens, page_size, rng, monkeypatch):
    monkeypatch.setattr(tpu_paged_write, "CHUNK", 256)
    pages = jnp.asarray(rng.normal(size=(tokens // page_size + 3, page_size, 2, 128)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(tokens, 2, 128)), jnp.float32) for _ in range(2))
    at = jnp.asarray(slots(rng, tokens, pages.shape[0] * page_size), jnp.int32)
    run = lambda name: jax.jit(lambda *x: write_pages(*x, implementation=name))(KVPages(pages, -pages), k, v, at)
    with interpreted():
        got = jax.block_until_ready(run(TPU))
    jax.tree.map(np.testing.assert_array_equal, got, run("xla"))


@pytest.mark.parametrize(
    ("shape", "dtype", "feature"),
    [
        ((3, 8, 2, 64), "float32", "heads of 64"),
        ((3, 8, 1, 128), "float32", "1 heads"),
        ((3, 8, 2, 128), "int8", "int8"),
    ],
)
def test_pages_that_cannot_be_written_in_place_are_declined(shape, dtype, feature):
    new = jnp.zeros((1, *shape[2:]))
    with pytest.raises(NotImplementedError, match=feature):
        write_pages(init_pages(*shape, dtype), new, new, jnp.zeros(1, jnp.int32), implementation=TPU)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("tokens", [64, 2048])
def test_pages_are_written_in_place(generation, tokens):
    pages = jax.ShapeDtypeStruct((4096, 16, 8, 128), jnp.bfloat16)
    new, slots = jax.ShapeDtypeStruct((tokens, 8, 128), jnp.bfloat16), jax.ShapeDtypeStruct((tokens,), jnp.int32)
    write = jax.jit(lambda *x: write_pages(*x, implementation=TPU), donate_argnums=0)
    compiled = compile_for(generation, write, KVPages(pages, pages), new, new, slots)
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20
    assert not copies_of(pages, compiled)


def copies_of(pages, compiled):
    """Instructions that make an array of the pages' shape from another."""
    shape = re.escape(str(list(pages.shape)).replace(" ", ""))
    return re.findall(rf"= \w+{shape}\S* (?:copy|fusion|transpose)\(.*", compiled.as_text())


ROWS, LENGTH = 64, 2048


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("page_size", [16, 64, 128])
def test_compiles_for_decode_of_llama_8b(generation, page_size):
    width = LENGTH // page_size
    pages = jax.ShapeDtypeStruct((ROWS * width, page_size, 8, 128), jnp.bfloat16)
    q, table, lens, ends = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((ROWS, 32, 128), jnp.bfloat16),
            ((ROWS, width), jnp.int32),
            ((ROWS,), jnp.int32),
            ((ROWS + 1,), jnp.int32),
        )
    )
    step = lambda q, pages, *rest: paged_attention(q, pages, *rest, max_q_len=1, implementation=TPU)
    compiled = compile_for(generation, step, q, KVPages(pages, pages), table, lens, ends)
    assert "paged_attention_few" in compiled.as_text()
    assert not copies_of(pages, compiled)
