"""The parts of a decoder layer that compute the same in two ways."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

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
