"""What is said to a person: how long something will still take, names of files, and lines that are always printed."""

import contextlib
from pathlib import Path
from typing import TextIO


def remaining(seconds: float, done: float, left: float) -> str:
    """The time for `left` more, where `done` took `seconds`: "about 40 s", "about 25 min", "about 1 h 40 min".

    Args:
        seconds: Since the beginning, or since a later moment from which `done` is counted.
        done: Epochs, steps or images, above 0.
        left: Of the same.
    """
    return f"about {duration(seconds / done * left)}"


def duration(seconds: float) -> str:
    """Seconds in words, as exact as a person wants them: "40 s", "25 min", "1 h 40 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def printable(path: str | Path) -> str:
    """A name on one line, with escapes for what no terminal can show."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(path))


def say(text: str, stream: TextIO | None) -> None:
    """Prints a line where there is something to print to, with escapes for what that cannot show."""
    with contextlib.suppress(ValueError, BrokenPipeError):  # it is closed
        encoding = getattr(stream, "encoding", None) or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
