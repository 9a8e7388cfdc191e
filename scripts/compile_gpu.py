"""What ptxas makes of the Hopper kernels of flash_attention, on a machine without a GPU.

python scripts/compile_gpu.py                                        # registers, spills and warnings of the anchors
python scripts/compile_gpu.py --shapes "B1 S4096 H8/8 D256 causal" --sass kernels.sass

Needs jax[cuda13] and a C compiler. Warnings C7510 to C7519 say that products wait for each other, which costs more than
any block size gains. Mosaic GPU's compiler asks the driver which GPU there is; a library of a few lines answers for it.
"""

import argparse
import ctypes
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

DRIVER = """
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuGetErrorName(int error, const char **text) { *text = "none here"; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "none here"; return 0; }
/* 75 and 76 are the compute capability. */
int cuDeviceGetAttribute(int *value, int name, int device) { *value = name == 75 ? 9 : name != 76; return 0; }
"""
TOLD = re.compile(r"Used \d+ registers|\d+ bytes spill stores, \d+ bytes spill loads|C75\d\d.*")


def main() -> None:
    options = parse()
    if options.compile:
        compile_kernels(options.shapes)
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "driver.c")
        source.write_text(DRIVER, encoding="utf-8")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", Path(folder, "libcuda.so.1"), source], check=True)
        print(run(folder, options, "MOSAIC_GPU_DUMP_PTXAS", told))
        if options.sass:
            options.sass.write_text(run(folder, options, "MOSAIC_GPU_DUMP_SASS", lambda line: True), encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", metavar="SHAPE", help="as in bench_attention.py")
    parser.add_argument("--sass", type=Path, metavar="FILE", help="where to leave the machine code")
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)  # in a process that has the library
    return parser.parse_args()


def told(line: str) -> bool:
    return line.startswith("==") or bool(TOLD.search(line))


def run(folder: str, options: argparse.Namespace, dump: str, wanted: Callable[[str], bool]) -> str:
    env = os.environ | {"LD_LIBRARY_PATH": folder, "JAX_PLATFORMS": "cpu", dump: "1"}
    shapes = ["--shapes", *options.shapes] if options.shapes else []
    command = [sys.executable, __file__, "--compile", *shapes]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return "\n".join(line.strip() for line in done.stdout.splitlines() if wanted(line))


def compile_kernels(texts: list[str] | None) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import jax
    from jax.experimental.mosaic.gpu import core

    from paxattn.kernels import gpu_flash
    from scripts.attention.peers import ours
    from scripts.attention.programs import program
    from scripts.attention.shapes import FORWARD, inputs, rows_of

    gpu_flash.on_hopper = lambda: True
    plugin = importlib.import_module("jax_plugins.xla_cuda13")
    compiler = ctypes.CDLL(str(plugin._get_library_path())).MosaicGpuCompile
    compiler.argtypes, compiler.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
    for row in rows_of([], texts or FORWARD):
        core.KNOWN_KERNELS.clear()
        arrays = jax.eval_shape(lambda shape=row.shape: inputs(shape))
        jax.export.export(jax.jit(program(row, ours("mosaic_gpu"))), platforms=["cuda"])(*arrays)
        for kernel in core.KNOWN_KERNELS.values():
            print(f"== {row}", flush=True)
            compiler(kernel, len(kernel))  # It cannot load what it compiled, and says so.


if __name__ == "__main__":
    main()
