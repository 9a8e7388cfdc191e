"""The scripts as a user runs them."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

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
