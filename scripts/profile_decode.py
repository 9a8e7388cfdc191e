"""Whether a decode loop stays on the device and copies no pages, and how long a step of it takes.

python scripts/profile_decode.py --dtype int8

The rows of a tiny decoder draw a token each in every step of one fori_loop; pages are found on the device as the rows
grow. The compiled loop must hold no copy and no transpose of a page array's size, and nothing that the host does. On a
GPU the loop also runs under the profiler, which tells what is copied to and from the host.
"""

import argparse
import collections
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import paxattn
from models import decoder
from models.config import Config
from paxattn.engine.generate import RUNNING, State, decode

DTYPES = ("bfloat16", "float16", "float32", "int8", "float8_e4m3fn")
PROMPT = 8  # tokens
LEAST_PAGES = 1024  # so that no other array of a small step is as large as the pages
CONFIG = Config(
    vocab_size=1024, num_layers=2, embed_dim=256, mlp_dim=512, num_heads=8, num_kv_heads=2, head_dim=64, context=1 << 20
)
Run = Callable[[State], State]

COPY = re.compile(r"= (\(.*?\)|\S+) (?:copy|copy-start|transpose)\(")
HOST = re.compile(
    r" (?:infeed|outfeed|send|recv)(?:-done)?\("
    r'|custom_call_target="[^"]*(?:[Cc]allback|[Hh]ost)'
    r'|execution_thread="host"'
    r"|S\(5\)"  # an array in the host's memory
)


def page_copies(hlo: str, size: int) -> list[str]:
    """The lines that copy or transpose an array of `size` elements or more."""
    return [line for line in hlo.splitlines() if (found := COPY.search(line)) and largest(found[1]) >= size]


def largest(shapes: str) -> int:
    """Elements of the largest array in a type as HLO writes it."""
    return max(math.prod(int(n) for n in dims.split(",") if n) for dims in re.findall(r"\w\[([\d,]*)\]", shapes))


def host_operations(hlo: str) -> list[str]:
    return [line for line in hlo.splitlines() if HOST.search(line)]


def prefilled(model: Any, params: Any, options: argparse.Namespace) -> State:
    """Every row has its prompt, and none will end within the loop."""
    count = options.steps + 2
    room = PROMPT + count
    kv = paxattn.PagedKV.create(
        CONFIG.num_layers,
        CONFIG.num_kv_heads,
        CONFIG.head_dim,
        max_seqs=options.rows,
        max_len=room,
        page_size=options.page_size,
        num_pages=max(LEAST_PAGES, options.rows * -(-room // options.page_size)),
        dtype=options.dtype,
        implementation=options.implementation,
    )
    prompts = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (options.rows, PROMPT)).tolist()
    return jax.block_until_ready(paxattn.prefill(model, params, kv, prompts, max_new_tokens=count))


def compiled(model: Any, params: Any, state: State, steps: int) -> Any:
    def loop(params: Any, state: State) -> State:
        return jax.lax.fori_loop(0, steps, lambda _, state: decode(model, params, state), state)

    return jax.jit(loop, donate_argnums=1).lower(params, state).compile()


def check_program(hlo: str, size: int) -> None:
    for what, lines in (("copies pages", page_copies(hlo, size)), ("needs the host", host_operations(hlo))):
        if lines:
            raise SystemExit(f"the loop {what}:\n" + "\n".join(line.strip()[:200] for line in lines[:8]))


def check_end(state: State, steps: int) -> None:
    """Every row drew a token in every step."""
    if not bool((state.reason == RUNNING).all() & (state.kv.lens == PROMPT + steps).all()):
        raise SystemExit("rows ended within the loop")


def timed(run: Run, state: State) -> tuple[State, float]:
    start = time.perf_counter()
    state = jax.block_until_ready(run(state))
    return state, time.perf_counter() - start


def profiled(run: Run, state: State) -> collections.Counter[str]:
    """How often the GPU did what: counts of "line of the profile: event"."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run(state))
        [file] = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        lines = [line for plane in planes if "GPU" in plane.name for line in plane.lines]
        return collections.Counter(f"{line.name}: {event.name}" for line in lines for event in line.events)


def memcpys(run: Run, state: State) -> dict[str, int]:
    events = profiled(run, state)
    if not events:
        raise SystemExit("the profiler saw nothing of the GPU")
    print(f"{events.total()} events of the GPU")
    return {name: count for name, count in events.items() if "memcpy" in name.lower()}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    model, params = decoder.random(CONFIG, dtype=jnp.bfloat16)
    start = partial(prefilled, model, params, options)
    state = start()
    program = compiled(model, params, state, options.steps)
    check_program(program.as_text(), state.kv.layers[0].k.size)
    print("the program copies no pages and needs no host")
    run = partial(program, params)
    check_end(run(state), options.steps)
    state, seconds = timed(run, start())
    check_end(state, options.steps)
    result: dict[str, Any] = dict(ms_per_step=seconds / options.steps * 1e3)
    print(f"{result['ms_per_step']:.3f} ms a step")
    if jax.default_backend() == "gpu":
        result["memcpys"] = memcpys(run, start())
        print("memcpys:", ", ".join(f"{name} {count}" for name, count in result["memcpys"].items()) or "none")
    return result


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the pages (default: %(default)s)")
    parser.add_argument("--implementation", help="of attention: xla, mosaic_gpu, mosaic_tpu or reference")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


def main() -> None:
    os.environ.setdefault("XLA_FLAGS", paxattn.XLA_FLAGS)
    options = arguments().parse_args()
    result = measure(options)
    if options.json:
        machine = dict(device=str(jax.devices()[0]), jax=jax.__version__)
        options.json.write_text(json.dumps({"machine": machine, "results": result}, indent=1))


if __name__ == "__main__":
    main()
