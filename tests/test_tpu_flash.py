"""The TPU kernel of flash_attention: its numbers in interpret mode, its plan, and what the TPU compiler makes of it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FLASH, FlashCase, error, flash_inputs, seen_keys
from flash_cases import attend, split
from test_gpu_flash import bound, check_what_sees_nothing, cotangents_of, judges
from tpu import GENERATIONS, compile_for, interpreted

from paxattn import flash_attention
from paxattn.kernels import tpu_flash_fwd_plan
from paxattn.kernels.problem import Problem
from paxattn.kernels.tpu_flash_fwd_plan import Config

TPU = "mosaic_tpu"


@pytest.fixture
def small_blocks(monkeypatch):
    """So small that the lengths of the cases make several, of queries and of keys, with several tiles in one."""
    monkeypatch.setattr(tpu_flash_fwd_plan, "config_for", lambda *_: Config(256, 256, 128, 128))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", FLASH, ids=str)
@pytest.mark.usefixtures("small_blocks")
def test_equals_the_oracle_as_closely_as_plain_attention(case, dtype, rng):
    case = replace(case, dtype=dtype)
    inputs = flash_inputs(case, rng, dtype)
    cotangents, seen = cotangents_of(case, rng), seen_keys(case, inputs)
    moving, fixed = split(inputs)
    exact = {name: x.astype(jnp.float32) for name, x in moving.items()}
    with interpreted():
        got = jax.jit(attend(case, TPU))(moving, fixed, cotangents)
        jax.block_until_ready(got)
    want, plain = judges(case)(moving, exact, fixed, seen, cotangents)
    # In low precision the gradients are the XLA implementation's, whose own test judges them.
    for name in got if dtype == "float32" else ("out", "lse"):
        x = got[name]
        assert x.shape == want[name].shape, name
        assert x.dtype == ("float32" if name in ("lse", "dsinks") else dtype), name
        # lse, too: the kernel has q scaled and rounded again, an error of lse where a query sees few keys.
        slack = 2 * error(plain[name], want[name]) if name == "lse" else 0.0
        assert error(x, want[name]) <= bound(name, plain[name], want[name], dtype) + slack, name
    check_what_sees_nothing(got, np.asarray(seen))


LENGTHS = [(1, 1), (1, 700), (300, 700), (700, 300), (512, 512), (700, 701)]
WINDOWS = [(None, None), (None, 0), (69, 0), (0, 0), (90, 40), (None, 20), (3, 400), (300, None)]


@pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS)
@pytest.mark.parametrize(("left", "right"), WINDOWS)
def test_the_plan_visits_every_pair_that_is_seen_once_and_no_tile_of_others(q_len, kv_len, left, right):
    problem = Problem(1, q_len, kv_len, 1, 1, 64, 64, left, right, 1.0, None)
    config = tpu_flash_fwd_plan.fitted(Config(256, 256, 128, 128), problem)
    case = FlashCase("", (1, q_len, kv_len, 1, 1, 64, 64), dict(window=(left, right)))
    seen = np.asarray(seen_keys(case, {}))[0]
    visited = np.zeros((q_len + 512, kv_len + 512), int)
    for visit in tpu_flash_fwd_plan.visits(problem, config):
        q_at, kv_at = visit.q_block * config.block_q, visit.kv_block * config.block_kv
        for tile in visit.kind:
            rows, keys = slice(q_at + tile.q, q_at + tile.q_end), slice(kv_at + tile.kv, kv_at + tile.kv_end)
            part = seen[rows, keys]
            visited[rows, keys] += 1
            padding = (rows.stop - rows.start, keys.stop - keys.start) != part.shape
            assert part.any() or padding
            assert part.all() or tile.ahead is not None
            assert keys.stop <= kv_len or tile.keys == kv_len - keys.start
    assert visited.max() == 1
    assert visited[:q_len, :kv_len][seen].all()


LLAMA_8B, GEMMA = (32, 8, 128), (8, 4, 256)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("heads", [LLAMA_8B, GEMMA], ids=["llama_8b", "gemma"])
@pytest.mark.parametrize("options", [dict(causal=True), dict(causal=True, window=1024, softcap=50.0)], ids=str)
def test_compiles_at_8k_tokens(generation, heads, options):
    h, k, d = heads
    q, kv = (jax.ShapeDtypeStruct((1, 8192, n, d), jnp.bfloat16) for n in (h, k))
    run = lambda q, k, v: flash_attention(q, k, v, implementation=TPU, return_lse=True, **options)
    assert "tpu_custom_call" in compile_for(generation, run, q, kv, kv).as_text()


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (192, 128)], ids=str)
def test_compiles_with_everything(generation, dtype, dims):
    shapes = dict(q=(2, 1000, 4, dims[0]), k=(2, 3001, 2, dims[0]), v=(2, 3001, 2, dims[1]))
    arrays = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
    ids = (jax.ShapeDtypeStruct((2, n), jnp.int32) for n in (1000, 3001))
    arrays |= dict(zip(("q_segment_ids", "kv_segment_ids"), ids, strict=True))
    arrays["sinks"] = jax.ShapeDtypeStruct((4,), jnp.float32)
    run = lambda arrays: flash_attention(**arrays, causal=True, window=700, softcap=30.0, implementation=TPU)
    assert "tpu_custom_call" in compile_for(generation, run, arrays).as_text()


@pytest.mark.parametrize(
    ("feature", "dtype", "dim"), [("dtype float16", "float16", 64), (r"head dims \(320, 320\)", "bfloat16", 320)]
)
def test_what_the_kernel_does_not_serve_is_declined_by_name(feature, dtype, dim):
    x = jax.ShapeDtypeStruct((1, 160, 2, dim), dtype)
    with pytest.raises(NotImplementedError, match=feature):
        jax.eval_shape(lambda q: flash_attention(q, q, q, implementation=TPU), x)
