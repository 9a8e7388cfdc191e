"""One body for every implementation of flash_attention, over tests/cases.py."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FLASH, error, flash_inputs, once, plain_attention, seen_keys

from paxattn import flash_attention

IMPLEMENTATIONS = ["xla"]
WRT = ("q", "k", "v", "sinks")


def run(case, inputs, cotangents, implementation):
    """Output, lse and the gradients of both, as one flat list."""
    fixed = {name: x for name, x in inputs.items() if name not in WRT}
    moving = {name: inputs[name] for name in WRT if inputs[name] is not None}

    def op(moving):
        return flash_attention(
            **{"sinks": None, **moving},
            **fixed,
            **case.options,
            return_lse=True,
            implementation=implementation,
        )

    def everything(moving, cotangents):
        (out, lse), pull = jax.vjp(op, moving)
        return (
            out,
            lse,
            pull((cotangents[0].astype(out.dtype), jnp.where(jnp.isfinite(lse), cotangents[1], 0.0))),
        )

    compiled = jax.jit if implementation == "xla" else once
    return jax.tree.leaves(compiled(everything)(moving, cotangents))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", FLASH, ids=str)
def test_float32_equals_the_oracle(case, implementation, rng):
    inputs = flash_inputs(case, rng, jnp.float32)
    b, t, _, h, _, _, dv = case.shape
    cotangents = tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((b, t, h, dv), (b, h, t)))
    got = run(case, inputs, cotangents, implementation)
    want = run(case, inputs, cotangents, "reference")
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)


LOW = [case for case in FLASH if case.name in ("causal_longer_keys", "full", "window_pair", "sinks", "segments")]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("case", LOW, ids=str)
def test_low_precision_error_is_at_most_twice_plain_attentions(case, dtype, implementation, rng):
    inputs = flash_inputs(case, rng, dtype)
    b, t, _, h, _, _, dv = case.shape
    cotangents = jnp.asarray(rng.normal(size=(b, t, h, dv)), dtype).astype(jnp.float32), jnp.zeros((b, h, t))
    exact = {name: x.astype(jnp.float32) if name in ("q", "k", "v") else x for name, x in inputs.items()}
    want = run(case, exact, cotangents, "reference")
    got = run(case, inputs, cotangents, implementation)
    seen = seen_keys(case, inputs)

    def plain(moving, cotangent):
        out, pull = jax.vjp(lambda q, k, v, sinks: plain_attention(q, k, v, seen, sinks=sinks), *moving)
        return out, pull(cotangent)

    moving = [inputs[name] for name in WRT]
    out, pulled = once(plain, xla_allow_excess_precision=False)(moving, cotangents[0].astype(dtype))
    base = [out, want[1], *(x for x in pulled if x is not None)]
    order = [0, 1, *(2 + i for i in np.argsort([n for n in WRT if inputs[n] is not None]))]
    base = [base[i] for i in order]
    for i, (x, y, z) in enumerate(zip(got, base, want, strict=True)):
        floor = 1e-3 if i == 1 else 1e-6
        assert error(x, z) <= 2 * error(y, z) + floor, i


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["large", "dominant", "equal", "huge_negative"])
def test_adversarial_scores(kind, implementation, rng):
    q, k, v = (jnp.asarray(rng.normal(size=(1, 300, 2, 16)), jnp.float32) for _ in range(3))
    if kind == "large":
        q = q * 200
    elif kind == "dominant":
        k = k.at[:, 7].multiply(300.0)
    elif kind == "equal":
        k = jnp.ones_like(k)
    else:
        # Exact scores, and no two keys alike for a query: lse is too large to hold the log of a sum of 2.
        order = rng.permuted(np.tile(np.arange(1, 301)[:, None], (1, 2)), axis=0)
        q, k = jnp.ceil(jnp.abs(q) * 8) * -1024, jnp.zeros_like(k).at[0, :, :, 0].set(1024.0 * order)
    grads = {}
    for name in (implementation, "reference"):
        op = jax.value_and_grad(
            lambda q, k, v, name=name: jnp.sum(flash_attention(q, k, v, causal=True, implementation=name) ** 2),
            argnums=(0, 1, 2),
        )
        grads[name] = jax.tree.leaves(jax.jit(op)(q, k, v))
    # What rounds in a gradient is as large as the other operand: dq is a sum of keys that may cancel.
    others = (jnp.ones(1), k, q, v)
    for x, y, other in zip(grads[implementation], grads["reference"], others, strict=True):
        scale = max(float(jnp.abs(y).max()), float(jnp.abs(other).max()))
        # Scores in the hundreds carry a rounding error of their own of some 1e-4.
        np.testing.assert_allclose(x / scale, y / scale, atol=5e-4)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_rows_with_nothing_to_see(implementation):
    """T > S and causal: the first T - S queries see nothing, with and without sinks."""
    q, k, v = jnp.ones((1, 5, 2, 4)), jnp.ones((1, 2, 1, 4)), jnp.ones((1, 2, 1, 4))
    for sinks in (None, jnp.ones(2)):

        def op(q, k, v, sinks=sinks):
            return flash_attention(q, k, v, causal=True, sinks=sinks, return_lse=True, implementation=implementation)

        (out, lse), pull = jax.vjp(op, q, k, v)
        assert (out[:, :3] == 0).all()
        assert jnp.isneginf(lse[:, :, :3]).all()
        assert (out[:, 3:] != 0).all()
        assert jnp.isfinite(lse[:, :, 3:]).all()
        grads = pull((jnp.ones_like(out), jnp.ones_like(lse)))
        assert all(jnp.isfinite(g).all() for g in grads)
        assert (grads[0][:, :3] == 0).all()


def test_works_under_vmap_checkpoint_scan_and_shard_map(rng):
    q, k, v = (jnp.asarray(rng.normal(size=(3, 2, 40, 2, 8)), jnp.float32) for _ in range(3))
    one = lambda q, k, v: flash_attention(q, k, v, causal=True, implementation="xla")
    want = jnp.stack([one(*x) for x in zip(q, k, v, strict=True)])
    np.testing.assert_allclose(jax.vmap(one)(q, k, v), want, rtol=1e-5, atol=1e-5)
    scanned = jax.lax.scan(lambda _, x: (None, jax.checkpoint(one)(*x)), None, (q, k, v))[1]
    np.testing.assert_allclose(scanned, want, rtol=1e-5, atol=1e-5)
    mesh = jax.make_mesh((1, 1), ("b", "h"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec("b", None, "h", None)
    sharded = jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec)
    np.testing.assert_allclose(jax.jit(sharded)(q[0], k[0], v[0]), want[0], rtol=1e-5, atol=1e-5)


def test_forward_mode_and_second_derivatives(rng):
    q, k, v = (jnp.asarray(rng.normal(size=(1, 9, 2, 4)), jnp.float32) for _ in range(3))

    def op(name):
        return lambda x: jnp.sum(flash_attention(x, k, v, causal=True, softcap=2.0, implementation=name) ** 2)

    tangent = [jax.jvp(op(name), (q,), (v,))[1] for name in ("xla", "reference")]
    np.testing.assert_allclose(*tangent, rtol=1e-4)
    twice = [jax.jvp(jax.grad(op(name)), (q,), (v,))[1] for name in ("xla", "reference")]
    np.testing.assert_allclose(*twice, rtol=1e-3, atol=1e-5)
    backwards = [jax.grad(lambda x, name=name: jnp.sum(jax.grad(op(name))(x) * v))(q) for name in ("xla", "reference")]
    np.testing.assert_allclose(*backwards, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("options", [dict(causal=True), dict(), dict(causal=True, window=100)], ids=str)
def test_memory_is_linear_in_length(options):
    def temporary(length, backward):
        x = jax.ShapeDtypeStruct((1, length, 4, 64), jnp.float32)

        def op(q, k, v):
            return flash_attention(q, k, v, implementation="xla", **options).sum()

        run = jax.jit(jax.grad(op, argnums=(0, 1, 2)) if backward else op)
        return run.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    for backward in (False, True):
        small, middle, large = (temporary(length, backward) for length in (2048, 4096, 8192))
        assert middle <= 2.1 * small
        assert large <= 2.1 * middle


GOOD = dict(q=(2, 5, 4, 8), k=(2, 7, 2, 8), v=(2, 7, 2, 6))
Q_IDS, KV_IDS = jnp.zeros((2, 5), jnp.int32), jnp.zeros((2, 7), jnp.int32)
BAD = [
    # Shapes.
    ("q", dict(q=(5, 4, 8))),
    ("q", dict(q=(2, 0, 4, 8))),
    ("q", dict(q=(2, 5, 0, 8))),
    ("q", dict(q=(0, 5, 4, 8), k=(0, 7, 2, 8), v=(0, 7, 2, 6))),
    ("q", dict(q=(2, 5, 4, 0), k=(2, 7, 2, 0))),
    ("k", dict(k=(2, 7, 2, 8, 1))),
    ("k", dict(k=(2, 7, 2, 9))),
    ("k", dict(k=(3, 7, 2, 8))),
    ("k", dict(k=(2, 7, 3, 8), v=(2, 7, 3, 6))),
    ("k", dict(k=(2, 7, 8, 8), v=(2, 7, 8, 6))),
    ("k", dict(k=(2, 7, 0, 8), v=(2, 7, 0, 6))),
    ("k", dict(k=(2, 0, 2, 8), v=(2, 0, 2, 6))),
    ("v", dict(v=(7, 2, 6))),
    ("v", dict(v=(2, 6, 2, 6))),
    ("v", dict(v=(2, 7, 4, 6))),
    ("v", dict(v=(2, 7, 2, 0))),
    # Dtypes.
    ("q", dict(q=jnp.zeros((2, 5, 4, 8), jnp.complex64))),
    ("q", dict(q=jnp.zeros((2, 5, 4, 8), jnp.float8_e4m3fn))),
    ("k", dict(k=jnp.zeros((2, 7, 2, 8), jnp.bfloat16))),
    ("v", dict(v=jnp.zeros((2, 7, 2, 6), jnp.float16))),
    ("v", dict(v=jnp.zeros((2, 7, 2, 6), bool))),
    # Options.
    ("causal", dict(causal=1)),
    ("causal", dict(causal="yes")),
    ("causal", dict(causal=jnp.asarray(True))),
    ("deterministic", dict(deterministic=None)),
    ("deterministic", dict(deterministic=0)),
    ("return_lse", dict(return_lse="lse")),
    ("window", dict(window=0)),
    ("window", dict(window=-3)),
    ("window", dict(window=True)),
    ("window", dict(window=(True, 2))),
    ("window", dict(window=(1, -1))),
    ("window", dict(window=(-1, None))),
    ("window", dict(window=(1, 2, 3))),
    ("window", dict(window=1.5)),
    ("window", dict(window=np.array([1, 2]))),
    ("softcap", dict(softcap=0.0)),
    ("softcap", dict(softcap=-2.0)),
    ("softcap", dict(softcap=float("nan"))),
    ("softcap", dict(softcap=float("inf"))),
    ("softcap", dict(softcap="2")),
    ("scale", dict(scale="x")),
    ("scale", dict(scale="2")),
    ("scale", dict(scale=True)),
    ("scale", dict(scale=float("nan"))),
    ("scale", dict(scale=float("inf"))),
    ("scale", dict(scale=10**400)),
    ("scale", dict(scale=1j)),
    ("sinks", dict(sinks=1.0)),
    ("sinks", dict(sinks=jnp.ones(3))),
    ("sinks", dict(sinks=jnp.ones((1, 4)))),
    ("sinks", dict(sinks=jnp.ones(4, jnp.int32))),
    ("q_segment_ids", dict(kv_segment_ids=KV_IDS)),
    ("kv_segment_ids", dict(q_segment_ids=Q_IDS)),
    ("kv_segment_ids", dict(q_segment_ids=Q_IDS, kv_segment_ids=Q_IDS)),
    ("kv_segment_ids", dict(q_segment_ids=Q_IDS, kv_segment_ids=KV_IDS[0])),
    ("kv_segment_ids", dict(q_segment_ids=Q_IDS, kv_segment_ids=KV_IDS.astype(bool))),
    ("q_segment_ids", dict(q_segment_ids=Q_IDS.astype(jnp.float32), kv_segment_ids=KV_IDS)),
    ("q_segment_ids", dict(q_segment_ids=[[0] * 5] * 2, kv_segment_ids=KV_IDS)),
    ("implementation", dict(implementation="triton")),
    ("implementation", dict(implementation="XLA")),
    ("implementation", dict(implementation=1)),
]


@pytest.mark.parametrize(("name", "change"), BAD, ids=[f"{i}_{name}" for i, (name, _) in enumerate(BAD)])
@pytest.mark.usefixtures("unchecked")
def test_a_bad_argument_is_named(name, change):
    arrays = {n: change.get(n, shape) for n, shape in GOOD.items()}
    arrays = {n: jnp.zeros(x) if isinstance(x, tuple) else x for n, x in arrays.items()}
    options = {n: x for n, x in change.items() if n not in GOOD}
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        flash_attention(**arrays, **options)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.usefixtures("unchecked")
def test_segment_ids_mean_the_same_in_every_dtype(implementation, rng):
    q, k, v = (jnp.asarray(rng.normal(size=(2, n, 2, 8)), jnp.float32) for n in (30, 50, 50))
    attend = partial(flash_attention, q, k, v, implementation=implementation)
    ids = rng.integers(-3, 4, (2, 30)), rng.integers(-3, 4, (2, 50))
    want = attend(q_segment_ids=jnp.asarray(ids[0], jnp.int32), kv_segment_ids=jnp.asarray(ids[1], jnp.int32))
    for a, b in ((np.int64, np.int8), (np.int8, np.int64), (np.int16, np.int16)):
        got = attend(q_segment_ids=ids[0].astype(a), kv_segment_ids=ids[1].astype(b))
        np.testing.assert_array_equal(got, want)
    with jax.enable_x64(True):
        apart = [x.astype(np.int64) * 2**32 for x in ids]
        np.testing.assert_array_equal(attend(q_segment_ids=apart[0], kv_segment_ids=apart[1]), want)
    with pytest.raises(ValueError, match=r"^q_segment_ids: got ids from"):
        attend(q_segment_ids=ids[0] + 2**32, kv_segment_ids=ids[1])
    with pytest.raises(ValueError, match=r"^kv_segment_ids: got ids from"):
        attend(q_segment_ids=ids[0], kv_segment_ids=ids[1].astype(np.uint32))
    with pytest.raises(ValueError, match=r"^kv_segment_ids: got dtype int32"):
        attend(q_segment_ids=jnp.zeros((2, 30), jnp.uint32), kv_segment_ids=jnp.zeros((2, 50), jnp.int32))


@pytest.mark.usefixtures("unchecked")
def test_bad_dtypes_and_traced_statics_are_named():
    x = jnp.zeros((1, 2, 2, 4))
    with pytest.raises(ValueError, match=r"^q: got dtype int32"):
        flash_attention(x.astype(jnp.int32), x, x)
    with pytest.raises(ValueError, match=r"^v: got dtype bfloat16"):
        flash_attention(x, x, x.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match=r"^q: got list"):
        flash_attention([[1.0]], x, x)
    with pytest.raises(ValueError, match=r"^scale: got .*trace time"):
        jax.jit(lambda scale: flash_attention(x, x, x, scale=scale))(1.0)


def test_a_window_wider_than_int32_sees_everything(rng):
    q, k = (jnp.asarray(rng.normal(size=(1, n, 2, 8)), jnp.float32) for n in (300, 5))
    want = flash_attention(q, k, k)
    for implementation in ("xla", "reference"):
        for wide in (2**40, (2**31 - 1, 2**31 - 1), (None, 2**63)):
            got = flash_attention(q, k, k, window=wide, implementation=implementation)
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
