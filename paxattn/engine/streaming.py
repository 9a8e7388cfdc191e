"""Many async streams over one engine: a task steps it in a thread and hands each request its updates."""

import asyncio
import contextvars
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

from paxattn.engine.engine import UnknownRequestError
from paxattn.engine.params import GenerationParams
from paxattn.engine.records import Update


class Steps(Protocol):
    """What of an engine is needed here."""

    @property
    def busy(self) -> bool: ...

    def add_request(self, prompt: Sequence[int], params: GenerationParams | None) -> int: ...

    def cancel(self, number: int) -> None: ...

    def step(self) -> list[Update]: ...


class Pump:
    """Streams of one event loop. The engine is touched by one of them at a time."""

    def __init__(self, engine: Steps):
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._lock = asyncio.Lock()
        self._queues: dict[int, asyncio.Queue[Update | BaseException]] = {}
        self._task: asyncio.Task[None] | None = None

    @property
    def here(self) -> bool:
        """Whether this is the running event loop's."""
        return self._loop is asyncio.get_running_loop()

    async def stream(self, prompt: Sequence[int], params: GenerationParams | None) -> AsyncGenerator[Update]:
        async with self._lock:
            number = self._engine.add_request(prompt, params)
            queue = self._queues[number] = asyncio.Queue()
        self._start()
        left = 1 if params is None else params.num_samples
        try:
            while left:
                told = await queue.get()
                if isinstance(told, BaseException):
                    raise told
                left -= told.reason is not None
                yield told
        finally:
            del self._queues[number]
            if left:
                await self._cancel(number)

    async def _cancel(self, number: int) -> None:
        async with self._lock:
            # It may have ended, and its last update not have been read.
            with suppress(UnknownRequestError):
                self._engine.cancel(number)
        # Who cancels the pump, as asyncio does at its end, wants no other.
        if self._task is not None and not self._task.cancelled():
            self._start()

    def _start(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
            self._task.add_done_callback(self._end)

    async def _run(self) -> None:
        while self._engine.busy:
            async with self._lock:
                updates = await _in_thread(self._engine.step)
            for update in updates:
                if update.id in self._queues:
                    self._queues[update.id].put_nowait(update)

    def _end(self, task: "asyncio.Task[Any]") -> None:
        """All streams that wait for a task that failed must hear why; the first that does may start another."""
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is not None:
            for queue in self._queues.values():
                queue.put_nowait(error)


async def _in_thread[T](function: Callable[[], T]) -> T:
    """Its result. Whoever is cancelled meanwhile goes on waiting until the thread is done: what it works on is its own.

    Not asyncio.to_thread, whose task asyncio cancels at its end as well, while the thread goes on.
    """
    run = contextvars.copy_context().run
    work = asyncio.get_running_loop().run_in_executor(None, run, function)
    try:
        return await asyncio.shield(work)
    finally:
        while not work.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([work])
