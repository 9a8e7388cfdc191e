"""An engine's programs: with them nothing more is compiled, none waits for the host, and a file keeps them."""

import importlib
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from engine_cases import SIZES, Windowed, at_rest
from test_gpu_lowering import module_for_cuda

from models import decoder
from paxattn import Engine, EngineConfig, GenerationParams, Sampling, dispatch
from paxattn.engine import edits, memory, program_file, programs, slots
from paxattn.engine.packed import Packed
from scripts.profile_decode import host_operations, page_copies


def test_nothing_is_compiled_after_warmup_and_nothing_read_inside_the_loop(tiny, compilations, rng):
    """A swapping engine, which has the most programs, under pressure; other sizes than any other test's."""
    config = EngineConfig(
        max_seqs=3,
        max_len=48,
        page_size=4,
        num_pages=17,
        prefill_tokens=256,
        decode_steps=5,
        preemption="swap",
        draft_tokens=2,
        ngram=1,
    )
    served = Engine(*tiny, config)
    ready = []
    served.warmup(lambda done, total: ready.append((done, total)))
    assert ready == [(i, len(ready)) for i in range(1, len(ready) + 1)]
    prompts = [rng.integers(0, TINY.vocab_size, int(n)).tolist() for n in rng.integers(1, 30, 12)]
    rich = GenerationParams(
        max_new_tokens=17, sampling=Sampling(0.8, 5, 0.9, 3, 0.01), stop_ids=[4], min_new_tokens=2, num_samples=3,
        repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1, logit_bias={3: 1.0}, logprobs=0,
    )  # fmt: skip
    with compilations() as compiled, jax.transfer_guard_device_to_host("disallow"):
        for i, prompt in enumerate(prompts):
            served.add_request(prompt, rich if i % 3 == 0 else GenerationParams(max_new_tokens=18))
            served.step()
        served.cancel(11)
        stats = at_rest_without_reading(served)
    assert compiled == []
    assert stats.preempted > 0
    at_rest(served)
    # So many pages that no other array of a step is as large.
    large = jax.eval_shape(lambda: served._create(4096))
    for shape in (config.shapes[0], config.shapes[-1]):
        program = served._programs.lower(shape, served.params, large).compile().as_text()
        assert host_operations(program) == []
        assert page_copies(program, large.kv.layers[0].k.size) == []


def at_rest_without_reading(engine):
    while engine.busy:
        engine.step()
    return engine.stats()


def test_what_an_edit_takes_goes_up_as_one_array(tiny, monkeypatch, rng):
    """With a score of arrays each, a GPU's host waited for the device after a few edits in a row."""
    counts = []

    def counted(slots, packed, apply=edits.apply):
        counts.append([type(x) for x in jax.tree.leaves(packed)])
        return apply(slots, packed)

    monkeypatch.setattr(edits, "apply", counted)
    served = Engine(*tiny, EngineConfig(**SIZES))
    served.generate([rng.integers(0, TINY.vocab_size, 9).tolist()], GenerationParams(max_new_tokens=2))
    assert counts
    assert all(kinds == [np.ndarray] for kinds in counts)


def test_packed_arrays_come_back_bit_for_bit(rng):
    def bits(shape, dtype):
        return rng.integers(0, 2**32, shape, np.uint32).view(dtype)

    tree = dict(
        ints=bits((3, 5), np.int32),
        one=(bits((), np.uint32), rng.integers(0, 2, (2, 3, 4)).astype(bool)),
        none=np.zeros((0, 7), np.float32),
        floats=[np.array([-0.0, np.inf, -1e-45, np.float32(1) / 3], np.float32), bits(6, np.int32)],
        mask=rng.integers(0, 2, 11).astype(bool),
    )
    packed = Packed.of(tree)
    assert packed.words.dtype == np.int32
    assert packed.words.shape == (15 + 1 + 24 + 4 + 6 + 11,)
    got = jax.jit(Packed.tree)(packed)
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    for x, want in zip(jax.tree.leaves(got), jax.tree.leaves(tree), strict=True):
        assert x.dtype == want.dtype
        assert x.shape == want.shape
        assert np.asarray(x).tobytes() == want.tobytes()


def test_programs_are_kept_in_a_file(tiny, alone, monkeypatch, tmp_path, rng):
    """None is traced again, and what was compiled for something else is refused by name."""
    file, config = tmp_path / "programs.zip", EngineConfig(**SIZES | dict(max_len=80))
    with pytest.raises(ValueError, match=r"^export: got an engine without programs"):
        Engine(*tiny, config).export(file)
    first = Engine(*tiny, config)
    first.warmup()
    first.export(file)
    second = Engine(*tiny, config)
    prompt = rng.integers(0, TINY.vocab_size, 30).tolist()
    with monkeypatch.context() as patch:
        for module, name in ((programs, "run"), (edits, "apply"), (edits, "fork")):
            patch.setattr(module, name, None)
        second.restore(file)
        [one] = second.generate([prompt], GenerationParams(max_new_tokens=12))
        many = second.generate([prompt], GenerationParams(max_new_tokens=5, num_samples=3))
    assert one.ids == alone(prompt)[:12]
    assert [each.ids for each in many] == [alone(prompt)[:5]] * 3
    at_rest(second)
    with pytest.raises(ValueError, match=r"programs\.zip: programs for config EngineConfig\(max_seqs=4.*export"):
        Engine(*tiny, replace(config, decode_steps=7)).restore(file)
    model, params = tiny
    other = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    with pytest.raises(ValueError, match=r"programs for (model|params)"):
        Engine(model, other, config).restore(file)
    with (
        jax.default_matmul_precision("highest"),
        pytest.raises(ValueError, match=r"programs for jax_default_matmul_precision None, not highest"),
    ):
        second.restore(file)


def test_programs_that_cannot_be_kept_are_not_written(tiny, tmp_path):
    """Those of a CPU that have run a sort, or that JAX may have taken from its own cache."""
    file = tmp_path / "programs.zip"
    file.write_bytes(b"an older one")
    served = Engine(*tiny, EngineConfig(**SIZES | dict(max_len=80)))
    served.warmup()
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        with pytest.raises(ValueError, match=r"programs\.zip: .* jax_enable_compilation_cache=False, warm up"):
            served.export(file)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    served.generate([[1, 2, 3]], GenerationParams(max_new_tokens=3))
    with pytest.raises(ValueError, match=r"programs\.zip: .* export right after warmup"):
        served.export(file)
    assert file.read_bytes() == b"an older one"
    assert list(tmp_path.iterdir()) == [file]


def test_an_engine_is_as_it_was_after_programs_that_do_not_run(tiny, alone, monkeypatch, tmp_path, rng):
    file, config = tmp_path / "programs.zip", EngineConfig(**SIZES | dict(max_len=80))
    served, prompt = Engine(*tiny, config), rng.integers(0, TINY.vocab_size, 20).tolist()
    want = alone(prompt)[:6]
    assert served.generate([prompt], GenerationParams(6))[0].ids == want
    at_rest(served)
    file.write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"programs\.zip: programs that do not run here"):
        served.restore(file)
    at_rest(served)

    def fail(*arguments):
        """As a program that has taken the pages and lacks a function."""
        for x in jax.tree.leaves(arguments[:2]):
            x.delete()
        raise jax.errors.JaxRuntimeError("INTERNAL: Function sort not found")

    monkeypatch.setattr(program_file, "load", lambda path, about, trees: dict.fromkeys(trees, lambda *x: fail(x[1])))
    with pytest.raises(ValueError, match=r"programs\.zip: programs that do not run here .*sort not found"):
        served.restore(file)
    assert served.generate([prompt], GenerationParams(6))[0].ids == want
    at_rest(served)
    served.add_request(prompt, GenerationParams(6))
    with pytest.raises(ValueError, match=r"^restore: got an engine with steps to take"):
        served.restore(file)
    at_rest(served)


def test_a_model_is_known_by_what_it_computes(tiny):
    model, params = tiny
    digest = memory.digest(Windowed(model), params)
    assert digest == memory.digest(Windowed(model), params)
    assert len({digest, memory.digest(model, params), memory.digest(Windowed(model, window=4), params)}) == 3


def test_the_loop_lowers_for_a_gpu(monkeypatch):
    """With the Hopper kernels by name, each lowered once for all layers: as far as a machine without a GPU can tell."""
    kernels = importlib.import_module(dispatch.MODULES["paged_attention"]["mosaic_gpu"])
    monkeypatch.setattr(kernels, "on_hopper", lambda: True)
    model, params = decoder.random(replace(TINY, head_dim=64), dtype=jnp.bfloat16)
    config = EngineConfig(max_seqs=4, max_len=64, num_pages=16, prefill_tokens=128, implementation="mosaic_gpu")
    served = Engine(model, params, config)

    def lowered(shape):
        run = partial(slots.run, model, shape=shape, limit=jnp.int32(3), idle=jnp.int32(1))
        return module_for_cuda(lambda params, state: run(params, state), params, served._slots)

    for shape in config.shapes:
        # One reads rows of few queries, the other those of many.
        assert lowered(shape).count("custom_call @mosaic_gpu") == (2 if shape.prefill else 1)
    # The loop itself, and those in which top-k and top-p look for their thresholds: each round of one is many launches.
    # Not seen in what is exported, which has a loop for each cumsum.
    loop = slots.run.trace(model, params, served._slots, np.int32(3), np.int32(1), shape=config.shapes[0])
    assert loop.lower(lowering_platforms=("cuda",)).as_text().count("stablehlo.while") == 3
