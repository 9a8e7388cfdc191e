"""What is asked of a server: lengths of prompts and outputs, and when they come."""

import csv
import re
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np

from scripts.paging.lengths import LENGTHS, Requests, read_trace

FIXED = re.compile(r"(\d+)x(\d+)\+(\d+)")
TEXT = re.compile(r"(copy|decoy|free):(\d+)\+(\d+)")
DRAWN = re.compile(r"(trace|azure|sharegpt):(\d+)")


@dataclass(frozen=True)
class Workload:
    """Requests in order of arrival.

    Fields:
      name: as asked for.
      prompt, output: tokens, ints [N].
      arrival: seconds from the start, [N]; all 0 = at once.
      kind: of one text that is to be continued with guesses and without (see `copying`), or none.
      ids: the prompts, where they are not random.
    """

    name: str
    prompt: np.ndarray
    output: np.ndarray
    arrival: np.ndarray
    kind: str = ""
    ids: tuple[list[int], ...] = ()

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def longest(self) -> int:
        return int((self.prompt + self.output).max())

    def of(self, *ids: list[int]) -> "Workload":
        """The same with these prompts."""
        return replace(self, ids=ids, prompt=np.array([len(one) for one in ids]))

    def prompts(self, vocab_size: int, seed: int) -> list[list[int]]:
        if self.ids:
            return list(self.ids)
        rng = np.random.default_rng(seed)
        return [rng.integers(0, vocab_size, n).tolist() for n in self.prompt]

    def at_rate(self, tokens_per_second: float) -> "Workload":
        """The same, spread so that so many output tokens are asked for in a second."""
        if not self.arrival[-1]:
            raise ValueError("--replay: the requests have no times of arrival")
        seconds = self.output.sum() / tokens_per_second
        name = f"{self.name} at {tokens_per_second:.0f} tokens/s"
        return replace(self, name=name, arrival=self.arrival * (seconds / self.arrival[-1]))

    def at_once(self) -> "Workload":
        return replace(self, arrival=np.zeros(len(self)))


def parse(text: str, trace: Path | None, max_len: int, seed: int) -> Workload:
    """A workload by its name.

    Args:
      text: COUNTxPROMPT+OUTPUT, or trace:COUNT, azure:COUNT, sharegpt:COUNT, or copy:PROMPT+OUTPUT, decoy:, free:.
      trace: the file of "trace", with TIMESTAMP, ContextTokens and GeneratedTokens.
      max_len: no request is longer; drawn ones are cut.
      seed: of drawn lengths and times.

    Raises:
      ValueError: there is no such workload.
    """
    if found := FIXED.fullmatch(text):
        count, prompt, output = map(int, found.groups())
        if min(count, prompt, output) < 1:
            raise ValueError(f"--jobs: got {text}, must have counts of at least 1")
        return Workload(text, np.full(count, prompt), np.full(count, output), np.zeros(count))
    if found := TEXT.fullmatch(text):
        prompt, output = int(found[2]), int(found[3])
        if min(prompt, output) < 1:
            raise ValueError(f"--jobs: got {text}, must have counts of at least 1")
        return Workload(text, np.array([prompt]), np.array([output]), np.zeros(1), kind=found[1])
    if not (found := DRAWN.fullmatch(text)) or not int(found[2]):
        known = "256x256+128, trace:1000, azure:1000, sharegpt:1000, copy:512+256, decoy:512+256 or free:512+256"
        raise ValueError(f"--jobs: got {text}, must be like {known}")
    kind, count = found[1], int(found[2])
    rng = np.random.default_rng(seed)
    if kind != "trace":
        drawn = LENGTHS[kind](count, rng)
        return _workload(text, drawn, np.cumsum(rng.exponential(size=count)), max_len)
    if trace is None:
        raise ValueError("--jobs: trace needs --trace FILE; azure is a distribution fitted to one")
    read = read_trace(trace, count)
    return _workload(text, read, arrivals(trace, len(read)), max_len)


def _workload(name: str, requests: Requests, arrival: np.ndarray, max_len: int) -> Workload:
    cut = requests.cut(max_len)
    return Workload(name, cut.prompt, cut.output, arrival)


def arrivals(trace: Path, count: int) -> np.ndarray:
    """Seconds from the first request, of the first `count`."""
    with trace.open(newline="", encoding="utf-8-sig") as file:
        rows = [row.get("TIMESTAMP") for _, row in zip(range(count), csv.DictReader(file), strict=False)]
    # Seven digits of a second are one too many for datetime.
    times = [datetime.fromisoformat(str(row)[:26]).timestamp() for row in rows]
    return np.array(times) - times[0]
