"""The oracle itself against loops in float64 that follow the definition word by word."""

import jax.numpy as jnp
import numpy as np
import pytest
from cases import FLASH, flash_inputs

from paxattn import flash_attention


def by_definition(q, k, v, sinks, q_seg, kv_seg, options):
    (b, t, h, d), (_, s, kv_heads, _) = q.shape, k.shape
    scale, cap = options.get("scale", d**-0.5), options.get("softcap")
    left, right = bounds(options)
    out, lse = np.zeros((b, t, h, v.shape[-1])), np.full((b, h, t), -np.inf)
    for i, j, head in np.ndindex(b, t, h):
        position = j + s - t
        seen = [
            n
            for n in range(s)
            if position - left <= n <= position + right and (q_seg is None or q_seg[i, j] == kv_seg[i, n])
        ]
        if not seen:
            continue
        kv = head // (h // kv_heads)
        scores = k[i, seen, kv] @ q[i, j, head] * scale
        if cap is not None:
            scores = cap * np.tanh(scores / cap)
        total = np.exp(scores).sum() + (0.0 if sinks is None else np.exp(sinks[head]))
        out[i, j, head] = np.exp(scores) @ v[i, seen, kv] / total
        lse[i, head, j] = np.log(total)
    return out, lse


def bounds(options):
    window = options.get("window")
    left, right = (window - 1, None) if isinstance(window, int) else window or (None, None)
    far = 10**9
    return far if left is None else left, 0 if options.get("causal") else far if right is None else right


SMALL = [case for case in FLASH if case.name != "full"]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_reference_equals_the_definition(case, rng):
    b, t, s, *rest = case.shape
    small = type(case)(case.name, (b, min(t, 1 + t // 30), 1 + s // 30, *rest), case.options, case.sinks, case.segments)
    inputs = flash_inputs(small, rng, jnp.float32)
    exact = [None if x is None else np.asarray(x, np.float64) for x in (inputs[n] for n in ("q", "k", "v", "sinks"))]
    segments = [inputs.get(n) for n in ("q_segment_ids", "kv_segment_ids")]
    segments = [None if x is None else np.asarray(x) for x in segments]
    out, lse = flash_attention(**inputs, **case.options, return_lse=True, implementation="reference")
    want_out, want_lse = by_definition(*exact, *segments, case.options)
    np.testing.assert_allclose(out, want_out, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-4, atol=1e-5)
