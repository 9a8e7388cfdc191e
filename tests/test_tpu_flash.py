"""The TPU kernel of flash_attention: its numbers in interpret mode, its plan, and what the TPU compiler makes of it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FLASH, FlashCase, error, flash_inputs, once, seen_keys
from flash_cases import attend, split
from jax.experimental.pallas import tpu as pltpu
from test_gpu_flash import bound, check_what_sees_nothing, cotangents_of, judged
from tpu import GENERATIONS, compile_for, interpreted, slow_but

from paxattn import flash_attention
from paxattn.kernels import tiles, tpu_flash_bwd_plan, tpu_flash_fwd_plan
from paxattn.kernels.problem import Problem
from paxattn.kernels.tpu_flash_fwd_plan import Config

TPU = "mosaic_tpu"


@pytest.fixture
def small_blocks(monkeypatch):
    """So small that the lengths of the cases make several, of queries and of keys, with several tiles in one."""
    for plan in (tpu_flash_fwd_plan, tpu_flash_bwd_plan):
        monkeypatch.setattr(plan, "config_for", lambda *_: Config(256, 256, 128, 128))


# Where a block of queries comes by every second step, its sum is just being written when it is needed again.
MORE = [FlashCase("two_blocks_of_queries", (1, 500, 600, 3, 3, 16, 24))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", FLASH + MORE, ids=str)
@pytest.mark.usefixtures("small_blocks")
def test_equals_the_oracle_as_closely_as_plain_attention(case, dtype, rng):
    case = replace(case, dtype=dtype)
    inputs = flash_inputs(case, rng, dtype)
    cotangents, seen = cotangents_of(case, rng), seen_keys(case, inputs)
    moving, fixed = split(inputs)
    with interpreted():
        got = once(attend(case, TPU))(moving, fixed, cotangents)
        jax.block_until_ready(got)
    want, plain = judged(case, moving, fixed, seen, cotangents)
    for name, x in got.items():
        assert x.shape == want[name].shape, name
        assert x.dtype == ("float32" if name in ("lse", "dsinks") else dtype), name
        # lse, too: the kernel has q scaled and rounded again, an error of lse where a query sees few keys.
        slack = 2 * error(plain[name], want[name]) if name == "lse" else 0.0
        assert error(x, want[name]) <= bound(name, plain[name], want[name], dtype) + slack, name
    check_what_sees_nothing(got, np.asarray(seen))


LENGTHS = [(1, 1), (1, 700), (300, 700), (700, 300), (512, 512), (700, 701)]
WINDOWS = [(None, None), (None, 0), (69, 0), (0, 0), (90, 40), (None, 20), (3, 400), (300, None)]


@pytest.mark.parametrize("plan", [tpu_flash_fwd_plan, tpu_flash_bwd_plan], ids=["forward", "backward"])
@pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS)
@pytest.mark.parametrize(("left", "right"), WINDOWS)
def test_the_plan_visits_every_pair_that_is_seen_once_and_no_tile_of_others(plan, q_len, kv_len, left, right):
    problem, config = small_problem(q_len, kv_len, left=left, right=right)
    case = FlashCase("", (1, q_len, kv_len, 1, 1, 64, 64), dict(window=(left, right)))
    seen = np.asarray(seen_keys(case, {}))[0]
    visited = np.zeros((q_len + 512, kv_len + 512), int)
    for visit in plan.visits(problem, config):
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


def small_problem(q_len, kv_len, batch=1, group=1, left=None, right=None):
    problem = Problem(batch, q_len, kv_len, group, 1, 64, 64, left, right, 1.0, None)
    return problem, tpu_flash_fwd_plan.fitted(Config(256, 256, 128, 128), problem)


@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize(("q_len", "kv_len"), [*LENGTHS, (300, 1700), (1700, 1700)])
@pytest.mark.parametrize(("left", "right"), WINDOWS)
def test_the_backward_plan_reads_sums_that_are_written(group, segments, q_len, kv_len, left, right, rng):
    problem, config = small_problem(q_len, kv_len, 2, group, left, right)
    ids = (np.sort(rng.integers(0, 5, (2, tiles.cdiv(n, 256) * 256)), axis=1) for n in (q_len, kv_len))
    q_seg, kv_seg = (jnp.asarray(x, jnp.int32) if segments else None for x in ids)
    plan, count, _ = tpu_flash_bwd_plan.steps(problem, config, q_seg, kv_seg)
    plan = jax.tree.map(np.asarray, plan)
    turns = [(int(plan.batch[n]), g, int(plan.q_block[n])) for n in range(int(count)) for g in range(group)]
    for turn, block in enumerate(turns):
        read, before = plan.read[turn // group], turns[:turn]
        assert (read == tpu_flash_bwd_plan.FRESH) == (block not in before)
        assert read != tpu_flash_bwd_plan.EARLY or block not in before[-2:]
    assert {block[::2] for block in turns} == {(b, i) for b in (0, 1) for i in range(tiles.cdiv(q_len, 256))}
    starts = [(int(plan.batch[n]), int(plan.kv_block[n])) for n in range(int(count)) if plan.first[n]]
    assert starts == [(b, j) for b in (0, 1) for j in range(tiles.cdiv(kv_len, 256))]


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
@pytest.mark.parametrize("model", slow_but(MODELS, ["llama_8b"]))
@pytest.mark.parametrize("length", slow_but([8192, 131072], [8192]))
def test_compiles_for_models(generation, model, length):
    h, k, d = MODELS[model]
    q, kv = (jax.ShapeDtypeStruct((1, length, n, d), jnp.bfloat16) for n in (h, k))
    check_kernels(compile_for(generation, gradients(causal=True), dict(q=q, k=kv, v=kv), {}))


DIMS = [(192, 128), (64, 64), (80, 80), (96, 96), (128, 128), (256, 256)]


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("dtype", slow_but(["bfloat16", "float32"], ["bfloat16"]))
@pytest.mark.parametrize("dims", slow_but(DIMS, DIMS[:1]), ids=str)
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


def loss(q, k, v, sinks):
    """A number that depends on out and on lse, so that its gradient goes through both."""
    out, lse = flash_attention(q, k, v, sinks=sinks, causal=True, return_lse=True, implementation=TPU)
    return (out**2).sum() + lse.sum()


def test_vmap_is_one_call_over_a_larger_batch(rng):
    shapes = dict(q=(2, 100, 4, 16), k=(2, 70, 2, 16), v=(2, 70, 2, 16), sinks=(4,))
    many = {name: jnp.asarray(rng.normal(size=(3, *shape)), jnp.float32) for name, shape in shapes.items()}
    run = jax.value_and_grad(lambda x: loss(**x))
    one = lambda i: jax.tree.map(lambda x: x[i], many)
    with interpreted():
        got = jax.block_until_ready(once(jax.vmap(run))(many))
    with interpreted():
        want = jax.block_until_ready(once(run)(one(1)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x[1], y, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.parametrize("order", ["jvp", "second"])
def test_forward_mode_and_second_derivatives_say_where_they_work(order):
    x = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.float32)
    first = lambda q: loss(q, q, q, None)
    second = lambda q: jax.grad(first)(q).sum()
    moved = (lambda q: jax.jvp(first, (q,), (q,))) if order == "jvp" else jax.grad(second)
    with (
        pltpu.force_tpu_interpret_mode(),
        pytest.raises((NotImplementedError, TypeError), match=r'(?is)(forward|second).*implementation="xla"'),
    ):
        jax.jit(moved).lower(x)
