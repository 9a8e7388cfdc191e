"""Async streams of one engine: they run together, hear of failures, and may be left at any time."""

import asyncio
import time

import pytest
from conftest import TINY
from engine_cases import at_rest

from paxattn import GenerationParams


def test_streams_run_together(engine, alone, rng):
    served = engine()
    prompts = [rng.integers(0, TINY.vocab_size, n).tolist() for n in (5, 30, 12)]

    async def read(prompt, samples):
        ids = [[] for _ in range(samples)]
        async for update in served.stream(prompt, GenerationParams(max_new_tokens=15, num_samples=samples)):
            ids[update.index] += update.ids
        return ids

    async def all_of_them():
        return await asyncio.gather(*(read(prompt, 1 + i) for i, prompt in enumerate(prompts)))

    for _ in range(2):  # each in an event loop of its own
        got = asyncio.run(all_of_them())
        assert got == [[alone(prompt)[:15]] * (1 + i) for i, prompt in enumerate(prompts)]
    at_rest(served)


def test_who_leaves_a_stream_cancels_it(engine, alone, rng):
    served = engine()
    prompts = [rng.integers(0, TINY.vocab_size, n).tolist() for n in (5, 12)]

    async def leave():
        stream = served.stream(prompts[0], GenerationParams(max_new_tokens=60))
        async for _ in stream:
            break
        await stream.aclose()

    async def read():
        return [
            i async for update in served.stream(prompts[1], GenerationParams(max_new_tokens=20)) for i in update.ids
        ]

    async def both():
        return await asyncio.gather(leave(), read())

    assert asyncio.run(both())[1] == alone(prompts[1])[:20]
    at_rest(served)
    assert served._live == {}


def test_streams_hear_of_a_failure(engine, monkeypatch):
    served = engine()

    async def read():
        return [update async for update in served.stream([1, 2], GenerationParams(max_new_tokens=3))]

    def fail():
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(served, "step", fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        asyncio.run(read())
    monkeypatch.undo()
    at_rest(served)


def test_all_streams_hear_the_same_failure(engine, monkeypatch):
    """Also those that come to it after the first has left, and nothing is left of any."""
    served, step, failures = engine(), engine().step, iter([RuntimeError("no such token")])

    def fail_once():
        for error in failures:
            raise error
        return step()

    async def read(prompt):
        return [update async for update in served.stream(prompt, GenerationParams(max_new_tokens=30))]

    async def all_of_them():
        return await asyncio.gather(*(read([i] * 9) for i in range(3)), return_exceptions=True)

    monkeypatch.setattr(served, "step", fail_once)
    assert [str(error) for error in asyncio.run(all_of_them())] == ["no such token"] * 3
    monkeypatch.undo()
    at_rest(served)
    assert served._live == {}


def test_a_stream_may_be_left_after_its_request_has_ended(engine):
    served = engine()

    async def leave_late():
        stream = served.stream([1, 2, 3], GenerationParams(max_new_tokens=20))
        async for _ in stream:
            while served._live:
                await asyncio.sleep(0.01)
            break
        await stream.aclose()

    asyncio.run(leave_late())
    at_rest(served)


def test_no_step_goes_on_beside_another_when_streams_are_cancelled(engine, monkeypatch):
    """At the end of an event loop, which cancels the task that waits for a step, but not the thread that takes it."""
    served, inside = engine(), []

    def alone(name):
        call = getattr(served, name)

        def guarded(*args):
            assert not inside
            inside.append(name)
            time.sleep(0.02)
            try:
                return call(*args)
            finally:
                inside.pop()

        return guarded

    for name in ("step", "cancel"):
        monkeypatch.setattr(served, name, alone(name))
    failures = []

    async def read(number):
        try:
            async for _ in served.stream([number] * 5, GenerationParams(max_new_tokens=60)):
                pass
        except AssertionError as error:
            failures.append(error)
            raise

    async def leave(seconds):
        tasks = [asyncio.create_task(read(i)) for i in range(4)]
        await asyncio.sleep(seconds)
        assert not any(task.done() for task in tasks)

    for seconds in (0.03, 0.05, 0.06):
        asyncio.run(leave(seconds))
        assert not inside
        assert not failures
        assert served._live == {}
        at_rest(served)
