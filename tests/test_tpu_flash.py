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
from paxattn.kernels import tpu_flash_bwd_plan, tpu_flash_fwd_plan
from paxattn.kernels.problem import Problem
from paxattn.kernels.tpu_flash_fwd_plan import Config

TPU = "mosaic_tpu"


@pytest.fixture
def small_blocks(monkeypatch):
    """So small that the lengths of the cases make several, of queries and of keys, with several tiles in one."""
    for plan in (tpu_flash_fwd_plan, tpu_flash_bwd_plan):
        monkeypatch.setattr(plan, "config_for", lambda *_: Config(256, 256, 128, 128))


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
    for name, x in got.items():
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


LLAMA_8B, LLAMA_70B, QWEN, GEMMA = (32, 8, 128), (64, 8, 128), (14, 2, 64), (8, 4, 256)
MODELS = dict(llama_8b=LLAMA_8B, llama_70b=LLAMA_70B, qwen2_0_5b=QWEN, gemma=GEMMA)


def gradients(**options):
    """Of out and lse in all arrays but the ids: forward and backward kernel."""

    def loss(moving, fixed):
        out, lse = flash_attention(**moving, **fixed, **options, implementation=TPU, return_lse=True)
        return out.astype(jnp.float32).sum() + lse.sum()

    return jax.grad(loss)


def check_kernels(compiled):
    text = compiled.as_text()
    assert "flash_attention_fwd" in text
    assert "flash_attention_bwd" in text


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("heads", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("length", [8192, 131072])
def test_compiles_for_models(generation, heads, length):
    h, k, d = heads
    q, kv = (jax.ShapeDtypeStruct((1, length, n, d), jnp.bfloat16) for n in (h, k))
    check_kernels(compile_for(generation, gradients(causal=True), dict(q=q, k=kv, v=kv), {}))


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (192, 128)], ids=str)
def test_compiles_with_everything(generation, dtype, dims):
    shapes = dict(q=(2, 1000, 4, dims[0]), k=(2, 3001, 2, dims[0]), v=(2, 3001, 2, dims[1]))
    moving = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
    moving["sinks"] = jax.ShapeDtypeStruct((4,), jnp.float32)
    ids = (jax.ShapeDtypeStruct((2, n), jnp.int32) for n in (1000, 3001))
    fixed = dict(zip(("q_segment_ids", "kv_segment_ids"), ids, strict=True))
    check_kernels(compile_for(generation, gradients(causal=True, window=700, softcap=30.0), moving, fixed))


@pytest.mark.parametrize(
    ("feature", "dtype", "dim"), [("dtype float16", "float16", 64), (r"head dims \(320, 320\)", "bfloat16", 320)]
)
def test_what_the_kernel_does_not_serve_is_declined_by_name(feature, dtype, dim):
    x = jax.ShapeDtypeStruct((1, 160, 2, dim), dtype)
    with pytest.raises(NotImplementedError, match=feature):
        jax.eval_shape(lambda q: flash_attention(q, q, q, implementation=TPU), x)
