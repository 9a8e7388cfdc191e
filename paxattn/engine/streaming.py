"""Many async streams over one engine: a task steps it in a thread and hands each request its updates."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol

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
        self._queues: dict[int, asyncio.Queue[Update | None]] = {}
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
                update = await queue.get()
                if update is None:
                    await self._failure()
                    return
                left -= update.reason is not None
                yield update
        finally:
            del self._queues[number]
            if left:
                async with self._lock:
                    self._engine.cancel(number)
                self._start()

    def _start(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
            self._task.add_done_callback(self._end)

    async def _run(self) -> None:
        while self._engine.busy:
            async with self._lock:
                updates = await asyncio.to_thread(self._engine.step)
            for update in updates:
                if update.id in self._queues:
                    self._queues[update.id].put_nowait(update)

    def _end(self, task: "asyncio.Task[Any]") -> None:
        """A stream that waits for a task that failed must hear of it."""
        if task.cancelled() or task.exception() is not None:
            for queue in self._queues.values():
                queue.put_nowait(None)

    async def _failure(self) -> None:
        if self._task is not None:
            await self._task
