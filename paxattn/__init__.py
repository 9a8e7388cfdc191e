"""FlashAttention, PagedAttention and a functional paged KV store for JAX."""

from paxattn.engine.generate import Generation, generate, stream, warmup
from paxattn.engine.sampling import Sampling
from paxattn.flash_attention import flash_attention
from paxattn.kv.page_table import PageCopies, PageTable
from paxattn.kv.pages import KVPages, copy_pages, init_pages, write_pages
from paxattn.kv.stores import BlockwiseKV, ContiguousKV, PagedKV, Uncached
from paxattn.paged_attention import paged_attention

__version__ = "0.1.0"

__all__ = [
    "BlockwiseKV",
    "ContiguousKV",
    "Generation",
    "KVPages",
    "PageCopies",
    "PageTable",
    "PagedKV",
    "Sampling",
    "Uncached",
    "copy_pages",
    "flash_attention",
    "generate",
    "init_pages",
    "paged_attention",
    "stream",
    "warmup",
    "write_pages",
]
