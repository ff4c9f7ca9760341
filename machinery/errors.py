"""The errors by name, and how they and other lines are printed."""

import os
import re
from datetime import timedelta
from typing import TextIO

# How long one of several processes waits for the others: longer than the slowest step or save. A link that is back
# within half of it costs nothing but the time, for TCP sends again after pauses that double.
PATIENCE = timedelta(minutes=5)
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class SettingError(ValueError):
    """A setting is out of range, or does not fit the data, the machine or the folder."""


class DataError(RuntimeError):
    """The data is damaged or out of reach."""


class DataUnreachableError(DataError):
    """CIFAR-10 is not found, and cannot be downloaded."""


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, foreign, or does not fit the run."""


class NonFiniteLossError(FloatingPointError):
    """The loss or a weight became infinite or NaN."""


class MachineError(RuntimeError):
    """The machine failed the run; the message says how, and how to resume."""


class StoppedError(RuntimeError):
    """Training stopped early on the signal of this number."""

    def __init__(self, message: str, number: int = 0) -> None:
        super().__init__(message)
        self.signal = number


class UnsavedError(OSError):
    """Training ended, but its result could not be written; `history` holds it."""

    def __init__(self, message: str, history: dict[str, list] | None = None) -> None:
        super().__init__(message)
        self.history = history


def failure_of_the_machine(error: BaseException) -> str | None:
    """What failed and what may help, if it was the machine; else None."""
    silent = f"another process of this run did not answer for {PATIENCE.total_seconds():g} s: it hangs or is cut off"
    signs = {  # what a regular expression finds in the error's class and text -> what happened
        "^MachineError": str(error),
        r"^\w*MemoryError|an't allocate memory": "memory ran out: end other programs, or take a smaller batch_size",
        r"^(Connection\w*|BrokenPipe|EOF)Error|shared memory|Cannot allocate|Too many open files|worker \(pid": (
            "a process that prepares images died or lacks room: try workers = 0, which gives the same"
        ),
    }
    if "TORCHELASTIC_RUN_ID" in os.environ and isinstance(error, RuntimeError):  # of gloo, NCCL, or their store
        signs |= {
            "connectFullMesh": "set GLOO_SOCKET_IFNAME to the network interface that leads to the other machines",
            "[Tt]imed out|timeout": silent,
            "^DistNetworkError|by peer|Broken pipe|remote process": "another process of this run died or is cut off",
        }
    return next((cause for sign, cause in signs.items() if re.search(sign, f"{type(error).__name__}: {error}")), None)


def duration(seconds: float) -> str:
    """Seconds in words, coarser the longer: "40 s", "25 min", "1 h 40 min"."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def printable(text: object) -> str:
    """The text in one line of valid UTF-8, control characters and stray bytes escaped."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def print_line(text: str, stream: TextIO | None) -> None:
    """Prints a line unless the stream is closed, escaping what it cannot encode; OSError on failure."""
    if stream is None or getattr(stream, "closed", False):
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=hasattr(stream, "flush"))
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        with open(os.devnull, "w") as nowhere:  # for what is still to come, at the end of Python at the latest
            os.dup2(nowhere.fileno(), stream.fileno())
