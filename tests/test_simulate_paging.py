"""The simulator's page pool against PageTable, its accounting, and the script as a user runs it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxattn import PageTable
from scripts.paging.allocators import ALLOCATORS, FirstFit
from scripts.paging.contiguous import simulate_contiguous
from scripts.paging.lengths import Requests, azure_lengths, read_trace, sharegpt_lengths
from scripts.paging.paged import simulate_paged
from scripts.paging.pool import PagePool
from scripts.paging.schemes import Setting, compare
from scripts.paging.timeline import STATES
from scripts.simulate_paging import PAPER_MEMORY

ROOT = Path(__file__).parents[1]

reserve = jax.jit(PageTable.reserve)
release = jax.jit(PageTable.release)
fork = jax.jit(PageTable.fork)


class Both(PagePool):
    """A page pool whose every operation is done to a PageTable as well; after each the two must be equal."""

    def __init__(self, num_pages, page_size, max_seqs, max_pages_per_seq):
        super().__init__(num_pages, page_size)
        self.table = PageTable.create(num_pages, page_size, max_seqs, max_pages_per_seq)
        self.compared = 0

    def reserve(self, row, tokens):
        done = super().reserve(row, tokens)
        self.table, ok = reserve(self.table, self.table.lens.at[row].set(tokens))
        assert bool(ok[row]) == done
        self.compare()
        return done

    def release(self, rows):
        super().release(rows)
        self.table = release(self.table, jnp.isin(jnp.arange(len(self.table.lens)), jnp.asarray(rows, jnp.int32)))
        self.compare()

    def fork(self, src, dst):
        copies = super().fork(src, dst)
        self.table, asked = fork(self.table, jnp.asarray([src]), jnp.asarray([dst]))
        assert bool(asked.ok[0]) == (copies is not None)
        assert [(int(asked.src[0]), int(asked.dst[0]))] == (copies or [(-1, -1)])
        self.compare()
        return copies

    def compare(self):
        lens, pages = np.asarray(self.table.lens), np.asarray(self.table.page_table)
        assert {r: int(n) for r, n in enumerate(lens) if n} == {r: n for r, n in self.lens.items() if n}
        assert int(self.table.num_free) == self.num_free
        for row, mine in self.rows.items():
            assert pages[row, : self.pages(int(lens[row]))].tolist() == mine
        assert self.table.owners.tolist() == self.owners
        self.compared += 1


def some_requests(rng, count, longest):
    prompt = rng.integers(1, longest, count)
    return Requests(prompt, rng.integers(1, longest - prompt + 1), "a test")


def test_page_pool_and_page_table_agree_on_a_trace_token_by_token(rng):
    requests = some_requests(rng, 14, 23)
    pool = Both(num_pages=13, page_size=3, max_seqs=14, max_pages_per_seq=8)
    timeline = simulate_paged(requests, pool, memory=40, stride=1)
    assert pool.compared > len(timeline.running) > 23
    assert timeline.waiting.any()
    assert pool.num_free == 13


def test_page_pool_and_page_table_agree_on_forks_and_refusals(rng):
    rows = 5
    pool = Both(num_pages=9, page_size=3, max_seqs=rows, max_pages_per_seq=9)
    refused = 0
    for _ in range(120):
        row, other = rng.permutation(rows)[:2].tolist()
        if row not in pool.rows:
            refused += not pool.reserve(row, int(rng.integers(1, 20)))
        elif other not in pool.rows:
            refused += pool.fork(row, other) is None
        elif rng.random() < 0.6:
            refused += not pool.reserve(row, pool.lens[row] + int(rng.integers(0, 4)))
        else:
            pool.release([row, other])
    assert refused


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_every_token_of_memory_is_in_one_state_at_every_step(rng, allocator):
    requests = some_requests(rng, 90, 61)
    setting = Setting(max_len=61, page_size=7, memory=389, allocator=allocator)
    stored = int((requests.prompt * requests.output + requests.output * (requests.output + 1) // 2).sum())
    for name, timeline in compare(requests, setting).items():
        assert (timeline.states.sum(axis=1) == setting.memory).all(), name
        assert (timeline.states >= 0).all(), name
        # Whatever the scheme, a request's n-th token is made in one step, with all those before it in memory.
        assert timeline.states[:, 0].sum() == stored, name
        assert timeline.running.sum() == requests.output.sum(), name
        assert timeline.waiting.any(), name


def test_intervals_and_single_steps_tell_the_same(rng):
    requests = some_requests(rng, 60, 40)
    one, many = (simulate_paged(requests, PagePool(31, 4), 125, stride) for stride in (1, None))
    np.testing.assert_array_equal(one.states, many.states)
    np.testing.assert_array_equal(one.running, many.running)
    assert one.preempted == many.preempted > 0
    assert one.recomputed == many.recomputed


@pytest.mark.parametrize("kind", ALLOCATORS.values())
def test_allocators_hand_out_no_token_twice_and_merge_what_comes_back(rng, kind):
    memory = 205
    allocator, taken, given = kind(memory), np.zeros(memory, bool), []
    for _ in range(600):
        size = int(rng.integers(1, 40))
        start = allocator.take(size)
        if start is None:
            assert given
            start, size = given.pop(int(rng.integers(len(given))))
            allocator.give(start, size)
            taken[start : start + allocator.rounded(size)] = False
        else:
            stretch = taken[start : start + allocator.rounded(size)]
            assert len(stretch) == allocator.rounded(size)
            assert not stretch.any()
            stretch[:] = True
            given.append((start, size))
        assert allocator.free == memory - taken.sum()
    for start, size in given:
        allocator.give(start, size)
    assert vars(allocator) == vars(kind(memory))


def test_free_memory_in_pieces_is_external_fragmentation():
    # Stretches of 3, 4 and 3 tokens; the outer two end after one step. The last request's 5 tokens would fit into the
    # 6 that they leave, but not into either 3: it waits until the middle one ends.
    requests = Requests(np.array([2, 1, 2, 4]), np.array([1, 3, 1, 1]), "a test")
    timeline = simulate_contiguous(requests, np.array([3, 4, 3, 5]), FirstFit(10))
    assert timeline.states.tolist() == [
        [8, 2, 0, 0, 0],
        [3, 1, 0, 6, 0],
        [4, 0, 0, 6, 0],
        [5, 0, 0, 0, 5],
    ]
    assert timeline.waiting.tolist() == [1, 1, 1, 0]


def test_the_papers_setting_gives_the_papers_region():
    requests = sharegpt_lengths(3000, np.random.default_rng(0)).cut(2048)
    done = compare(requests, Setting(2048, 16, PAPER_MEMORY, "buddy"))
    for name in ("max", "pow2", "oracle"):
        assert 0.2 < done[name].shares()["used"] < 0.4, name
    assert done["paged"].shares()["used"] > 0.96
    assert done["paged"].shares()["external"] == 0


def test_the_fit_keeps_to_the_trace():
    # Quantiles of the 19,366 requests of the Azure conversation trace at these levels.
    levels = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
    drawn = azure_lengths(60_000, np.random.default_rng(0))
    np.testing.assert_allclose(np.quantile(drawn.prompt, levels), (207, 396, 1020, 1189, 2734, 4142), rtol=0.05)
    np.testing.assert_allclose(np.quantile(drawn.output, levels), (54, 85, 129, 395, 424, 601), rtol=0.05)


def run(*arguments):
    command = [sys.executable, "scripts/simulate_paging.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")


def write_trace(path, lines):
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]) + "\n", encoding="utf-8")
    return path


def test_a_trace_file_end_to_end(tmp_path):
    trace = write_trace(tmp_path / "tiny.csv", [f"2023-11-16 18:15:46,{30 + i},{5 + i % 7}" for i in range(40)])
    png, out = tmp_path / "paging.png", tmp_path / "out.json"
    done = run("--trace", trace, "--max-len", 64, "--memory", 512, "--page-size", 8, "--png", png, "--json", out)
    assert done.returncode == 0, done.stderr
    assert png.read_bytes().startswith(b"\x89PNG")
    told = json.loads(out.read_text(encoding="utf-8"))
    assert (told["source"], told["requests"], told["max_len"], told["memory"]) == ("tiny.csv", 40, 64, 512)
    for name in ("max", "pow2", "oracle", "blockwise", "paged"):
        figures = told["schemes"][name]
        assert sum(figures[state] for state in STATES) == pytest.approx(1)
        assert re.search(rf"^{name} +{figures['effective_use']:.1%} ", done.stdout, re.M)
    assert told["schemes"]["paged"]["effective_use"] > told["schemes"]["max"]["effective_use"]


def test_without_a_trace_the_source_is_named():
    done = run("--requests", 60)
    assert done.returncode == 0, done.stderr
    assert "Splitwise, ISCA 2024" in done.stdout
    assert "60 requests" in done.stdout
    assert run("--requests", 60).stdout.split("simulated")[0] == done.stdout.split("simulated")[0]
    assert "No request ever waited" in run("--requests", 2, "--lengths", "sharegpt").stdout


def test_steps_tell_page_tables_and_free_pages():
    done = run("--steps")
    assert done.returncode == 0, done.stderr
    for what in ("admit A", "A grew by", "fork A into C", "is copied to", "the first 9 as A's", "waits", "gives way"):
        assert what in done.stdout
    stanzas = done.stdout.split("\n\n")
    assert stanzas[0] == "10 pages of 4 tokens"
    for stanza in stanzas[1:]:
        owned = {page for pages in re.findall(r"pages ([\d ]+)$", stanza, re.M) for page in pages.split()}
        free = re.search(r"free: ([\d ]+|none)$", stanza, re.M)[1].replace("none", "").split()
        assert owned.isdisjoint(free)
        assert len(owned) + len(free) == 10
    assert stanzas[-1].strip().endswith("free: 0 1 2 3 4 5 6 7 8 9")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "has no requests"),
        (["now,12,3", "now,12,many"], "line 3: GeneratedTokens is 'many'"),
        (["now,0,3"], "line 2: ContextTokens is '0'"),
        (["now,12"], "line 2: GeneratedTokens is None"),
    ],
)
def test_a_bad_line_is_named(tmp_path, lines, message):
    trace = write_trace(tmp_path / "bad.csv", lines)
    with pytest.raises(ValueError, match=f"^--trace: .*bad.csv.*{message}"):
        read_trace(trace, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trace", "no/such/file.csv"], "--trace: no/such/file.csv cannot be read"),
        (["--trace", "README.md"], "--trace: README.md has no column ContextTokens"),
        (["--trace", "docs/images/paging.png"], "--trace: docs/images/paging.png cannot be read as CSV"),
        (["--memory", "1000"], "--memory: got 1000 tokens, max needs 2048"),
        (["--memory", "lots"], "--memory: 'lots'"),
        (["--page-size", "0"], "--page-size: '0'"),
        (["--max-len", "1"], "--max-len: '1'"),
        (["--requests", "-3"], "--requests: '-3'"),
        (["--seed", "-1"], "--seed: '-1'"),
        (["--png", "no/such/folder/x.png"], "--png: no/such/folder"),
        (["--lengths", "alpaca"], "--lengths"),
    ],
    ids=" ".join,
)
def test_bad_input_is_refused_by_name(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
