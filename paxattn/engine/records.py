"""What an engine knows of requests and tells of them, and its statistics."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from paxattn.engine.params import GenerationParams, InvalidParamsError, Limits, check_prompt
from paxattn.engine.rules import Rules
from paxattn.engine.scheduler import Request
from paxattn.engine.slots import News


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a drawn token, and the likeliest (id, log-probability) in its place."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Update:
    """What one sample of a request got.

    Fields:
      id: the request's, from add_request.
      index: which of its samples.
      ids: the new tokens.
      reason: None while it goes on, or "stop" or "length".
      logprobs: of the new tokens, where asked for.
    """

    id: int
    index: int
    ids: list[int]
    reason: str | None = None
    logprobs: list[TokenLogprob] | None = None


@dataclass(frozen=True)
class Stats:
    """Of an engine.

    Fields:
      num_pages, num_free, num_cached, num_shared: pages in all, free, kept for prefixes alone, of several owners.
      stored: tokens in pages of running requests; a page that two share holds its tokens twice here.
      running, waiting: requests now; those that gave way wait.
      preempted: how often a request gave way.
      tokens, steps, seconds: told and taken since the engine was made, and the time that loops took.
      host_gap: seconds of these for which the device may have waited for the host.
      last: when the last loop was looked at, by time.perf_counter.
    """

    num_pages: int
    num_free: int
    num_cached: int = 0
    num_shared: int = 0
    stored: int = 0
    running: int = 0
    waiting: int = 0
    preempted: int = 0
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    host_gap: float = 0.0
    last: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def step_seconds(self) -> float:
        return self.seconds / self.steps if self.steps else 0.0


@dataclass(eq=False)
class Job:
    """A sample as the engine's user knows it, what it asks for (with the rules of the first), and what it has got."""

    id: int
    index: int
    params: GenerationParams
    rules: Rules
    ids: list[int] = field(default_factory=list)
    reason: str = "running"
    logprobs: list[TokenLogprob] | None = None


def samples(number: int, prompt: Sequence[int], params: GenerationParams, limits: Limits, like: Rules) -> list[Request]:
    """A request for each sample, under the number that all share.

    Args:
      like: rules with as much room as the engine has.

    Raises:
      InvalidParamsError: a value of params is out of range.
      ValueError: prompt is not a sequence of token ids.
    """
    if not isinstance(params, GenerationParams):
        raise InvalidParamsError(f"params: got {params!r}, must be a GenerationParams or None")
    ids = check_prompt(prompt, limits.vocabulary)
    # From here on what was checked is what runs, whatever the caller does with what was given.
    params = params.checked(limits)
    rules = params.rules(like, len(ids))
    return [
        Request(
            prompt=ids,
            max_new_tokens=params.max_new_tokens,
            priority=params.priority,
            salt=params.salt,
            options=Job(number, index, params, rules),
        )
        for index in range(params.num_samples)
    ]


def token_logprobs(news: News, row: int, top: int | None) -> list[TokenLogprob] | None:
    """Of the tokens that a row drew, with the likeliest `top` in place of each; None where nobody asked for them."""
    if top is None:
        return None
    at = np.argwhere(news.tokens[: news.steps, row] >= 0)
    told = []
    for step, place in at.tolist():
        ids, values = news.top_ids[step, row, place, :top], news.top_logprobs[step, row, place, :top]
        best = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        told.append(TokenLogprob(float(news.logprobs[step, row, place]), best))
    return told


def tell(
    request: Request,
    ids: list[int],
    reason: str | None,
    detokenize: Callable[[list[int]], str] | None,
    logprobs: list[TokenLogprob] | None,
) -> Update:
    """Add new tokens to a request's job, up to the one that completes a stop string, and say so."""
    job = request.options
    if job.params.stop_strings and detokenize is not None:
        count = _before_stop(job.ids, ids, job.params.stop_strings, job.params.min_new_tokens, detokenize)
        if count is not None:
            ids, reason = ids[:count], "stop"
            logprobs = None if logprobs is None else logprobs[:count]
    job.ids += ids
    job.reason = reason or "running"
    if logprobs is not None:
        job.logprobs = (job.logprobs or []) + logprobs
    return Update(job.id, job.index, ids, reason, logprobs)


def _before_stop(
    old: list[int], new: list[int], strings: Sequence[str], least: int, detokenize: Callable[[list[int]], str]
) -> int | None:
    """How many of the new tokens it takes to complete a stop string behind the first `least`; None = more than all."""
    ids = old + new
    if not new or len(ids) <= least:
        return None
    early = len(detokenize(ids[:least])) if least else 0

    def stops(count: int) -> bool:
        text = detokenize(ids[: len(old) + count])
        return any(string in text[max(0, early - len(string) + 1) :] for string in strings)

    if not stops(len(new)):
        return None
    return next(count for count in range(1, len(new) + 1) if stops(count))
