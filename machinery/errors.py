"""What may go wrong, by name. Each message says what was wrong, what was expected, and what to do."""

from typing import Any


class SettingError(ValueError):
    """A setting is out of range, or does not fit the data, the machine or the folder; the message names it."""


class DataError(RuntimeError):
    """The data is damaged or out of reach; the message says where, why and what to do."""


class DataUnreachableError(DataError):
    """CIFAR-10 was found nowhere, and downloading it failed."""


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, foreign, or does not fit the run; the message says which and what to do."""


class NonFiniteLossError(FloatingPointError):
    """The loss or a weight became infinite or NaN, so training on would be useless."""


class MachineError(RuntimeError):
    """The machine failed the run, not its settings; the message says how, and how to go on."""


class StoppedError(RuntimeError):
    """Training was asked to end before its time, by the signal of this number; the message says how to go on."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number

    def __reduce__(self) -> tuple[Any, ...]:  # so that it passes from one process to another
        return type(self), (str(self), self.signal)


class UnsavedError(OSError):
    """Training ended, but its result could not be written; `history` holds it, and the model is trained."""

    def __init__(self, message: str, history: dict[str, list]) -> None:
        super().__init__(message)
        self.history = history

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.history)
