"""Hugging Face transformers on the same shapes, with random weights, in a process of its own that ends before ours."""

import multiprocessing
import time
from functools import partial
from typing import Any

import numpy as np

from models.config import Config
from scripts import huggingface
from scripts.serving.runs import Run
from scripts.serving.workloads import Workload

STATIC, CONTINUOUS = "transformers, static cache", "transformers, continuous batching"


def measure(config: Config, dtype: str, works: list[Workload], vocab_size: int, seed: int) -> list[dict[str, Run]]:
    """For each workload, a Run by name; nothing where a peer cannot serve it."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    arguments = there, config, dtype, works, vocab_size, seed
    worker = multiprocessing.get_context("spawn").Process(target=_work, args=arguments)
    worker.start()
    there.close()
    try:
        return [here.recv() for _ in works]
    except EOFError as error:
        raise RuntimeError("transformers failed; its own message stands above") from error
    finally:
        worker.join()


def _work(pipe: Any, config: Config, dtype: str, works: list[Workload], vocab_size: int, seed: int) -> None:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(getattr(torch, dtype))
    with torch.device(device):
        model = transformers.LlamaForCausalLM(huggingface.llama_config(config)).eval()
    torch.set_default_dtype(torch.float32)
    for work in works:
        prompts = work.prompts(vocab_size, seed)
        runs = {}
        if not work.arrival.any():
            runs[CONTINUOUS] = _continuous(transformers, model, prompts, work.output)
        alike = len({*work.prompt}) == len({*work.output}) == 1 and not work.arrival.any()
        # On a CPU, compiling it takes minutes and makes it no faster.
        if device == "cuda" and alike and len(work) <= 64:
            runs[STATIC] = _static(model, prompts, int(work.output[0]))
        pipe.send(runs)


def _static(model: Any, prompts: list[list[int]], count: int) -> Run:
    once = partial(huggingface.generate, model, prompts, count, cache_implementation="static")
    once()
    return Run(seconds=once()[1], tokens=len(prompts) * count)


def _continuous(transformers: Any, model: Any, prompts: list[list[int]], counts: np.ndarray) -> Run:
    # As each request ends at its own length, no token may end it before.
    how = transformers.GenerationConfig(
        do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=int(counts.max())
    )
    # On a GPU it sizes its cache by the memory; on a CPU that would be all there is.
    sizes = {} if model.device.type == "cuda" else dict(num_blocks=256, max_batch_tokens=256)
    config = transformers.ContinuousBatchingConfig(**sizes)
    with model.continuous_batching_context_manager(generation_config=how, continuous_batching_config=config) as manager:
        start = time.perf_counter()
        for prompt, count in zip(prompts, counts.tolist(), strict=True):
            manager.add_request(prompt, max_new_tokens=count)
        run, done = Run(), 0
        while done < len(prompts):
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError("continuous batching ended before its requests")
            if result is not None and result.is_finished():
                done, run.tokens = done + 1, run.tokens + len(result.generated_tokens)
        run.seconds = time.perf_counter() - start
    return run
