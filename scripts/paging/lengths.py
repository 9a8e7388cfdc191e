"""Requests: how long their prompts and outputs are, from a trace or drawn."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

COLUMNS = ("ContextTokens", "GeneratedTokens")  # of a trace


@dataclass(frozen=True)
class LengthClass:
    """A share of all requests, and their lengths in tokens at LEVELS."""

    share: float
    prompt: tuple[int, ...]
    output: tuple[int, ...]


# Azure LLM inference trace 2023, conversation, 19,366 requests, CC-BY 4.0: Patel et al., "Splitwise: Efficient
# generative LLM inference using phase splitting", ISCA 2024. The lengths have several modes, which no lognormal has,
# and prompts near 1,050 tokens get the long answers. So the fit is a mixture of three classes (prompts below 900,
# below 1,400, and longer), each with its share of the requests and its quantiles, log-linear in between.
LEVELS = (0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 1)
AZURE = (
    LengthClass(
        share=0.419,
        prompt=(2, 14, 119, 181, 203, 237, 377, 389, 396, 402, 409, 430, 660, 884, 898, 899),
        output=(7, 12, 32, 59, 77, 86, 92, 98, 107, 122, 150, 182, 217, 381, 556, 1000),
    ),
    LengthClass(
        share=0.403,
        prompt=(900, 913, 970, 994, 1020, 1041, 1060, 1081, 1103, 1131, 1174, 1312, 1316, 1356, 1389, 1399),
        output=(26, 45, 82, 132, 373, 388, 395, 399, 409, 416, 429, 467, 536, 646, 965, 1000),
    ),
    LengthClass(
        share=0.178,
        prompt=(1400, 1416, 1529, 1689, 2001, 2319, 2593, 3366, 4076, 4082, 4088, 4101, 4152, 5776, 7165, 14050),
        output=(15, 27, 33, 38, 46, 52, 62, 72, 83, 96, 111, 137, 160, 335, 594, 757),
    ),
)

# Means of ShareGPT's lengths, in tokens, from Figure 11 of Kwon et al. 2023. Of the spread the paper has a picture
# alone: the exponential distribution is the one that assumes no more than the mean.
SHAREGPT_PROMPT, SHAREGPT_OUTPUT = 161.31, 337.99


@dataclass(frozen=True)
class Requests:
    """Lengths in tokens, in order of arrival: prompt i64 [N], output i64 [N], and where they come from."""

    prompt: np.ndarray
    output: np.ndarray
    source: str

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def total(self) -> np.ndarray:
        return self.prompt + self.output

    def cut(self, max_len: int) -> "Requests":
        """No request outgrows max_len: a prompt keeps room for one token, an output ends where the room does."""
        prompt = np.minimum(self.prompt, max_len - 1)
        return Requests(prompt, np.minimum(self.output, max_len - prompt), self.source)


def read_trace(path: Path, count: int | None) -> Requests:
    """The first `count` requests of a CSV file with the columns ContextTokens and GeneratedTokens."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"--trace: {path} has no column {missing[0]}; it needs {' and '.join(COLUMNS)}")
            rows = [[_length(path, reader.line_num, name, row[name]) for name in COLUMNS] for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"--trace: {path} cannot be read as CSV: {error}") from error
    if not rows:
        raise ValueError(f"--trace: {path} has no requests")
    prompt, output = np.array(rows[:count], dtype=np.int64).T
    return Requests(prompt, output, path.name)


def _length(path: Path, line: int, column: str, text: str | None) -> int:
    if text is None or not is_positive(text.strip()):
        raise ValueError(f"--trace: {path}, line {line}: {column} is {text!r}, must be an integer from 1 to 999999999")
    return int(text)


def azure_lengths(count: int, rng: np.random.Generator) -> Requests:
    kind = rng.choice(len(AZURE), count, p=[one.share for one in AZURE])

    def draw(quantiles: list[tuple[int, ...]]) -> np.ndarray:
        level = rng.random(count)
        values = np.stack([np.exp(np.interp(level, LEVELS, np.log(one))) for one in quantiles])
        return np.rint(values[kind, np.arange(count)]).astype(np.int64)

    source = "lengths fitted to the Azure conversation trace (Patel et al., Splitwise, ISCA 2024; CC-BY 4.0)"
    return Requests(draw([one.prompt for one in AZURE]), draw([one.output for one in AZURE]), source)


def sharegpt_lengths(count: int, rng: np.random.Generator) -> Requests:
    def draw(mean: float) -> np.ndarray:
        return np.maximum(np.rint(rng.exponential(mean, count)), 1).astype(np.int64)

    source = "exponential lengths with ShareGPT's means (Kwon et al., PagedAttention, SOSP 2023)"
    return Requests(draw(SHAREGPT_PROMPT), draw(SHAREGPT_OUTPUT), source)


LENGTHS = {"azure": azure_lengths, "sharegpt": sharegpt_lengths}


def is_positive(text: str) -> bool:
    return text.isdecimal() and 0 < int(text[:10]) < 10**9
