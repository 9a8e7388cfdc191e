"""Shapes are checked with beartype, promotions of dtype and rank are errors, and inputs are fresh every run."""

import os
from contextlib import contextmanager

from jaxtyping import config as jaxtyping_config
from jaxtyping import install_import_hook

TYPED = ("paxattn.flash_attention", "paxattn.paged_attention", "paxattn.kernels")
install_import_hook(TYPED, "beartype.beartype")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import KINDS, LONGEST, SIZES

import paxattn
from models import decoder
from models.config import Config

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def rng():
    """A fresh generator; its seed is printed with a failure, and PAXATTN_TEST_SEED repeats it."""
    seed = int(os.environ.get("PAXATTN_TEST_SEED") or np.random.SeedSequence().entropy % 2**32)
    print(f"PAXATTN_TEST_SEED={seed}")
    return np.random.default_rng(seed)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """A program of XLA for the CPU takes tens of memory maps, of which Linux allows 65,530; beyond, LLVM crashes."""
    yield
    jax.clear_caches()


@pytest.fixture
def unchecked():
    """No beartype: what a user sees who passes a bad argument."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.fixture
def compilations():
    """A context manager whose value is the list of what XLA compiled inside it."""
    done = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            done.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)

    @contextmanager
    def watch():
        done.clear()
        yield done

    yield watch
    jax.monitoring.unregister_event_duration_listener(listen)


STORES = {"paged": paxattn.PagedKV, "contiguous": paxattn.ContiguousKV, "blockwise": paxattn.BlockwiseKV}


@pytest.fixture(params=STORES)
def new_store(request):
    """Make a float32 store of each kind for a decoder's config."""

    def create(config, max_seqs, max_len, **options):
        return STORES[request.param].create(
            config.num_layers,
            config.num_kv_heads,
            config.head_dim,
            max_seqs=max_seqs,
            max_len=max_len,
            dtype=jnp.float32,
            **options,
        )

    return create


TINY = Config(
    vocab_size=97,
    num_layers=2,
    embed_dim=48,
    mlp_dim=80,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    context=128,
)


@pytest.fixture(scope="session")
def tiny():
    """A tiny decoder with random weights: (model, params)."""
    return decoder.random(TINY, seed=1)


@pytest.fixture(scope="session")
def engine(tiny):
    """The engine of a kind, the same for all tests; each leaves it at rest."""
    made = {}

    def get(kind="recompute"):
        if kind not in made:
            text = lambda ids: " ".join(map(str, ids)) + " "
            config = paxattn.EngineConfig(**SIZES | KINDS[kind])
            made[kind] = paxattn.Engine(*tiny, config, detokenize=text)
        return made[kind]

    return get


@pytest.fixture(scope="session")
def alone(tiny):
    """Greedy tokens of a prompt that has a store to itself."""
    known = {}

    def run(prompt):
        key = tuple(prompt)
        if key not in known:
            kv = paxattn.PagedKV.create(2, 2, 16, max_seqs=1, max_len=96, page_size=4, dtype=jnp.float32)
            [one] = paxattn.generate(*tiny, kv, [prompt], max_new_tokens=LONGEST - len(prompt))
            known[key] = one.ids
        return known[key]

    return run
