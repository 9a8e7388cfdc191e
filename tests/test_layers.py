"""The parts of a decoder layer that compute the same in two ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import layers
from models.layers import RMSNorm, matmul


@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.02), (jnp.float16, 0.003)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_a_norm_behind_the_product_is_the_norm_before_it(dtype, rtol, size, rng):
    """One row, which takes the other way, beside the same among others."""
    norm = RMSNorm(64, 1e-5, dtype=dtype)
    norm.weight[...] = jnp.asarray(rng.uniform(0.5, 2, 64), dtype)
    weight = nnx.Param(jnp.asarray(rng.normal(size=(3, 10, 64)), dtype))
    x = jnp.asarray(rng.normal(size=(4, 64)) * size, dtype)
    among_others = norm.matmul(x, weight)
    np.testing.assert_array_equal(among_others, matmul(norm(x), weight))
    for row in range(4):
        alone = norm.matmul(x[row : row + 1], weight)
        assert alone.dtype == dtype
        want = np.asarray(among_others[row], np.float32)
        np.testing.assert_allclose(np.asarray(alone[0], np.float32), want, atol=rtol * np.abs(want).max(), rtol=0)


def test_hidden_states_of_wanted_tokens_are_those_among_all(tiny, new_store, rng):
    (model, params), store = tiny, new_store(tiny[0].config, max_seqs=3, max_len=20)
    kv, _ = store.extend(jnp.asarray([5, 0, 3], jnp.int32), num_tokens=11)
    tokens = jnp.asarray(rng.integers(0, 50, 11), jnp.int32)
    places = jnp.asarray([7, 4, 0, 4], jnp.int32)
    every, after_all = model(params, tokens, kv.batch.positions, kv)
    some, after_some = model(params, tokens, kv.batch.positions, kv.want(places))
    assert some.shape == (4, every.shape[1])
    np.testing.assert_allclose(some, every[places], atol=1e-5)
    for x, y in zip(after_all.layers, after_some.layers, strict=True):
        np.testing.assert_array_equal(x.k, y.k)
    assert kv.wanted is None
    assert after_some.end_step().wanted is None
    with pytest.raises(ValueError, match="want: no step is under way"):
        store.want(places)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_sums_are_the_product_of_one_row(dtype, rng):
    """What a GPU is given, and what is kept elsewhere."""
    x, w = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((1, 64), (30, 64)))
    sums, product = layers._sums(x, w), layers._product(x, w)
    assert sums.dtype == product.dtype == matmul(x, nnx.Param(w)).dtype
    np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (sums, product)), atol=1e-4, rtol=0.01)
    alone = jax.grad(lambda x: matmul(x, nnx.Param(w)).sum())(x)
    among = jax.grad(lambda x: matmul(jnp.concatenate([x, x]), nnx.Param(w)).sum() / 2)(x)
    np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (alone, among)), atol=0.1, rtol=0.01)
    assert matmul(x[:0], nnx.Param(w)).shape == (0, 30)
