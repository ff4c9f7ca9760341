"""Files that survive: written whole or not at all, checked before they are believed, and a way to stop in peace."""

import contextlib
import errno
import hashlib
import io
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from machinery.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"  # the file that says that a process is writing to the folder, and which launch of torchrun it is from
SCRATCH = ".new"  # ends the name of a file that is being written
DIGEST_SIZE = hashlib.sha256().digest_size


def write_whole(path: Path, content: bytes) -> None:
    """Writes beside `path`, flushes to the disk, reads it back and renames, so that `path` is the old or the new file.

    A power cut, a kill or a full disk at any instant leaves the old file, and at worst a scratch file beside it, which
    `remove_scratch` deletes.

    Raises:
        OSError: The disk is full, the folder is read-only, or what was written is not what is read back.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}{SCRATCH}")
    try:
        with open(scratch, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if scratch.read_bytes() != content:
            raise OSError(f"{scratch} does not hold what was written to it")
        os.replace(scratch, path)
    except OSError:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise
    with contextlib.suppress(OSError, AttributeError):  # Windows cannot open a folder, and need not
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)


def remove_scratch(folder: Path) -> None:
    """Deletes what a killed process had not finished writing in `folder`."""
    for path in folder.glob(f".*{SCRATCH}"):
        path.unlink(missing_ok=True)


def lock(folder: Path, launch: str) -> io.TextIOBase:
    """Marks the folder as written to by this process until it ends, and notes its launch, see `last_launch_id`.

    The system frees the lock when the process dies, however it dies; data-loading workers do not inherit it. Windows
    and some network file systems have no such lock, so there nothing is refused.

    Returns:
        The open file, which holds the lock.

    Raises:
        BlockingIOError: Another process has the lock.
    """
    file = open(folder / LOCK, "a+")  # noqa: SIM115
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            file.close()
            raise BlockingIOError(f"another process is writing to {folder}") from error
    file.truncate(0)
    file.write(launch)
    file.flush()
    return file


def last_launch_id(folder: Path) -> str | None:
    """Which launch of torchrun last wrote to the folder; empty if it was started alone, None if nobody did."""
    try:
        return (folder / LOCK).read_text()
    except OSError:
        return None


def packed(state: dict[str, Any]) -> bytes:
    """Tensors, numbers, strings, lists and dicts as `torch.save` writes them, followed by the sha256 of it all."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    return content + hashlib.sha256(content).digest()


def load(path: Path) -> dict[str, Any]:
    """What `packed` made, on the CPU. Nothing is unpickled before the sha256 is right, and then only plain data.

    Raises:
        CheckpointError: The file is missing, truncated, altered, not a checkpoint, or holds more than plain data.
    """
    try:
        whole = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    content, digest = whole[:-DIGEST_SIZE], whole[-DIGEST_SIZE:]
    if hashlib.sha256(content).digest() != digest:
        raise CheckpointError(
            f"{path} is truncated, altered or not a checkpoint of this project (its sha256 is wrong), and was not "
            "loaded. Restore it from a copy, or start the run anew."
        )
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file that was made to mislead can cause
        raise CheckpointError(
            f"{path} holds something other than tensors and plain values, and was not loaded. "
            "Do not use it unless you know where it comes from."
        ) from error


class StopRequest:
    """Whether someone asked for an end: Ctrl-C, the notebook's stop button, or a scheduler's SIGTERM.

    `signal` is 0 until then. A further request raises KeyboardInterrupt at once, unless it comes within 1 s of the
    first: torchrun forwards the Ctrl-C that the terminal has delivered already.
    """

    def __init__(self) -> None:
        self.signal, self.time = 0, math.inf

    def take(self, number: int, frame: object) -> None:
        """The signal handler."""
        if time.monotonic() > self.time + 1:
            raise KeyboardInterrupt
        if not self.signal:
            self.signal, self.time = number, time.monotonic()


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Catches SIGINT and SIGTERM inside the `with`; outside the main thread, where nobody can, it catches nothing."""
    request, before = StopRequest(), {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, request.take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
