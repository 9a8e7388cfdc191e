"""The TPU kernel of paged_attention: its numbers in interpret mode, and that it compiles for each generation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PAGED, paged_inputs
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from paxattn import paged_attention

INTERPRET = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


def interpret(case, inputs):
    op = jax.jit(lambda x: paged_attention(**x, **case.options, return_lse=True, implementation="mosaic_tpu"))
    with pltpu.force_tpu_interpret_mode(INTERPRET):
        results = jax.block_until_ready(op(inputs))
    assert not interpreter.races.races_found
    return results


@pytest.mark.parametrize("case", PAGED, ids=str)
def test_float32_equals_the_oracle(case, rng):
    inputs = paged_inputs(case, rng, jnp.float32)
    out, lse = interpret(case, inputs)
    want_out, want_lse = paged_attention(**inputs, **case.options, return_lse=True, implementation="reference")
    np.testing.assert_allclose(out, want_out, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(lse, want_lse, rtol=2e-5, atol=2e-5)
    tokens = sum(case.q_lens)
    assert (np.asarray(out[tokens:]) == 0).all()
    assert np.isneginf(lse[:, tokens:]).all()
