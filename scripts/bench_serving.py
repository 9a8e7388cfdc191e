"""Output tokens per second, time to the first token and between tokens of the engine, beside transformers.

python scripts/bench_serving.py                                              # SmolLM2, 24 requests, as on a CPU
python scripts/bench_serving.py --preset llama3-8b --implementation mosaic_gpu \\
    --jobs 1x128+256 64x1024+128 256x256+128 --json bench.json
python scripts/bench_serving.py --preset llama3-8b --implementation mosaic_gpu --trace TRACE.csv \\
    --jobs trace:1000 --replay 0.8 --kv-dtype int8 --plot serving.png
python scripts/bench_serving.py --preset small --max-seqs 4000 --jobs 4000x64+128
python scripts/bench_serving.py --draft-tokens 4 --jobs copy:512+256 free:512+256

A job is COUNTxPROMPT+OUTPUT, or trace:COUNT of a file with TIMESTAMP, ContextTokens and GeneratedTokens, or azure:COUNT
or sharegpt:COUNT of a named distribution. All requests are there from the start; with --replay, a drawn job runs once
more at its times of arrival, scaled to that share of the rate that it reached. Weights are random but for SmolLM2, and
outputs are as long as the job says. Or a job is copy:PROMPT+OUTPUT, decoy:PROMPT+OUTPUT or free:PROMPT+OUTPUT, one text
that is continued with --draft-tokens guesses and without, in turns (scripts/serving/copying.py says what texts). The
roofline is the time for the prompts' matrix products and for reading weights and kept keys and values in each step, of
one token a row, at the rates measured in the same run. There are two: by the products that the device does for
milliseconds, and by those that its power lets it keep up for seconds.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import paxattn
from models import decoder
from models.config import Config
from models.load import load
from scripts import huggingface
from scripts.attention.console import say
from scripts.attention.telling import machine
from scripts.serving import copying, peers, roofline
from scripts.serving.runs import Run, serve
from scripts.serving.workloads import Workload, parse

OURS, UNGUESSED = "paxattn", "paxattn, no guesses"
ROUNDS = 3  # of a text, with guesses and without
SHAPES = {
    "llama3-8b": Config(128256, 32, 4096, 14336, 32, 8, 128, 1 << 20, 500_000.0),
    "small": Config(49152, 12, 576, 1536, 9, 3, 64, 1 << 20, tied_head=True),
}
SMOLLM2 = Config(49152, 30, 576, 1536, 9, 3, 64, 8192, 100_000.0, tied_head=True)


@dataclass(frozen=True)
class Result:
    """Runs of one workload by name, and the least seconds that the device could take, by what it multiplies for
    milliseconds; and what it would take by what it keeps up for seconds."""

    work: Workload
    runs: dict[str, Run]
    least: float
    least_kept_up: float

    def share(self, name: str) -> float:
        return self.least / self.runs[name].seconds

    def share_kept_up(self, name: str) -> float:
        return self.least_kept_up / self.runs[name].seconds


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("smollm2", *SHAPES), default="smollm2")
    parser.add_argument("--jobs", nargs="+", default=["24x32+64"], metavar="JOB", help="default: %(default)s")
    parser.add_argument("--trace", type=Path, metavar="FILE")
    parser.add_argument("--replay", type=float, metavar="SHARE", help="drawn jobs again, at that share of their rate")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--kv-dtype", choices=("float32", "bfloat16", "int8", "float8_e4m3fn"))
    parser.add_argument("--implementation", help="of attention: xla, mosaic_gpu, mosaic_tpu or reference")
    parser.add_argument("--max-seqs", type=int, default=256, help="rows, if a job has as many (%(default)s)")
    parser.add_argument("--max-len", type=int, default=16384, help="drawn requests are cut there (%(default)s)")
    parser.add_argument("--num-pages", type=int, help="default: what the memory has room for")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--prefill-tokens", type=int, default=2048, help="of prompts in a step (%(default)s)")
    parser.add_argument("--decode-steps", type=int, default=16, help="of a loop (%(default)s)")
    parser.add_argument("--draft-tokens", type=int, default=0)
    parser.add_argument("--preemption", choices=("recompute", "swap"), default="recompute")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where JAX keeps what it has compiled")
    parser.add_argument("--programs", type=Path, metavar="DIR", help="where the engine's programs are, or come to be")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="rewritten after each job")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="rates, and memory over time (needs matplotlib)")
    return parser


def weights(works: list[Workload], options: argparse.Namespace, dtype: Any) -> tuple[Any, Any, list[Workload]]:
    """Model, parameters, and the workloads with the texts that these are to continue."""
    if options.preset == "smollm2":
        model, params, tokenizer = load(None, dtype)
        prompt = copying.words(tokenizer)
    elif any(work.kind for work in works):
        model, params, prompt = copying.chain(SHAPES[options.preset], options.seed, dtype)
    else:
        return *decoder.random(SHAPES[options.preset], options.seed, dtype), works
    texts = [
        work.of(prompt(work.kind, int(work.prompt[0]), int(work.output[0]))) if work.kind else work for work in works
    ]
    return model, params, texts


def new_engine(model: Any, params: Any, work: Workload, options: argparse.Namespace, drafts: int) -> paxattn.Engine:
    config = paxattn.EngineConfig(
        max_seqs=min(options.max_seqs, len(work)),
        max_len=-(-work.longest // 128) * 128,
        page_size=options.page_size,
        num_pages=options.num_pages or "auto",
        prefill_tokens=options.prefill_tokens,
        decode_steps=options.decode_steps,
        kv_dtype=options.kv_dtype,
        implementation=options.implementation,
        draft_tokens=drafts,
        preemption=options.preemption,
    )
    return paxattn.Engine(model, params, config)


def measure(
    model: Any, params: Any, work: Workload, options: argparse.Namespace, rates: Callable[[], Any]
) -> list[Result]:
    engine = started(model, params, work, options, options.draft_tokens)
    say(f"{work.name}: the first token {since_start():.1f} s after the start of the process")
    # Of what follows, a server has long run all.
    count = min(4 * options.decode_steps, engine.config.max_len - 8)
    engine.generate([[1] * 8], paxattn.GenerationParams(max_new_tokens=count))
    engine.drain()
    least = partial(least_seconds, engine, model.config, params, rates(), options)
    vocab = model.config.vocab_size
    if work.kind:
        engines = {OURS: engine, UNGUESSED: started(model, params, work, options, 0)}
        return [Result(work, in_turns(engines, work, vocab, options), *least(work))]

    def run(work: Workload) -> Result:
        return Result(work, {OURS: served(engine, work, vocab, options)}, *least(work))

    results = [run(work.at_once())]
    if options.replay and work.arrival.any():
        results.append(run(work.at_rate(options.replay * results[0].runs[OURS].rate)))
    return results


def started(model: Any, params: Any, work: Workload, options: argparse.Namespace, drafts: int) -> paxattn.Engine:
    """An engine that has compiled everything and drawn a token."""
    start = time.perf_counter()
    engine = new_engine(model, params, work, options, drafts)
    made, kept = time.perf_counter(), options.programs and options.programs / f"{work.name}+{drafts}.zip"
    if kept and kept.exists():
        engine.restore(kept)
    else:
        with Bar(f"{work.name}: compiling") as said:
            engine.warmup(said)
    ready = time.perf_counter()
    say(f"{work.name}: {engine.num_pages} pages in {made - start:.1f} s, programs in {ready - made:.1f} s")
    if kept and not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        engine.export(kept)
        say(f"{work.name}: programs written in {time.perf_counter() - ready:.1f} s")
    engine.generate([[1] * 8], paxattn.GenerationParams(max_new_tokens=1))
    engine.drain()
    return engine


def served(engine: paxattn.Engine, work: Workload, vocab: int, options: argparse.Namespace) -> Run:
    with Bar(work.name) as said:
        return serve(engine, work, vocab, options.seed, said)


def in_turns(engines: dict[str, Any], work: Workload, vocab: int, options: argparse.Namespace) -> dict[str, Run]:
    """The median run of each; the first round, which leaves the prompt in the prefix index, does not count."""
    rounds = [{name: served(one, work, vocab, options) for name, one in engines.items()} for _ in range(1 + ROUNDS)]
    with_guesses, without = (list(rounds[0][name].drawn.values()) for name in engines)
    say(f"{work.name}: {'the same' if with_guesses == without else 'OTHER'} tokens with guesses as without")

    def median(name: str) -> Run:
        return sorted((one[name] for one in rounds[1:]), key=lambda run: run.seconds)[ROUNDS // 2]

    return {name: median(name) for name in engines}


def least_seconds(
    engine: Any, config: Config, params: Any, rates: roofline.Rates, options: Any, work: Workload
) -> tuple[float, float]:
    weight_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
    if not config.tied_head:
        weight_bytes -= config.vocab_size * config.embed_dim * jax.tree.leaves(params)[0].dtype.itemsize
    layers = jax.tree.leaves(engine._slots.kv.layers)
    token_bytes = sum(x.nbytes for x in layers) / (engine.num_pages * options.page_size)
    given = work, config, engine.config.max_seqs, weight_bytes, token_bytes
    return roofline.seconds(*given, rates), roofline.seconds(*given, roofline.for_seconds(rates))


def measured_rates(dtype: Any) -> roofline.Rates:
    rates = roofline.measured(dtype)
    products = f"{rates.compute / 1e12:.3g} TFLOP/s, for seconds {rates.kept_up / 1e12:.3g}"
    say(f"read {rates.read / 1e9:.0f} GB/s, matrix products {products}")
    return rates


class Bar:
    """A progress bar on stderr; its value is what to call with (done, total)."""

    def __init__(self, title: str):
        self.progress = Progress(console=Console(stderr=True), transient=True)
        self.task = self.progress.add_task(title, total=None)

    def __enter__(self) -> Callable[[int, int], None]:
        self.progress.start()
        return lambda done, total: self.progress.update(self.task, completed=done, total=total)

    def __exit__(self, *_: Any) -> None:
        self.progress.stop()


def since_start() -> float:
    """Seconds since the process was started, imports and all, where the system tells; else since the import of this."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.perf_counter() - IMPORTED


IMPORTED = time.perf_counter()


def say_result(result: Result) -> None:
    for name, run in result.runs.items():
        told = run.told()
        first, between = (told[key].get("p50") for key in ("first_token_ms", "between_tokens_ms"))
        more = "" if first is None or between is None else f", first token {first:.0f} ms, then {between:.2f} ms"
        if run.about:
            more += f"; {told['step_ms']:.2f} ms a step, host gap {told['host_gap']:.1%}, {told['preempted']} preempted"
        shares = f"{result.share(name):.0%} of roofline, {result.share_kept_up(name):.0%} of that kept up"
        say(f"{result.work.name} | {name} {run.rate:.1f} tokens/s, {shares}{more}")


def table(results: list[Result]) -> Table:
    shown = Table("job", "", "output tokens/s", "roofline", "ours / peer", *("first token, ms", "between tokens, ms"))
    for one in results:
        for name, run in one.runs.items():
            told = run.told()
            times = (
                " / ".join(f"{x:.1f}" for x in told[key].values()) or "-"
                for key in ("first_token_ms", "between_tokens_ms")
            )
            ratio = "" if name == OURS else f"{one.runs[OURS].rate / run.rate:.2f}"
            shares = f"{one.share(name):.0%} / {one.share_kept_up(name):.0%}"
            shown.add_row(one.work.name, name, f"{run.rate:.1f}", shares, ratio, *times)
    shown.caption = "roofline: of milliseconds / seconds; times: 50 / 90 / 99%"
    return shown


def write_json(path: Path, results: list[Result], rates: Any, options: argparse.Namespace) -> None:
    chosen = {
        key: str(value)
        for key, value in vars(options).items()
        if key not in ("json", "plot", "cache", "programs", "trace")
    }
    rows = [
        dict(
            job=one.work.name,
            requests=len(one.work),
            roofline_seconds=one.least,
            roofline_seconds_kept_up=one.least_kept_up,
            runs={name: run.told() | shares_of(one, name) for name, run in one.runs.items()},
        )
        for one in results
    ]
    measured = dict(read_gbs=rates.read / 1e9, compute_tflops=rates.compute / 1e12, kept_up_tflops=rates.kept_up / 1e12)
    told = dict(machine=machine(), options=chosen, **measured, rows=rows)
    path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def shares_of(result: Result, name: str) -> dict[str, float]:
    return dict(roofline_share=result.share(name), roofline_share_kept_up=result.share_kept_up(name))


def draw(results: list[Result], path: Path) -> None:
    """Left: rates; right: pages in use and cached over time, and requests running, of the last job."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=(1, 2))
    bars = [(f"{one.work.name}\n{name}", run.rate) for one in results for name, run in one.runs.items()]
    left.barh(*zip(*bars, strict=True))
    left.invert_yaxis()
    left.tick_params(axis="y", labelsize=7)
    left.set(xlabel="output tokens/s")
    run = results[-1].runs[OURS]
    at, used, cached, running, _ = np.array(run.memory).T
    right.stackplot(at, used, cached, labels=("pages of running requests", "kept for prefixes"), alpha=0.8)
    right.axhline(run.about["num_pages"], color="black", linewidth=1, linestyle="--", label="all pages")
    right.set(xlabel="seconds", ylabel="pages", title=results[-1].work.name)
    other = right.twinx()
    right.plot([], [], color="black", linewidth=0.8, label="requests running (right)")
    other.plot(at, running, color="black", linewidth=0.8)
    other.set_ylim(bottom=0)
    right.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, frameon=False)
    figure.suptitle(machine()["device"])
    figure.savefig(path, dpi=110)


def main() -> None:
    os.environ.setdefault("XLA_FLAGS", paxattn.XLA_FLAGS)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")
    parser = arguments()
    options = parser.parse_args()
    try:
        works = [parse(text, options.trace, options.max_len, options.seed) for text in options.jobs]
        if not options.draft_tokens and any(work.kind for work in works):
            raise ValueError("--draft-tokens: got 0, must be at least 1 to compare guesses with none")
        run(works, options)
    except ValueError as error:
        parser.error(str(error))


def run(works: list[Workload], options: argparse.Namespace) -> None:
    shapes = SHAPES.get(options.preset, SMOLLM2)
    others: list[dict[str, Run]] = [{} for _ in works]
    random = [work for work in works if not work.kind]
    if random and not options.no_peers and huggingface.installed():
        # First, so that they have the memory to themselves. JAX has not looked for a device yet.
        dtype = options.dtype or ("bfloat16" if os.path.exists("/dev/nvidia0") else "float32")
        alike = [work.at_once() for work in random]
        measured = iter(peers.measure(shapes, dtype, alike, shapes.vocab_size, options.seed))
        others = [{} if work.kind else next(measured) for work in works]
    elif random and not options.no_peers:
        say("transformers is left out: it needs torch and transformers installed")
    if options.cache:
        jax.config.update("jax_compilation_cache_dir", str(options.cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    dtype = options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    # When they are first asked for, as a server does not wait for them.
    rates = cache(partial(measured_rates, jnp.dtype(dtype)))
    model, params, works = weights(works, options, jnp.dtype(dtype))
    results: list[Result] = []
    for work, theirs in zip(works, others, strict=True):
        mine = measure(model, params, work, options, rates)
        mine[0].runs.update(theirs)
        for one in mine:
            say_result(one)
        results += mine
        if options.json:
            write_json(options.json, results, rates(), options)
    Console(width=None if sys.stdout.isatty() else 160).print(table(results))
    if options.plot:
        draw(results, options.plot)


if __name__ == "__main__":
    main()
