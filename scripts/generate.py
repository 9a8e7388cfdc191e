"""Continue text with a real model through a KV store. stdout has the continuation alone.

python scripts/generate.py --prompt "The capital of France is"
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

import paxattn
from models.load import Loaded, load
from models.smollm2 import FetchError, cache_folder
from models.tokenizer import TextStream, Tokenizer

STORES: dict[str, Any] = {
    "paged": paxattn.PagedKV,
    "contiguous": paxattn.ContiguousKV,
    "blockwise": paxattn.BlockwiseKV,
}
DTYPES = ("float32", "bfloat16", "float16")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to continue (stdin where neither is given)")
    source = what.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="the text to continue")
    source.add_argument("--prompts", type=Path, metavar="FILE", help='JSON lines with a "prompt", run as one batch')
    what.add_argument("--chat", action="store_true", help="put the prompt to the model as a user's message")
    model = parser.add_argument_group("model")
    model.add_argument("--model", type=Path, help="a GGUF file or a Hugging Face folder (default: SmolLM2-135M)")
    model.add_argument("--checkpoint", type=Path, metavar="DIR", help="restored from, or written on the first run")
    model.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 elsewhere")
    model.add_argument("--kv", choices=STORES, default="paged", help="the KV store (default: %(default)s)")
    model.add_argument("--implementation", help="of attention: xla, mosaic_gpu, mosaic_tpu or reference")
    tokens = parser.add_argument_group("tokens")
    tokens.add_argument("--max-new-tokens", type=int, default=128, help="default: %(default)s")
    tokens.add_argument("--temperature", type=float, default=0.0, help="0 = greedy, the default")
    tokens.add_argument("--top-k", type=int, default=0, help="0 = all, the default")
    tokens.add_argument("--top-p", type=float, default=1.0, help="1 = all, the default")
    tokens.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help='a line {"out_ids", "text"} for each prompt')
    return parser


def main() -> None:
    os.environ.setdefault("XLA_FLAGS", paxattn.XLA_FLAGS)
    parser = arguments()
    options = parser.parse_args()
    try:
        run(options)
    except (ValueError, NotImplementedError, FetchError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def run(options: argparse.Namespace) -> None:
    sampling = paxattn.Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    sampling.checked()
    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens: got {options.max_new_tokens}, must be at least 1")
    texts = read_prompts(options)
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    with status("loading the model"):
        loaded = load(options.model, dtype_of(options), options.checkpoint)
    if texts is None:
        converse(loaded, options, sampling)
        return
    prompts = [encode(loaded[2], text, options.chat) for text in texts]
    check_lengths(prompts, loaded, options)
    show = len(prompts) == 1 and not options.json
    new = continue_all(loaded, prompts, options, sampling, echo=show)
    for prompt, ids in zip(prompts, new, strict=True):
        text = loaded[2].continuation(prompt, ids)
        if options.json:
            print(json.dumps({"out_ids": ids, "text": text}))
        elif not show:
            print(text)


def read_prompts(options: argparse.Namespace) -> list[str] | None:
    """The prompts; None = a conversation at the terminal."""
    if options.prompt is not None:
        texts = [options.prompt]
    elif options.prompts is not None:
        texts = [prompt_of(options.prompts, i, line) for i, line in lines_of(options.prompts)]
    elif sys.stdin.isatty():
        if options.chat:
            return None
        raise ValueError("no prompt: give --prompt, --prompts, text on stdin, or --chat to talk")
    else:
        texts = [sys.stdin.read()]
    if not texts:
        raise ValueError(f"{options.prompts}: holds no prompt")
    if "" in texts:
        raise ValueError("a prompt is empty")
    return texts


def lines_of(path: Path) -> list[tuple[int, str]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [(i, line) for i, line in enumerate(lines, 1) if line.strip()]


def prompt_of(path: Path, number: int, line: str) -> str:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        raise ValueError(f'{path}, line {number}: must be an object with a string "prompt"')
    return fields["prompt"]


def dtype_of(options: argparse.Namespace) -> Any:
    if options.dtype is not None:
        return jnp.dtype(options.dtype)
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def encode(tokenizer: Tokenizer, text: str, chat: bool) -> list[int]:
    return tokenizer.encode_chat([{"role": "user", "content": text}]) if chat else tokenizer.encode(text)


def check_lengths(prompts: list[list[int]], loaded: Loaded, options: argparse.Namespace) -> None:
    context = loaded[0].config.context
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) + options.max_new_tokens > context:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens; with --max-new-tokens {options.max_new_tokens} "
                f"that is over the model's context of {context}"
            )


def new_store(loaded: Loaded, prompts: list[list[int]], options: argparse.Namespace) -> Any:
    """A store with a row a prompt; the length is rounded up, so that similar prompts share a compilation."""
    config, dtype = loaded[0].config, dtype_of(options)
    longest = max(len(prompt) for prompt in prompts) + options.max_new_tokens
    return STORES[options.kv].create(
        config.num_layers,
        config.num_kv_heads,
        config.head_dim,
        max_seqs=len(prompts),
        max_len=-(-longest // 256) * 256,
        dtype=dtype,
        implementation=options.implementation,
    )


def continue_all(
    loaded: Loaded, prompts: list[list[int]], options: argparse.Namespace, sampling: Any, *, echo: bool
) -> list[list[int]]:
    """The new tokens of every prompt. With echo, the first prompt's text goes to stdout as it comes."""
    model, params, tokenizer = loaded
    kv = jax.block_until_ready(new_store(loaded, prompts, options))
    how = dict(max_new_tokens=options.max_new_tokens, sampling=sampling, stop_ids=tokenizer.stop_ids)
    with status("compiling"):
        paxattn.warmup(model, params, kv, prompts, **how)
    out: list[list[int]] = [[] for _ in prompts]
    text = TextStream(tokenizer, prompts[0])
    times = [time.perf_counter()]
    for step in paxattn.stream(model, params, kv, prompts, **how):
        times.append(time.perf_counter())
        for ids, token in zip(out, step, strict=True):
            ids += [] if token is None else [token]
        if echo and step[0] is not None:
            print(text.put(step[0]), end="", flush=True)
    if echo:
        print(text.end())
    report(sum(map(len, prompts)), times[1] - times[0], sum(map(len, out)) - len(out), times[-1] - times[1])
    return out


def report(prompt_tokens: int, prefill: float, new_tokens: int, decode: float) -> None:
    line = f"prefill {prompt_tokens} tokens, {prompt_tokens / prefill:.1f} tokens/s"
    if new_tokens:
        line += f"; decode {new_tokens} tokens, {new_tokens / decode:.1f} tokens/s"
    print(line, file=sys.stderr)


def converse(loaded: Loaded, options: argparse.Namespace, sampling: Any) -> None:
    """A conversation at the terminal, until end of input."""
    tokenizer = loaded[2]
    messages: list[dict[str, str]] = []
    while (line := read_line()) is not None:
        prompt = tokenizer.encode_chat([*messages, {"role": "user", "content": line}])
        check_lengths([prompt], loaded, options)
        [ids] = continue_all(loaded, [prompt], options, sampling, echo=True)
        answer = tokenizer.continuation(prompt, ids)
        messages += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]


def read_line() -> str | None:
    """The next line that is not empty; None at the end of input."""
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if line.strip() or not line:
            return line.strip() or None


def status(what: str) -> Any:
    return Console(stderr=True).status(what)


if __name__ == "__main__":
    main()
