"""The TPU kernel of paged_attention: its numbers in interpret mode, and that it compiles for each generation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PAGED, error, paged_inputs
from test_paged_attention import LOW, run
from tpu import GENERATIONS, compile_for, interpreted

from paxattn import KVPages, paged_attention

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
    assert "tpu_custom_call" in compile_for(generation, step, q, KVPages(pages, pages), table, lens, ends).as_text()
