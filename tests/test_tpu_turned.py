"""The softmax of the TPU kernels for many queries where a maximum of earlier keys does not do for later ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import once
from tpu import interpreted

from paxattn import KVPages, flash_attention, paged_attention
from paxattn.kernels import tpu_flash_fwd_plan, tpu_paged_plan, tpu_turned
from paxattn.kernels.tpu_flash_fwd_plan import Config

BLOCK, PAGE = 128, 16
QUERIES, KEYS, HEADS, DIM = 200, 6 * BLOCK - 30, 2, 16

# What a block's scores have in common: all, or those of one query alone.
COMMON = {
    "rising": ([0, 100, 200, 300, 400, 500], None),
    "falling": ([500, 400, 300, 200, 100, 0], None),
    "a_little": ([0, 12, 18, 0, 20, 4], None),
    "far_below": ([-3e4, -3e4, -3e4, -2.9e4, -3e4, -3e4], None),
    "at_once": ([0, 0, 300, 0, 1, 0], None),
    "of_one_query": ([0, 0, 90, 95, 300, 0], 140),
}


def arrays(common, query, rng):
    """q, k, v of one batch; the first dimension has what is common: q k / sqrt(D) is k's number there."""
    q, k, v = (rng.normal(size=(n, HEADS, DIM)).astype(np.float32) for n in (QUERIES, KEYS, KEYS))
    q[..., 0] = 0 if query is not None else DIM**0.5
    q[query, :, 0] = DIM**0.5
    k[..., 0] = np.repeat(common, BLOCK)[:KEYS, None]
    return map(jnp.asarray, (q, k, v))


def flash(q, k, v, implementation):
    attend = lambda *x: flash_attention(*x, causal=True, return_lse=True, implementation=implementation)
    out, lse = once(attend)(q[None], k[None], v[None])
    return out[0], lse[0]


def paged(q, k, v, implementation):
    in_pages = lambda x: jnp.pad(x, ((0, -KEYS % PAGE), (0, 0), (0, 0))).reshape(-1, PAGE, HEADS, DIM)
    pages = KVPages(in_pages(k), in_pages(v))
    attend = lambda *x: paged_attention(*x, return_lse=True, implementation=implementation)
    ints = lambda *x: jnp.asarray(x, jnp.int32)
    return once(attend)(q, pages, jnp.arange(pages.num_pages)[None], ints(KEYS), ints(0, QUERIES))


@pytest.fixture(params=[flash, paged])
def op(request, monkeypatch):
    monkeypatch.setattr(tpu_flash_fwd_plan, "config_for", lambda *_: Config(BLOCK, BLOCK, BLOCK, BLOCK))
    monkeypatch.setattr(tpu_paged_plan, "BLOCK", BLOCK)
    jax.clear_caches()  # of what was traced with other constants
    yield request.param
    jax.clear_caches()


def both(op, common, rng):
    inputs = tuple(arrays(*common, rng))
    with interpreted():
        got = jax.block_until_ready(op(*inputs, "mosaic_tpu"))
    return got, op(*inputs, "reference")


@pytest.mark.parametrize("common", COMMON.values(), ids=COMMON)
def test_is_exact_whatever_the_scores(op, common, rng):
    (out, lse), (want_out, want_lse) = both(op, common, rng)
    slack = 1e-6 * np.abs(common[0]).max()  # float32 has no more of such scores
    np.testing.assert_allclose(out, want_out, rtol=1e-4, atol=1e-5 + 2 * slack)
    np.testing.assert_allclose(lse, want_lse, rtol=2e-6, atol=1e-5)


def test_that_is_because_what_overflowed_is_done_again(op, rng, monkeypatch):
    monkeypatch.setattr(tpu_turned, "BOLDEST", np.inf)
    (out, _), _ = both(op, COMMON["rising"], rng)
    assert not np.isfinite(out).all()
