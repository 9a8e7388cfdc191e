"""Five ways to give requests memory, on the same requests."""

from dataclasses import dataclass

import numpy as np

from scripts.paging.allocators import ALLOCATORS, FirstFit, next_power_of_two
from scripts.paging.contiguous import simulate_contiguous
from scripts.paging.lengths import Requests
from scripts.paging.paged import simulate_paged
from scripts.paging.pool import PagePool
from scripts.paging.timeline import Timeline

BLOCK = 128  # tokens, the default of paxattn.BlockwiseKV


@dataclass(frozen=True)
class Setting:
    """Lengths in tokens; allocator is a key of ALLOCATORS."""

    max_len: int
    page_size: int
    memory: int
    allocator: str


def stretches(requests: Requests, max_len: int) -> dict[str, np.ndarray]:
    """Tokens that each contiguous scheme asks for, i64 [N] each."""
    # pow2 is "over-reserves the space for outputs by at most 2x" (Kwon et al. 2023, section 6.1).
    output = np.array([next_power_of_two(n) for n in requests.output.tolist()])
    return dict(
        max=np.full(len(requests), max_len),
        pow2=np.minimum(requests.prompt + output, max_len),
        oracle=requests.total,
        blockwise=np.full(len(requests), -(-max_len // BLOCK) * BLOCK),
    )


def compare(requests: Requests, setting: Setting) -> dict[str, Timeline]:
    """A timeline for each scheme, on the same requests. Requests must fit setting.max_len.

    Raises:
      ValueError: a scheme's memory does not hold its largest request.
    """
    done = {
        name: run_contiguous(name, requests, sizes, setting)
        for name, sizes in stretches(requests, setting.max_len).items()
    }
    return done | {"paged": run_paged(requests, setting)}


def run_contiguous(name: str, requests: Requests, sizes: np.ndarray, setting: Setting) -> Timeline:
    # Rows of one size, first fit, are fixed rows.
    kind = FirstFit if name == "blockwise" else ALLOCATORS[setting.allocator]
    largest = int(sizes.max())
    if kind(setting.memory).take(largest) is None:
        least = kind(setting.memory).rounded(largest)
        raise ValueError(f"--memory: got {setting.memory} tokens, {name} needs {least} for one request")
    return simulate_contiguous(requests, sizes, kind(setting.memory))


def run_paged(requests: Requests, setting: Setting) -> Timeline:
    pool = PagePool(setting.memory // setting.page_size, setting.page_size)
    if pool.pages(int(requests.total.max())) > pool.num_free:
        raise ValueError(f"--memory: got {setting.memory} tokens, too few pages for the longest request")
    return simulate_paged(requests, pool, setting.memory)
