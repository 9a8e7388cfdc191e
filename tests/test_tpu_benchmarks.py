"""What the benchmarks call compiles for a TPU, so that they run there unchanged."""

from functools import partial

import jax
import pytest
from tpu import compile_for, slow_but

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


@pytest.mark.parametrize("row", slow_but(ROWS, SMOKE_ROWS), ids=str)
def test_flash_attention_compiles(row):
    inputs = jax.eval_shape(partial(attention.inputs, row.shape))
    text = compile_for("v6e", program(row, ours(TPU)), *inputs).as_text()
    assert "flash_attention_fwd" in text
    assert ("flash_attention_bwd" in text) == (row.mode == "fwdbwd")


@pytest.mark.parametrize("text", slow_but(DECODES, SMOKE_DECODES))
def test_paged_attention_compiles(text, monkeypatch):
    monkeypatch.setattr(dispatch, "platform", lambda: "tpu")  # so that pages are as there
    shape = paged.Shape.parse(text)
    inputs = jax.eval_shape(partial(paged.inputs, shape))
    decode = partial(compile_for, "v6e", paged_by(TPU)(shape), inputs)
    assert "paged_attention_few" in decode().as_text()
