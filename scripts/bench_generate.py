"""Tokens per second of the generate loop, beside Hugging Face transformers where torch is installed.

python scripts/bench_generate.py --json bench.json

Decode is the time of more tokens less the time of one; medians over repeats that take turns. The same weights, the
same prompts, greedy; how many of the tokens agree is printed with the figures.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import paxattn
from models import weights
from models.config import Config
from models.huggingface import NAMES
from models.load import load
from scripts import huggingface

# prompts [B][T], new tokens -> the new ids, and seconds
Run = Callable[[list[list[int]], int], tuple[list[list[int]], float]]


def paxattn_runner(model: Any, params: Any, dtype: Any, implementation: str | None) -> Run:
    config = model.config

    def run(prompts: list[list[int]], count: int) -> tuple[list[list[int]], float]:
        kv = paxattn.PagedKV.create(
            config.num_layers,
            config.num_kv_heads,
            config.head_dim,
            max_seqs=len(prompts),
            max_len=-(-(len(prompts[0]) + count) // 128) * 128,
            dtype=dtype,
            implementation=implementation,
        )
        jax.block_until_ready(kv)
        start = time.perf_counter()
        done = paxattn.generate(model, params, kv, prompts, max_new_tokens=count)
        return [one.ids for one in done], time.perf_counter() - start

    return run


def transformers_runner(config: Config, params: Any, dtype: str) -> Run | None:
    """The same weights in Hugging Face's own model, or None where torch or transformers is missing.

    It lives in a process of its own, so that the thread pools of torch and XLA do not spin against each other.
    """
    if not huggingface.installed():
        print("transformers is left out: it needs torch and transformers installed")
        return None
    arrays = {weights.rename(name, NAMES): x for name, x in weights.unpack(config, params).items()}
    arrays = {name: np.asarray(x.astype(jnp.float32)) for name, x in arrays.items()}
    here, there = multiprocessing.get_context("spawn").Pipe()
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    target = multiprocessing.get_context("spawn").Process(
        target=serve_transformers, args=(there, config, arrays, dtype, device), daemon=True
    )
    target.start()

    def run(prompts: list[list[int]], count: int) -> tuple[list[list[int]], float]:
        here.send((prompts, count))
        return here.recv()

    return run


def serve_transformers(pipe: Any, config: Config, arrays: dict[str, np.ndarray], dtype: str, device: str) -> None:
    """Answer (prompts, count) with (new ids, seconds) for ever."""
    import torch
    import transformers

    model = transformers.LlamaForCausalLM(huggingface.llama_config(config))
    tensors = {name: torch.from_numpy(np.array(x)) for name, x in arrays.items()}
    model.load_state_dict(tensors, strict=not config.tied_head)
    model = model.to(device=device, dtype=getattr(torch, dtype)).eval()
    while True:
        pipe.send(huggingface.generate(model, *pipe.recv()))


def decode_rate(run: Run, prompts: list[list[int]], count: int) -> tuple[list[list[int]], float]:
    _, one = run(prompts, 1)
    ids, many = run(prompts, count + 1)
    return ids, len(prompts) * count / (many - one)


def prefill_rate(run: Run, prompts: list[list[int]], _: int) -> tuple[list[list[int]], float]:
    ids, seconds = run(prompts, 1)
    return ids, sum(map(len, prompts)) / seconds


def measure(runners: dict[str, Run], measured: Any, prompts: list[list[int]], count: int, repeats: int) -> dict:
    """Medians in tokens/s by name; the runners take turns, the first round warms up."""
    rates: dict[str, list[float]] = {name: [] for name in runners}
    ids: dict[str, list[list[int]]] = {}
    for turn in range(repeats + 1):
        for name, run in runners.items():
            ids[name], rate = measured(run, prompts, count)
            rates[name] += [rate] if turn else []
    first = ids[next(iter(ids))]
    same = {name: float(np.mean(np.array(other) == np.array(first))) for name, other in ids.items()}
    return {
        name: {"tokens_per_s": statistics.median(rates[name]), "all": rates[name], "same_tokens": same[name]}
        for name in runners
    }


def main() -> None:
    os.environ.setdefault("XLA_FLAGS", paxattn.XLA_FLAGS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF file or a Hugging Face folder (default: SmolLM2-135M)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--implementation")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prefill", type=int, nargs="+", default=[512])
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    dtype = jnp.dtype(options.dtype)
    model, params, tokenizer = load(options.model, dtype)
    runners = {"paxattn": paxattn_runner(model, params, dtype, options.implementation)}
    peer = transformers_runner(model.config, params, options.dtype)
    if peer is not None:
        runners["transformers"] = peer

    text = tokenizer.encode((Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8"))
    jobs: list[tuple[str, Any, list[list[int]], int]] = [
        (
            f"decode, batch {b}",
            decode_rate,
            [text[40 * i : 40 * i + 16] for i in range(b)],
            options.new_tokens,
        )
        for b in options.batch
    ]
    jobs += [(f"prefill, {n} tokens", prefill_rate, [text[:n]], 1) for n in options.prefill]
    results = {name: measure(runners, rate, prompts, count, options.repeats) for name, rate, prompts, count in jobs}
    show(results, list(runners))
    if options.json:
        machine = dict(device=str(jax.devices()[0]), processor=platform.processor(), jax=jax.__version__)
        options.json.write_text(json.dumps({"machine": machine, "dtype": options.dtype, "results": results}, indent=1))


def show(results: dict, names: list[str]) -> None:
    table = Table("tokens/s", *names, "ratio", "same tokens")
    for job, by_name in results.items():
        rates = [by_name[name]["tokens_per_s"] for name in names]
        ratio = f"{rates[0] / rates[1]:.2f}" if len(rates) > 1 else "-"
        same = f"{by_name[names[-1]]['same_tokens']:.0%}" if len(rates) > 1 else "-"
        table.add_row(job, *(f"{rate:.1f}" for rate in rates), ratio, same)
    Console().print(table)


if __name__ == "__main__":
    main()
