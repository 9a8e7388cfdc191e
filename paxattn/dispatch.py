"""Which implementation serves a call: the ordered list of the platform, or the one asked for by name.

An implementation is a module with a function named like the op. It declines a call with
NotImplementedError that names the feature. The first of the platform's list that does not decline
serves the call; one asked for by name never falls back.
"""

import importlib
from collections.abc import Callable
from typing import Any

import jax

NAMES = ("xla", "mosaic_gpu", "mosaic_tpu", "reference")

MODULES = {
    "flash_attention": {
        "xla": "paxattn.kernels.xla_flash",
        "mosaic_gpu": "paxattn.kernels.gpu_flash",
        "mosaic_tpu": "paxattn.kernels.tpu_flash",
        "reference": "paxattn.reference",
    },
    "paged_attention": {
        "xla": "paxattn.kernels.xla_paged",
        "mosaic_gpu": "paxattn.kernels.gpu_paged",
        "mosaic_tpu": "paxattn.kernels.tpu_paged",
        "reference": "paxattn.reference",
    },
    "write_pages": {
        "xla": "paxattn.kernels.xla_pages",
        "mosaic_gpu": "paxattn.kernels.gpu_paged",
        "mosaic_tpu": "paxattn.kernels.tpu_paged_write",
    },
    "write_compressed_pages": {"xla": "paxattn.kernels.xla_pages", "mosaic_gpu": "paxattn.kernels.gpu_paged"},
    "lay_out": {
        "xla": "paxattn.kernels.xla_pages",
        "mosaic_gpu": "paxattn.kernels.gpu_paged",
        "mosaic_tpu": "paxattn.kernels.xla_pages",
        "reference": "paxattn.kernels.xla_pages",
    },
}

ORDER = {"gpu": ("mosaic_gpu", "xla"), "tpu": ("mosaic_tpu", "xla"), "cpu": ("xla",)}

# Served by name alone, until all tests of these kernels have passed on the machine that they are for.
BY_NAME = {
    ("flash_attention", "mosaic_tpu"),
    ("paged_attention", "mosaic_tpu"),
    ("write_pages", "mosaic_tpu"),
}


def call(op: str, implementation: str | None, *args: Any, **kwargs: Any) -> Any:
    """Call `op` of the named implementation, or of the first of this platform's that serves it.

    Raises:
      ValueError: no implementation is called that.
      NotImplementedError: the named one, or every one of the platform, declines the call.
    """
    if implementation is not None:
        return load(op, implementation)(*args, **kwargs)
    declined = []
    for name in ORDER.get(platform(), ("xla",)):
        if (op, name) in BY_NAME:
            continue
        try:
            return load(op, name)(*args, **kwargs)
        except NotImplementedError as reason:
            declined.append(f"{name}: {reason}")
    raise NotImplementedError(f"{op}: every implementation declines. {'; '.join(declined)}")


def platform() -> str:
    """Of the device that arrays come to be on, unless they are put elsewhere."""
    device = jax.config.jax_default_device
    return getattr(device, "platform", device) or jax.default_backend()


def load(op: str, implementation: str) -> Callable[..., Any]:
    """The op's function; its module is imported on first use."""
    if implementation not in NAMES:
        raise ValueError(f"implementation: got {implementation!r}, must be None or one of {', '.join(NAMES)}")
    module = MODULES[op].get(implementation)
    if module is None:
        raise NotImplementedError(f"{op} has no {implementation!r} implementation in this version")
    return getattr(importlib.import_module(module), op)
