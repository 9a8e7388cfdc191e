"""Snapshots: generation goes on from one as if nothing had happened; a bad one is named and touches nothing."""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import TINY

from models import decoder
from paxattn import PagedKV, PageTable, Sampling
from paxattn.engine.generate import prefill, step
from paxattn.snapshot import MANIFEST, restore_snapshot, save_snapshot

# Orbax reads in threads, which die of a damaged file some time after the main one was told.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)

LAYERS, T, H, K, D = 2, 64, 4, 2, 8
SIZES = dict(max_seqs=3, max_len=120, page_size=5, num_pages=40)


def empty(num_layers=LAYERS, dtype=jnp.float32, **sizes):
    return PagedKV.create(num_layers, K, D, dtype=dtype, **{**SIZES, **sizes})


@pytest.fixture
def late_threads():
    """Let what threads still have to say be said within the test."""
    yield
    time.sleep(0.3)


@jax.jit
def run_step(store, q_lens, qkv):
    store, ok = store.extend(q_lens, T)
    outs = []
    for layer, (q, k, v) in enumerate(qkv):
        out, store = store.attend(layer, q, k, v)
        outs.append(out)
    return store.end_step(), outs, ok


def advance(store, rng, q_lens):
    """A step of random tokens through all layers: the store at rest, and all that attention gave."""
    draw = lambda heads: jnp.asarray(rng.normal(size=(T, heads, D)), jnp.bfloat16)
    qkv = [(draw(H), draw(K), draw(K)) for _ in store.layers]
    store, outs, ok = run_step(store, jnp.asarray(q_lens, jnp.int32), qkv)
    assert ok.all()
    return store, outs


def in_use(rng, **sizes):
    """A store whose pages went through several hands."""
    store, _ = advance(empty(**sizes), rng, (7, 40, 13))
    store = store.release(jnp.asarray([True, False, False]))
    return advance(store, rng, (11, 1, 4))[0]


def contents(tree):
    return [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


@contextmanager
def refused(folder, like, match):
    before = contents(like)
    with pytest.raises(ValueError, match=match) as error:
        yield
    assert str(error.value).startswith(f"{folder}: ")
    assert contents(like) == before


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e4m3fn"])
def test_a_restored_store_goes_on_bit_for_bit(tmp_path, rng, dtype):
    store = in_use(rng, dtype=dtype)
    save_snapshot(tmp_path / "snapshot", store)
    restored = restore_snapshot(str(tmp_path / "snapshot"), empty(dtype=dtype))
    assert jax.tree.structure(restored) == jax.tree.structure(store)
    assert contents(restored) == contents(store)
    seed = rng.integers(2**32)
    for q_lens in ((1, 1, 1), (30, 0, 9)):
        (store, outs), (restored, again) = (advance(x, np.random.default_rng(seed), q_lens) for x in (store, restored))
        assert contents(outs) == contents(again)
    assert contents(restored) == contents(store)


SMALL = replace(TINY, num_layers=1)


def fresh_state(small, prompts):
    sizes = dict(max_seqs=3, max_len=64, page_size=4, dtype=jnp.float32)
    store = PagedKV.create(SMALL.num_layers, SMALL.num_kv_heads, SMALL.head_dim, **sizes)
    sampling = Sampling(temperature=1.0, seed=7)
    return prefill(*small, store, prompts, max_new_tokens=20, sampling=sampling, stop_ids=(96,))


def go_on(small, state, steps):
    tokens = []
    for _ in range(steps):
        state = step(*small, state)
        tokens.append(np.asarray(state.tokens).tolist())
    return tokens, state


def go_on_elsewhere(folder):
    """What the new process runs: onto its second device, from a state made there."""
    small = decoder.random(SMALL, seed=1)
    device = jax.devices()[1]
    state = restore_snapshot(folder, jax.device_put(fresh_state(small, [[0]]), device))
    assert {x.device for x in jax.tree.leaves(state)} == {device}
    print(json.dumps(go_on(small, state, 9)[0]))


def in_a_new_process(folder):
    here = Path(__file__).parent
    code = f"import test_snapshot; test_snapshot.go_on_elsewhere({str(folder)!r})"
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": f"{here}:{here.parent}"}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def test_generation_goes_on_with_the_same_tokens_here_and_in_a_new_process(tmp_path, rng, compilations):
    small = decoder.random(SMALL, seed=1)
    prompts = [rng.integers(0, 97, n).tolist() for n in (5, 9, 1)]
    _, state = go_on(small, fresh_state(small, prompts), 4)
    save_snapshot(tmp_path / "snapshot", state)
    tokens, last = go_on(small, state, 9)
    restored = restore_snapshot(tmp_path / "snapshot", fresh_state(small, [[0]]))
    with compilations() as compiled:
        again, end = go_on(small, restored, 9)
    assert (again, contents(end)) == (tokens, contents(last))
    assert compiled == []
    assert in_a_new_process(tmp_path / "snapshot") == tokens


def any_tree(rng):
    names = ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float16", "float32", "int8", "int32", "uint32")
    bits = {name: rng.bytes(6 * jnp.dtype(name).itemsize) for name in names}
    return {
        "a/b.c": [jnp.asarray(np.frombuffer(bits[name], jnp.dtype(name)).reshape(3, 2)) for name in names],
        "": (jnp.asarray([True, False]), None, jnp.zeros((0, 4), jnp.int8)),
        "scalars": (jnp.bfloat16(-0.0), np.uint32(2**32 - 1), 5, 2.5, True),
    }


def test_any_pytree_of_any_dtype_survives_bit_for_bit(tmp_path, rng):
    tree = any_tree(rng)
    save_snapshot(tmp_path / "snapshot", tree)
    restored = restore_snapshot(tmp_path / "snapshot", jax.tree.map(jnp.zeros_like, tree))
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    assert contents(restored) == contents(jax.tree.map(jnp.asarray, tree))
    save_snapshot(tmp_path / "one", jnp.arange(3))
    assert restore_snapshot(tmp_path / "one", jnp.zeros(3, jnp.int32)).tolist() == [0, 1, 2]


def restores_or_refuses(folder, like, want):
    """Whether the snapshot was refused; if not, it must be what was saved."""
    before = contents(like)
    try:
        restored = restore_snapshot(folder, like)
    except ValueError as error:
        text = str(error)
    else:
        assert contents(restored) == want
        return False
    assert text.startswith(f"{folder}: ")
    assert contents(like) == before
    return True


@pytest.mark.usefixtures("late_threads")
def test_whatever_file_is_cut_short_or_lost_no_wrong_number_comes_back(tmp_path, rng):
    store, like = in_use(rng), in_use(rng)
    folder = tmp_path / "snapshot"
    save_snapshot(folder, store)
    seen = 0
    for path in files(folder):
        whole = path.read_bytes()
        for cut in (whole[: len(whole) // 2], whole[:-1], b"", None):
            path.unlink() if cut is None else path.write_bytes(cut)
            seen += restores_or_refuses(folder, like, contents(store))
        path.write_bytes(whole)
    assert seen >= 12
    assert not restores_or_refuses(folder, like, contents(store))
    advance(like, rng, (1, 1, 1))


@pytest.mark.usefixtures("late_threads")
def test_no_flipped_bit_goes_unnoticed(tmp_path, rng):
    store, like = in_use(rng), empty()
    folder = tmp_path / "snapshot"
    save_snapshot(folder, store)
    largest = max(files(folder), key=lambda path: path.stat().st_size)
    for path in [largest] * 20 + files(folder) * 2:
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        restores_or_refuses(folder, like, contents(store))
        path.write_bytes(whole)


@pytest.mark.usefixtures("late_threads")
def test_arrays_of_another_snapshot_are_not_taken_for_this_one(tmp_path, rng):
    for name, tree in (("a", in_use(rng)), ("b", in_use(rng)), ("c", {"x": jnp.arange(4)})):
        save_snapshot(tmp_path / name, tree)
    for other, match in (("b", r"damaged, \.layers\[0\]\.k is not what was saved"), ("c", "damaged")):
        (tmp_path / "a" / "arrays").rename(tmp_path / f"away from {other}")
        (tmp_path / other / "arrays").rename(tmp_path / "a" / "arrays")
        with refused(tmp_path / "a", like := empty(), match):
            restore_snapshot(tmp_path / "a", like)


STATE = dict(tokens=jnp.arange(3), count=jnp.int32(4))


@pytest.mark.parametrize(
    ("saved", "like", "difference"),
    [
        (empty(num_pages=39), empty(), ".layers[0].k: saved float32[39, 5, 2, 8], like has float32[40, 5, 2, 8]"),
        (empty(dtype="bfloat16"), empty(), ".layers[0].k: saved bfloat16[40, 5, 2, 8], like has float32[40, 5, 2, 8]"),
        (empty(num_layers=1), empty(), ".layers[1].k: saved nothing, like has float32[40, 5, 2, 8]"),
        (empty(), empty(num_layers=1), ".layers[1].k: saved float32[40, 5, 2, 8], like has nothing"),
        (empty(max_seqs=4), empty(), ".table.lens: saved int32[4], like has int32[3]"),
        (empty(page_size=4), empty(), ".table.page_size: saved 4, like has 5"),
        (PageTable.create(9, 5, 2, 3), PageTable.create(9, 4, 2, 3), ".page_size: saved 5, like has 4"),
        (empty(), empty(implementation="xla"), ".implementation: saved None, like has 'xla'"),
        ({"kv": [empty()]}, {"kv": [empty(page_size=4)]}, "['kv'][0].table.page_size: saved 5, like has 4"),
        (STATE, {**STATE, "count": jnp.uint32(4)}, "['count']: saved int32[], like has uint32[]"),
        (STATE, {**STATE, "tokens": jnp.zeros((3, 1), int)}, "['tokens']: saved int32[3], like has int32[3, 1]"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_snapshot_of_something_else_says_what_differs(tmp_path, saved, like, difference):
    save_snapshot(tmp_path / "snapshot", saved)
    with refused(tmp_path / "snapshot", like, re.escape(difference)):
        restore_snapshot(tmp_path / "snapshot", like)


def test_a_long_list_of_differences_is_cut(tmp_path):
    save_snapshot(tmp_path / "snapshot", list(jnp.arange(30)))
    with refused(tmp_path / "snapshot", like := list(jnp.arange(10.0)), r"\[3\]: .* and 26 more$"):
        restore_snapshot(tmp_path / "snapshot", like)


def test_what_is_no_snapshot_says_so(tmp_path):
    like = empty()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", {"x": np.arange(3)})
    for name in ("file", "folder", "orbax", "nowhere"):
        with refused(tmp_path / name, like, "holds no snapshot"):
            restore_snapshot(tmp_path / name, like)
    for text in ("", "[]", "{}", "7", '{"format": 1}', '{"format": 1, "tree": []}', "[" * 100_000, "\xff"):
        (tmp_path / "folder" / MANIFEST).write_text(text, encoding="latin-1")
        with refused(tmp_path / "folder", like, "damaged"):
            restore_snapshot(tmp_path / "folder", like)
    (tmp_path / "folder" / MANIFEST).write_text('{"format": 2}')
    with refused(tmp_path / "folder", like, "a snapshot of format 2, must be 1"):
        restore_snapshot(tmp_path / "folder", like)


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    for name in ("file", "folder"):
        with pytest.raises(ValueError, match=f"^{tmp_path / name}: .*not overwritten"):
            save_snapshot(tmp_path / name, empty())
    assert files(tmp_path) == [tmp_path / "file", tmp_path / "folder" / "notes.txt"]
    (tmp_path / "folder" / "notes.txt").unlink()
    save_snapshot(tmp_path / "folder", STATE)
    assert contents(restore_snapshot(tmp_path / "folder", STATE)) == contents(STATE)


def test_a_number_of_64_bits_is_refused_and_not_cut_to_32(tmp_path):
    store = empty()
    wide = replace(store, table=replace(store.table, lens=np.asarray(store.lens, np.int64)))
    with pytest.raises(ValueError, match=r"^tree: got int64 at \.table\.lens, must be int32"):
        save_snapshot(tmp_path / "snapshot", wide)
    assert list(tmp_path.iterdir()) == []
    save_snapshot(tmp_path / "snapshot", store)
    with pytest.raises(ValueError, match=r"^tree: got int64 at \.table\.lens, must be int32"):
        restore_snapshot(tmp_path / "snapshot", wide)


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"^tree: got nothing to save"):
        save_snapshot(tmp_path / "snapshot", {"x": jnp.zeros(0)})

    def fail(checkpointer, path, tree):
        assert path.parent != tmp_path / "snapshot"
        path.mkdir()
        raise OSError("no space left on device")

    monkeypatch.setattr(ocp.StandardCheckpointer, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        save_snapshot(tmp_path / "snapshot", STATE)
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_orbax_gives_no_kind_is_damage_and_others_pass(tmp_path, monkeypatch):
    save_snapshot(tmp_path / "snapshot", STATE)
    for error in (Exception("odd\nthings"), MemoryError("too much")):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(ocp.StandardCheckpointer, "restore", fail)
        kind, match = (
            (ValueError, r"damaged \(Exception: odd\)$") if type(error) is Exception else (MemoryError, "much")
        )
        with pytest.raises(kind, match=match):
            restore_snapshot(tmp_path / "snapshot", STATE)


def test_orbax_is_imported_on_use_and_asked_for_by_name(tmp_path, monkeypatch):
    code = "import sys, paxattn.snapshot; assert not any(name.startswith('orbax') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    for call in (save_snapshot, restore_snapshot):
        with pytest.raises(ImportError, match=r'pip install "paxattn\[snapshot\]"'):
            call(tmp_path / "snapshot", STATE)
    assert list(tmp_path.iterdir()) == []
