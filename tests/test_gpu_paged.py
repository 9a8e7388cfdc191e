"""The Hopper kernel of paged_attention on the GPU it is for: `pytest -m gpu tests/test_gpu_paged.py`.

Most of the time is compilation: add `-n 16`, with XLA_PYTHON_CLIENT_PREALLOCATE=false and
XLA_PYTHON_CLIENT_ALLOCATOR=platform for as many processes to share the GPU's memory, and
XLA_FLAGS=--xla_gpu_autotune_level=0, as the oracle need not be fast.
"""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PagedCase, error, paged_inputs, plain_row
from paged_cases import CASES, COMPRESSED, check_compressed, compressed, decompressed
from test_paged_attention import program, run

from paxattn import init_pages, paged_attention, write_pages
from paxattn.kernels import codes

pytestmark = pytest.mark.gpu

GPU = "mosaic_gpu"
FEW = 4  # rows that plain attention tells the rounding of


@pytest.fixture(autouse=True)
def hopper():
    assert jax.default_backend() == "gpu"
    if jax.devices()[0].compute_capability != "9.0":
        pytest.skip("the kernel is for Hopper (compute capability 9.0)")


def oracle(case, exact):
    """On the CPU: for the GPU XLA takes minutes to compile some of them."""
    return run(case, jax.device_put(exact, jax.devices("cpu")[0]), "reference")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_oracle_as_closely_as_plain_attention(case, rng):
    check(case, paged_inputs(case, rng, case.dtype))


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("case", COMPRESSED, ids=str)
def test_compressed_pages_do_as_if_they_were_what_they_stand_for(case, dtype, rng):
    inputs = paged_inputs(case, rng, case.dtype)
    pages = compressed(inputs["pages"], dtype)
    check(case, inputs | {"pages": pages}, inputs | {"pages": decompressed(pages, case.dtype)})


def check(case, inputs, plain_inputs=None):
    exact = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == case.dtype else x, inputs)
    want, want_lse = (np.asarray(x) for x in oracle(case, exact))
    kernel = program(case, GPU)
    (got, lse), *others = [kernel(inputs) for _ in range(3)]

    assert got.shape == want.shape
    assert got.dtype == case.dtype
    assert lse.dtype == jnp.float32
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(want_lse))
    some = np.isfinite(want_lse)
    atol = 1e-2 if plain_inputs else 2e-3  # For compressed pages queries are rotated, and so rounded.
    np.testing.assert_allclose(np.asarray(lse)[some], want_lse[some], atol=atol, rtol=1e-3)
    assert not np.asarray(got, np.float32)[~some.T].any()
    rows = [row for row, q_len in enumerate(case.q_lens) if q_len and case.kv_lens[row]][:FEW]
    tokens = [np.arange(sum(case.q_lens[:row]), sum(case.q_lens[: row + 1])) for row in rows]
    if rows:
        chosen = np.concatenate(tokens)
        of_plain = error(jnp.concatenate([plain_row(case, plain_inputs or inputs, row) for row in rows]), want[chosen])
        floor = float(jnp.finfo(case.dtype).eps) / 8 * float(np.sqrt(np.mean(want[chosen] ** 2))) + 1e-6
        assert error(np.asarray(got)[chosen], want[chosen]) <= 2 * of_plain + floor
        assert error(got, want) <= 4 * of_plain + floor
    for again in others:
        assert all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip((got, lse), again, strict=True))


def prefix_case(rng, q_lens, prefix, own, heads=(8, 2, 128), page_size=16, sinks=False):
    """Rows whose first `prefix` tokens stand in the same pages."""
    kv_lens = tuple(prefix + n for n in own)
    case = PagedCase("prefix", q_lens, kv_lens, heads, page_size, padding=3, sinks=sinks)
    inputs = paged_inputs(case, rng, "bfloat16")
    table = np.array(inputs["page_table"])
    table[:, : prefix // page_size] = table[0, : prefix // page_size]
    if not q_lens[0]:
        table[0] = -1  # a row without queries, whose entries nobody may look at
    return case, inputs | dict(page_table=jnp.asarray(table))


@pytest.mark.parametrize("prefix", [0, 16, 1008, 2048])
@pytest.mark.parametrize("q_lens", [(1,) * 9, (0, 1, 1, 1), (40, 1, 300, 2)])
def test_a_shared_prefix_changes_no_result_beyond_rounding(q_lens, prefix, rng):
    case, inputs = prefix_case(rng, q_lens, prefix, [n + 5 * i for i, n in enumerate(q_lens)])
    check_prefix(case, inputs, prefix)


@pytest.mark.parametrize(
    ("heads", "page_size", "sinks", "own"),
    [
        ((8, 2, 64), 16, False, (1, 6, 200)),
        ((6, 3, 80), 16, True, (1, 6, 200)),
        ((8, 1, 256), 256, True, (1, 6, 300)),
        ((160, 8, 128), 32, False, (1, 6, 40)),  # one part
    ],
)
def test_a_shared_prefix_of_other_heads_and_pages(heads, page_size, sinks, own, rng):
    check_prefix(*prefix_case(rng, (1, 1, 1), 1024, own, heads, page_size, sinks), 1024)


def test_a_shared_prefix_beside_a_row_of_nothing_is_none(rng):
    case = PagedCase("nothing", (1, 1), (0, 40), (8, 2, 128), 16, padding=3)
    check_prefix(case, paged_inputs(case, rng, "bfloat16"), 32)


def check_prefix(case, inputs, prefix):
    exact = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, inputs)
    want, want_lse = (np.asarray(x) for x in oracle(case, exact))
    plainly, _ = run(case, inputs, GPU)
    shared = replace(case, options=dict(shared_prefix_len=prefix, max_q_len=max(case.q_lens)))
    got, lse = run(shared, inputs, GPU)
    tokens = sum(case.q_lens)
    np.testing.assert_allclose(lse[:, :tokens], want_lse[:, :tokens], atol=2e-3, rtol=1e-3)
    assert np.isneginf(lse[:, tokens:]).all()
    assert not np.asarray(got, np.float32)[tokens:].any()
    assert error(got, want) <= 1.5 * error(plainly, want) + 1e-6


@pytest.mark.parametrize("q_lens", [(40, 1, 1), (300, *[1] * 40), (17, 0, 130)])
def test_several_mixed_calls_in_a_scan_are_those_one_by_one(q_lens, rng):
    """Each call's results are a slice of what the scan stacks; one tiny chunk beside many rows, and no such rows."""
    case = PagedCase(
        "mixed", q_lens, tuple(n + 200 * (i % 3) for i, n in enumerate(q_lens)), (8, 2, 128), 16, padding=5
    )
    calls = [paged_inputs(case, rng, "bfloat16") for _ in range(3)]
    call = lambda inputs: paged_attention(**inputs, implementation=GPU, return_lse=True)
    together = jax.jit(jax.vmap(call))(jax.tree.map(lambda *x: jnp.stack(x), *calls))
    for i, inputs in enumerate(calls):
        for got, want in zip(together, jax.jit(call)(inputs), strict=True):
            assert np.asarray(got[i]).tobytes() == np.asarray(want).tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("kv_heads", "dim"), [(8, 128), (3, 80), (1, 64), (2, 96), (5, 256)])
def test_writes_are_those_of_xla_bit_for_bit(kv_heads, dim, dtype, rng):
    """To slots in any order, some of them none."""
    tokens, pages = 203, init_pages(40, 16, kv_heads, dim, dtype)
    slots = jnp.where(rng.random(tokens) < 0.2, -1, rng.permutation(40 * 16)[:tokens])
    slots = slots.at[:3].set([40 * 16, 2**31 - 1, -(2**31)])
    k, v = (jnp.asarray(rng.normal(size=(tokens, kv_heads, dim)), jnp.bfloat16) for _ in range(2))
    kernel, xla = (jax.jit(partial(write_pages, implementation=name), donate_argnums=0) for name in (GPU, "xla"))
    got, want = (jax.tree.leaves(write(jax.tree.map(jnp.copy, pages), k, v, slots)) for write in (kernel, xla))
    assert all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(got, want, strict=True))
    assert np.asarray(got[0], np.float32).any()


@pytest.mark.parametrize("page_dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("tokens", [1, 203, 2048])
@pytest.mark.parametrize(("kv_heads", "dim"), [(8, 128), (3, 80), (1, 64), (2, 96), (5, 256)])
def test_compressed_writes_stand_for_what_those_of_xla_do(kv_heads, dim, tokens, dtype, page_dtype, rng):
    """To slots in any order, some of them none, and nothing of what nobody writes changes."""
    pages = init_pages(150, 16, kv_heads, dim, page_dtype)
    bits = lambda x: jnp.asarray(rng.integers(0, 256, (*x.shape, x.dtype.itemsize)), jnp.uint8)
    pattern = lambda x: jax.lax.bitcast_convert_type(bits(x) if x.dtype.itemsize > 1 else bits(x)[..., 0], x.dtype)
    pages = jax.tree.map(pattern, pages)
    slots = rng.permutation(150 * 16)[:tokens]
    if tokens > 1:
        slots[rng.random(tokens) < 0.2] = -1
        slots[30:90] = -7
        slots[:3] = 150 * 16, 2**31 - 1, -(2**31)
    spread = 10 ** rng.uniform(-2, 2, (2, tokens, kv_heads, 1))
    k, v = jnp.asarray(rng.normal(size=(2, tokens, kv_heads, dim)) * spread, dtype)
    v = v.at[0].set(0)
    kernel, xla = (jax.jit(partial(write_pages, implementation=name), donate_argnums=0) for name in (GPU, "xla"))
    got, want = (write(jax.tree.map(jnp.copy, pages), k, v, jnp.asarray(slots, jnp.int32)) for write in (kernel, xla))
    others = np.setdiff1d(np.arange(150 * 16), slots)
    for x, before in zip(jax.tree.leaves(got), jax.tree.leaves(pages), strict=True):
        x, before = (np.asarray(y).reshape(150 * 16, -1)[others] for y in (x, before))
        assert x.tobytes() == before.tobytes()
    there = (slots >= 0) & (slots < 150 * 16)
    stored = lambda x: np.asarray(x).reshape(150 * 16, kv_heads, -1)[slots[there]]
    for x, name in ((k, "k"), (v, "v")):
        pairs = ([stored(getattr(y, field)) for field in (name, f"{name}_scale")] for y in (got, want))
        check_compressed(np.asarray(codes.rotate(x))[there], *pairs)


@pytest.mark.parametrize("page_dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_row(bad, page_dtype, rng):
    pages, slots = init_pages(3, 8, 2, 128, page_dtype), jnp.arange(20)
    k, v = jnp.asarray(rng.normal(size=(2, 20, 2, 128)), jnp.bfloat16)
    write = lambda k, v: write_pages(pages, k, v, slots, implementation=GPU)
    clean, other = write(k, v), write(k.at[7, 1, 5].set(bad), v.at[7, 1, 90].set(bad))
    for x, y in zip(jax.tree.leaves(clean), jax.tree.leaves(other), strict=True):
        x, y = (np.asarray(z).reshape(24 * 2, -1) for z in (x, y))
        assert np.delete(x, 7 * 2 + 1, axis=0).tobytes() == np.delete(y, 7 * 2 + 1, axis=0).tobytes()
    assert np.isnan(other.k_scale[0, 7, 1]).all()
    assert np.isnan(other.v_scale[0, 7, 1]).all()


def test_a_loop_of_a_thousand_steps_neither_copies_pages_nor_asks_the_host(rng):
    rows, page_size, kv_heads, heads, dim, steps = 5, 16, 2, 8, 128, 1000
    lens = jnp.asarray([1, 16, 17, 300, 31])
    most = -(-(300 + steps) // page_size)
    table = jnp.asarray(rng.permutation(rows * most).reshape(rows, most), jnp.int32)
    pages = init_pages(rows * most, page_size, kv_heads, dim)
    q = jnp.asarray(rng.normal(size=(rows, heads, dim)), jnp.bfloat16)
    before = jnp.asarray(rng.normal(size=(2, rows * most * page_size, kv_heads, dim)), jnp.bfloat16)

    def decode(implementation, pages, q):
        pages = write_pages(pages, *before, jnp.arange(before.shape[1]), implementation=implementation)

        def one_step(i, carry):
            pages, kv_lens, out = carry
            new = jnp.sin(out[:, :kv_heads] + i.astype(out.dtype))
            slots = table[jnp.arange(rows), kv_lens // page_size] * page_size + kv_lens % page_size
            pages = write_pages(pages, new, -new, slots, implementation=implementation)
            starts = jnp.arange(rows + 1)
            options = dict(max_q_len=1, implementation=implementation)
            return pages, kv_lens + 1, paged_attention(q, pages, table, kv_lens + 1, starts, **options)

        return jax.lax.fori_loop(0, steps, one_step, (pages, lens, q))

    program = jax.jit(decode, static_argnums=0, donate_argnums=1).lower(GPU, pages, q).compile()
    text, shape = program.as_text(), re.escape(",".join(map(str, pages.k.shape)))
    flat = re.escape(f"{rows * most * page_size},{kv_heads * dim}")
    assert "known_trip_count" in text
    assert not re.findall(rf"= bf16\[(?:{shape}|{flat})\]\S* copy", text)
    assert not re.findall(r" (?:send|recv|infeed|outfeed|copy-start)\(", text)
    assert program.memory_analysis().temp_size_in_bytes < pages.k.nbytes
    want, _, want_out = decode("xla", init_pages(*pages.k.shape), q)
    got, kv_lens, out = program(pages, q)
    np.testing.assert_array_equal(kv_lens, lens + steps)
    assert error(out, want_out) <= 0.02 * float(np.sqrt(np.mean(np.asarray(want_out, np.float32) ** 2)))
    assert error(got.k, want.k) <= 0.02
