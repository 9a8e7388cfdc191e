"""EngineConfig: how much of what an engine has, and the programs that follow from it."""

from dataclasses import dataclass
from typing import Any, Literal

from paxattn import checks
from paxattn.engine.slots import Shape


@dataclass(frozen=True)
class EngineConfig:
    """How much of what an engine has.

    Fields:
      max_seqs: R, requests that run at once.
      max_len: most tokens of a request, prompt and output together.
      page_size: P
      num_pages: N, or "auto": what fits the memory that weights and programs leave.
      memory_fraction: of the device's memory, for "auto".
      prefill_tokens: most tokens of prompts in a step, besides one of each row that draws.
      decode_steps: most steps before the host looks at what was drawn.
      kv_dtype: of the pages; None = as the model's keys.
      implementation: of paged_attention.
      prefix_cache: find full pages of earlier requests again; never where all layers have windows.
      preemption: a request that gives way computes its tokens again, or has its pages swapped to host memory.
      patience: by how many arrivals a unit of priority goes ahead.
      draft_tokens: most tokens guessed from a row's own text and verified at once; 0 = none.
      ngram: how many tokens must stand there already for a guess.
      max_stop_ids, max_logit_bias, max_logprobs: room for them in each request.
    """

    max_seqs: int = 64
    max_len: int = 2048
    page_size: int = 16
    num_pages: int | Literal["auto"] = "auto"
    memory_fraction: float = 0.9
    prefill_tokens: int = 2048
    decode_steps: int = 16
    kv_dtype: Any = None
    implementation: str | None = None
    prefix_cache: bool = True
    preemption: Literal["recompute", "swap"] = "recompute"
    patience: int = 256
    draft_tokens: int = 0
    ngram: int = 3
    max_stop_ids: int = 8
    max_logit_bias: int = 16
    max_logprobs: int = 0

    def check(self) -> None:
        """Raise a ValueError that names what is out of range."""
        sizes = ("max_seqs", "max_len", "page_size", "prefill_tokens", "decode_steps", "patience", "ngram")
        for name in (*sizes, "max_stop_ids", "max_logit_bias"):
            checks.check_positive_int(name, getattr(self, name))
        for name in ("draft_tokens", "max_logprobs"):
            value = getattr(self, name)
            checks.require(checks.is_int(value) and value >= 0, name, repr(value), "an int of at least 0")
        if self.num_pages != "auto":
            checks.check_positive_int("num_pages", self.num_pages)
        fraction = checks.static_float("memory_fraction", self.memory_fraction)
        checks.require(0 < fraction <= 1, "memory_fraction", fraction, "above 0 and at most 1")
        checks.check_bool("prefix_cache", self.prefix_cache)
        known = self.preemption in ("recompute", "swap")
        checks.require(known, "preemption", repr(self.preemption), "'recompute' or 'swap'")

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The programs: one for decode, then those of more and more tokens of prompts."""
        sizes = [self.prefill_tokens]
        while sizes[0] >= 256 and len(sizes) < 3:
            sizes.insert(0, sizes[0] // 4)
        return tuple(self._shape(size) for size in (0, *sizes))

    def _shape(self, prefill: int) -> Shape:
        return Shape(
            prefill=prefill,
            steps=self.decode_steps,
            drafts=0 if prefill else self.draft_tokens,
            ngram=self.ngram,
            top=self.max_logprobs,
            cached=self.prefix_cache,
        )
