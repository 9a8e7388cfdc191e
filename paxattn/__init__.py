"""FlashAttention, PagedAttention and a functional paged KV store for JAX."""

from paxattn.engine.beam import Beam, beam_search
from paxattn.engine.config import EngineConfig
from paxattn.engine.engine import BrokenEngineError, Engine, UnknownRequestError
from paxattn.engine.generate import Generation, State, generate, prefill, step, stream, warmup
from paxattn.engine.params import GenerationParams, InvalidParamsError
from paxattn.engine.records import Stats, TokenLogprob, Update
from paxattn.engine.sampling import Sampling
from paxattn.engine.scheduler import TooLongError
from paxattn.flags import XLA_FLAGS
from paxattn.flash_attention import flash_attention
from paxattn.kv.page_table import PageCopies, PageTable
from paxattn.kv.pages import KVPages, copy_pages, init_pages, write_pages
from paxattn.kv.prefix import PrefixIndex
from paxattn.kv.stores import BlockwiseKV, ContiguousKV, PagedKV, Uncached
from paxattn.kv.swap import SwappedRow, swap_in, swap_out
from paxattn.paged_attention import paged_attention
from paxattn.snapshot import restore_snapshot, save_snapshot

__version__ = "0.1.0"

__all__ = [
    "XLA_FLAGS",
    "Beam",
    "BlockwiseKV",
    "BrokenEngineError",
    "ContiguousKV",
    "Engine",
    "EngineConfig",
    "Generation",
    "GenerationParams",
    "InvalidParamsError",
    "KVPages",
    "PageCopies",
    "PageTable",
    "PagedKV",
    "PrefixIndex",
    "Sampling",
    "State",
    "Stats",
    "SwappedRow",
    "TokenLogprob",
    "TooLongError",
    "Uncached",
    "UnknownRequestError",
    "Update",
    "beam_search",
    "copy_pages",
    "flash_attention",
    "generate",
    "init_pages",
    "paged_attention",
    "prefill",
    "restore_snapshot",
    "save_snapshot",
    "step",
    "stream",
    "swap_in",
    "swap_out",
    "warmup",
    "write_pages",
]
