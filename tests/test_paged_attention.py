"""One body for every implementation of paged_attention, over tests/cases.py, with NaN in all that nobody owns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PAGED, dense, error, once, paged_inputs, plain_row

from paxattn import KVPages, flash_attention, init_pages, paged_attention, write_pages

IMPLEMENTATIONS = ["xla"]


def program(case, implementation):
    compiled = jax.jit if implementation == "xla" else once
    return compiled(
        lambda inputs: paged_attention(**inputs, **case.options, return_lse=True, implementation=implementation)
    )


def run(case, inputs, implementation):
    return program(case, implementation)(inputs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", PAGED, ids=str)
def test_float32_equals_the_oracle(case, implementation, rng):
    inputs = paged_inputs(case, rng, jnp.float32)
    out, lse = run(case, inputs, implementation)
    want_out, want_lse = run(case, inputs, "reference")
    assert out.shape == inputs["q"].shape
    assert lse.shape == inputs["q"].shape[1::-1]
    np.testing.assert_allclose(out, want_out, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(lse, want_lse, rtol=2e-5, atol=2e-5)
    tokens = sum(case.q_lens)
    assert (np.asarray(out[tokens:]) == 0).all()
    assert np.isneginf(lse[:, tokens:]).all()


@pytest.mark.parametrize("case", PAGED, ids=str)
def test_the_oracle_equals_dense_attention_row_by_row(case, rng):
    inputs = paged_inputs(case, rng, jnp.float32)
    out, lse = run(case, inputs, "reference")
    options = {name: x for name, x in case.options.items() if name != "max_q_len"}
    for row, (q_len, kv_len) in enumerate(zip(case.q_lens, case.kv_lens, strict=True)):
        if not q_len or not kv_len:
            continue
        start = sum(case.q_lens[:row])
        k, v = dense(inputs, row, kv_len, case.page_size)
        want_out, want_lse = flash_attention(
            inputs["q"][None, start : start + q_len],
            k,
            v,
            causal=True,
            sinks=inputs["sinks"],
            return_lse=True,
            implementation="reference",
            **options,
        )
        np.testing.assert_allclose(out[start : start + q_len], want_out[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(lse[:, start : start + q_len], want_lse[0], rtol=1e-5, atol=1e-5)


LOW = [case for case in PAGED if case.name in ("decode", "prefill")]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("case", LOW, ids=str)
def test_low_precision_error_is_at_most_twice_plain_attentions(case, dtype, implementation, rng):
    inputs = paged_inputs(case, rng, dtype)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == dtype else x, inputs)
    want, _ = run(case, exact, "reference")
    got, _ = run(case, inputs, implementation)
    assert got.dtype == dtype
    check_rounding(case, inputs, got, want)


def check_rounding(case, inputs, got, want):
    """An error of at most twice plain attention's, and nothing where there is no key."""
    rows = [row for row, q_len in enumerate(case.q_lens) if q_len and case.kv_lens[row]]
    chosen = [np.arange(sum(case.q_lens[:row]), sum(case.q_lens[: row + 1])) for row in rows]
    chosen = np.concatenate([*chosen, np.zeros(0, int)])
    assert not np.delete(np.asarray(got, np.float32), chosen, axis=0).any()
    if rows:
        plainly = jnp.concatenate([plain_row(case, inputs, row) for row in rows])
        assert error(got[chosen], want[chosen]) <= 2 * error(plainly, want[chosen]) + 1e-6


def test_pages_of_another_dtype_than_the_queries(rng):
    inputs = paged_inputs(PAGED[0], rng, jnp.float32)
    half = inputs | {"pages": jax.tree.map(lambda x: x.astype(jnp.bfloat16), inputs["pages"])}
    out, _ = run(PAGED[0], half, "xla")
    want, _ = run(PAGED[0], inputs, "reference")
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, want, atol=0.05)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("case", PAGED, ids=str)
def test_compressed_pages_equal_the_oracle(case, dtype, implementation, rng):
    inputs = paged_inputs(case, rng, jnp.float32)
    plain = inputs["pages"]
    slots = jnp.arange(plain.num_pages * plain.page_size)
    empty = init_pages(*plain.k.shape, dtype)
    tokens = (x.reshape(-1, *x.shape[2:]) for x in (plain.k, plain.v))
    compressed = write_pages(empty, *tokens, slots)
    poison = jnp.isnan(plain.k[..., 0])
    scales = (jnp.where(poison[..., None], jnp.nan, x) for x in (compressed.k_scale, compressed.v_scale))
    pages = KVPages(compressed.k, compressed.v, *scales)
    out, lse = run(case, inputs | {"pages": pages}, implementation)
    want_out, want_lse = run(case, inputs | {"pages": pages}, "reference")
    np.testing.assert_allclose(out, want_out, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(lse, want_lse, rtol=2e-5, atol=2e-5)
    exact, _ = run(case, inputs, "reference")
    assert error(out, exact) < (0.02 if dtype == "int8" else 0.08)


def test_int64_lengths_and_tables_are_taken(rng):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        inputs = paged_inputs(PAGED[8], rng, jnp.float32)
        wide = inputs | {n: inputs[n].astype(jnp.int64) for n in ("page_table", "kv_lens", "cu_q_lens")}
        out, _ = run(PAGED[8], wide, "xla")
        want, _ = run(PAGED[8], inputs, "reference")
        np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-5)


def good():
    return dict(
        q=jnp.zeros((3, 4, 8)),
        pages=init_pages(6, 4, 2, 8, jnp.float32),
        page_table=jnp.zeros((2, 3), jnp.int32),
        kv_lens=jnp.ones(2, jnp.int32),
        cu_q_lens=jnp.arange(3),
    )


BAD = [
    ("q", dict(q=jnp.zeros((3, 4)))),
    ("q", dict(q=jnp.zeros((3, 4, 9)))),
    ("q", dict(q=jnp.zeros((3, 4, 8), jnp.int32))),
    ("pages", dict(q=jnp.zeros((3, 5, 8)))),
    ("pages", dict(pages=jnp.zeros((6, 4, 2, 8)))),
    ("pages", dict(pages=KVPages(jnp.zeros((6, 4, 2, 8)), jnp.zeros((5, 4, 2, 8))))),
    ("pages", dict(pages=KVPages(*[jnp.zeros((6, 4, 2, 8), jnp.int8)] * 2))),
    ("return_lse", dict(return_lse="yes")),
    ("shared_prefix_len", dict(shared_prefix_len="x")),
    ("page_table", dict(page_table=jnp.zeros(3, jnp.int32))),
    ("page_table", dict(page_table=jnp.zeros((2, 3)))),
    ("kv_lens", dict(kv_lens=jnp.ones(3, jnp.int32))),
    ("kv_lens", dict(kv_lens=[1, 1])),
    ("cu_q_lens", dict(cu_q_lens=jnp.arange(2))),
    ("max_q_len", dict(max_q_len=0)),
    ("window", dict(window=-3)),
    ("softcap", dict(softcap=-1.0)),
    ("sinks", dict(sinks=jnp.ones((4, 1)))),
    ("implementation", dict(implementation="cuda")),
]


@pytest.mark.parametrize(("name", "change"), BAD, ids=[f"{i}_{name}" for i, (name, _) in enumerate(BAD)])
@pytest.mark.usefixtures("unchecked")
def test_a_bad_argument_is_named(name, change):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        paged_attention(**{**good(), **change})


@pytest.mark.usefixtures("unchecked")
def test_what_is_not_there_declines_by_name():
    pages, new, slots = good()["pages"], jnp.zeros((3, 2, 8)), jnp.arange(3)
    with pytest.raises(NotImplementedError, match=r"write_pages.*reference"):
        write_pages(pages, new, new, slots, implementation="reference")


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "reference"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize(("tokens", "rows", "width"), [(0, 2, 3), (3, 0, 3), (3, 2, 0), (0, 0, 0)])
def test_an_axis_of_nothing_gives_nothing(tokens, rows, width, dtype, implementation):
    ints = lambda *shape: jnp.zeros(shape, jnp.int32)
    args = jnp.ones((tokens, 4, 8)), init_pages(6, 4, 2, 8, dtype), ints(rows, width), ints(rows), ints(rows + 1)
    out, lse = paged_attention(*args, return_lse=True, implementation=implementation)
    assert (out.shape, lse.shape) == ((tokens, 4, 8), (4, tokens))
    assert not out.any()
    assert np.isneginf(lse).all()


@pytest.mark.usefixtures("unchecked")
def test_arrays_of_numpy_under_jit(rng):
    inputs = paged_inputs(PAGED[0], rng, jnp.float32)
    fixed = jax.tree.map(np.asarray, {name: inputs.pop(name) for name in ("q", "pages")})
    got = jax.jit(lambda inputs: paged_attention(**fixed, **inputs))(inputs)
    np.testing.assert_array_equal(got, paged_attention(**jax.tree.map(jnp.asarray, fixed), **inputs))


def test_pages_is_a_pytree():
    pages = init_pages(6, 4, 2, 8)
    assert jax.tree.map(lambda x: x.dtype, pages) == KVPages(jnp.dtype("bfloat16"), jnp.dtype("bfloat16"))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_shared_prefix_is_a_hint(implementation, rng):
    inputs = paged_inputs(PAGED[0], rng, jnp.float32)
    want = paged_attention(**inputs, implementation=implementation)
    got = paged_attention(**inputs, shared_prefix_len=jnp.int32(4), implementation=implementation)
    np.testing.assert_array_equal(got, want)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", [1.5, jnp.zeros(2, jnp.int32), jnp.float32(3)])
def test_a_wrong_shared_prefix_len_is_named(wrong, rng):
    with pytest.raises(ValueError, match="shared_prefix_len"):
        paged_attention(**paged_inputs(PAGED[0], rng, jnp.float32), shared_prefix_len=wrong)
