"""A workload through an engine, with the time of every token and of the memory."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paxattn import Engine, GenerationParams
from scripts.serving.workloads import Workload


@dataclass
class Run:
    """Seconds from the start: of each request's arrival and tokens; `spaces` between tokens.

    Tokens come in groups, a loop's at once. A space is the time since the last group, over the tokens of this one.
    `drawn` are the tokens themselves, by the number of the request.
    """

    seconds: float = 0.0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    spaces: list[float] = field(default_factory=list)
    memory: list[tuple[float, ...]] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    drawn: dict[int, list[int]] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    def told(self) -> dict[str, Any]:
        def percentiles(values: list[float]) -> dict[str, float]:
            return {f"p{p}": float(np.percentile(values, p)) * 1e3 for p in (50, 90, 99)} if values else {}

        return dict(
            output_tokens_per_s=self.rate,
            seconds=self.seconds,
            tokens=self.tokens,
            first_token_ms=percentiles(self.first),
            between_tokens_ms=percentiles(self.spaces),
            **self.about,
        )


def serve(engine: Engine, work: Workload, vocab_size: int, seed: int, said: Callable[[int, int], None]) -> Run:
    """Requests are added when they arrive; their outputs are as long as asked for."""
    prompts = work.prompts(vocab_size, seed)
    run, before = Run(), engine.stats()
    arrived: dict[int, float] = {}
    last: dict[int, float] = {}
    done, start = 0, time.perf_counter()
    while done < len(work):
        now = time.perf_counter() - start
        while len(arrived) < len(work) and work.arrival[len(arrived)] <= now:
            at = len(arrived)
            how = GenerationParams(max_new_tokens=int(work.output[at]))
            arrived[engine.add_request(prompts[at], how)] = float(work.arrival[at])
        if not engine.busy:
            time.sleep(max(0.0, float(work.arrival[len(arrived)]) - now))
            continue
        updates = engine.step()
        now = time.perf_counter() - start
        for update in updates:
            count = len(update.ids)
            run.tokens += count
            run.drawn.setdefault(update.id, []).extend(update.ids)
            if update.id not in last:
                run.first.append(now - arrived[update.id])
            elif count:
                run.spaces += [(now - last[update.id]) / count] * count
            last[update.id] = now
            done += update.reason is not None
        told = engine.stats()
        run.memory.append(
            (now, told.num_pages - told.num_free - told.num_cached, told.num_cached, told.running, told.stored)
        )
        said(done, len(work))
    run.seconds = time.perf_counter() - start
    engine.drain()
    run.about = about(engine, before)
    _, used, _, _, stored = np.array(run.memory).T
    run.about["page_waste"] = 1 - float(stored.sum() / (used.sum() * engine.config.page_size))
    return run


def about(engine: Engine, before: Any) -> dict[str, Any]:
    after = engine.stats()
    steps, busy = after.steps - before.steps, after.seconds - before.seconds
    return dict(
        steps=steps,
        step_ms=busy / max(steps, 1) * 1e3,
        host_gap=(after.host_gap - before.host_gap) / max(busy, 1e-9),
        preempted=after.preempted - before.preempted,
        num_pages=after.num_pages,
    )
