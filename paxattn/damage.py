"""One way to say that a file or folder cannot be used, whatever a library raised over it."""

import os
from pathlib import Path
from types import TracebackType

LIBRARY_ERRORS = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, OSError, RecursionError)


class Blame:
    """A context in which an error of reading becomes a ValueError that names the path.

    tokenizers and Orbax raise Exception itself, and nothing narrower, over damaged files; no subclass of it
    besides LIBRARY_ERRORS is touched, and no ValueError that names the path, or what lies in it, already.
    """

    def __init__(self, path: Path, verdict: str = "damaged or not supported"):
        self.path = path
        self.verdict = verdict

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or not (kind is Exception or issubclass(kind, LIBRARY_ERRORS)):
            return
        text = str(error)
        if kind is ValueError and text.startswith((f"{self.path}: ", f"{self.path}{os.sep}")):
            return
        reason = next(iter(text.splitlines()), "no reason given")[:200]
        raise ValueError(f"{self.path}: {self.verdict} ({kind.__name__}: {reason})") from error
