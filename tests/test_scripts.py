"""The scripts as a user runs them."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxattn import reference
from scripts import bench_attention as bench
from scripts.attention import measuring, peers, programs, shapes
from scripts.profile_decode import host_operations, page_copies

ROOT = Path(__file__).parents[1]
GOLDENS = {
    one["name"]: one
    for one in json.loads((ROOT / "tests" / "goldens" / "smollm2.json").read_text(encoding="utf-8"))["prompts"]
}


def run(*arguments, stdin="", script="generate.py"):
    command = [sys.executable, f"scripts/{script}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True, text=True, encoding="utf-8")


def test_stdout_has_the_continuation_alone():
    golden = GOLDENS["raw00"]
    done = run("--prompt", golden["prompt"], "--max-new-tokens", 64)
    assert done.returncode == 0, done.stderr
    assert done.stdout == golden["out_text"].removesuffix("<|im_end|>") + "\n"
    assert "prefill 5 tokens" in done.stderr
    assert "tokens/s" in done.stderr


def test_chat_from_stdin():
    done = run("--chat", "--kv", "contiguous", "--max-new-tokens", 64, stdin="What is the capital of France?")
    assert done.stdout == GOLDENS["chat00"]["out_text"].removesuffix("<|im_end|>") + "\n"


def test_a_batch_of_prompts_as_json_lines(tmp_path):
    golden = [GOLDENS[name] for name in ("chat04", "raw04", "raw13")]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": one["prompt"]}) for one in golden) + "\n\n", encoding="utf-8")
    done = run("--prompts", file, "--json", "--kv", "blockwise", "--max-new-tokens", 64)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["out_ids"] for line in lines] == [one["out_ids"] for one in golden]
    assert [line["text"] for line in lines] == [one["out_text"].removesuffix("<|im_end|>") for one in golden]


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["--model", "no/such/file.gguf", "--prompt", "x"], "", "no/such/file.gguf"),
        (["--model", "README.md", "--prompt", "x"], "", "README.md: not a GGUF file"),
        (["--prompts", "no/such/file.jsonl"], "", "no/such/file.jsonl"),
        (["--prompts", "README.md"], "", "README.md, line 1"),
        (["--prompt", "a b " * 5000], "", "context of 8192"),
        (["--prompt", "x", "--temperature", "-1"], "", "temperature"),
        (["--prompt", "x", "--top-p", "0"], "", "top_p"),
        (["--prompt", "x", "--max-new-tokens", "0"], "", "--max-new-tokens"),
        (["--prompt", "x", "--implementation", "triton"], "", "implementation: got 'triton'"),
        (["--prompt", "x", "--implementation", "mosaic_gpu"], "", "mosaic_gpu"),
        (["--prompt", "x", "--kv", "heap"], "", "--kv"),
        (["--prompt", ""], "", "a prompt is empty"),
        ([], "", "a prompt is empty"),
    ],
    ids=lambda x: " ".join(x)[:40] if isinstance(x, list) else None,
)
def test_what_cannot_be_done_is_said_in_one_line(arguments, stdin, message):
    done = run(*arguments, stdin=stdin)
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_decode_loop_is_checked_and_timed(tmp_path):
    out = tmp_path / "out.json"
    done = run("--rows", 3, "--steps", 20, "--dtype", "int8", "--json", out, script="profile_decode.py")
    assert done.returncode == 0, done.stderr
    assert "the program copies no pages and needs no host" in done.stdout
    assert json.loads(out.read_text(encoding="utf-8"))["results"]["ms_per_step"] > 0


def test_a_copy_of_pages_and_a_call_of_the_host_are_seen_in_a_program():
    pages = jnp.zeros((50, 4))
    write = lambda pages: pages.at[3].set(1.0)
    call = lambda pages: jax.pure_callback(lambda x: x, jax.typeof(pages), pages)
    hlo = lambda function, **options: jax.jit(function, **options).lower(pages).compile().as_text()
    assert page_copies(hlo(write), 200)
    assert not page_copies(hlo(write), 201)
    assert not page_copies(hlo(write, donate_argnums=0), 200)
    assert host_operations(hlo(call))
    assert not host_operations(hlo(write))
    start = "%c = (f32[50,4]{1,0}, f32[50,4]{1,0:S(5)}, u32[]) copy-start(%pages)"
    assert page_copies(start, 200)
    assert host_operations(start)


def test_bench_attention_end_to_end_on_a_cpu(tmp_path):
    given = ["B2 S96 H2/1 D32 causal docs3", "T40 S72 H2 D32/16 full f32"]
    out, png = tmp_path / "bench.json", tmp_path / "bench.png"
    options = ["--shapes", *given, "--rounds", 1, "--iterations", 2, "--implementation", "xla"]
    done = run(*options, "--json", out, "--plot", png, script="bench_attention.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert png.read_bytes().startswith(b"\x89PNG")
    told = json.loads(out.read_text(encoding="utf-8"))
    assert told["machine"]["jax"]
    assert str(tmp_path) not in told["command"]
    assert [row["pass"] for row in told["rows"]] == ["fwd", "fwd", "fwdbwd", "fwdbwd"]
    for row in told["rows"]:
        assert str(shapes.Shape.parse(row["shape"])) in done.stdout
        for one in row["kernels"].values():
            assert one["tflops"] == pytest.approx(row["flops"] / (one["kernel_ms"] or one["wall_ms"]) / 1e9)
            assert set(one["errors"]) == set(shapes.RESULTS if row["pass"] == "fwdbwd" else ["out"])


def test_bench_attention_names_a_bad_shape():
    done = run("--shapes", "B2 S96 H2 D32 casual", script="bench_attention.py")
    assert done.returncode == 2
    assert "'casual'" in done.stderr


def test_bench_attention_does_not_time_a_wrong_kernel():
    def wrong(shape):
        return lambda q, k, v, docs: 1.05 * peers.ours("xla")(shape)(q, k, v, docs)

    row = shapes.Row("fwdbwd", shapes.Shape.parse("S24 H2 D16 causal"))
    built = {
        "wrong": programs.compiled(row, wrong),
        "right": programs.compiled(row, peers.ours("xla")),
        "none": "absent",
    }
    oracle = {"reference": programs.compiled(row, peers.ours("reference"))}
    options = bench.arguments().parse_args(["--rounds", "1", "--iterations", "1"])
    figures = measuring.measure(row, built, oracle, options).figures
    assert figures["right"].tflops > 0
    assert (figures["wrong"].tflops, figures["none"].tflops) == (None, None)
    assert figures["wrong"].note.startswith("wrong: out ")
    assert figures["none"].note == "declines: absent"


@pytest.mark.parametrize(
    "text",
    [
        "B2 T9 S13 H3/1 D8 causal",
        "B2 T9 S13 H3/1 D8 full",
        "T13 S9 H3 D8/16 causal window4",
        "T13 S9 H3 D8/16 full window4 f16",
        "B2 S31 H3 D8 causal docs5",
        "B2 S31 H3 D8 full docs5 window4",
    ],
)
def test_bench_attention_counts_what_the_oracle_sees(text):
    shape = shapes.Shape.parse(text)
    assert shapes.Shape.parse(str(shape)) == shape
    # With all scores equal and a one-hot value for each key, the weights above 0 are the pairs.
    q, k = jnp.zeros((shape.batch, shape.q_len, 1, 1)), jnp.zeros((shape.batch, shape.kv_len, 1, 1))
    v = jnp.broadcast_to(jnp.eye(shape.kv_len)[None, :, None], (shape.batch, shape.kv_len, 1, shape.kv_len))
    segments = shapes.documents(shape).segments if shape.docs else None
    left, right = shape.window and shape.window - 1, 0 if shape.causal else None
    weights, _ = reference.flash_attention(
        q, k, v, None, segments, segments, left=left, right=right, scale=1.0, softcap=None, deterministic=True
    )
    pairs = int(np.count_nonzero(weights))
    assert shapes.visible_pairs(shape) == pairs
    assert shapes.flops(shapes.Row("fwd", shape)) == pairs * shape.heads * 2 * (shape.dim + shape.v_dim)


def test_bench_attention_counts_the_anchors_as_they_do():
    rows = shapes.rows_of(["anchors"], [])
    assert [sum(row.mode == mode for row in rows) for mode in shapes.PASSES] == [12, 5]
    causal, training = (shapes.flops(shapes.Row(mode, rows[2].shape)) for mode in shapes.PASSES)
    assert causal == 4 * 4 * 16 * 4096**2 * 128 / 2
    assert training == 3.5 * causal
