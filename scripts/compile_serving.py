"""What XLA makes of the serving loop on an H100, on a machine without one: kernels a step, copies of pages, CUDA graph.

python scripts/compile_serving.py --layers 2 --max-seqs 64
python scripts/compile_serving.py --layers 2 --max-seqs 1 --draft-tokens 4 --list

Needs jax[cuda13]. XLA is told which GPU there would be, and compiles for it. It tries no matrix products to find the
fastest, so that those may be other kernels on a GPU; all the rest is as there. A loop and a branch count as one kernel.
"""

import argparse
import collections
import os
import re
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
OPERATION = re.compile(r"^( *)\d+: (k\w+) +\[.*?\] *(.*)")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama3-8b")
    parser.add_argument("--layers", type=int, help="default: all of the preset")
    parser.add_argument("--max-seqs", type=int, default=64)
    parser.add_argument("--max-len", type=int, default=1152)
    parser.add_argument("--kv-dtype")
    parser.add_argument("--draft-tokens", type=int, default=0)
    parser.add_argument(
        "--prompts", action="store_true", help="the largest program for prompts, not the one for decode"
    )
    parser.add_argument("--list", action="store_true", help="print all operations of a step")
    return parser.parse_args()


def a_gpu() -> Any:
    """An H100 to compile for."""
    from jax.experimental import topologies

    return topologies.get_topology_desc("", "cuda", target_config=H100, topology="1x1x1").devices[0]


def compiled(options: argparse.Namespace) -> tuple[Any, int]:
    """The program, and the elements of a layer's keys."""
    import jax
    import jax.numpy as jnp

    from models import decoder
    from paxattn import EngineConfig, PagedKV, dispatch
    from paxattn.engine import slots
    from paxattn.kernels import gpu_flash, gpu_paged
    from scripts.bench_serving import SHAPES

    gpu_flash.on_hopper = gpu_paged.on_hopper = lambda: True
    dispatch.platform = lambda: "gpu"
    config = SHAPES[options.preset]
    config = replace(config, num_layers=options.layers or config.num_layers)
    engine = EngineConfig(
        max_seqs=options.max_seqs,
        max_len=options.max_len,
        implementation="mosaic_gpu",
        draft_tokens=options.draft_tokens,
    )

    def state() -> slots.Slots:
        kv = PagedKV.create(
            config.num_layers,
            config.num_kv_heads,
            config.head_dim,
            max_seqs=engine.max_seqs,
            max_len=engine.max_len,
            dtype=options.kv_dtype or jnp.bfloat16,
            implementation=engine.implementation,
        )
        return slots.Slots.create(kv, engine.max_stop_ids, engine.max_logit_bias)

    model, params = decoder.abstract(config, jnp.bfloat16)
    there = jax.sharding.SingleDeviceSharding(a_gpu())
    number = jax.ShapeDtypeStruct((), jnp.int32)
    args = params, jax.eval_shape(state), number, number
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), args)
    start = time.perf_counter()
    traced = slots.run.trace(model, *args, shape=engine.shapes[-1 if options.prompts else 0])
    lowered = traced.lower(lowering_platforms=("cuda",))
    middle = time.perf_counter()
    program = lowered.compile()
    print(f"lowered in {middle - start:.1f} s, compiled in {time.perf_counter() - middle:.1f} s")
    return program, args[1].kv.layers[0].k.size


def operations(sequence: str) -> tuple[bool, list[str]]:
    """Whether all is one CUDA graph, and what the body of the outer loop does."""
    lines = [match for line in sequence.splitlines() if (match := OPERATION.match(line))]
    loop = next(i for i, line in enumerate(lines) if line[2] == "kWhile")
    inside = [line for line in lines[loop + 1 :] if len(line[1]) > len(lines[loop][1])]
    level = min(len(line[1]) for line in inside)
    steps = [line for line in inside if len(line[1]) == level and line[2] != "kCommandBuffer"]
    return lines[0][2] == "kCommandBuffer" and lines[loop][1] != "", [
        line[3].split(" ")[0] if line[3] and line[2] != "kDynamicSliceFusion" else line[2] for line in steps
    ]


def main() -> None:
    options = arguments()
    os.environ["JAX_PLATFORMS"] = "cpu"
    from paxattn import XLA_FLAGS
    from scripts.profile_decode import host_operations, page_copies

    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_gpu_autotune_level=0 --xla_dump_to={folder} --xla_dump_hlo_as_text"
        os.environ["XLA_FLAGS"] = f"{XLA_FLAGS} {flags}"
        program, page_size = compiled(options)
        [sequence] = Path(folder).glob("*run*thunk_sequence_after_thunk_passes.txt")
        whole, steps = operations(sequence.read_text(encoding="utf-8"))
    text = program.as_text()
    print(f"{'one CUDA graph' if whole else 'NOT one CUDA graph'}, {len(steps)} operations a step")
    print(f"{len(page_copies(text, page_size))} copies of pages, {len(host_operations(text))} host operations")
    for name, count in collections.Counter(re.sub(r"[._]\d+$", "", name) for name in steps).most_common():
        print(f"{count:5} {name}")
    if options.list:
        print(*steps, sep="\n")


if __name__ == "__main__":
    main()
