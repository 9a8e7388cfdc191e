"""What a request asks for, checked, and as the arrays that the device works with."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
      min_new_tokens: no stop token is drawn before, and no stop string that is complete by then ends it.
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

    def checked(self, limits: "Limits") -> "GenerationParams":
        """A copy that nobody else can change, and whose sequences may be gone through again.

        Raises:
          InvalidParamsError: a value is out of range, or beyond what the engine has room for.
        """
        try:
            return self._checked(limits)
        except ValueError as error:
            raise InvalidParamsError(str(error)) from error

    def _checked(self, limits: "Limits") -> "GenerationParams":
        checks.require(isinstance(self.sampling, Sampling), "sampling", repr(self.sampling), "a Sampling")
        checks.check_positive_int("max_new_tokens", self.max_new_tokens)
        checks.check_positive_int("num_samples", self.num_samples)
        counted = checks.is_int(self.min_new_tokens) and 0 <= self.min_new_tokens <= self.max_new_tokens
        checks.require(counted, "min_new_tokens", repr(self.min_new_tokens), "an int from 0 to max_new_tokens")
        checks.require(checks.is_int(self.priority), "priority", repr(self.priority), "an int")
        checks.require(isinstance(self.salt, str | bytes), "salt", repr(self.salt), "a str or bytes")
        told = self.logprobs is None or (checks.is_int(self.logprobs) and 0 <= self.logprobs <= limits.logprobs)
        checks.require(
            told, "logprobs", repr(self.logprobs), f"None or an int from 0 to the engine's {limits.logprobs}"
        )
        repetition, presence, frequency = (
            checks.static_float32(name, getattr(self, name))
            for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")
        )
        checks.require(repetition > 0, "repetition_penalty", repetition, "above 0")
        return replace(
            self,
            sampling=self.sampling.checked_numbers(),
            stop_ids=_ids("stop_ids", self.stop_ids, limits.vocabulary, limits.stop_ids),
            stop_strings=_strings(self.stop_strings, limits.texts),
            logit_bias=_biases(self.logit_bias, limits),
            repetition_penalty=repetition,
            presence_penalty=presence,
            frequency_penalty=frequency,
        )

    def rules(self, like: Rules, prompt: int) -> Rules:
        """One row's Rules, of numbers, for a prompt of so many tokens; its first sample's."""
        return Rules(
            sampling=self.sampling,
            stream=0,
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


@dataclass(frozen=True)
class Limits:
    """What an engine has room for: ids below `vocabulary`, so many of each, and stop strings, where it makes texts."""

    vocabulary: int
    stop_ids: int
    biases: int
    logprobs: int
    texts: bool


def check_prompt(prompt: Any, vocabulary: int) -> list[int]:
    """As a list of ints.

    Raises:
      ValueError: it is not a sequence of token ids, or empty.
    """
    ids = checks.token_ids("prompt", prompt, vocabulary)
    checks.require(ids.size > 0, "prompt", "no tokens", "at least one token long")
    return ids.tolist()


def _ids(name: str, given: Any, below: int, most: int) -> tuple[int, ...]:
    ids = checks.token_ids(name, given, below)
    checks.require(len(ids) <= most, name, f"{len(ids)} of them", f"at most the {most} that the engine has room for")
    return tuple(ids.tolist())


def _strings(given: Any, texts: bool) -> tuple[str, ...]:
    must = "a sequence of texts that are not empty"
    checks.require(isinstance(given, Iterable) and not isinstance(given, str), "stop_strings", repr(given), must)
    strings = tuple(given)
    checks.require(all(x and isinstance(x, str) for x in strings), "stop_strings", repr(strings), must)
    checks.require(texts or not strings, "stop_strings", repr(strings), "empty without detokenize")
    return strings


def _biases(given: Any, limits: Limits) -> dict[int, float]:
    checks.require(isinstance(given, Mapping), "logit_bias", repr(given), "a mapping of token ids to numbers")
    ids = _ids("logit_bias", tuple(given), limits.vocabulary, limits.biases)
    return {i: checks.static_float32("logit_bias", x) for i, x in zip(ids, given.values(), strict=True)}


def _padded(values: Sequence[Any], like: jax.Array, fill: int) -> np.ndarray:
    row = np.full(like.shape[1], fill, like.dtype)
    row[: len(values)] = values
    return row
