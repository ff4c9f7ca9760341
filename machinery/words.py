"""What is said to a person: how long something will still take, names of files, and lines that are always printed."""

import contextlib
import os
import re
import sys
from typing import TextIO

UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


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


def printable(text: object) -> str:
    """The text in one line that any UTF-8 output takes: control characters and stray bytes become escapes."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def print_line(text: str, stream: TextIO | None) -> None:
    """Prints a line to what stands for the standard output or error, in a terminal, a notebook or a test.

    What it cannot encode becomes escapes; what nobody can read any more, since it is closed, is not printed.

    Raises:
        OSError: It cannot be written, as on a full disk.
    """
    if stream is None or getattr(stream, "closed", False):
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=hasattr(stream, "flush"))
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        with open(os.devnull, "w") as nowhere:  # for what is still to come, at the end of Python at the latest
            os.dup2(nowhere.fileno(), stream.fileno())


def say(text: str) -> None:
    """Prints a line to the standard output, if it takes one; what is at work does not end for it."""
    with contextlib.suppress(OSError):
        print_line(text, sys.stdout)
