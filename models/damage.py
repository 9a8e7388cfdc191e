"""One way to say that a file cannot be used, whatever a library raised over it."""

from pathlib import Path
from types import TracebackType

LIBRARY_ERRORS = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, OSError)


class Blame:
    """A context in which an error of reading becomes a ValueError that names the file.

    tokenizers and Orbax raise Exception itself, and nothing narrower, over damaged files; no subclass of it
    besides LIBRARY_ERRORS is touched.
    """

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or not (kind is Exception or issubclass(kind, LIBRARY_ERRORS)):
            return
        text = str(error)
        if kind is ValueError and text.startswith(str(self.path)):
            return
        reason = text.splitlines()[0][:200] if text else "no reason given"
        raise ValueError(f"{self.path}: damaged or not supported ({kind.__name__}: {reason})") from error
