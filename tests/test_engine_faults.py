"""What fails or interrupts an engine costs nobody else a token, and no page."""

import random
import signal

import pytest
from conftest import TINY
from engine_cases import SIZES, at_rest, collect

from paxattn import Engine, EngineConfig, GenerationParams
from paxattn.engine.engine import BrokenEngineError
from paxattn.engine.interrupts import postponed


def test_what_detokenize_raises_ends_its_request_alone(engine, alone, monkeypatch, rng):
    """Others lose no token, and no page is lost, whenever it comes: also where others end in the same loop."""
    served, text = engine(), engine().detokenize
    for calls in (1, 2, 3):
        left = iter(range(calls - 1, -1, -1))

        def fail(ids, left=left):
            if next(left, 1) == 0:
                raise RuntimeError("no such token")
            return text(ids)

        monkeypatch.setattr(served, "detokenize", fail)
        prompts = [rng.integers(0, TINY.vocab_size, 9).tolist() for _ in range(4)]
        lengths = (12, 3, 20, 6)
        numbers = [
            served.add_request(prompt, GenerationParams(new, stop_strings=["zz"] if new == 12 else ()))
            for prompt, new in zip(prompts, lengths, strict=True)
        ]
        got, raised = {}, 0
        while served.busy:
            try:
                collect(served, served.step(), got)
            except RuntimeError:
                raised += 1
        assert raised == 1
        for number, prompt, new in list(zip(numbers, prompts, lengths, strict=True))[1:]:
            assert got[number, 0] == alone(prompt)[:new]
        at_rest(served)
        assert served._live == {}


def test_an_interrupt_comes_between_steps(engine, alone, monkeypatch, rng):
    """Wherever it strikes: every other request gets its tokens, and no page is lost."""
    served, strike = engine(), random.Random(int(rng.integers(2**31)))
    prompts = [rng.integers(0, TINY.vocab_size, n).tolist() for n in (5, 30, 12)]
    served.generate(prompts, GenerationParams(24, num_samples=2))
    monkeypatch.setattr(signal, "SIGINT", signal.SIGALRM)
    old = signal.signal(signal.SIGALRM, signal.default_int_handler)
    interrupted = 0
    try:
        for _ in range(20):
            number = served.add_request(prompts[0], GenerationParams(24))
            signal.setitimer(signal.ITIMER_REAL, 0.001 + 0.02 * strike.random())
            got = {}
            try:
                served.generate(prompts, GenerationParams(24, num_samples=2))
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
            collect(served, served.drain(), got)
            while served.busy:
                collect(served, served.step(), got)
            assert got == {(number, 0): alone(prompts[0])[:24]}
            at_rest(served)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert interrupted > 0
    assert served._live == {}


@pytest.fixture
def _interruptible():
    """A shell has what it runs in the background ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_an_interrupt_waits_for_the_end_of_a_block_and_a_second_does_not():
    done = []

    def until_the_end():
        with postponed():
            signal.raise_signal(signal.SIGINT)
            done.append("whole")

    def until_let_in():
        with postponed() as let_in:
            signal.raise_signal(signal.SIGINT)
            let_in()
            done.append("never")

    def impatient():
        with postponed(), postponed():
            for _ in range(4):
                signal.raise_signal(signal.SIGINT)
            done.append("never")

    for run in (until_the_end, until_let_in, impatient):
        with pytest.raises(KeyboardInterrupt):
            run()
    assert done == ["whole"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_step_that_fails_halfway_is_the_last(tiny):
    """And what failed is the cause of what is raised afterwards."""
    served = Engine(*tiny, EngineConfig(**SIZES | dict(implementation="mosaic_gpu")))
    with pytest.raises(Exception, match="mosaic_gpu") as first:
        served.generate([[1, 2]], GenerationParams(3))
    for call in (served.step, served.drain, lambda: served.add_request([1])):
        with pytest.raises(BrokenEngineError, match="make another engine") as later:
            call()
        assert later.value.__cause__ is first.value
