"""The TPU kernels of paged_attention and write_pages: their numbers in interpret mode, and that they compile."""

import re
from dataclasses import replace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PAGED, PagedCase, error, once, paged_inputs
from paged_cases import compressed
from test_paged_attention import check_rounding, run
from tpu import GENERATIONS, compile_for, interpreted, slow, slow_but

from paxattn import KVPages, dispatch, init_pages, paged_attention, write_pages
from paxattn.kernels import tpu_paged, tpu_paged_codes, tpu_paged_write, tpu_paged_write_packed

TPU = "mosaic_tpu"
LLAMA_8B, LLAMA_70B, QWEN, GEMMA = (32, 8, 128), (64, 8, 128), (14, 2, 64), (8, 4, 256)


def pages_of_a_tpu(*sizes):
    with mock.patch.object(dispatch, "platform", return_value="tpu"):
        return init_pages(*sizes)


def interpret(case, inputs):
    with interpreted():
        return jax.block_until_ready(run(case, inputs, TPU))


@pytest.mark.parametrize("case", PAGED, ids=str)
def test_float32_equals_the_oracle(case, rng):
    check(case, rng)


STREAMED = [case for case in PAGED if case.name in ("decode_idle_rows", "mixed", "window_decode_dropped")]


@pytest.mark.parametrize("case", STREAMED, ids=str)
def test_a_page_table_too_large_for_smem_is_read_line_by_line(case, rng, monkeypatch):
    monkeypatch.setattr(tpu_paged, "MOST_RESIDENT", 0)
    check(case, rng)


def check(case, rng):
    inputs = paged_inputs(case, rng, jnp.float32)
    out, lse = interpret(case, inputs)
    want_out, want_lse = run(case, inputs, "reference")
    np.testing.assert_allclose(out, want_out, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(lse, want_lse, rtol=2e-5, atol=2e-5)
    tokens = sum(case.q_lens)
    assert (np.asarray(out[tokens:]) == 0).all()
    assert np.isneginf(lse[:, tokens:]).all()


QUICK_CASES = "decode", "decode_idle_rows", "prefill", "multi_query_7", "everything"


@pytest.mark.parametrize("case", slow_but(PAGED, [case for case in PAGED if case.name in QUICK_CASES]), ids=str)
def test_bfloat16_is_as_near_as_plain_attention(case, rng):
    inputs = paged_inputs(case, rng, jnp.bfloat16)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, inputs)
    want, want_lse = run(case, exact, "reference")
    got, lse = interpret(case, inputs)
    assert got.dtype == jnp.bfloat16
    check_rounding(case, inputs, got, want)
    np.testing.assert_allclose(lse, want_lse, atol=1e-2, rtol=1e-2)  # scaled queries are rounded once more


SLOTS = {
    "scattered": lambda rng, tokens, room: np.where(rng.random(tokens) < 0.2, -1, rng.permutation(room)[:tokens]),
    "in_order": lambda rng, tokens, room: np.arange(tokens) + rng.integers(0, room - tokens + 1),
    "beyond": lambda rng, tokens, room: rng.permutation(room)[:tokens] + room // 2,
    "nowhere": lambda rng, tokens, room: np.full(tokens, -1) - rng.integers(0, 9, tokens),
}


@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS)
@pytest.mark.parametrize(("tokens", "page_size"), [(1, 16), (61, 8), (300, 16), (70, 1), (60, 64), (500, 128)])
def test_writes_what_xla_writes(slots, tokens, page_size, rng, monkeypatch):
    monkeypatch.setattr(tpu_paged_write, "CHUNK", 256)
    check_write(slots, tokens, (page_size, 2, 128), jnp.float32, rng)


@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS)
@pytest.mark.parametrize(
    ("tokens", "page_size", "dim", "dtype"),
    [
        (1, 16, 128, "bfloat16"),
        (300, 32, 128, "bfloat16"),
        (500, 16, 256, "bfloat16"),
        (700, 64, 128, "bfloat16"),
        (70, 8, 128, "float32"),
    ],
)
def test_writes_single_rows(slots, tokens, page_size, dim, dtype, rng, monkeypatch):
    monkeypatch.setattr(tpu_paged_write_packed, "CHUNK", 256)  # registers that begin in one and end in the next
    check_write(slots, tokens, (page_size, 1, dim), dtype, rng)


def check_write(slots, tokens, page, dtype, rng):
    pages = jnp.asarray(rng.normal(size=(tokens // page[0] + 3, *page)), dtype)
    k, v = (jnp.asarray(rng.normal(size=(tokens, *page[1:])), dtype) for _ in range(2))
    at = jnp.asarray(slots(rng, tokens, pages.shape[0] * page[0]), jnp.int32)
    run = lambda name: once(lambda *x: write_pages(*x, implementation=name))(KVPages(pages, -pages), k, v, at)
    with interpreted():
        got = jax.block_until_ready(run(TPU))
    jax.tree.map(np.testing.assert_array_equal, got, run("xla"))


@pytest.mark.parametrize(
    ("shape", "dtype", "feature"),
    [
        ((3, 8, 2, 64), "float32", "2 rows of 64"),
        ((3, 8, 1, 128), "bfloat16", "one row a token in pages of 8"),
        ((3, 8, 2, 128), "int8", "write_compressed_pages"),
    ],
)
def test_pages_that_cannot_be_written_in_place_are_declined(shape, dtype, feature):
    new = jnp.zeros((1, *shape[2:]))
    with pytest.raises(NotImplementedError, match=feature):
        write_pages(init_pages(*shape, dtype), new, new, jnp.zeros(1, jnp.int32), implementation=TPU)


WRITES = [
    (LLAMA_8B, 16, 64),
    (LLAMA_8B, 16, 2048),
    (QWEN, 16, 64),
    *(
        slow(heads, page_size, tokens)
        for heads in (LLAMA_8B, QWEN, GEMMA)  # 70B has the KV heads of 8B
        for page_size in (16, 64, 128)
        for tokens in (64, 2048)
        if page_size > 16 or heads == GEMMA
    ),
]


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(("heads", "page_size", "tokens"), WRITES)
def test_pages_are_written_in_place(generation, heads, page_size, tokens):
    heads = heads[1:]
    pages = jax.eval_shape(lambda: pages_of_a_tpu(4096, page_size, *heads))
    new, slots = jax.ShapeDtypeStruct((tokens, *heads), jnp.bfloat16), jax.ShapeDtypeStruct((tokens,), jnp.int32)
    write = jax.jit(lambda *x: write_pages(*x, implementation=TPU), donate_argnums=0)
    compiled = compile_for(generation, write, pages, new, new, slots)
    assert compiled.memory_analysis().temp_size_in_bytes < 2**22
    assert not copies_of(pages.k, compiled)


def copies_of(pages, compiled):
    """Instructions that make an array of the pages' shape from another."""
    num_pages, page_size, kv_heads, dim = pages.shape
    shape = rf"\[{num_pages},{page_size},{f'(?:{kv_heads},)?' if kv_heads == 1 else f'{kv_heads},'}{dim}\]"
    return re.findall(rf"= \w+{shape}\S* (?:copy|fusion|transpose)\(.*", compiled.as_text())


def arrays(tokens, rows, width, heads, page_size, dtype=jnp.bfloat16):
    """The arguments of a call: q, pages, page_table, kv_lens, cu_q_lens."""
    pages = jax.eval_shape(lambda: pages_of_a_tpu(max(4096, width), page_size, *heads[1:], dtype))
    ints = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, width), (rows,), (rows + 1,)))
    return jax.ShapeDtypeStruct((tokens, heads[0], heads[2]), dtype), pages, *ints


@pytest.mark.parametrize("page_size", [8, 16])
@pytest.mark.parametrize(("q_lens", "options"), [((1, 1, 1), dict(max_q_len=1)), ((300, 1, 40), {})])
def test_pages_of_a_single_head(page_size, q_lens, options, rng):
    case = PagedCase("", q_lens, (620, 130, 64), (3, 1, 128), page_size, options=options)
    inputs = paged_inputs(case, rng, jnp.bfloat16)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, inputs)
    want, _ = run(case, exact, "reference")
    got, _ = interpret(case, inputs)
    plainly, _ = run(case, inputs, "xla")
    assert error(got, want) <= 2 * error(plainly, want) + 1e-6


def side_by_side(pages, heads_a_row):
    num_pages, page_size, kv_heads, dim = pages.k.shape
    shape = num_pages, page_size, kv_heads // heads_a_row, heads_a_row * dim
    return KVPages(pages.k.reshape(shape), pages.v.reshape(shape), heads_a_row=heads_a_row)


@pytest.mark.parametrize("implementation", ["xla", "reference", TPU])
@pytest.mark.parametrize(("q_lens", "options"), [((1, 1, 1), dict(max_q_len=1)), ((300, 1, 40), dict(window=90))])
@pytest.mark.parametrize(("heads", "heads_a_row"), [((14, 2, 64), 2), ((8, 8, 32), 4), ((4, 4, 96), 4)])
def test_heads_that_lie_side_by_side(heads, heads_a_row, q_lens, options, implementation, rng):
    case = PagedCase("", q_lens, (620, 130, 64), heads, 16, options=options, sinks=True)
    inputs = paged_inputs(case, rng, jnp.float32)
    want = run(case, inputs, "reference")
    inputs |= dict(pages=side_by_side(inputs["pages"], heads_a_row))
    got = interpret(case, inputs) if implementation == TPU else run(case, inputs, implementation)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), got, want)


@pytest.mark.parametrize(
    ("kv_heads", "dim", "heads_a_row"),
    [(2, 64, 2), (8, 32, 4), (3, 64, 1), (2, 128, 1), (2, 96, 1), (8, 96, 4), (8, 80, 8)],
)
def test_pages_of_a_tpu_have_heads_side_by_side(kv_heads, dim, heads_a_row, rng, monkeypatch):
    make = lambda dtype: init_pages(5, 8, kv_heads, dim, dtype)
    plain = make(jnp.float32)
    monkeypatch.setattr(dispatch, "platform", lambda: "tpu")
    pages = make(jnp.float32)
    assert (pages.heads_a_row, pages.num_kv_heads, pages.head_dim) == (heads_a_row, kv_heads, dim)
    assert make(jnp.int8).heads_a_row == heads_a_row
    k, v = (jnp.asarray(rng.normal(size=(9, kv_heads, dim)), jnp.float32) for _ in range(2))
    slots = jnp.asarray(rng.permutation(40)[:9], jnp.int32)
    written = jax.jit(write_pages)(pages, k, v, slots)
    assert written.heads_a_row == heads_a_row
    want = write_pages(plain, k, v, slots)
    jax.tree.map(np.testing.assert_array_equal, written.apart(), want)


def turned(pages):
    """Compressed pages with their scales as on a TPU."""
    rows = pages.page_size * pages.k.shape[2]
    columns = lambda x: x.reshape(pages.num_pages, rows, x.shape[-1]).swapaxes(1, 2)
    return replace(pages, k_scale=columns(pages.k_scale), v_scale=columns(pages.v_scale), scales_turned=True)


QUICK_CODES = "decode_many_pages", "mixed", "page_of_256", "multi_query_7", "everything"


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, "int8") if case.name in QUICK_CODES else slow(case, "int8") for case in PAGED),
        *((case, "float8_e4m3fn") if case.name == "mixed" else slow(case, "float8_e4m3fn") for case in STREAMED),
    ],
    ids=str,
)
def test_codes_in_float32_equal_the_oracle(case, dtype, rng):
    inputs = paged_inputs(case, rng, jnp.float32)
    pages = compressed(inputs["pages"], dtype)
    out, lse = interpret(case, inputs | dict(pages=turned(pages)))
    want_out, want_lse = run(case, inputs | dict(pages=pages), "reference")
    np.testing.assert_allclose(out, want_out, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(lse, want_lse, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("heads", "page_size"), [((3, 64), 16), ((2, 80), 16), ((1, 128), 8)])
def test_pages_that_would_be_copied_are_declined_on_a_tpu(heads, page_size, monkeypatch):
    pages = pages_of_a_tpu(6, page_size, *heads)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    ints = jnp.ones((1, 1), jnp.int32), jnp.ones(1, jnp.int32), jnp.arange(2)
    with pytest.raises(NotImplementedError, match="would copy all"):
        paged_attention(jnp.zeros((1, *heads), jnp.bfloat16), pages, *ints, implementation=TPU)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize(("heads", "page_size"), [((16, 8, 128), 16), ((8, 8, 64), 32), ((3, 1, 128), 128)])
def test_codes_of_a_tpu_in_bfloat16_are_as_near_as_the_xla_implementation(heads, page_size, dtype, rng):
    case = PagedCase("", (70, 1, 40), (300, 130, 64), heads, page_size)
    inputs = paged_inputs(case, rng, jnp.bfloat16)
    plain = inputs["pages"]
    empty = pages_of_a_tpu(plain.num_pages, page_size, *heads[1:], dtype)
    tokens = (jnp.nan_to_num(x).reshape(-1, *heads[1:]) for x in (plain.k, plain.v))
    inputs |= dict(pages=write_pages(empty, *tokens, jnp.arange(plain.num_pages * page_size)))
    exact = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, inputs)
    want, _ = run(case, exact, "reference")
    got, _ = interpret(case, inputs)
    plainly, _ = run(case, inputs, "xla")
    assert error(got, want) <= 2 * error(plainly, want) + 1e-6


def test_any_scale_is_what_float16_says():
    scales = jnp.arange(0x7C01, dtype=jnp.uint16).view(jnp.float16)  # none to infinity
    bits = scales.view(jnp.int16)
    np.testing.assert_array_equal(tpu_paged_codes._float32(bits), scales.astype(jnp.float32))
    assert jnp.isnan(tpu_paged_codes._float32(jnp.array([jnp.nan], jnp.float16).view(jnp.int16))).all()


@pytest.mark.parametrize(("heads", "page_size"), [((8, 128), 16), ((1, 128), 128), ((8, 64), 32)])
@pytest.mark.parametrize("tokens", [1, 9, 70])
def test_codes_of_a_tpu_are_written_and_found_again(heads, page_size, tokens, rng):
    pages = pages_of_a_tpu(6, page_size, *heads, "int8")
    assert pages.scales_turned
    want = pages.apart()
    for _ in range(2):
        slots = np.where(rng.random(tokens) < 0.2, -1, rng.permutation(6 * page_size)[:tokens])
        slots = jnp.asarray(slots, jnp.int32)
        k, v = (jnp.asarray(rng.normal(size=(tokens, *heads)), jnp.float32) for _ in range(2))
        pages, want = (jax.jit(write_pages)(x, k, v, slots) for x in (pages, want))
    jax.tree.map(np.testing.assert_array_equal, pages.apart(), want)


@pytest.mark.parametrize(("heads", "page_size"), [((12, 128), 32), ((4, 256), 64), ((8, 128), 8), ((4, 80), 64)])
def test_codes_that_lie_nowhere_together_are_declined(heads, page_size):
    pages = pages_of_a_tpu(6, page_size, *heads, "int8")
    ints = jnp.ones((1, 1), jnp.int32), jnp.ones(1, jnp.int32), jnp.arange(2)
    with pytest.raises(NotImplementedError, match="compressed pages"):
        paged_attention(jnp.zeros((1, *heads)), pages, *ints, implementation=TPU)


CALLS = {
    **{f"decode_pages_of_{page}": ((64, 64, 2048 // page, LLAMA_8B, page), 1) for page in (16, 64, 128)},
    **{f"chunk_pages_of_{page}": ((2048, 3, 8192 // page, LLAMA_8B, page), None) for page in (16, 64, 128)},
    "decode_llama_70b": ((64, 64, 128, LLAMA_70B, 16), 1),
    "decode_qwen": ((64, 64, 128, QWEN, 16), 1),
    "decode_gemma": ((64, 64, 128, GEMMA, 16), 1),
    "decode_of_one_kv_head": ((64, 64, 128, (8, 1, 128), 16), 1),
    "mixed_of_one_kv_head": ((2048, 9, 512, (8, 1, 128), 16), None),
    "mixed_llama_70b": ((2048, 9, 512, LLAMA_70B, 16), None),
    "mixed_qwen": ((2048, 9, 512, QWEN, 16), None),
    "mixed_gemma": ((2048, 9, 512, GEMMA, 16), None),
    "a_large_table": ((4096, 4096, 512, LLAMA_8B, 16), 1),
    "32_kv_heads_float32": ((64, 64, 128, (32, 32, 128), 16, jnp.float32), 1),
    "mixed_32_kv_heads_float32": ((2048, 9, 512, (32, 32, 128), 16, jnp.float32), None),
    "mixed_16_heads_of_256_float32": ((2048, 9, 512, (16, 16, 256), 16, jnp.float32), None),
}
QUICK_CALLS = "decode_pages_of_16", "a_large_table"


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("call", slow_but(CALLS, QUICK_CALLS))
def test_compiles(generation, call):
    shapes, longest = CALLS[call]
    args = arrays(*shapes)
    step = lambda *x: paged_attention(*x, max_q_len=longest, implementation=TPU)
    compiled = compile_for(generation, step, *args)
    assert "paged_attention_few" in compiled.as_text()
    assert ("paged_attention_many" in compiled.as_text()) == (longest is None)
    assert not copies_of(args[1].k, compiled)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("heads", [QWEN, (8, 1, 128), (32, 8, 64), (32, 8, 80), (32, 8, 96)], ids=str)
def test_a_step_over_narrow_or_single_heads_works_in_place(generation, heads):
    check_step(generation, *arrays(64, 64, 128, heads, 16))


CODES = [
    (LLAMA_8B, 16, "int8", 1),
    *(
        slow(*call)
        for call in [
            *((LLAMA_8B, page_size, "int8", 1) for page_size in (64, 128)),
            *((LLAMA_8B, page_size, "int8", None) for page_size in (16, 64, 128)),
            (LLAMA_8B, 16, "float8_e4m3fn", 1),
            (LLAMA_70B, 16, "int8", 1),
            (LLAMA_70B, 16, "float8_e4m3fn", None),
            (QWEN, 128, "int8", 1),
        ]
    ),
]


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(("heads", "page_size", "dtype", "longest"), CODES)
def test_a_step_over_codes_works_in_place(generation, heads, page_size, dtype, longest):
    tokens, rows, length = (64, 64, 2048) if longest else (512, 9, 8192)
    q, _, *rest = arrays(tokens, rows, length // page_size, heads, page_size)
    pages = jax.eval_shape(lambda: pages_of_a_tpu(3 * 2**17 // page_size, page_size, *heads[1:], dtype))
    compiled = check_step(generation, q, pages, *rest, longest=longest)
    copied = rf"= (?:s8|f8e4m3fn|f16|s16)\[{pages.num_pages},[\d,]*\]\S* (?:copy|transpose)\(.*"
    assert not re.findall(copied, compiled.as_text())


def check_step(generation, q, pages, *rest, longest=1):
    heads = pages.num_kv_heads, pages.head_dim
    new, slots = jax.ShapeDtypeStruct((len(q), *heads), q.dtype), jax.ShapeDtypeStruct((len(q),), jnp.int32)

    def step(pages, q, k, v, slots, *rest):
        pages = write_pages(pages, k, v, slots, implementation=TPU if pages.k_scale is None else "xla")
        return paged_attention(q, pages, *rest, max_q_len=longest, implementation=TPU), pages

    compiled = compile_for(generation, jax.jit(step, donate_argnums=0), pages, q, new, new, slots, *rest)
    if longest == 1:
        assert compiled.memory_analysis().temp_size_in_bytes < pages.k.size * pages.k.dtype.itemsize // 4
    return compiled
