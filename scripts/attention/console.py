"""Lines that are seen as soon as they are said."""


def say(text: str) -> None:
    print(text, flush=True)
