"""Checkpoints: written whole or not at all, checked when read; and stopping on a signal."""

import contextlib
import copy
import errno
import io
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import BaseFileLock, FileLock, Timeout
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from machinery.errors import CheckpointError
from machinery.weights import FileError, load_plain, read_plain

LOCK = ".lock"  # the file that says that a process is writing to the folder
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)  # says a file system without them
SCRATCH = ".new"  # ends the name of a file that is being written
WRAPPERS = (nn.DataParallel, DistributedDataParallel, AveragedModel)


def write_whole(path: Path, content: bytes) -> None:
    """Writes `content` so that `path` holds the old or the new file at any instant."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}{SCRATCH}")
    try:
        with open(scratch, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()  # if it was not renamed
    with contextlib.suppress(OSError):  # Windows cannot open a folder, and need not
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the rename itself
        os.close(folder)


def remove_scratch(folder: Path) -> None:
    """Deletes half-written files of killed processes from `folder`."""
    for path in folder.glob(f".*{SCRATCH}"):
        path.unlink(missing_ok=True)


def lock(folder: Path) -> BaseFileLock:
    """Locks the folder until released or this process ends; BlockingIOError if the lock is taken."""
    lock = FileLock(folder / LOCK, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise BlockingIOError(f"another process is writing to {folder}") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return lock


def packed(state: Any, name: str = "") -> bytes:
    """Tensors and plain values as `torch.save` writes them; CheckpointError names an entry that `load` would refuse."""
    buffer = io.BytesIO()
    try:
        torch.save(_plain(state), buffer)
        load_plain(buffer.getvalue())
    except Exception as error:  # pickle and torch raise many kinds
        parts = state.items() if isinstance(state, dict) else enumerate(state if type(state) in (list, tuple) else ())
        for key, entry in parts:
            packed(entry, f"{name}.{key}".lstrip("."))
        raise CheckpointError(
            f"cannot save {name}, a {type(state).__module__}.{type(state).__qualname__}: only tensors, numbers, "
            "strings, lists and dicts of such can be read again"
        ) from error
    return buffer.getvalue()


def load(path: Path) -> dict[str, Any]:
    """What `packed` made, on the CPU; CheckpointError if it is missing, damaged, or not plain data."""
    try:
        return read_plain(path)
    except FileError as error:
        raise CheckpointError(f"cannot read the checkpoint: {error}") from error


def weights_file(model: nn.Module) -> bytes:
    """The content of model.pt: the weights under "model", beside `trained_on`."""
    state = unwrapped(model).state_dict()
    weights = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in state.items()}
    return packed({"model": weights, **dict.fromkeys(("classes", "size", "mean", "std")), **trained_on(model)})


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside DataParallel, DistributedDataParallel, AveragedModel or torch.compile's wrapper."""
    inner = model.module if isinstance(model, WRAPPERS) else getattr(model, "_orig_mod", None)
    return model if inner is None else unwrapped(inner)


def trained_on(model: nn.Module) -> dict[str, Any]:
    """The network's `trained_on`: "classes", "size", "mean" and "std"; {} if it has none."""
    known = getattr(unwrapped(model), "trained_on", None)
    return known if isinstance(known, dict) else {}


def _plain(value: Any) -> Any:
    """The value with NumPy's numbers as Python's, also in dicts, lists and tuples."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        same = copy.copy(value)  # of its kind, with the versions that a state dict notes
        same.clear()
        same.update({_plain(name): _plain(entry) for name, entry in value.items()})  # a Counter would count pairs
        return same
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


@dataclass
class StopRequest:
    """The number of the signal that requested a stop, or 0."""

    signal: int = 0


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Catches SIGINT and SIGTERM inside the `with`, in the main thread.

    A second request raises KeyboardInterrupt, unless within 1 s: torchrun repeats the terminal's Ctrl-C.
    """
    request, first = StopRequest(), math.inf

    def take(number: int, frame: object) -> None:
        nonlocal first
        if time.monotonic() > first + 1:
            raise KeyboardInterrupt
        if not request.signal:
            request.signal, first = number, time.monotonic()

    is_main = threading.current_thread() is threading.main_thread()  # nobody else can catch them
    before = {number: signal.signal(number, take) for number in (signal.SIGINT, signal.SIGTERM) if is_main}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
