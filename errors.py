"""What ends a run before its time, and which failures are the machine's."""

import torch

import distributed


class UnsavedError(OSError):
    """Training ended, but its result could not be written; `history` holds it, and the model is trained."""

    def __init__(self, message: str, history: dict[str, list]) -> None:
        super().__init__(message)
        self.history = history


class NonFiniteLossError(FloatingPointError):
    """The loss or a weight became infinite or NaN, so training on would be useless."""


class StoppedError(RuntimeError):
    """Training was asked to end before its time, by the signal of this number; the message says how to go on."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


class MachineError(RuntimeError):
    """The machine failed the run, not its settings; the message says how, and how to go on."""


def failure_of_the_machine(error: BaseException) -> str | None:
    """What happened and what may help, if the machine failed; None if the error is of another kind."""
    text = str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return "memory ran out: end other programs, or begin a new run with a smaller batch_size"
    if isinstance(error, ConnectionError | EOFError) or "DataLoader worker (pid" in text:
        return "a process that prepares images died, often for want of memory: try workers = 0, which gives the same"
    if distributed.world_size() > 1 and ("by peer" in text or "Broken pipe" in text):  # gloo: closed or reset
        return "another process of this run died"
    return None
