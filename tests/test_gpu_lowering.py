"""The Hopper kernel of flash_attention as far as a machine without a GPU can follow it: it lowers for CUDA."""

import importlib
import itertools
import math
import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from cases import FlashCase
from flash_cases import AXES, CASES, ROWS, attend, cotangent_shapes, pairs, representatives, split

from paxattn import dispatch, flash_attention

GPU = "mosaic_gpu"


@pytest.fixture
def on_hopper(monkeypatch):
    """The kernel's module thinks that it is on a Hopper GPU: lowering for one needs none."""
    module = importlib.import_module(dispatch.MODULES["flash_attention"][GPU])
    monkeypatch.setattr(module, "on_hopper", lambda: True)


def features(case):
    """What another kernel, or another branch of one, is lowered for. Lengths are not, but whether they are odd is."""
    _, t, s, h, k, *dims = case.shape
    left, right = bounds(case.options.get("window"))
    return dict(
        dims=tuple(dims),
        dtype=case.dtype,
        causal=case.options.get("causal", False),
        left=left,
        right=right,
        grouped=h > k,
        odd=(t % 128 != 0, s % 128 != 0),
        softcap="softcap" in case.options,
        sinks=case.sinks,
        segments=case.segments > 0,
        deterministic=case.options.get("deterministic", True),
    )


def bounds(window):
    """Whether there is a bound on the left and on the right."""
    pair = window if isinstance(window, tuple) else (window, None)
    return tuple(x is not None for x in pair)


IN_CI = [case.name for case in representatives(CASES, features)]
SLOW_TOO = [case if case.name in IN_CI else pytest.param(case, marks=pytest.mark.slow) for case in CASES]


def shapes(case):
    """What flash_inputs gives, without values, and the cotangents."""
    b, t, s, h, k, d, dv = case.shape
    array = jax.ShapeDtypeStruct
    of = dict(q=(b, t, h, d), k=(b, s, k, d), v=(b, s, k, dv))
    inputs = {name: array(shape, case.dtype) for name, shape in of.items()}
    if case.sinks:
        inputs["sinks"] = array((h,), jnp.float32)
    if case.segments:
        inputs |= {"q_segment_ids": array((b, t), jnp.int32), "kv_segment_ids": array((b, s), jnp.int32)}
    return *split(inputs), tuple(array(shape, jnp.float32) for shape in cotangent_shapes(case))


def modules_for_cuda(case):
    """What the forward alone lowers to, and the forward with the backward."""
    moving, fixed, cotangents = shapes(case)
    op = partial(flash_attention, **case.options, implementation=GPU)
    yield module_for_cuda(lambda moving, fixed: op(**moving, **fixed), moving, fixed)
    yield module_for_cuda(attend(case, GPU), moving, fixed, cotangents)


def module_for_cuda(run, *args):
    # The kernel's custom call is among those that jax.export promises to keep: no check need be disabled.
    return jax.export.export(jax.jit(run), platforms=["cuda"])(*args).mlir_module()


def tensors(module):
    """The shapes of all tensors that are outside kernels."""
    return {tuple(map(int, dims.split("x")[:-1])) for dims in re.findall(r"tensor<((?:\d+x)+)[a-z]", module)}


@pytest.mark.parametrize("case", SLOW_TOO, ids=str)
@pytest.mark.usefixtures("on_hopper")
def test_lowers_for_cuda(case):
    b, t, s, h, k, *dims = case.shape
    scores = {(t, s), (s, t)} if {t, s}.isdisjoint((1, b, h, k, *dims)) else set()
    for module in modules_for_cuda(case):
        assert "custom_call @mosaic_gpu" in module
        found = tensors(module)
        assert (b, t, h, dims[0]) in found
        assert not {shape[-2:] for shape in found} & scores


LONG = FlashCase("long", (1, 8191, 8253, 4, 2, 128, 128), dtype="bfloat16")


@pytest.mark.parametrize("options", [dict(), dict(causal=True, window=1000, deterministic=False)], ids=str)
@pytest.mark.parametrize("segments", [0, 16])
@pytest.mark.usefixtures("on_hopper")
def test_no_tensor_has_the_size_of_the_scores(options, segments):
    case = replace(LONG, options=options, segments=segments)
    for module in modules_for_cuda(case):
        assert max(map(math.prod, tensors(module))) < 8191 * 8253


@pytest.mark.parametrize("order", ["jvp", "second"])
@pytest.mark.usefixtures("on_hopper")
def test_forward_mode_and_second_derivatives_say_where_they_work(order):
    x = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)

    def first(q, k, v):
        return flash_attention(q, k, v, causal=True, implementation=GPU).astype(jnp.float32).sum()

    def second(q, k, v):
        return jax.grad(first)(q, k, v).astype(jnp.float32).sum()

    moved = lambda *x: jax.jvp(first, x, x) if order == "jvp" else jax.grad(second)(*x)
    with pytest.raises((NotImplementedError, TypeError), match=r'(?is)(forward|second).*implementation="xla"'):
        module_for_cuda(moved, x, x, x)


@pytest.mark.parametrize(
    ("feature", "dtype", "d", "dv"),
    [
        ("float32", "float32", 64, 64),
        ("72", "bfloat16", 72, 72),
        ("512", "float16", 512, 512),
        ("64", "float16", 128, 64),
    ],
)
@pytest.mark.usefixtures("on_hopper")
def test_what_the_kernel_does_not_serve_is_declined_by_name(feature, dtype, d, dv):
    q, v = (jax.ShapeDtypeStruct((1, 128, 2, dim), dtype) for dim in (d, dv))
    with pytest.raises(NotImplementedError, match=feature):
        jax.eval_shape(partial(flash_attention, implementation=GPU), q, q, v)


def test_a_machine_without_hopper_is_told_so():
    x = jnp.zeros((1, 2, 2, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="Hopper"):
        flash_attention(x, x, x, implementation=GPU)
    assert flash_attention(x, x, x).shape == x.shape


def test_every_pair_of_choices_is_in_the_list():
    held = set().union(*map(pairs, ROWS))
    for a, b in itertools.combinations(AXES, 2):
        for x, y in itertools.product(AXES[a], AXES[b]):
            assert ((a, x), (b, y)) in held
    assert len(CASES) >= 220
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.usefixtures("on_hopper")
def test_lowers_under_shard_map_over_batch_and_heads():
    mesh = jax.sharding.AbstractMesh((1, 1), ("b", "h"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    P = jax.sharding.PartitionSpec
    x, ids = jax.ShapeDtypeStruct((2, 160, 2, 64), jnp.bfloat16), jax.ShapeDtypeStruct((2, 160), jnp.int32)

    def loss(q, k, v, sinks, ids):
        def one(q, k, v, sinks, ids):
            options = dict(causal=True, sinks=sinks, q_segment_ids=ids, kv_segment_ids=ids)
            return flash_attention(q, k, v, implementation=GPU, **options)

        heads = P("b", None, "h", None)
        specs = (heads, heads, heads, P("h"), P("b"))
        out = jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=heads)(q, k, v, sinks, ids)
        return out.astype(jnp.float32).sum()

    sinks = jax.ShapeDtypeStruct((2,), jnp.float32)
    assert "custom_call @mosaic_gpu" in module_for_cuda(jax.grad(loss, argnums=(0, 1, 2, 3)), x, x, x, sinks, ids)


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.usefixtures("on_hopper")
def test_lowers_where_the_user_has_64_bits_and_strict_promotion(segments):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        x, ids = jax.ShapeDtypeStruct((1, 160, 2, 64), jnp.bfloat16), jax.ShapeDtypeStruct((1, 160), jnp.int32)

        def loss(q, k, v, ids):
            given = dict(q_segment_ids=ids, kv_segment_ids=ids) if segments else {}
            return flash_attention(q, k, v, causal=True, implementation=GPU, **given).astype(jnp.float32).sum()

        assert "custom_call @mosaic_gpu" in module_for_cuda(jax.grad(loss, argnums=(0, 1, 2)), x, x, x, ids)


@pytest.mark.usefixtures("on_hopper")
def test_64_bit_segment_ids_are_declined_by_name():
    with jax.enable_x64(True):
        x = jax.ShapeDtypeStruct((1, 160, 2, 64), jnp.bfloat16)
        ids = jnp.zeros((1, 160), jnp.int64)
        with pytest.raises(NotImplementedError, match="q_segment_ids of int64"):
            jax.eval_shape(
                lambda q: flash_attention(q, q, q, q_segment_ids=ids, kv_segment_ids=ids, implementation=GPU), x
            )


@pytest.mark.usefixtures("on_hopper")
def test_an_axis_of_nothing_under_vmap():
    x = jax.ShapeDtypeStruct((0, 1, 64, 2, 64), jnp.bfloat16)
    one = lambda q: flash_attention(q, q, q, implementation=GPU)
    assert jax.eval_shape(jax.vmap(one), x).shape == x.shape
