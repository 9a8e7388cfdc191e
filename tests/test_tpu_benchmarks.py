"""What the benchmarks call compiles for a TPU, so that they run there unchanged."""

from functools import partial

import jax
import pytest
from tpu import compile_for

from paxattn import dispatch
from scripts.attention import shapes as attention
from scripts.attention.peers import ours
from scripts.attention.programs import program
from scripts.paged import shapes as paged
from scripts.paged.peers import paged as paged_by

TPU = "mosaic_tpu"


ROWS = attention.rows_of(attention.SUITES, [])
SMOKE_ROWS = attention.rows_of(["smoke", "small"], [])
DECODES = list(dict.fromkeys(text for suite in paged.SUITES.values() for text in suite))
SMOKE_DECODES = [*paged.SUITES["smoke"], paged.ANCHORS[0]]


def fast_and_slow(all_of_them, fast):
    return [one if one in fast else pytest.param(one, marks=pytest.mark.slow) for one in all_of_them]


@pytest.mark.parametrize("row", fast_and_slow(ROWS, SMOKE_ROWS), ids=str)
def test_flash_attention_compiles(row):
    inputs = jax.eval_shape(partial(attention.inputs, row.shape))
    text = compile_for("v6e", program(row, ours(TPU)), *inputs).as_text()
    assert "flash_attention_fwd" in text
    assert ("flash_attention_bwd" in text) == (row.mode == "fwdbwd")


@pytest.mark.parametrize("text", fast_and_slow(DECODES, SMOKE_DECODES))
def test_paged_attention_compiles(text, monkeypatch):
    monkeypatch.setattr(dispatch, "platform", lambda: "tpu")  # so that pages are as there
    shape = paged.Shape.parse(text)
    inputs = jax.eval_shape(partial(paged.inputs, shape))
    decode = partial(compile_for, "v6e", paged_by(TPU)(shape), inputs)
    assert "paged_attention_few" in decode().as_text()
