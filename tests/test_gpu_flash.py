"""The Hopper kernel of flash_attention on the GPU it is for: `pytest -m gpu tests/test_gpu_flash.py`.

Several processes share the GPU where XLA_PYTHON_CLIENT_PREALLOCATE=false: add `-n 8`, most of the time is compilation.
"""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FlashCase, error, flash_inputs, once, plain_attention_and_lse, seen_keys
from flash_cases import CASES, WRT, attend, cotangent_shapes, everything, split
from test_gpu_lowering import on_hopper, test_forward_mode_and_second_derivatives_say_where_they_work

from paxattn import flash_attention

__all__ = ["on_hopper", "test_forward_mode_and_second_derivatives_say_where_they_work"]

pytestmark = pytest.mark.gpu

GPU = "mosaic_gpu"


@pytest.fixture(autouse=True)
def hopper():
    assert jax.default_backend() == "gpu"
    if jax.devices()[0].compute_capability != "9.0":
        pytest.skip("the kernel is for Hopper (compute capability 9.0)")


def cotangents_of(case, rng):
    """What low precision holds exactly, so that every implementation pulls the same back."""
    normal = lambda shape: jnp.asarray(rng.normal(size=shape), case.dtype).astype(jnp.float32)
    return tuple(map(normal, cotangent_shapes(case)))


def judged(case, moving, fixed, seen, cotangents):
    """What an oracle of more bits gives, and what plain attention gives in the case's dtype."""
    numeric = {name: x for name, x in case.options.items() if name in ("scale", "softcap")}
    plain = partial(everything, partial(plain_attention_and_lse, **numeric))
    # Without this XLA keeps float32 between fused operations, and plain attention would not be in low precision.
    low = once(plain, xla_allow_excess_precision=False)(moving, {"seen": seen}, cotangents)
    if case.dtype == "float32":
        with jax.enable_x64(True):
            exact = {name: x.astype(jnp.float64) for name, x in moving.items()}
            return once(plain)(exact, {"seen": seen}, cotangents), low
    exact = {name: x.astype(jnp.float32) for name, x in moving.items()}
    return once(attend(case, "reference"))(exact, fixed, cotangents), low


def bound(name, plain, want, dtype):
    """At most twice plain attention's error; the floor is an eighth of a rounding, for what it has exactly by luck."""
    if name == "lse":  # float32 in every precision of the inputs
        return 1e-3
    floor = float(jnp.finfo(dtype).eps) / 8 * rms(want) + 1e-6
    return 2 * error(plain, want) + floor


def rms(x):
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_oracle_as_closely_as_plain_attention(case, rng):
    inputs = flash_inputs(case, rng, case.dtype)
    cotangents, seen = cotangents_of(case, rng), seen_keys(case, inputs)
    moving, fixed = split(inputs)
    got = jax.jit(attend(case, GPU))(moving, fixed, cotangents)
    want, plain = judged(case, moving, fixed, seen, cotangents)

    assert got.keys() == want.keys()
    for name, x in got.items():
        assert x.shape == want[name].shape, name
        assert x.dtype == ("float32" if name in ("lse", "dsinks") else case.dtype), name
        assert not np.isnan(want[name]).any(), name
        assert error(x, want[name]) <= bound(name, plain[name], want[name], case.dtype), name
    check_what_sees_nothing(got, np.asarray(seen))


def check_what_sees_nothing(got, seen):
    """Exactly zero, not merely small, and lse -inf: nothing of a masked key or query may get through."""
    some_key, some_query = seen.any(axis=2), seen.any(axis=1)
    for name, there in (("out", some_key), ("dq", some_key), ("dk", some_query), ("dv", some_query)):
        assert not np.asarray(got[name], np.float32)[~there].any(), name
    lse = np.asarray(got["lse"]).swapaxes(1, 2)
    assert np.isneginf(lse[~some_key]).all()
    assert np.isfinite(lse[some_key]).all()


MANY_BLOCKS = [
    FlashCase("d128_causal", (2, 1601, 1799, 8, 2, 128, 128), dict(causal=True), dtype="bfloat16"),
    FlashCase("d64_segments_sinks", (2, 1601, 1799, 6, 3, 64, 64), sinks=True, segments=4, dtype="float16"),
    FlashCase("d256_window", (1, 1601, 1799, 6, 2, 256, 256), dict(window=(700, 300)), dtype="bfloat16"),
    FlashCase("d192_multi_query", (2, 1799, 1601, 16, 1, 192, 128), dict(causal=True, softcap=9.0), dtype="bfloat16"),
]


@pytest.mark.parametrize("case", MANY_BLOCKS, ids=str)
def test_the_same_inputs_give_the_same_bits(case, rng):
    inputs = flash_inputs(case, rng, case.dtype)
    moving, fixed = split(inputs)
    cotangents = cotangents_of(case, rng)
    run = jax.jit(attend(case, GPU))
    first, *others = [run(moving, fixed, cotangents) for _ in range(5)]
    for name, x in first.items():
        assert np.isfinite(np.asarray(x, np.float32)).any(), name
        assert all(np.asarray(x).tobytes() == np.asarray(other[name]).tobytes() for other in others), name


@pytest.mark.parametrize("case", MANY_BLOCKS[:2], ids=str)
def test_what_deterministic_changes_is_rounding(case, rng):
    """Many blocks add to one dq: lost or repeated additions show."""
    inputs = flash_inputs(case, rng, case.dtype)
    moving, fixed = split(inputs)
    cotangents = cotangents_of(case, rng)
    want = jax.jit(attend(case, GPU))(moving, fixed, cotangents)
    run = jax.jit(attend(replace(case, options=case.options | {"deterministic": False}), GPU))
    for got in [run(moving, fixed, cotangents) for _ in range(3)]:
        for name in got:
            check_close(got[name], want[name], name)


def check_close(got, want, name):
    """Equal up to the rounding of the last step, or up to that of a long sum in float32."""
    eps = max(float(jnp.finfo(want.dtype).eps) / 2, 1e-4)
    assert error(got, want) <= eps * rms(np.where(np.isfinite(want), want, 0)) + 1e-6, name


def batched(rng, *lead):
    shapes = dict(q=(2, 200, 6, 64), k=(2, 257, 3, 64), v=(2, 257, 3, 64))
    inputs = {name: jnp.asarray(rng.normal(size=(*lead, *shape)), jnp.bfloat16) for name, shape in shapes.items()}
    return inputs | {"sinks": jnp.asarray(rng.normal(size=(*lead, 6)), jnp.float32)}


def loss(q, k, v, sinks):
    """A number that depends on out and on lse, so that its gradient goes through both."""
    out, lse = flash_attention(q, k, v, sinks=sinks, causal=True, return_lse=True, implementation=GPU)
    return jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(lse)


def call(inputs):
    return jax.value_and_grad(lambda inputs: loss(**inputs))(inputs)


def check_tree_close(got, want):
    for (path, x), y in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        check_close(x, y, path)


def one_by_one(inputs):
    return jax.tree.map(lambda *x: jnp.stack(x), *(call(jax.tree.map(lambda x, i=i: x[i], inputs)) for i in range(3)))


def test_vmap(rng):
    inputs = batched(rng, 3)
    check_tree_close(jax.jit(jax.vmap(call))(inputs), one_by_one(inputs))


def test_vmap_over_the_queries_alone(rng):
    inputs, more = batched(rng), batched(rng, 3)
    run = lambda q: call(inputs | {"q": q})
    check_tree_close(jax.jit(jax.vmap(run))(more["q"]), jax.tree.map(lambda *x: jnp.stack(x), *map(run, more["q"])))


def test_checkpoint(rng):
    inputs = batched(rng)
    again = jax.value_and_grad(jax.checkpoint(lambda inputs: loss(**inputs)))
    check_tree_close(jax.jit(again)(inputs), call(inputs))


def test_scan(rng):
    inputs = batched(rng, 3)
    scanned = jax.jit(lambda inputs: jax.lax.scan(lambda _, x: (None, call(x)), None, inputs)[1])
    check_tree_close(scanned(inputs), one_by_one(inputs))


def test_gradient_of_a_scan_of_checkpoints(rng):
    """As layers of a decoder are trained: the residuals of each step are made again in the backward."""
    inputs = batched(rng)

    def layers(inputs):
        step = jax.checkpoint(lambda total, _: (total + loss(**inputs), None))
        return jax.lax.scan(step, jnp.float32(0), None, length=3)[0]

    total, grads = jax.jit(jax.value_and_grad(layers))(inputs)
    want, once = call(inputs)
    np.testing.assert_allclose(total, 3 * want, rtol=1e-3)
    for name, x in grads.items():
        eps = float(jnp.finfo(x.dtype).eps)
        assert error(x, 3 * once[name].astype(jnp.float32)) <= 4 * eps * rms(x) + 1e-5, name


def test_shard_map_over_batch_and_heads(rng):
    inputs = batched(rng)
    mesh = jax.make_mesh((1, 1), ("b", "h"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec
    arrays, heads = spec("b", None, "h", None), spec("h")

    op = lambda q, k, v, sinks: flash_attention(q, k, v, sinks=sinks, causal=True, return_lse=True, implementation=GPU)
    sharded = jax.shard_map(op, mesh=mesh, in_specs=(arrays,) * 3 + (heads,), out_specs=(arrays, spec("b", "h", None)))

    def total(op, inputs):
        out, lse = op(*(inputs[name] for name in WRT))
        return jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(lse)

    # shard_map takes arguments by position alone.
    run = lambda op: jax.jit(jax.value_and_grad(partial(total, op)))(inputs)
    check_tree_close(run(sharded), run(op))


def lowered(dtype, implementation, options=None):
    x = jax.ShapeDtypeStruct((1, 128, 2, 64), dtype)
    op = partial(flash_attention, implementation=implementation, **(options or {}))
    return jax.jit(op).lower(x, x, x).as_text()


def test_the_kernel_is_the_default_where_it_serves():
    assert "mosaic_gpu" in lowered("bfloat16", None)
    assert "mosaic_gpu" not in lowered("float32", None)
    with pytest.raises(NotImplementedError, match="float32"):
        lowered("float32", GPU)


def test_float32_is_served_by_xla(rng):
    q, k, v = (jnp.asarray(rng.normal(size=(1, 130, 2, 64)), jnp.float32) for _ in range(3))
    want = flash_attention(q, k, v, causal=True, implementation="xla")
    np.testing.assert_array_equal(flash_attention(q, k, v, causal=True), want)


def test_neighbours_that_are_nan_change_nothing(rng):
    """No user pads, so what lies past a row's odd end is another row: its values may not be multiplied by zero."""
    case = FlashCase("odd", (3, 130, 201, 6, 3, 128, 128), dict(causal=True), dtype="bfloat16")
    moving, _ = split(flash_inputs(case, rng, case.dtype))
    cotangents = cotangents_of(case, rng)
    run = jax.jit(attend(case, GPU))
    want = run(moving, {}, cotangents)
    # Rows 0 and 2 lie before and behind the clean one, and KV heads 0 and 2 (query heads 0, 1, 4, 5) beside it.
    for axis, clean in ((0, [1]), (2, [1])):
        poisoned = {name: poison(x, axis, clean) for name, x in moving.items()}
        got = run(poisoned, {}, (poison(cotangents[0], axis, clean), cotangents[1]))
        for name in ("out", "dq", "dk", "dv"):
            kept = [np.asarray(kept_part(x[name], axis, clean), np.float32) for x in (got, want)]
            np.testing.assert_array_equal(*kept, err_msg=name)


def heads_of(size, axis, clean):
    """The indices of q's axis that belong to `clean` of three KV heads or rows."""
    group = size // 3 if axis == 2 else 1
    return [i * group + j for i in clean for j in range(group)]


def poison(x, axis, clean):
    kept = np.isin(np.arange(x.shape[axis]), heads_of(x.shape[axis], axis, clean))
    return jnp.where(jnp.expand_dims(kept, [i for i in range(x.ndim) if i != axis]), x, jnp.asarray(np.nan, x.dtype))


def kept_part(x, axis, clean):
    return jnp.take(x, jnp.asarray(heads_of(x.shape[axis], axis, clean)), axis=axis)


def attention64(q, k, v, dout, causal):
    """Attention and its gradients in float64 numpy, [B,T,H,D] and T <= S or rows that see nothing."""
    q, k, v, dout = (np.asarray(x, np.float64) for x in (q, k, v, dout))
    group, t, s = q.shape[2] // k.shape[2], q.shape[1], k.shape[1]
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    scale = q.shape[-1] ** -0.5
    seen = np.arange(s)[None] <= np.arange(t)[:, None] + s - t if causal else np.ones((t, s), bool)
    scores = np.where(seen, np.einsum("bthd,bshd->bhts", q, k) * scale, -np.inf)
    top = scores.max(axis=-1, keepdims=True)
    p = np.exp(scores - np.where(np.isfinite(top), top, 0.0))
    p /= np.maximum(p.sum(axis=-1, keepdims=True), 1e-300)
    out = np.einsum("bhts,bshd->bthd", p, v)
    dp = np.einsum("bthd,bshd->bhts", dout, v)
    ds = p * (dp - np.sum(p * dp, axis=-1, keepdims=True)) * scale
    dk, dv = np.einsum("bhts,bthd->bshd", ds, q), np.einsum("bhts,bthd->bshd", p, dout)
    add_up = lambda x: x.reshape(*x.shape[:2], -1, group, x.shape[-1]).sum(axis=3)
    return {"out": out, "dq": np.einsum("bhts,bshd->bthd", ds, k), "dk": add_up(dk), "dv": add_up(dv)}


def cudnn(q, k, v, dout, causal):
    """What cuDNN gives; queries that see nothing it does not know, so they are left out and filled with zeros."""
    blind = max(q.shape[1] - k.shape[1], 0) if causal else 0
    op = partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # jax.nn is not strict
        got = by_name(jax.jit(partial(pulled, op))(q[:, blind:], k, v, dout[:, blind:]))
    pad = lambda x: jnp.pad(x, ((0, 0), (blind, 0), (0, 0), (0, 0)))
    return got | {name: pad(got[name]) for name in ("out", "dq")}


def pulled(op, q, k, v, dout):
    out, pull = jax.vjp(op, q, k, v)
    return out, *pull(dout)


def by_name(arrays):
    return dict(zip(("out", "dq", "dk", "dv"), arrays, strict=True))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("d", "dtype"), [(64, "bfloat16"), (128, "bfloat16"), (128, "float16")])
@pytest.mark.parametrize("kind", ["random", "large", "dominant", "equal", "blind"])
def test_error_is_at_most_a_fifth_above_cudnns(kind, d, dtype, causal, rng):
    inputs = adversarial(kind, d, dtype, rng)
    want = attention64(*inputs, causal)
    op = partial(flash_attention, causal=causal, implementation=GPU)
    got, base = by_name(jax.jit(partial(pulled, op))(*inputs)), cudnn(*inputs, causal)
    errors = {name: (error(got[name], want[name]), error(base[name], want[name])) for name in want}
    print(kind, d, dtype, causal, {name: f"{x:.3g} / {y:.3g}" for name, (x, y) in errors.items()})
    for name, (ours, theirs) in errors.items():
        assert ours <= 1.2 * theirs + 1e-6, name


def adversarial(kind, d, dtype, rng):
    """q, k, v, dout whose scores are: normal, in the hundreds, led by one key, all equal, or seen by no query."""
    t = 640 if kind == "blind" else 512
    q, k, v, dout = (rng.normal(size=(2, n, h, d)) for n, h in ((t, 4), (512, 2), (512, 2), (t, 4)))
    if kind == "large":
        q *= 100
    elif kind == "dominant":
        k[:, 7] *= 50
    elif kind == "equal":
        k[:] = 1.0
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v, dout))


LINEAR = {
    "full": dict(),
    "causal": dict(causal=True),
    "causal_any_order": dict(causal=True, deterministic=False),
    "window_softcap": dict(causal=True, window=1000, softcap=20.0),
    "segments": dict(causal=True, segments=True),
}


@pytest.mark.parametrize("options", LINEAR.values(), ids=LINEAR)
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_memory_is_linear_in_length(direction, d, options):
    options = dict(options)
    segments = options.pop("segments", False)
    op = partial(flash_attention, implementation=GPU, **options)
    both = partial(everything, lambda **x: op(**x, return_lse=True))
    run = jax.jit((lambda moving, fixed, _: op(**moving, **fixed)) if direction == "forward" else both)

    def temporary(length):
        # Odd, and T and S apart: what is padded or copied counts.
        q, k = (jax.ShapeDtypeStruct((1, n, h, d), jnp.bfloat16) for n, h in ((length - 1, 4), (length - 3, 2)))
        out, lse = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (q.shape, (1, 4, length - 1)))
        ids = {name: jax.ShapeDtypeStruct(x.shape[:2], jnp.int32) for name, x in (("q", q), ("kv", k))}
        fixed = {f"{name}_segment_ids": x for name, x in ids.items() if segments}
        compiled = run.lower(dict(q=q, k=k, v=k), fixed, (out, lse)).compile()
        check_no_scores(compiled.as_text(), length)
        return compiled.memory_analysis().temp_size_in_bytes

    small, middle, large = map(temporary, (2048, 4096, 8192))
    assert middle <= 2.1 * small + 4096
    assert large <= 2.1 * middle + 4096


def check_no_scores(hlo, length):
    shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", hlo)
    assert shapes
    largest = max(np.prod([int(n) for n in shape.split(",")], dtype=np.int64) for shape in shapes)
    assert largest < (length - 1) * (length - 3)
