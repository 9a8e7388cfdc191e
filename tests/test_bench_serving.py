"""The serving benchmark: what is asked of the engine, and a small run of it."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY

from scripts import bench_serving as bench
from scripts.serving import copying, roofline
from scripts.serving.workloads import parse

TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,30,4
2023-11-16 18:15:47.1805900,20,9
2023-11-16 18:15:48.6805900,90,5
2023-11-16 18:15:50.6805900,7,3
"""


@pytest.fixture
def trace(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text(TRACE, encoding="utf-8")
    return file


def test_fixed_shapes_come_at_once():
    work = parse("3x20+5", None, 64, 0)
    assert (work.prompt.tolist(), work.output.tolist(), work.arrival.tolist()) == ([20] * 3, [5] * 3, [0] * 3)
    assert work.longest == 25
    assert [len(prompt) for prompt in work.prompts(97, 0)] == [20] * 3
    with pytest.raises(ValueError, match=r"^--replay"):
        work.at_rate(10.0)


def test_a_trace_is_cut_and_keeps_its_times(trace):
    work = parse("trace:3", trace, 64, 0)
    assert (work.prompt.tolist(), work.output.tolist()) == ([30, 20, 63], [4, 9, 1])
    np.testing.assert_allclose(work.arrival, [0.0, 0.5, 2.0])
    scaled = work.at_rate(7.0)
    np.testing.assert_allclose(scaled.arrival, [0.0, 0.5, 2.0])  # 14 tokens in two seconds
    np.testing.assert_allclose(work.at_rate(14.0).arrival, [0.0, 0.25, 1.0])
    assert not work.at_once().arrival.any()


@pytest.mark.parametrize("kind", ["azure", "sharegpt"])
def test_drawn_requests_come_one_after_another(kind):
    work = parse(f"{kind}:50", None, 512, 0)
    assert len(work) == 50
    assert work.longest <= 512
    assert (np.diff(work.arrival) > 0).all()


@pytest.mark.parametrize("text", ["3x20", "0x1+1", "azure:0", "nothing:3", "trace:4", "copy:0+3", "free:3"])
def test_other_jobs_are_refused(text):
    with pytest.raises(ValueError, match=r"^--jobs: "):
        parse(text, None, 64, 0)


@pytest.mark.parametrize(("kind", "rises"), [("copy", 1.5), ("decoy", 1), ("free", 1)])
def test_guesses_save_steps_where_a_text_is_copied(kind, rises):
    """A chain of 97 tokens, of which the prompt has 40, and the output the first 30 of these."""
    model, params, prompt = copying.chain(TINY, 3, np.float32)
    ids = prompt(kind, 40, 30)
    assert len(ids) == len(set(ids)) == 40
    options = bench.arguments().parse_args(["--draft-tokens", "3", "--num-pages", "16", "--prefill-tokens", "64"])
    work = parse(f"{kind}:40+30", None, 0, 0).of(ids)
    [result] = bench.measure(model, params, work, options, lambda: roofline.Rates(1e9, 1e9, 5e8))
    guessed, plain = (result.runs[name] for name in (bench.OURS, bench.UNGUESSED))
    [want], [got] = plain.drawn.values(), guessed.drawn.values()
    assert got == want
    assert len(set(want)) == 30
    assert (set(want) <= set(ids)) == (kind != "free")
    assert plain.about["steps"] >= rises * guessed.about["steps"] >= rises
    assert bench.table([result]).row_count == 2


def test_more_text_than_the_chain_has_is_refused():
    _, _, prompt = copying.chain(TINY, 3, np.float32)
    with pytest.raises(ValueError, match=r"^--jobs: got 90 \+ 30"):
        prompt("free", 90, 30)


def test_a_product_that_is_done_again_and_again_stays_in_the_loop():
    again = jax.jit(roofline.products, static_argnums=1)
    text = again.lower(jnp.ones((64, 64)), 3).compile().as_text()
    [body] = re.findall(r"body=%?([\w.-]+)", text)
    assert re.search(rf"^%?{re.escape(body)} .*?^}}", text, re.DOTALL | re.MULTILINE)[0].count("/dot_general") == 1
    np.testing.assert_array_equal(again(jnp.ones((64, 64)), 3), np.full((64, 64), 64))


def test_the_roofline_of_one_long_output_is_reading_all_for_each_token():
    rates = roofline.Rates(read=1e9, compute=1e30, kept_up=1e30)
    least = roofline.seconds(parse("1x100+11", None, 0, 0), TINY, 1, 10**6, 50.0, rates)
    np.testing.assert_allclose(least, (10 * 10**6 + 10 * (100 + 5.5) * 50) / 1e9)
    two = roofline.seconds(parse("2x100+11", None, 0, 0), TINY, 2, 10**6, 50.0, rates)
    np.testing.assert_allclose(two, (10 * 10**6 + 2 * 10 * (100 + 5.5) * 50) / 1e9)


def test_a_run_tells_rates_and_times(tiny, trace, tmp_path):
    file, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    arguments = "--no-peers --max-seqs 2 --num-pages 16 --page-size 8 --prefill-tokens 32 --decode-steps 4 --replay 0.8"
    options = bench.arguments().parse_args([*arguments.split(), "--json", str(file), "--programs", str(tmp_path)])
    rates = roofline.Rates(1e9, 1e9, 5e8)
    results = bench.measure(*tiny, parse("trace:4", trace, 64, 0), options, lambda: rates)
    assert [len(one.runs) for one in results] == [1, 1]
    for one in results:
        run = one.runs[bench.OURS]
        assert run.tokens == one.work.output.sum() == 17
        assert len(run.first) == 4
        assert len(run.spaces) <= 17 - 4
        assert one.share_kept_up(bench.OURS) > one.share(bench.OURS) > 0
        assert 0 <= run.about["page_waste"] < 1
    assert results[1].runs[bench.OURS].seconds >= results[1].work.arrival[-1]
    bench.write_json(file, results, rates, options)
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [row["runs"]["paxattn"]["tokens"] for row in rows] == [17, 17]
    again = bench.measure(*tiny, parse("trace:4", trace, 64, 0), options, lambda: rates)
    assert again[0].runs[bench.OURS].drawn == results[0].runs[bench.OURS].drawn
    bench.draw(results, picture)
    assert picture.stat().st_size > 10_000
    assert bench.table(results).row_count == 2
