"""What a request asks for, checked, and as the arrays that the device works with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from paxattn import checks
from paxattn.engine.rules import Rules
from paxattn.engine.sampling import Sampling


class InvalidParamsError(ValueError):
    """A value of GenerationParams is out of range, or the engine has no room for it; the message names it."""


@dataclass(frozen=True)
class GenerationParams:
    """How a prompt is continued.

    Fields:
      max_new_tokens: at least 1.
      sampling: greedy by default. Tokens depend on its seed and the request alone, not on what else runs.
      stop_ids: tokens that end a continuation, and are its last.
      stop_strings: texts that end it; its last token completes one. Needs the engine's `detokenize`.
      min_new_tokens: no stop token is drawn before.
      repetition_penalty: above 1 makes tokens of prompt and output less likely (Keskar et al. 2019).
      presence_penalty, frequency_penalty: taken from the logits of tokens in the output, once and for each time.
      logit_bias: added to the logits of these ids.
      logprobs: also tell the log-probability of each token, from the logits as the model gave them, and those of so
        many likeliest ones; None = tell none.
      num_samples: continuations, which share the prompt's pages.
      priority: goes before the engine's `patience` earlier requests for each unit.
      salt: only requests of one salt share prefixes.
    """

    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: Sequence[int] = ()
    stop_strings: Sequence[str] = ()
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    num_samples: int = 1
    priority: int = 0
    salt: str | bytes = ""

    def check(self, like: Rules, top: int, texts: bool) -> None:
        """Raise InvalidParamsError for what is out of range, or for what an engine of these rules has no room."""
        try:
            self._check(like.stop_ids.shape[1], like.bias_ids.shape[1], top, texts)
        except ValueError as error:
            raise InvalidParamsError(str(error)) from error

    def _check(self, stop_ids: int, biases: int, top: int, texts: bool) -> None:
        checks.require(isinstance(self.sampling, Sampling), "sampling", repr(self.sampling), "a Sampling")
        self.sampling.checked_numbers()
        checks.check_positive_int("max_new_tokens", self.max_new_tokens)
        checks.check_positive_int("num_samples", self.num_samples)
        counted = checks.is_int(self.min_new_tokens) and 0 <= self.min_new_tokens <= self.max_new_tokens
        checks.require(counted, "min_new_tokens", repr(self.min_new_tokens), "an int from 0 to max_new_tokens")
        checks.require(checks.is_int(self.priority), "priority", repr(self.priority), "an int")
        checks.require(isinstance(self.salt, str | bytes), "salt", repr(self.salt), "a str or bytes")
        _check_ids("stop_ids", self.stop_ids, stop_ids)
        _check_ids("logit_bias", tuple(self.logit_bias), biases)
        for name, value in (("logit_bias", x) for x in self.logit_bias.values()):
            checks.static_float(name, value)
        penalty = checks.static_float("repetition_penalty", self.repetition_penalty)
        checks.require(penalty > 0, "repetition_penalty", penalty, "above 0")
        checks.static_float("presence_penalty", self.presence_penalty)
        checks.static_float("frequency_penalty", self.frequency_penalty)
        told = self.logprobs is None or (checks.is_int(self.logprobs) and 0 <= self.logprobs <= top)
        checks.require(told, "logprobs", repr(self.logprobs), f"None or an int from 0 to the engine's {top}")
        strings = not isinstance(self.stop_strings, str) and all(x and isinstance(x, str) for x in self.stop_strings)
        checks.require(strings, "stop_strings", repr(self.stop_strings), "a sequence of texts that are not empty")
        checks.require(
            texts or not self.stop_strings, "stop_strings", repr(self.stop_strings), "empty without detokenize"
        )

    def rules(self, like: Rules, stream: int, prompt: int) -> Rules:
        """One row's Rules, of numbers, for a prompt of so many tokens."""
        return Rules(
            sampling=self.sampling,
            stream=stream,
            prompt=prompt,
            least=prompt + self.min_new_tokens,
            most=prompt + self.max_new_tokens,
            stop_ids=_padded(self.stop_ids, like.stop_ids, -1),
            bias_ids=_padded(tuple(self.logit_bias), like.bias_ids, -1),
            bias=_padded(tuple(self.logit_bias.values()), like.bias, 0),
            repetition=self.repetition_penalty,
            presence=self.presence_penalty,
            frequency=self.frequency_penalty,
            logprobs=self.logprobs is not None,
        )


def check_prompt(prompt: Any) -> list[int]:
    """As a list of ints.

    Raises:
      ValueError: it is not a sequence of token ids, or empty.
    """
    ids = np.asarray(prompt)
    whole = ids.ndim == 1 and ids.size > 0 and np.issubdtype(ids.dtype, np.integer)
    checks.require(
        whole and bool(np.all((ids >= 0) & (ids < 2**31))), "prompt", repr(prompt)[:80], "token ids, not empty"
    )
    return ids.tolist()


def _check_ids(name: str, given: Sequence[int], most: int) -> None:
    ids = np.asarray(given)
    whole = ids.ndim == 1 and (ids.size == 0 or np.issubdtype(ids.dtype, np.integer))
    checks.require(whole and bool(np.all((ids >= 0) & (ids < 2**31))), name, repr(given), "token ids")
    checks.require(len(ids) <= most, name, f"{len(ids)} of them", f"at most the {most} that the engine has room for")


def _padded(values: Sequence[Any], like: jax.Array, fill: int) -> np.ndarray:
    row = np.full(like.shape[1], fill, like.dtype)
    row[: len(values)] = values
    return row
