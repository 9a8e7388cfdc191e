"""How the memory of a KV cache is managed, and what that is worth. NumPy alone; no model is run.

python scripts/simulate_paging.py --steps                                # page tables, step by step
python scripts/simulate_paging.py --lengths sharegpt --png paging.png    # the paper's setting, five schemes
python scripts/simulate_paging.py --trace requests.csv --json out.json   # the same on a trace of your own

All requests wait from the start and are admitted first come, first served, as soon as memory allows; every running
request gains one token a step. Five ways to give them memory are compared:

  max        one stretch of --max-len tokens each, whatever the request will need
  pow2       one stretch for the prompt and the next power of two of the output
  oracle     one stretch of the true length, as if it were known
  blockwise  a fixed row of --max-len tokens in blocks of 128, as in paxattn.BlockwiseKV
  paged      pages of --page-size tokens, taken as the request grows; where none is left, the latest request
             gives way and is computed again later

max, pow2 and oracle take their stretch from a real allocator over one range of addresses (--allocator). They follow
Orca (Max), (Pow2) and (Oracle) of Kwon et al., "Efficient Memory Management for Large Language Model Serving with
PagedAttention", SOSP 2023; paged follows vLLM.

At each step a token of memory is in one of five states:

  used       it holds a key and a value
  reserved   its request will fill it later
  internal   it belongs to a request that will never fill it
  external   free, and all that is free would do for the next request, but it lies in pieces
  free       free, and too little for the next request (paged admits none into the last 1% of the pages)

Effective use is used / memory, the mean over the steps in which a request waits.
"""

import argparse
import csv
import heapq
import importlib.util
import json
import time
from bisect import bisect
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

STATES = ("used", "reserved", "internal", "external", "free")
COLOURS = ("#2a9d55", "#8ecae6", "#e76f51", "#6d597a", "#d9d9d9")

NAMES = "ABCDE"  # of the requests in the example
BLOCK = 128  # tokens, the default of paxattn.BlockwiseKV
PAPER_MEMORY = 15728  # tokens: 12 GiB at the 800 KiB a token of OPT-13B in float16 (Table 1: 15.7K)

WATERMARK = 0.01  # of the pages stay free at an admission, so that it does not cost a preemption soon; vLLM's default

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


class Allocator(Protocol):
    """Stretches of one range of addresses. `free` counts the tokens that nobody has."""

    free: int

    def __init__(self, memory: int) -> None: ...
    def rounded(self, size: int) -> int:
        """What a stretch of `size` really takes."""
        ...

    def take(self, size: int) -> int | None:
        """The start of a stretch, or None where no hole is long enough."""
        ...

    def give(self, start: int, size: int) -> None: ...


class FirstFit:
    """The lowest hole that is long enough; neighbouring holes merge."""

    def __init__(self, memory: int) -> None:
        self.free = memory
        self.holes = [(0, memory)]  # (start, length), by address

    def rounded(self, size: int) -> int:
        return size

    def take(self, size: int) -> int | None:
        for i, (start, length) in enumerate(self.holes):
            if length >= size:
                self.holes[i : i + 1] = [(start + size, length - size)] if length > size else []
                self.free -= size
                return start
        return None

    def give(self, start: int, size: int) -> None:
        self.free += size
        i = bisect(self.holes, (start, 0))
        end = start + size
        first = i
        if i > 0 and sum(self.holes[i - 1]) == start:
            first, start = i - 1, self.holes[i - 1][0]
        if i < len(self.holes) and self.holes[i][0] == end:
            end = sum(self.holes[i])
            i += 1
        self.holes[first:i] = [(start, end - start)]


class Buddy:
    """Powers of two, split in halves on demand; two free halves merge (Knuth 1997, section 2.5). Orca's, in the paper.

    A range that is no power of two starts as the blocks of its binary digits, the largest first.
    """

    def __init__(self, memory: int) -> None:
        self.free = memory
        self.blocks: dict[int, set[int]] = {1 << bit: set() for bit in range(memory.bit_length())}
        start = 0
        for size in reversed(self.blocks):
            if memory & size:
                self.blocks[size].add(start)
                start += size

    def rounded(self, size: int) -> int:
        return next_power_of_two(size)

    def take(self, size: int) -> int | None:
        want = self.rounded(size)
        have = want
        while have in self.blocks and not self.blocks[have]:
            have *= 2
        if have not in self.blocks:
            return None
        start = min(self.blocks[have])
        self.blocks[have].remove(start)
        while have > want:
            have //= 2
            self.blocks[have].add(start + have)
        self.free -= want
        return start

    def give(self, start: int, size: int) -> None:
        size = self.rounded(size)
        self.free += size
        while start ^ size in self.blocks[size]:
            self.blocks[size].remove(start ^ size)
            start &= ~size
            size *= 2
        self.blocks[size].add(start)


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


ALLOCATORS: dict[str, type[Allocator]] = {"buddy": Buddy, "first-fit": FirstFit}


class PagePool:
    """Pages of P tokens with an owner count; rows grow, are released and share. The host's twin of paxattn.PageTable.

    Pages are taken and given back in PageTable's order, so that the two may be compared page by page.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.free = list(range(num_pages))[::-1]
        self.owners = [0] * num_pages
        self.rows: dict[int, list[int]] = {}
        self.lens: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        return len(self.free)

    def pages(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def reserve(self, row: int, tokens: int) -> bool:
        """Grow a row to hold `tokens`; False, and nothing is changed, where too few pages are left."""
        need = self.pages(tokens) - len(self.rows.get(row, ()))
        if need > self.num_free:
            return False
        self.rows.setdefault(row, []).extend(self._take() for _ in range(need))
        self.lens[row] = tokens
        return True

    def release(self, rows: Iterable[int]) -> None:
        """Drop rows; a page is free when its last owner lets go."""
        freed = []
        for row in rows:
            del self.lens[row]
            for page in self.rows.pop(row):
                self.owners[page] -= 1
                if not self.owners[page]:
                    freed.append(page)
        self.free += sorted(freed)

    def fork(self, src: int, dst: int) -> list[tuple[int, int]] | None:
        """The new row dst shares src's pages. A partly filled last page, which both would write, is copied.

        Returns the copies (from, to), none or one of them; None where there is no page for it.
        """
        row, partial = self.rows[src], self.lens[src] % self.page_size != 0
        if partial and not self.free:
            return None
        self._share(row[: len(row) - partial], dst)
        self.lens[dst] = self.lens[src]
        if not partial:
            return []
        self.rows[dst].append(self._take())
        return [(row[-1], self.rows[dst][-1])]

    def share_prefix(self, src: int, dst: int, tokens: int) -> int:
        """The new row dst starts with src's first tokens, as far as they fill whole pages: how many these are."""
        shared = self.rows[src][: tokens // self.page_size]
        self._share(shared, dst)
        self.lens[dst] = len(shared) * self.page_size
        return self.lens[dst]

    def _take(self) -> int:
        page = self.free.pop()
        self.owners[page] = 1
        return page

    def _share(self, pages: list[int], dst: int) -> None:
        self.rows[dst] = list(pages)
        for page in pages:
            self.owners[page] += 1


@dataclass(frozen=True)
class Timeline:
    """What memory held after each of S steps.

    Fields:
      states: i64 [S,5], tokens in each of STATES.
      running, waiting: i64 [S], requests.
      preempted: how often a request gave way.
      recomputed: tokens whose keys and values were computed again for it.
    """

    states: np.ndarray
    running: np.ndarray
    waiting: np.ndarray
    preempted: int = 0
    recomputed: int = 0

    @classmethod
    def of(cls, pieces: list[np.ndarray], preempted: int = 0, recomputed: int = 0) -> "Timeline":
        """From arrays [steps, 7] of the states, running and waiting, one after another in time."""
        table = np.concatenate(pieces)
        return cls(table[:, :5], table[:, 5], table[:, 6], preempted, recomputed)

    @property
    def pressed(self) -> np.ndarray:
        """bool [S], the steps that count: a request waits. All of them where none ever did."""
        waits = self.waiting > 0
        return waits if waits.any() else ~waits

    def shares(self) -> dict[str, float]:
        """The mean share of memory in each state, under pressure."""
        means = self.states[self.pressed].mean(axis=0)
        return dict(zip(STATES, (means / means.sum()).tolist(), strict=True))

    def figures(self) -> dict[str, float]:
        """Shares of memory, used over what has an owner, mean of the requests running, steps, preemptions."""
        shares = self.shares()
        return dict(
            effective_use=shares["used"],
            **shares,
            used_of_owned=shares["used"] / (shares["used"] + shares["reserved"] + shares["internal"]),
            running=float(self.running[self.pressed].mean()),
            steps=len(self.running),
            preempted=self.preempted,
            recomputed=self.recomputed,
        )


def simulate_contiguous(requests: Requests, sizes: np.ndarray, allocator: Allocator) -> Timeline:
    """Each request has one stretch of sizes[i] tokens from its admission to its end.

    Nothing but the count of tokens changes between one request's end and the next, so time runs in such intervals.
    """
    prompt, output, total = requests.prompt.tolist(), requests.output.tolist(), requests.total.tolist()
    stretches = sizes.tolist()
    running: list[tuple[int, int, int]] = []  # a heap of (step of the end, request, address)
    now = head = used = reserved = internal = 0
    pieces = []
    while head < len(requests) or running:
        while running and running[0][0] == now:
            _, i, start = heapq.heappop(running)
            allocator.give(start, stretches[i])
            used -= total[i]
            internal -= allocator.rounded(stretches[i]) - total[i]
        while head < len(requests) and (address := allocator.take(stretches[head])) is not None:
            heapq.heappush(running, (now + output[head], head, address))
            used += prompt[head]
            reserved += output[head]
            internal += allocator.rounded(stretches[head]) - total[head]
            head += 1
        if not running:
            break
        waiting = len(requests) - head
        in_pieces = waiting > 0 and allocator.rounded(stretches[head]) <= allocator.free
        external, free = (allocator.free, 0) if in_pieces else (0, allocator.free)
        steps = running[0][0] - now
        grown = np.arange(1, steps + 1) * len(running)
        piece = np.empty((steps, 7), np.int64)
        piece[:] = used, reserved, internal, external, free, len(running), waiting
        piece[:, 0] += grown
        piece[:, 1] -= grown
        pieces.append(piece)
        used, reserved, now = used + int(grown[-1]), reserved - int(grown[-1]), now + steps
    return Timeline.of(pieces)


def simulate_paged(requests: Requests, pool: PagePool, memory: int, stride: int | None = None) -> Timeline:
    """Requests take pages as they grow.

    As in vLLM, running requests are served before waiting ones, and where one finds no page the latest gives way: it
    loses its pages, goes to the head of the queue and has its keys and values computed again when it is back.

    Time runs in intervals in which no request ends and no page is missing, of at most `stride` steps.
    """
    total = requests.total
    held = requests.prompt.copy()  # tokens that a request starts with: more than its prompt after a preemption
    waiting = deque(range(len(requests)))
    running: list[int] = []  # in order of arrival: the last is the latest
    preempted = recomputed = 0
    pieces = []
    while waiting or running:
        done = [i for i in running if pool.lens[i] == total[i]]
        pool.release(done)
        running = [i for i in running if i not in done]

        need = [pool.pages(pool.lens[i] + 1) - len(pool.rows[i]) for i in running]
        fits = sum(need) <= pool.num_free
        while sum(need) > pool.num_free:
            need.pop()
            victim = running.pop()
            held[victim] = pool.lens[victim]
            pool.release([victim])
            waiting.appendleft(victim)
            preempted += 1
            recomputed += int(held[victim])
        # A request that gave way must not come back in the same step, or it would give way again.
        kept = int(WATERMARK * len(pool.owners)) if running else 0
        left = pool.num_free - sum(need) - kept
        while fits and waiting and (pages := pool.pages(int(held[waiting[0]]) + 1)) <= left:
            running.append(waiting.popleft())
            pool.reserve(running[-1], int(held[running[-1]]))
            left -= pages

        if not running:
            break
        piece = _grow(pool, running, total[running], memory, len(waiting), stride)
        pieces.append(piece)
        for i in running:
            pool.reserve(i, pool.lens[i] + len(piece))
    return Timeline.of(pieces, preempted, recomputed)


def _grow(
    pool: PagePool, running: list[int], total: np.ndarray, memory: int, waiting: int, stride: int | None
) -> np.ndarray:
    """The steps until a request ends or pages run out: [steps, 7], as in Timeline.of."""
    lens = np.array([pool.lens[i] for i in running])
    steps = int((total - lens).min())
    tokens = lens + np.arange(1, min(steps, stride or steps) + 1)[:, None]
    pages = -(-tokens // pool.page_size)
    owned = sum(len(pool.rows[i]) for i in running)
    enough = int(np.searchsorted(pages.sum(axis=1) - owned, pool.num_free, side="right"))
    tokens, room = tokens[:enough], pages[:enough] * pool.page_size
    will = np.minimum(room, total)
    piece = np.zeros((enough, 7), np.int64)
    piece[:, 0] = tokens.sum(axis=1)
    piece[:, 1] = (will - tokens).sum(axis=1)
    piece[:, 2] = (room - will).sum(axis=1)
    piece[:, 4] = memory - room.sum(axis=1)
    piece[:, 5:] = len(running), waiting
    return piece


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
    """A timeline for each scheme, on the same requests. Requests must fit setting.max_len."""
    done = {}
    for name, sizes in stretches(requests, setting.max_len).items():
        # Rows of one size, first fit, are fixed rows.
        kind = FirstFit if name == "blockwise" else ALLOCATORS[setting.allocator]
        largest = int(sizes.max())
        if kind(setting.memory).take(largest) is None:
            least = kind(setting.memory).rounded(largest)
            raise ValueError(f"--memory: got {setting.memory} tokens, {name} needs {least} for one request")
        done[name] = simulate_contiguous(requests, sizes, kind(setting.memory))
    pool = PagePool(setting.memory // setting.page_size, setting.page_size)
    if pool.pages(int(requests.total.max())) > pool.num_free:
        raise ValueError(f"--memory: got {setting.memory} tokens, too few pages for the longest request")
    done["paged"] = simulate_paged(requests, pool, setting.memory)
    return done


def report(timelines: dict[str, Timeline]) -> None:
    columns = ("of memory:", *STATES, "used of owned", "running", "steps", "preempted")
    print(("{:10}" + "{:>10}" * 5 + "{:>15}{:>9}{:>9}{:>11}").format(*columns))
    for name, timeline in timelines.items():
        figures = timeline.figures()
        print(
            f"{name:10}"
            + "".join(f"{figures[state]:10.1%}" for state in STATES)
            + f"{figures['used_of_owned']:15.1%}{figures['running']:9.1f}"
            + f"{figures['steps']:9}{figures['preempted']:11}"
        )
    if not any(timeline.waiting.any() for timeline in timelines.values()):
        print("No request ever waited: this memory holds them all at once, and the figures say little.")


def draw(timelines: dict[str, Timeline], title: str, path: Path) -> None:
    """Where memory goes, as Figure 2 of Kwon et al. 2023, and requests running and effective use over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    figure.suptitle(title, fontsize=10)
    bars, running, use = (axes := figure.subplot_mosaic("ab;ac", width_ratios=[1.15, 1])).values()
    bottom = np.zeros(len(timelines))
    shares = [timeline.shares() for timeline in timelines.values()]
    for state, colour in zip(STATES, COLOURS, strict=True):
        heights = np.array([100 * share[state] for share in shares])
        drawn = bars.bar(list(timelines), heights, bottom=bottom, label=state, color=colour)
        bars.bar_label(drawn, [f"{h:.1f}" if h > 2.5 else "" for h in heights], label_type="center", fontsize=8)
        bottom += heights
    bars.set(ylabel="share of KV memory, %", ylim=(0, 100))
    bars.legend(ncols=len(STATES), loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False, fontsize=8)
    for name, timeline in timelines.items():
        at, live = binned(timeline.running)
        running.plot(at, live, label=name, linewidth=1, linestyle="--" if name == "blockwise" else "-")
        at, used = binned(100 * timeline.states[:, 0] / timeline.states[0].sum())
        use.plot(at, used, linewidth=1, linestyle="--" if name == "blockwise" else "-")
    running.set(ylabel="requests running", ylim=(0, None))
    running.legend(fontsize=8, frameon=False)
    use.set(ylabel="effective use, %", xlabel="step (one token for each running request)", ylim=(0, 100))
    for one in axes.values():
        one.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def binned(values: np.ndarray, bins: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Means over equal stretches of time: (their middles, the means)."""
    edges = np.unique(np.linspace(0, len(values), bins + 1).astype(int))
    return (edges[:-1] + edges[1:]) / 2, np.add.reduceat(values, edges[:-1]) / np.diff(edges)


class Tour:
    """A handful of requests in a small pool, told step by step."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.pool = PagePool(num_pages, page_size)
        self.told = 0
        print(f"{num_pages} pages of {page_size} tokens")

    def tell(self, what: str) -> None:
        pool = self.pool
        self.told += 1
        print(f"\n{self.told}. {what}")
        for row, pages in sorted(pool.rows.items()):
            print(f"     {NAMES[row]}  {pool.lens[row]:2} tokens  pages {' '.join(map(str, pages))}")
        print(f"     free: {' '.join(map(str, sorted(pool.free))) or 'none'}")
        shared = [f"{page} ({owners} owners)" for page, owners in enumerate(pool.owners) if owners > 1]
        if shared:
            print(f"     shared: {', '.join(shared)}")

    def admit(self, row: int, tokens: int) -> None:
        need = counted(self.pool.pages(tokens))
        if self.pool.reserve(row, tokens):
            self.tell(f"admit {NAMES[row]}: a prompt of {tokens} tokens takes {need}")
        else:
            self.tell(f"{NAMES[row]} waits: a prompt of {tokens} tokens needs {need}, more than are free")

    def grow(self, row: int, tokens: int) -> None:
        before = len(self.pool.rows[row])
        for _ in range(tokens):
            while not self.pool.reserve(row, self.pool.lens[row] + 1):
                latest = max(self.pool.rows)
                self.pool.release([latest])
                self.tell(f"no page is left for {NAMES[row]}: {NAMES[latest]}, the latest, gives way")
        self.tell(f"{NAMES[row]} grew by {tokens} tokens and took {counted(len(self.pool.rows[row]) - before)}")

    def fork(self, src: int, dst: int) -> None:
        copies = self.pool.fork(src, dst)
        assert copies is not None, "the example has room for this fork"
        shared = counted(len(self.pool.rows[dst]) - len(copies))
        copied = "".join(f"; page {old}, not full, is copied to {new}, as both will write it" for old, new in copies)
        self.tell(f"fork {NAMES[src]} into {NAMES[dst]}: {shared} shared{copied}")

    def admit_with_prefix(self, src: int, dst: int, prefix: int, tokens: int) -> None:
        found = self.pool.share_prefix(src, dst, prefix)
        self.pool.reserve(dst, tokens)
        self.tell(
            f"admit {NAMES[dst]}: {tokens} tokens, the first {prefix} as {NAMES[src]}'s; "
            f"{found} of them fill whole pages, which are shared"
        )

    def finish(self, *rows: int) -> None:
        before = self.pool.num_free
        self.pool.release(rows)
        freed = counted(self.pool.num_free - before)
        self.tell(f"finish {' and '.join(NAMES[row] for row in rows)}: {freed} without an owner, free again")


def counted(pages: int) -> str:
    return f"{pages} page{'s' if pages != 1 else ''}"


def show_steps() -> None:
    tour = Tour(num_pages=10, page_size=4)
    a, b, c, d, e = range(5)
    tour.admit(a, 7)
    tour.admit(b, 5)
    tour.grow(a, 3)
    tour.fork(a, c)
    tour.grow(c, 3)
    tour.admit_with_prefix(a, d, 9, 13)
    tour.admit(e, 11)
    tour.finish(a)
    tour.finish(c)
    tour.admit(e, 11)
    tour.grow(b, 8)
    tour.finish(b, d)
    tour.admit(e, 11)
    tour.finish(e)


def is_positive(text: str) -> bool:
    return text.isdecimal() and 0 < int(text[:10]) < 10**9


def positive(text: str) -> int:
    if not is_positive(text):
        raise argparse.ArgumentTypeError(f"{text!r}: must be an integer from 1 to 999999999")
    return int(text)


def length(text: str) -> int | None:
    """A length that a prompt and an output fit in, or None for the longest request's."""
    if text == "longest":
        return None
    if not is_positive(text) or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r}: must be an integer of at least 2, or longest")
    return int(text)


def seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: must be an integer of at least 0")
    return int(text)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", action="store_true", help="tell a small example step by step, and no more")
    work = parser.add_argument_group("requests")
    source = work.add_mutually_exclusive_group()
    source.add_argument("--trace", type=Path, metavar="FILE", help=f"CSV with the columns {' and '.join(COLUMNS)}")
    source.add_argument("--lengths", choices=LENGTHS, default="azure", help="where there is no trace (%(default)s)")
    work.add_argument("--requests", type=positive, metavar="N", help="how many (all of the trace; 5000 without one)")
    work.add_argument("--seed", type=seed, default=0, help="of the drawn lengths (%(default)s)")
    memory = parser.add_argument_group("memory, in tokens")
    memory.add_argument("--memory", type=positive, default=PAPER_MEMORY, help="%(default)s: OPT-13B on an A100 40GB")
    memory.add_argument(
        "--max-len",
        type=length,
        default=2048,
        metavar="N",
        help="where requests are cut; longest = nowhere (%(default)s)",
    )
    memory.add_argument("--page-size", type=positive, default=16, help="%(default)s")
    memory.add_argument("--allocator", choices=ALLOCATORS, default="buddy", help="of max, pow2, oracle (%(default)s)")
    output = parser.add_argument_group("output")
    output.add_argument("--png", type=Path, metavar="FILE", help="draw it (needs matplotlib)")
    output.add_argument("--json", type=Path, metavar="FILE", help="write the settings and figures")
    return parser


def main() -> None:
    parser = arguments()
    options = parser.parse_args()
    if options.steps:
        show_steps()
        return
    try:
        run(options)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def run(options: argparse.Namespace) -> None:
    for name in ("png", "json"):
        path = getattr(options, name)
        if path and not path.parent.is_dir():
            raise ValueError(f"--{name}: {path.parent} is no folder")
    if options.png and not importlib.util.find_spec("matplotlib"):
        raise ValueError("--png: needs matplotlib, which is not installed")
    if options.trace:
        requests = read_trace(options.trace, options.requests)
    else:
        requests = LENGTHS[options.lengths](options.requests or 5000, np.random.default_rng(options.seed))
    max_len = options.max_len or int(requests.total.max())
    setting = Setting(max_len, options.page_size, options.memory, options.allocator)
    requests = requests.cut(max_len)
    said = (
        f"{len(requests)} requests, {requests.source}\n"
        f"cut at {max_len} tokens: prompt mean {requests.prompt.mean():.0f}, output mean {requests.output.mean():.0f}; "
        f"memory {setting.memory} tokens, pages of {setting.page_size}, {setting.allocator}"
    )
    print(said + "\n")
    start = time.perf_counter()
    timelines = compare(requests, setting)
    report(timelines)
    print(f"\nsimulated in {time.perf_counter() - start:.1f} s")
    if options.json:
        figures = {name: timeline.figures() for name, timeline in timelines.items()}
        about = dict(source=requests.source, requests=len(requests), **asdict(setting))
        options.json.write_text(json.dumps(dict(**about, schemes=figures), indent=1) + "\n", encoding="utf-8")
    if options.png:
        draw(timelines, said, options.png)


if __name__ == "__main__":
    main()
