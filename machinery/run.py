"""A run: its folder, runs/NAME, locked and written whole, and saving and restoring its parts."""

import contextlib
import dataclasses
import itertools
import json
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from machinery import checkpoint, distributed
from machinery.config import Config, folder_of, refuse_other_settings, settings_of
from machinery.device import Runtime
from machinery.distributed import broadcast_from_rank_0, print_rank0, rank
from machinery.errors import (
    CheckpointError,
    MachineError,
    NonFiniteLossError,
    SettingError,
    StoppedError,
    UnsavedError,
    failure_of_the_machine,
    print_line,
)
from machinery.record import after_restart, go_on, new_record, refuse_separate

FILES = ("last.pt", "model.pt", "metrics.json", "curves.png", "confusion.png", "misclassified.png", "summary.txt")


class Run:
    """A run's folder, locked inside the `with`; of several processes, the first one writes.

    SettingError or CheckpointError if the folder is unfit; MachineError if memory, disk or another process fails.
    """

    def __init__(self, config: Config) -> None:
        self.config = after_restart(config)
        self.state: dict[str, Any] | None = None  # the last.pt of a run that goes on, until it is restored
        self.record: dict[str, Any] = {}  # metrics.json
        self.items: dict[str, torch.Tensor | None] = {}  # hashes of a folder's pictures
        self.parts: dict[str, Any] = {}  # what has a state_dict and a load_state_dict, or None; together, last.pt
        self.errors: dict[str, OSError] = {}  # why the last writing of a file failed, by its name
        self.rate = 0.0  # learning rate when the epoch began
        self.started = self.saved_at = time.perf_counter()

    def __enter__(self) -> "Run":
        resume = self.config.resume
        refuse_separate(Path(resume).parent if resume else Path("runs"))
        with contextlib.ExitStack() as stack:
            self.path = broadcast_from_rank_0(lambda: stack.enter_context(_held(self.config)))
            if resume:
                self.state = broadcast_from_rank_0(lambda: checkpoint.load(self.path / "last.pt"))
                refuse_other_settings(self.config, settings_of(self.state, self.path), self.path)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.stack.close()
        if error and (cause := failure_of_the_machine(error)):
            raise MachineError(f"{cause}\n{self.how_to_go_on()}") from error

    @property
    def history(self) -> dict[str, list]:
        return self.record["history"]

    @property
    def epochs(self) -> int:
        """How many are finished."""
        return len(self.history.get("epoch", ()))

    def describe(self, runtime: Runtime, sets: dict[str, dict[str, Any]], by_recipe: bool) -> None:
        """Begins the record, from the parts and the `facts_of` both sets; if resumed, compares it."""
        self.items = {name: facts.pop("items") for name, facts in sets.items()}
        self.record = new_record(self.config, self.parts, runtime, sets)
        if self.state:
            go_on(self.record, self.state, self.items, by_recipe, self.path)

    def restore(self) -> None:
        """Restores all parts of a resumed run; CheckpointError if they do not fit."""
        if not self.state:
            return
        try:
            for name, part in self.parts.items():
                own = name != "random" or rank() == 0  # else all ranks would draw as the first one
                if own and (saved := self.state[name]):  # empty for the scaler of bf16 and fp32
                    part.load_state_dict(saved)
            self.rate = self.state["rate"]
            if len({len(values) for values in self.history.values()}) > 1:
                raise ValueError("its history is incomplete")
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            path = self.path / "last.pt"
            raise CheckpointError(f"{path} does not fit this network, or is damaged: {error}") from error
        self.state = None
        if self.epochs and not self.parts["meter"].steps:
            self.write_results()  # whoever was killed may have had no time for them

    def introduce(self, images: int) -> None:
        """Prints what is trained, on what, and where results go."""
        network, parameters, data = (self.record[name] for name in ("network", "parameters", "data"))
        processes = f", {self.record['processes']} processes" if self.record["processes"] > 1 else ""
        print_rank0(
            f"{network}, {parameters:,} parameters, on {images:,} images of {data}; {self.record['runtime']}{processes}"
            f"\nresults in {self.path}{f', going on after {self.place()}' if self.rate else ''}"
        )

    def place(self) -> str:
        """How far the run is."""
        return f"{self.epochs} epochs and {self.parts['meter'].steps} steps"

    def begin_epoch(self) -> str:
        """Notes the learning rate of the next epoch, and returns its title."""
        if not self.parts["meter"].steps:
            self.rate = float(self.parts["optimizer"].param_groups[0]["lr"])
        synthetic = " (synthetic)" if self.record["data"] == "synthetic" else ""
        return f"epoch {self.epochs + 1}/{self.config.epochs}{synthetic}"

    def end_epoch(self, title: str, train: tuple[float, float], test: tuple[float, float]) -> dict[str, Any]:
        """Adds an epoch, with its mean losses in nats and accuracies in percent, to the history, and saves."""
        meter, before = self.parts["meter"], self.history.get("seconds", [0.0])[-1]
        row = {
            "epoch": self.epochs + 1,
            "train_loss": train[0],
            "train_accuracy": train[1],
            "test_loss": test[0],
            "test_accuracy": test[1],
            "lr": self.rate,
            "seconds": round(before + meter.seconds, 2),
            "data": self.record["data"],
            "tested_on": "held-out" if self.record["test_set"]["is_validation"] else "test",
        }
        for column, value in row.items():
            self.history.setdefault(column, []).append(value)
        meter.reset()
        print_rank0(
            f"{title}: train {train[1]:.2f} % (loss {train[0]:.3f}), "
            f"{row['tested_on']} {test[1]:.2f} % (loss {test[0]:.3f}), {row['seconds']:.0f} s"
        )
        self.save()
        self.write_results()
        return row

    def packed(self) -> bytes:
        """The content of last.pt; CheckpointError names what could not be read again."""
        parts = {name: part.state_dict() if part else None for name, part in self.parts.items()}
        facts = {"result": self.record, "items": self.items, "rate": self.rate, "launch": distributed.launch_id()}
        return checkpoint.packed({**parts, **facts, **checkpoint.trained_on(self.parts["model"])})

    def is_due(self) -> bool:
        """Whether it is time to save within the epoch."""
        return time.perf_counter() - self.saved_at > 60 * self.config.save_minutes

    def save(self) -> None:
        """Writes last.pt, on rank 0; NonFiniteLossError if a weight is infinite or NaN."""
        if rank() > 0:
            return
        if not all(parameter.isfinite().all() for parameter in self.parts["model"].parameters()):
            raise NonFiniteLossError("a weight became infinite or NaN. Try a lower lr, or precision fp32.")
        now = time.perf_counter()
        self.record["wall_seconds"] = round(self.record["wall_seconds"] + now - self.started, 2)
        self.started = self.saved_at = now
        self.write("last.pt", self.packed())
        if self.config.overwrite and "last.pt" not in self.errors:
            self.config = dataclasses.replace(self.config, overwrite=False)
            for name in FILES[1:]:  # of the run that this one replaces, which could go on until now
                (self.path / name).unlink(missing_ok=True)

    def write_results(self) -> None:
        """Writes model.pt and metrics.json, on rank 0."""
        if rank() == 0:
            self.write("model.pt", checkpoint.weights_file(self.parts["model"]))
            self.write("metrics.json", (json.dumps(self.record, indent=1) + "\n").encode())

    def write(self, name: str, content: bytes) -> None:
        """Writes a file whole or not at all; on failure keeps the old one and warns."""
        if self.config.overwrite and name != "last.pt":  # which is not saved yet, so the run before stays whole
            return
        self.errors.pop(name, None)
        try:
            checkpoint.write_whole(self.path / name, content)
        except OSError as error:
            self.errors[name] = error
            with contextlib.suppress(OSError):
                fault = f"cannot write {self.path / name}: {error.strerror or error}"
                print_line(f"warning: {fault}. Make room: training goes on, and the next save is tried.", sys.stderr)

    def stop_if(self, signal: int) -> None:
        """Stops the run, which is saved, if there is a signal."""
        if not signal:
            return
        distributed.max_over_ranks(0)  # the others wait until it is saved, for torchrun ends all when one ends
        unsaved = "last.pt" in self.errors
        where = "not saved: the last save that worked counts" if unsaved else f"saved after {self.place()}"
        raise StoppedError(f"stopped, {where}\n{self.how_to_go_on()}", signal)

    def end(self) -> None:
        """Prints the folder's files; UnsavedError if one could not be written."""
        for name, error in self.errors.items():
            raise UnsavedError(f"training ended, but {self.path / name} could not be written: {error}", self.history)
        print_rank0(f"saved in {self.path}: {', '.join(name for name in FILES if (self.path / name).exists())}")

    def how_to_go_on(self) -> str:
        """The command that resumes the run."""
        if self.config.overwrite or not (self.path / "last.pt").exists():
            return "nothing was saved yet: begin anew"
        program, folder = "torchrun ..." if distributed.launch_id() else "python", self.path.as_posix()
        command = f"{program} train.py --resume {shlex.quote(folder)}"
        return f'go on with\n  {command}\nor, in the notebook, with resume = "{folder}"'


@contextlib.contextmanager
def _held(config: Config) -> Iterator[Path]:
    """A run's folder, locked inside the `with`, and removed if nothing was saved."""
    try:
        path = folder_of(config.resume) if config.resume else _new(config)
        lock = checkpoint.lock(path)
        checkpoint.remove_scratch(path)
    except OSError as error:
        raise SettingError(f"{'resume' if config.resume else 'name'}: cannot write to the folder: {error}") from error
    try:
        yield path
    finally:
        lock.release()
        with contextlib.suppress(OSError):  # it may be gone
            if not _files(path):
                shutil.rmtree(path)
                path.parent.rmdir()  # if it was the first run


def _files(folder: Path) -> list[Path]:
    """Its files, except the lock and half-written ones."""
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def _new(config: Config) -> Path:
    """Makes runs/NAME; refuses one that holds a run, unless `config.overwrite`."""
    Path("runs").mkdir(exist_ok=True)  # an OSError where it is a link to nothing
    if config.name:
        path = Path("runs") / config.name
        path.mkdir(exist_ok=True)
        if _files(path) and not config.overwrite:
            raise SettingError(f"name: {path} holds a run already; give resume, overwrite, or another name")
        return path
    name = f"{Path(config.data).name}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(1):
        path = Path("runs") / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):  # of a run that began in the same second
            path.mkdir()
            break
    return path
