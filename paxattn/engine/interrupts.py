"""Ctrl-C between steps instead of within one, which would leave rows and pages that nobody knows of."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def postponed() -> Iterator[Callable[[], None]]:
    """SIGINT waits until the end of the block, or until the value is called; only a second one does not wait.

    Nothing waits outside the main thread, as Python sends signals nowhere else.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield lambda: None
        return
    came: list[FrameType | None] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(frame)
        if len(came) > 1:
            let_in()

    def let_in() -> None:
        if came:
            frame = came[0]
            came.clear()
            before(signal.SIGINT, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield let_in
    finally:
        signal.signal(signal.SIGINT, before)
        let_in()
