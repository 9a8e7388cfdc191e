"""The Hopper kernel of paged_attention as far as a machine without a GPU can follow it: it lowers for CUDA."""

import importlib
import itertools
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flash_cases import pairs, representatives
from paged_cases import AXES, CASES, COMPRESSED, ROWS
from test_gpu_lowering import module_for_cuda

from paxattn import KVPages, dispatch, init_pages, paged_attention, write_pages
from paxattn.kernels import gpu_paged, gpu_paged_decode, hopper

GPU = "mosaic_gpu"


@pytest.fixture
def on_hopper(monkeypatch):
    module = importlib.import_module(dispatch.MODULES["paged_attention"][GPU])
    monkeypatch.setattr(module, "on_hopper", lambda: True)


def features(case):
    """What another kernel, or another branch of one, is lowered for."""
    heads, kv_heads, dim = case.heads
    return dict(
        dim=dim,
        dtype=case.dtype,
        page_size=case.page_size,
        group=heads // kv_heads,
        many_rows=len(case.q_lens) > 256,
        several=case.options.get("max_q_len", 2) > 1,
        chunks="max_q_len" not in case.options,
        window="window" in case.options,
        softcap="softcap" in case.options,
        sinks=case.sinks,
    )


IN_CI = [case.name for case in representatives(CASES, features)]
SLOW_TOO = [case if case.name in IN_CI else pytest.param(case, marks=pytest.mark.slow) for case in CASES]


def shapes(q_lens, kv_lens, heads, page_size, dtype, page_dtype=None, sinks=False, scales=0):
    array, (h, k, d) = jax.ShapeDtypeStruct, heads
    width = -(-max(kv_lens) // page_size) + 1
    pages = array((len(q_lens) * width, page_size, k, d), page_dtype or dtype)
    scale = array((*pages.shape[:3], scales), jnp.float16) if scales else None
    inputs = dict(
        q=array((max(sum(q_lens), 1), h, d), dtype),
        pages=KVPages(pages, pages, scale, scale),
        page_table=array((len(q_lens), width), jnp.int32),
        kv_lens=array((len(q_lens),), jnp.int32),
        cu_q_lens=array((len(q_lens) + 1,), jnp.int32),
    )
    return inputs | ({"sinks": array((h,), jnp.float32)} if sinks else {})


def compressed_shapes(case, dtype):
    inputs = shapes(case.q_lens, case.kv_lens, case.heads, case.page_size, case.dtype, sinks=case.sinks)
    return inputs | dict(pages=jax.eval_shape(lambda: init_pages(*inputs["pages"].k.shape, dtype)))


def module_of(inputs, **options):
    op = partial(paged_attention, **options, return_lse=True, implementation=GPU)
    return module_for_cuda(lambda inputs: op(**inputs), inputs)


def tensors(module):
    return {tuple(map(int, dims.split("x")[:-1])) for dims in re.findall(r"tensor<((?:\d+x)+)[a-z]", module)}


@pytest.mark.parametrize("case", SLOW_TOO, ids=str)
@pytest.mark.usefixtures("on_hopper")
def test_lowers_for_cuda(case):
    inputs = shapes(case.q_lens, case.kv_lens, case.heads, case.page_size, case.dtype, sinks=case.sinks)
    assert "custom_call @mosaic_gpu" in module_of(inputs, **case.options)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("case", [case for case in COMPRESSED if re.search("_d|several|windows", case.name)], ids=str)
@pytest.mark.usefixtures("on_hopper")
def test_compressed_pages_lower_for_cuda(case, dtype):
    assert "custom_call @mosaic_gpu" in module_of(compressed_shapes(case, dtype), **case.options)


@pytest.mark.usefixtures("on_hopper")
def test_no_pages_are_copied_and_nothing_has_the_size_of_what_is_read():
    inputs = shapes((1,) * 64, (2048,) * 64, (32, 8, 128), 16, "bfloat16")
    module = module_of(inputs, max_q_len=1)
    pages = math.prod(inputs["pages"].k.shape)
    assert {math.prod(shape) for shape in tensors(module) if math.prod(shape) > 2**21} == {pages}
    assert not re.search(r"stablehlo\.(copy|gather|dynamic_slice|transpose|convert|pad)", module)


@pytest.mark.usefixtures("on_hopper")
def test_a_shared_prefix_is_one_more_kernel():
    inputs = shapes((1,) * 64, (4224,) * 64, (32, 8, 128), 16, "bfloat16")
    assert module_of(inputs, max_q_len=1, shared_prefix_len=4096).count("custom_call @mosaic_gpu") == 2


@pytest.mark.parametrize(
    ("feature", "changes"),
    [
        ("dtype float32", dict(dtype="float32")),
        ("scales of int8, 1 and 1 a head", dict(page_dtype="int8", scales=1)),
        ("pages of float16", dict(page_dtype="float16")),
        ("head dim 72", dict(heads=(8, 2, 72))),
        ("page size 24", dict(page_size=24)),
        ("groups of 65", dict(heads=(65, 1, 64))),
    ],
)
@pytest.mark.usefixtures("on_hopper")
def test_what_the_kernel_does_not_serve_is_declined_by_name(feature, changes):
    given = dict(q_lens=(1, 1), kv_lens=(50, 300), heads=(8, 2, 64), page_size=16, dtype="bfloat16")
    with pytest.raises(NotImplementedError, match=feature):
        module_of(shapes(**given | changes))


@pytest.mark.parametrize("page_dtype", ["bfloat16", "int8"])
@pytest.mark.usefixtures("on_hopper")
def test_no_rows_are_declined(page_dtype):
    inputs = shapes((1,), (50,), (8, 2, 64), 16, "bfloat16")
    inputs |= dict(
        pages=jax.eval_shape(lambda: init_pages(*inputs["pages"].k.shape, page_dtype)),
        page_table=jax.ShapeDtypeStruct((0, 4), jnp.int32),
        kv_lens=jax.ShapeDtypeStruct((0,), jnp.int32),
        cu_q_lens=jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    with pytest.raises(NotImplementedError, match="an axis of nothing"):
        module_of(inputs)


@pytest.mark.usefixtures("on_hopper")
def test_what_is_laid_out_is_the_same(rng):
    arrays = [jnp.asarray(rng.normal(size=(3, heads, 64)), jnp.bfloat16) for heads in (8, 2, 2)]
    for x, y in zip(gpu_paged.lay_out(*arrays), arrays, strict=True):
        np.testing.assert_array_equal(x, y)
    q, k, v = arrays
    for others in ((q.astype(jnp.float32), k, v), (q, k, v.astype(jnp.float16)), ([[1.0]], k, v)):
        assert all(x is y for x, y in zip(gpu_paged.lay_out(*others), others, strict=True))


@pytest.mark.usefixtures("on_hopper")
def test_what_varies_alone_is_laid_out_alone():
    """Keys of one head for all queries, which are cut over devices: a store that is the same everywhere stays so."""
    mesh = jax.sharding.AbstractMesh((2,), ("h",), axis_types=(jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec
    q, k = (jax.ShapeDtypeStruct((1, heads, 64), jnp.bfloat16) for heads in (4, 1))
    step = jax.shard_map(
        gpu_paged.lay_out, mesh=mesh, in_specs=(P(None, "h"), P(), P()), out_specs=(P(None, "h"), P(), P())
    )
    assert "concatenate" not in module_for_cuda(step, q, k, k)


def test_a_machine_without_hopper_is_told_so():
    with pytest.raises(NotImplementedError, match="Hopper"):
        module_of(shapes((1, 1), (50, 300), (8, 2, 64), 16, "bfloat16"))


@pytest.mark.parametrize("page_dtype", ["bfloat16", "int8"])
@pytest.mark.usefixtures("on_hopper")
def test_lowers_under_shard_map_over_heads(page_dtype):
    mesh = jax.sharding.AbstractMesh((1,), ("h",), axis_types=(jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec
    inputs = shapes((1, 1), (50, 300), (8, 2, 64), 16, "bfloat16", sinks=True)
    inputs |= dict(pages=jax.eval_shape(lambda: init_pages(*inputs["pages"].k.shape, page_dtype)))
    new = jax.ShapeDtypeStruct((2, 2, 64), jnp.bfloat16)

    def step(q, pages, table, kv_lens, cu_q_lens, sinks, new, slots):
        pages = write_pages(pages, new, new, slots, implementation=GPU)
        options = dict(sinks=sinks, max_q_len=1, implementation=GPU)
        return paged_attention(q, pages, table, kv_lens, cu_q_lens, **options), pages

    heads, of_pages = P(None, "h", None), P(None, None, "h", None)
    specs = (heads, of_pages, P(), P(), P(), P("h"), heads, P())
    sharded = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=(heads, of_pages))
    module = module_for_cuda(sharded, *inputs.values(), new, jax.ShapeDtypeStruct((2,), jnp.int32))
    assert module.count("custom_call @mosaic_gpu") == 2


MANY = dict(q_lens=(300, 1), kv_lens=(300, 400), heads=(8, 2, 64), page_size=16, dtype="bfloat16")


@pytest.mark.parametrize("prefix", [None, 16])
@pytest.mark.usefixtures("on_hopper")
def test_chunks_and_prefixes_lower_under_shard_map_over_heads(prefix):
    mesh = jax.sharding.AbstractMesh((1,), ("h",), axis_types=(jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec
    inputs = shapes(**MANY, sinks=True)

    def step(q, pages, table, kv_lens, cu_q_lens, sinks):
        options = dict(sinks=sinks, shared_prefix_len=prefix, implementation=GPU)
        return paged_attention(q, pages, table, kv_lens, cu_q_lens, **options)

    heads, of_pages = P(None, "h", None), P(None, None, "h", None)
    sharded = jax.shard_map(step, mesh=mesh, in_specs=(heads, of_pages, P(), P(), P(), P("h")), out_specs=heads)
    assert module_for_cuda(sharded, *inputs.values()).count("custom_call @mosaic_gpu") == (3 if prefix else 2)


@pytest.mark.parametrize("options", [dict(max_q_len=1), dict(), dict(shared_prefix_len=16)], ids=str)
@pytest.mark.usefixtures("on_hopper")
def test_lowers_where_the_user_has_64_bits_and_strict_promotion(options):
    window = {} if "shared_prefix_len" in options else dict(window=40)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        inputs = shapes(**MANY, sinks=True)
        assert "custom_call @mosaic_gpu" in module_of(inputs, **options, **window)


def test_every_pair_of_choices_is_in_the_list():
    held = set().union(*map(pairs, ROWS))
    for a, b in itertools.combinations(AXES, 2):
        for x, y in itertools.product(AXES[a], AXES[b]):
            assert ((a, x), (b, y)) in held
    assert len(CASES) >= 200
    assert len({case.name for case in CASES}) == len(CASES)


def test_no_consumer_waits_for_registers_that_the_block_has_not():
    warpgroups = 3
    at_start = 65536 // (warpgroups * 128) // 8 * 8
    shared_out = 2 * gpu_paged_decode.CONSUMER_REGISTERS + gpu_paged_decode.PRODUCER_REGISTERS
    assert shared_out == warpgroups * at_start


def written(tokens, kv_heads, dim, page_dtype="bfloat16", dtype="bfloat16"):
    pages = jax.eval_shape(lambda: init_pages(40, 16, kv_heads, dim, page_dtype))
    new = jax.ShapeDtypeStruct((tokens, kv_heads, dim), dtype)
    return pages, new, new, jax.ShapeDtypeStruct((tokens,), jnp.int32)


def check_one_kernel_in_place(*args):
    run = jax.jit(partial(write_pages, implementation=GPU), donate_argnums=0)
    module = jax.export.export(run, platforms=["cuda"])(*args).mlir_module()
    assert module.count("custom_call @mosaic_gpu") == 1
    assert "output_operand_aliases = [#stablehlo.output_operand_alias" in module
    assert not re.search(r"scatter|stablehlo\.(dot|multiply|round|divide)", module)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("tokens", "kv_heads", "dim"), [(1, 1, 64), (300, 2, 80), (9, 3, 80), (2048, 8, 128), (5, 3, 256), (7, 1, 17)]
)
@pytest.mark.usefixtures("on_hopper")
def test_writes_in_place_in_one_kernel(tokens, kv_heads, dim, dtype):
    check_one_kernel_in_place(*written(tokens, kv_heads, dim, dtype))


@pytest.mark.parametrize("page_dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("tokens", "kv_heads", "dim"), [(1, 1, 64), (300, 2, 80), (9, 3, 96), (2048, 8, 128), (5, 3, 256)]
)
@pytest.mark.usefixtures("on_hopper")
def test_compresses_and_writes_in_place_in_one_kernel(tokens, kv_heads, dim, dtype, page_dtype):
    check_one_kernel_in_place(*written(tokens, kv_heads, dim, page_dtype, dtype))


@pytest.mark.parametrize("page_dtype", ["bfloat16", "int8"])
@pytest.mark.usefixtures("on_hopper")
def test_write_pages_of_no_tokens_is_declined_by_name(page_dtype):
    with pytest.raises(NotImplementedError, match="nothing"):
        jax.eval_shape(partial(write_pages, implementation=GPU), *written(0, 8, 64, page_dtype))


@pytest.mark.parametrize(
    ("feature", "dim", "scales", "dtype"),
    [
        ("head dim 48", 48, (3, 1), "bfloat16"),
        ("scales of int8, 1 and 1 a head", 64, (1, 1), "bfloat16"),
        ("scales of int8, 4 and 2 a head", 64, (4, 2), "bfloat16"),
        ("k of int32", 64, (4, 1), "int32"),
    ],
)
@pytest.mark.usefixtures("on_hopper")
def test_compressed_writes_that_are_not_served_are_declined_by_name(feature, dim, scales, dtype, monkeypatch):
    pages, *new = written(5, 2, dim, "int8", dtype)
    k_scale, v_scale = (jax.ShapeDtypeStruct((*pages.k.shape[:3], n), jnp.float16) for n in scales)
    pages = KVPages(pages.k, pages.v, k_scale, v_scale)
    with pytest.raises(NotImplementedError, match=feature):
        jax.eval_shape(partial(write_pages, implementation=GPU), pages, *new)
    monkeypatch.setattr(dispatch, "platform", lambda: "gpu")
    assert jax.tree.leaves(jax.eval_shape(write_pages, pages, *new)) == jax.tree.leaves(pages)


@pytest.mark.parametrize("op", sorted(dispatch.MODULES))
def test_what_is_served_by_name_alone_is_no_default(op, monkeypatch):
    asked = []

    def load(op, name):
        asked.append(name)
        raise NotImplementedError

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(dispatch, "load", load)
    with pytest.raises(NotImplementedError, match=op):
        dispatch.call(op, None)
    assert asked == [name for name in ("mosaic_gpu", "xla") if (op, name) not in dispatch.BY_NAME]


def test_what_is_not_there_declines_by_name():
    with pytest.raises(NotImplementedError, match="write_compressed_pages has no 'mosaic_tpu'"):
        dispatch.load("write_compressed_pages", "mosaic_tpu")


@pytest.mark.usefixtures("on_hopper")
def test_what_is_written_in_place_is_no_slice_of_what_a_scan_stacks():
    """As XLA would lose what the kernel for chunks has written there; `pytest -m gpu` has the same with numbers."""
    inputs = shapes([40, 1, 1], [140, 100, 7], (8, 2, 128), 16, jnp.bfloat16)
    several = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), inputs)
    module = module_for_cuda(jax.vmap(lambda inputs: paged_attention(**inputs, implementation=GPU)), several)
    assert module.count("custom_call @mosaic_gpu") == 2
    assert "optimization_barrier" in module


@pytest.mark.parametrize(("dim", "whole_lines"), [(64, True), (80, False), (96, False), (128, True)])
@pytest.mark.usefixtures("on_hopper")
def test_what_decode_reads_may_leave_the_cache_first(dim, whole_lines, monkeypatch):
    """`hopper.load_once` finds all copies that this jax issues for it; where heads share lines there are none."""
    found, operands_of = [], hopper.operands_of
    monkeypatch.setattr(hopper, "operands_of", lambda copy: found.append(operands_of(copy)) or found[-1])
    inputs = shapes([1] * 4, [100] * 4, (8, 2, dim), 16, jnp.bfloat16)
    assert ("L2::cache_hint" in module_of(inputs, max_q_len=1)) == whole_lines == bool(found)
    assert None not in found


@pytest.mark.parametrize(("dtype", "arrays"), [("bfloat16", 2), ("int8", 4)])
@pytest.mark.usefixtures("on_hopper")
def test_lowers_under_vmap_attention_a_call_after_the_other_and_writes_at_once(dtype, arrays):
    inputs = shapes([1] * 4, [100] * 4, (8, 2, 128), 16, jnp.bfloat16)
    inputs |= dict(pages=jax.eval_shape(lambda: init_pages(*inputs["pages"].k.shape, dtype)))
    tokens, slots = jax.ShapeDtypeStruct((4, 2, 128), jnp.bfloat16), jax.ShapeDtypeStruct((4,), jnp.int32)

    def step(inputs, tokens, slots):
        pages = write_pages(inputs["pages"], tokens, tokens, slots, implementation=GPU)
        return paged_attention(**inputs | {"pages": pages}, max_q_len=1, implementation=GPU)

    several = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), (inputs, tokens, slots))
    module = module_for_cuda(jax.vmap(step), *several)
    assert module.count("custom_call @mosaic_gpu") == 1
    assert module.count('"stablehlo.scatter"(') == arrays
