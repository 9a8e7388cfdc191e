"""Engine: many requests through one store, as they come. The host plans, the device loops.

    step: plan -> edits and a loop are enqueued -> the loop before is looked at, while this one runs

The host is always one loop late. Where that matters (a row found no page), it waits for what is under way first.
"""

import os
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

from paxattn import checks
from paxattn.engine import memory, program_file, records
from paxattn.engine.config import EngineConfig
from paxattn.engine.edits import Admission, row_of
from paxattn.engine.generate import Generation, Model, check_prompts
from paxattn.engine.interrupts import postponed
from paxattn.engine.meter import Meter
from paxattn.engine.params import GenerationParams, Limits
from paxattn.engine.programs import Programs
from paxattn.engine.records import Job, Stats, TokenLogprob, Update
from paxattn.engine.scheduler import Plan, Request, Scheduler
from paxattn.engine.slots import REASONS, RUNNING, News, Slots
from paxattn.kv.prefix import PrefixIndex
from paxattn.kv.swap import swap_in, swap_out


@dataclass(frozen=True)
class _Flight:
    """A loop that was enqueued and not looked at yet: what it tells, who had which row, and what it may do at most."""

    news: Any
    rows: dict[int, Request]
    steps: int
    fed: int
    start: float


class _Drawn(NamedTuple):
    """What a loop drew for a request, and why it ended there; its row is settled, and nobody has been told."""

    request: Request
    ids: list[int]
    reason: str | None
    logprobs: list[TokenLogprob] | None


class Engine:
    """Continuous batching of requests (Orca, Yu et al. 2022) over a paged store.

    Args:
      model, params: see `Model`.
      config: EngineConfig
      detokenize: token ids to text, for stop strings.

    Raises:
      ValueError: a value of config is out of range; the message names it.
    """

    def __init__(
        self,
        model: Model,
        params: Any,
        config: EngineConfig | None = None,
        *,
        detokenize: Callable[[list[int]], str] | None = None,
    ):
        config = EngineConfig() if config is None else config
        checks.require(isinstance(config, EngineConfig), "config", repr(config), "an EngineConfig or None")
        config.check()
        layout = memory.layout(model, params)
        told, most = config.max_logprobs, layout.vocabulary
        checks.require(told <= most, "max_logprobs", told, f"at most the {most} tokens of the vocabulary")
        if layout.window is not None:
            config = replace(config, prefix_cache=False)
        self.model, self.params, self.config, self.detokenize = model, params, config, detokenize
        self._layout = layout
        texts = detokenize is not None
        self._limits = Limits(layout.vocabulary, config.max_stop_ids, config.max_logit_bias, config.max_logprobs, texts)
        self._programs = Programs(model, config)
        workspace = lambda: self._programs.workspace(params, jax.eval_shape(lambda: self._create(1)))
        self.num_pages = memory.num_pages(layout, config, workspace)
        self._slots = self._new_slots()
        index = PrefixIndex(config.page_size) if config.prefix_cache else None
        self._scheduler = Scheduler(
            num_pages=self.num_pages,
            page_size=config.page_size,
            max_seqs=config.max_seqs,
            max_len=config.max_len,
            index=index,
            patience=config.patience,
            reserve=self.num_pages // 100,
            window=layout.window,
        )
        self._flights: deque[_Flight] = deque()
        self._live: dict[int, list[Request]] = {}
        self._untold: deque[_Drawn] = deque()
        self._unclaimed: list[Update] = []
        self._next_id = 0
        self._settle = False
        self._pump: Any = None
        self._meter = Meter(self.num_pages)
        self._tokens = 0
        self._failure: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return self._scheduler.busy or bool(self._flights or self._untold or self._unclaimed)

    def warmup(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compile everything that any request may need, and run it once; nothing is compiled afterwards.

        Args:
          progress: called with how many programs are ready, of how many.
        """
        self._take_over(self._programs.compile(self.params, self._slots, progress))

    def export(self, path: str | os.PathLike) -> None:
        """Write what `warmup` has compiled to a file, from which `restore` takes it instead.

        Raises:
          ValueError: there was no `warmup`, or its programs cannot be written any more; the message says what to do.
        """
        checks.require(bool(self._programs.compiled), "export", "an engine without programs", "one after warmup")
        self._programs.save(Path(path), self.params, self._slots)

    def restore(self, path: str | os.PathLike) -> None:
        """Instead of `warmup`: take the programs that the same engine has exported on such a device.

        Nothing is traced. What swapping takes is compiled all the same. Like any program, the file can do what it
        likes with this process: take none from strangers. Where they do not run, the engine is as it was before, but
        for the prefixes it knew.

        Raises:
          ValueError: they are programs of another model, config, device or version, or damaged, or the engine is busy;
            the message says which.
        """
        checks.require(not self.busy, "restore", "an engine with steps to take", "one that is not busy")
        loaded = self._programs.load(Path(path), self.params, self._slots)
        with program_file.readable(Path(path)):
            self._take_over(loaded)

    def add_request(self, prompt: Sequence[int], params: GenerationParams | None = None) -> int:
        """Let a prompt wait for its turn; its id, for `cancel` and in what `step` tells.

        Raises:
          TooLongError: it could never run in this engine.
          InvalidParamsError: a value of params is out of range.
          ValueError: prompt is not a sequence of token ids.
        """
        self._check_whole()
        params = GenerationParams() if params is None else params
        samples = records.samples(self._next_id, prompt, params, self._limits, self._slots.rules)
        # What is shorter than a page shares none.
        if len(samples[0].prompt) > self.config.page_size:
            samples[0].twins = samples[1:]
        else:
            self._scheduler.check(samples[0])
        number = self._next_id
        with postponed():
            for one in samples[: 1 if samples[0].twins else None]:
                self._scheduler.add(one)
            self._next_id += 1
            self._live[number] = samples
        return number

    def cancel(self, number: int) -> None:
        """End a request; its pages go back before the next loop. Nothing more is told of it.

        Raises:
          UnknownRequestError: there is none of that id, or it has ended.
        """
        checks.require(checks.is_int(number), "number", repr(number), "an id that add_request gave")
        if number not in self._live:
            raise UnknownRequestError(f"number: got {number!r}, must be the id of a request that has not ended")
        with postponed():
            for one in self._live.pop(number):
                if one.ended is None:
                    self._scheduler.cancel(one)
                    one.options.reason = "cancelled"
            self._untold = deque(drawn for drawn in self._untold if drawn.request.options.id != number)
            self._unclaimed = [update for update in self._unclaimed if update.id != number]

    def step(self) -> list[Update]:
        """Enqueue the next loop, and tell what the one before has drawn: an Update for each sample that got tokens.

        What `detokenize` raises comes out here, and ends the request that it was called for; others go on.

        Raises:
          BrokenEngineError: an earlier step has failed.
        """
        with postponed():
            if self._settle:
                with self._whole():
                    self._collect(0)
                    self._settle = False
                self._tell()
            with self._whole():
                more = self._scheduler.busy
                if more:
                    self._launch()
                self._collect(int(more))
            self._tell()
        return self._claim()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: GenerationParams | Sequence[GenerationParams] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Generation]:
        """Continue every prompt, and wait for all of them.

        Args:
          prompts: token ids.
          params: of all, or one for each.
          progress: called with how many samples are done, of how many.

        Returns:
          A Generation for each sample; those of one prompt after each other. The reason of those that `progress` has
          cancelled is "cancelled".

        Raises:
          ValueError: see add_request; nothing runs then.
        """
        check_prompts(prompts)
        each = list(params) if isinstance(params, Sequence) else [params] * len(prompts)
        checks.require(len(each) == len(prompts), "params", f"{len(each)} of them", f"one, or {len(prompts)}")
        with postponed() as let_interrupt_in:
            jobs = self._run_through(prompts, each, progress, let_interrupt_in)
        return [Generation(job.ids, job.reason, job.logprobs) for job in jobs]

    def _run_through(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[GenerationParams | None],
        progress: Callable[[int, int], None] | None,
        between: Callable[[], None],
    ) -> list[Job]:
        """The samples of all prompts, each ended; `between` is called after each step."""
        numbers: list[int] = []
        jobs: list[Job] = []
        others: list[Update] = []
        try:
            for prompt, one in zip(prompts, params, strict=True):
                numbers.append(self.add_request(prompt, one))
                jobs += [request.options for request in self._live[numbers[-1]]]
            mine = set(numbers)
            while not mine.isdisjoint(self._live):
                others += [update for update in self.step() if update.id not in mine]
                if progress is not None:
                    progress(sum(job.reason != "running" for job in jobs), len(jobs))
                between()
        finally:
            self._unclaimed += others
            for number in numbers:
                if number in self._live:
                    self.cancel(number)
        return jobs

    def stream(self, prompt: Sequence[int], params: GenerationParams | None = None) -> AsyncGenerator[Update]:
        """Updates of one request as they come, for `async for`; to leave the loop cancels the request.

        Any number of streams may run in one event loop; `step` must not be called besides.
        """
        # Here, as asyncio would make up a quarter of what importing the library takes.
        from paxattn.engine.streaming import Pump

        if self._pump is None or not self._pump.here:
            self._pump = Pump(self)
        return self._pump.stream(prompt, params)

    def drain(self) -> list[Update]:
        """Wait for what is under way, so that the store is at rest; the Updates that came of it."""
        with postponed():
            with self._whole():
                self._collect(0)
            self._tell()
        return self._claim()

    def stats(self) -> Stats:
        """As last told by the device, and since the engine was made."""
        scheduler = self._scheduler
        return replace(
            self._meter.stats,
            tokens=self._tokens,
            num_cached=scheduler.cached,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            preempted=scheduler.num_preempted,
        )

    def _new_slots(self) -> Slots:
        # Bound to its device from the start, as what comes back from a swap is: jit tells the two kinds apart.
        device = next(iter(jax.tree.leaves(self.params)[0].devices()))
        return jax.device_put(self._create(self.num_pages), device)

    def _create(self, num_pages: int) -> Slots:
        config = self.config
        return Slots.create(self._layout.store(config, num_pages), config.max_stop_ids, config.max_logit_bias)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What must run to its end: whatever stops it is told ever after."""
        self._check_whole()
        try:
            yield
        except BaseException as error:
            self._failure = error
            raise

    def _check_whole(self) -> None:
        if self._failure is not None:
            raise BrokenEngineError("engine: a step has failed halfway, make another engine") from self._failure

    def _launch(self) -> None:
        width = self.config.shapes[0].width
        ahead = sum(flight.steps for flight in self._flights) * width
        plan = self._scheduler.plan(ahead, self.config.decode_steps * width)
        self._carry_out(plan)
        running = dict(self._scheduler.running)
        lacking = [one.known - one.stored for one in running.values()]
        shape, steps, fed = self._programs.choose(lacking, sum(flight.fed for flight in self._flights))
        idle = self.config.max_seqs - (len(running) if self._scheduler.waiting else 0)
        under_way, start = not all(flight.news.steps.is_ready() for flight in self._flights), time.perf_counter()
        self._slots, news = self._programs.loop(shape, self.params, self._slots, steps, idle)
        self._meter.launch(start, under_way)
        with jax.transfer_guard_device_to_host("allow"):  # Of this copy a user who forbids them knows nothing.
            for x in jax.tree.leaves(news):
                x.copy_to_host_async()
        self._flights.append(_Flight(news, running, steps, fed, start))

    def _carry_out(self, plan: Plan) -> None:
        if self.config.preemption == "swap":
            for request, row in plan.preempted:
                kv, request.swapped = swap_out(self._slots.kv, row)
                self._slots = replace(self._slots, kv=kv)
        drop = plan.dropped + [row for _, row in plan.preempted]
        returning = [request for request, _ in plan.admitted if request.swapped is not None]
        if returning:
            self._slots = self._programs.edit(self._slots, drop, plan.let_go, [])
            for request in returning:
                self._bring_back(request)
            drop, plan.let_go = [], []
        if drop or plan.let_go or plan.admitted:
            admitted = [Admission.of(request, pages) for request, pages in plan.admitted]
            self._slots = self._programs.edit(self._slots, drop, plan.let_go, admitted)
        if plan.forks:
            self._slots = self._programs.fork(self._slots, plan.forks)

    def _bring_back(self, request: Request) -> None:
        kv, fits = swap_in(self._slots.kv, request.swapped, row_of(request))
        self._slots = replace(self._slots, kv=kv)
        # Where it does not fit, the row is empty, and what it held is computed again.
        request.stored = request.swapped.length if fits else 0
        request.swapped = None

    def _collect(self, keep: int) -> None:
        """Look at the loops under way, oldest first, until only `keep` are left."""
        while len(self._flights) > keep:
            flight = self._flights.popleft()
            waited = not flight.news.steps.is_ready()
            news = jax.device_get(flight.news)
            self._meter.land(flight.start, waited, news)
            self._scheduler.report(int(news.num_free))
            self._settle = bool(news.stalled)
            self._digest(flight, news)
        # Pages that are yet to be let go keep nobody waiting.
        if not (self._flights or self._scheduler.running or self._scheduler.waiting):
            self._meter.rest()

    def _digest(self, flight: _Flight, news: News) -> None:
        """Bring all rows up to date, before anybody is told: `detokenize` may raise."""
        drawn = news.tokens[: news.steps].swapaxes(0, 1).reshape(self.config.max_seqs, -1)
        for row, request in flight.rows.items():
            if request.row != row or request.ended is not None:
                self._offer(None, row, news)
                continue
            ids = [token for token in drawn[row].tolist() if token >= 0]
            request.output += ids
            request.stored = int(news.lens[row])
            self._offer(request, row, news)
            reason = REASONS[news.state[row]] if news.state[row] > RUNNING else None
            if reason is not None:
                self._scheduler.end(request, reason)
            logprobs = records.token_logprobs(news, row, request.options.params.logprobs)
            self._untold.append(_Drawn(request, ids, reason, logprobs))

    def _tell(self) -> None:
        """Make Updates of what was drawn. One is left aside only where it raises, and ends its request."""
        while self._untold:
            request, ids, reason, logprobs = self._untold.popleft()
            try:
                update = records.tell(request, ids, reason, self.detokenize, logprobs)
            except BaseException:
                self._end(request, "failed")
                raise
            self._tokens += len(update.ids)
            if update.ids or update.reason is not None:
                self._unclaimed.append(update)
            if update.reason is not None:
                self._end(request, update.reason)

    def _claim(self) -> list[Update]:
        updates, self._unclaimed = self._unclaimed, []
        return updates

    def _end(self, request: Request, reason: str) -> None:
        """A request that was told all it gets, whether the device has ended it or goes on with it."""
        if request.ended is None:
            self._scheduler.cancel(request, reason)
        request.options.reason = reason
        number = request.options.id
        if all(one.ended is not None for one in self._live.get(number, ())):
            self._live.pop(number, None)

    def _offer(self, request: Request | None, row: int, news: News) -> None:
        for count in (int(news.begun[row]), int(news.ended[row])):
            if count:
                tokens = request.tokens[: count * self.config.page_size] if request is not None else []
                self._scheduler.offer(request, tokens, news.pages[row, :count].tolist())

    def _take_over(self, made: Programs) -> None:
        """Use these programs from now on, if they run."""
        if not self.busy:
            try:
                self._slots = made.rehearse(self.params, self._slots)
            except BaseException:
                # The pages were given to a program that did not give them back.
                self._slots = self._new_slots()
                self._scheduler.forget_prefixes()
                raise
        self._programs = made


class BrokenEngineError(RuntimeError):
    """A step has failed halfway, for the reason that is its cause: nobody knows any more who has which pages."""


class UnknownRequestError(LookupError):
    """No request of that id is waiting or running."""
