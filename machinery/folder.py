"""A run's folder, runs/NAME: claimed once, written whole, and read with what has to be the same to go on."""

import contextlib
import dataclasses
import io
import itertools
import json
import platform
import shlex
import shutil
import sys
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from machinery import checkpoint, distributed, machines
from machinery.config import FREE, Config, settings_of
from machinery.device import Runtime, describe_hardware, fastest_precision
from machinery.errors import CheckpointError, SettingError

FILES = ("last.pt", "metrics.json", "curves.png", "model.pt")
NOTED = ("runtime", "processes", "hardware", "versions")  # with others, a run may not go on bit for bit
PACKAGES = ("torch", "torchvision", "albumentations", "albucore", "opencv-python-headless", "numpy")

_taken: set[Path] = set()  # by this process, whose own threads a file's lock does not keep apart
_claiming = threading.Lock()


class Folder:
    """The folder of a run, held by this process inside the `with`; of several processes, the first one writes.

    Attributes:
        config: The settings, maybe with `resume` in them, if torchrun has started all processes anew.
        path: Where it is.
        errors: Why the last writing of a file failed, by its name.

    Raises:
        SettingError: It holds a run already, another writes to it, it cannot be written, or the run that is to be
            resumed has other settings.
        CheckpointError: There is no run to be resumed.
    """

    def __init__(self, config: Config) -> None:
        self.config = after_restart(config)
        self.errors: dict[str, OSError] = {}
        self.lock: io.TextIOBase | None = None

    def __enter__(self) -> "Folder":
        machines.refuse_separate(Path(self.config.resume).parent if self.config.resume else Path("runs"))
        self.path: Path = distributed.broadcast_from_rank_0(self._claimed)
        return self

    def __exit__(self, *error: object) -> None:
        """Lets others write to it, now and not when the last traceback that knows it is forgotten."""
        if not self.lock:
            return
        with _claiming:
            _taken.discard(self.path.resolve())
            self.lock.close()
        if not [path for path in self.path.iterdir() if path.name != checkpoint.LOCK]:
            shutil.rmtree(self.path, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.path.parent.rmdir()  # if it was the first run

    def _claimed(self) -> Path:
        config, field = self.config, "resume" if self.config.resume else "name"
        try:
            path = _existing(config.resume) if config.resume else _new(config)
            with _claiming:
                if path.resolve() in _taken:
                    raise BlockingIOError(f"this process is already writing to {path}")
                self.lock = checkpoint.lock(path, distributed.launch_id())
                _taken.add(path.resolve())
            checkpoint.remove_scratch(path)
            for name in FILES if config.overwrite else ():
                (path / name).unlink(missing_ok=True)
        except BlockingIOError as error:
            raise SettingError(f"{field}: {error}") from error
        except OSError as error:
            raise SettingError(f"{field}: cannot write to {config.resume or config.name}: {error}") from error
        return path

    def read(self) -> dict[str, Any] | None:
        """The last.pt of a run that is to be resumed, on all processes; else None.

        Raises:
            CheckpointError: It is missing, damaged or of another version.
            SettingError: The run has other settings.
        """
        if not self.config.resume:
            return None
        state = distributed.broadcast_from_rank_0(lambda: checkpoint.load(self.path / "last.pt"))
        refuse_other_settings(self.config, settings_of(state, self.path), self.path)
        return state

    def write(self, name: str, content: bytes) -> None:
        """A file, whole or not at all. If that fails, says so and goes on: the one before is still there."""
        self.errors.pop(name, None)
        try:
            checkpoint.write_whole(self.path / name, content)
        except OSError as error:
            self.errors[name] = error
            print(
                f"warning: cannot write {self.path / name}: {error.strerror or error}. What was saved before is "
                "kept, training goes on, and the next save is tried. Make room or give back the rights to the folder.",
                file=sys.stderr,
                flush=True,
            )

    def how_to_go_on(self) -> str:
        if not (self.path / "last.pt").exists():
            return "nothing was saved yet: begin anew"
        folder, quoted = self.path.as_posix(), shlex.quote(self.path.as_posix())
        if distributed.launch_id():
            return f"go on with the same torchrun command, but for train.py --resume {quoted}"
        return f'go on with\n  python train.py --resume {quoted}\nor, in the notebook, with resume = "{folder}"'


def after_restart(config: Config) -> Config:
    """The settings with which to go on if torchrun has started all processes anew because one of them died."""
    if config.resume or not distributed.can_restart():
        return config
    if not config.name or distributed.launch_id() == "none":
        raise SettingError(
            "name: with --max-restarts, a run needs a --name by which it is found again, and torchrun a --rdzv-id "
            "(--standalone makes one)"
        )
    folder = Path("runs") / config.name

    def look() -> tuple[bool, bool]:
        return checkpoint.last_launch_id(folder) == distributed.launch_id(), (folder / "last.pt").exists()

    ours, saved = distributed.broadcast_from_rank_0(look)
    return dataclasses.replace(config, resume=str(folder) if saved else None, overwrite=not saved) if ours else config


def _existing(resume: str) -> Path:
    path = Path(resume).parent if Path(resume).is_file() else Path(resume)
    if not path.is_dir():
        raise CheckpointError(f"there is no run to resume in {path}")
    return path


def _new(config: Config) -> Path:
    """runs/NAME, made; refused if it holds another run, unless `config.overwrite` says so."""
    if config.name:
        path = Path("runs") / config.name
        if not config.overwrite and path.is_dir() and any(not file.name.startswith(".") for file in path.iterdir()):
            raise SettingError(
                f"name: {path} holds a run already; go on with it (resume), delete it (overwrite), or choose another"
            )
        path.mkdir(parents=True, exist_ok=True)
        return path
    name = f"{Path(config.data).name}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(1):
        path = Path("runs") / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):  # of a run that began in the same second
            path.mkdir(parents=True)
            break
    return path


def new_record(config: Config, model: nn.Module, runtime: Runtime) -> dict[str, Any]:
    """What metrics.json says of a run that begins: its settings, and on what it runs; the rest comes as it goes."""
    return {
        "data": config.data,
        "network": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "before": _records_of(config.weights) if config.weights else [],
        "history": {},
        "config": dataclasses.asdict(config),
        "runtime": str(runtime),
        "processes": distributed.world_size(),
        "wall_seconds": 0.0,
        "hardware": describe_hardware(),
        "versions": _versions(),
    }


def _records_of(weights: str) -> list[dict[str, Any]]:
    """Of the runs that these weights went through, the first one first, from the metrics.json beside them.

    Empty if there is none that `fit` wrote, as for weights that come from elsewhere.
    """
    path = Path(__file__).parents[1] / "weights" if weights == "pretrained" else Path(weights)
    try:
        record = json.loads((path / "metrics.json" if path.is_dir() else path.with_name("metrics.json")).read_text())
        records = [*record.pop("before", []), record]
        return records if all(run["data"] and {**run["config"]} and {**run["history"]} for run in records) else []
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return []


def _versions() -> dict[str, str]:
    """Of Python and of the packages that a result may depend on, as far as they are installed by these names."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def facts_of(config: Config, runtime: Runtime) -> dict[str, str]:
    """What has to be the same on all machines that train together: packages, settings, arithmetic and code."""
    own = ("data_dir", "workers")
    settings = {name: repr(value) for name, value in dataclasses.asdict(config).items() if name not in own}
    versions = {name: value for name, value in _versions().items() if name != "python"}
    arithmetic = {"the arithmetic": str(runtime), "the optimizer's precision": fastest_precision(runtime.device.type)}
    return {**versions, **arithmetic, **settings, **machines.code()}


def refuse_other_settings(config: Config, saved: dict[str, Any], folder: Path) -> None:
    """Raises SettingError if the run in `folder`, begun with the settings `saved`, cannot go on with `config`."""
    wanted = dataclasses.asdict(config)
    other = [
        f"{field} {wanted[field]!r} (the run has {saved[field]!r})"
        for field in wanted
        if field not in (*FREE, "epochs") and wanted[field] != saved[field]
    ]
    if other:
        raise SettingError(
            f"resume: {folder} was begun with other settings, with which it would not be the same run: "
            f"{'; '.join(other)}. Give the same, or begin a new run."
        )
    if config.skip and config.epochs != saved["epochs"]:
        raise SettingError(
            f"epochs: a run with skip keeps its length, since which images an epoch has depends on it; "
            f"the run in {folder} is one of {saved['epochs']}, got {config.epochs}. Begin a new one, with --weights."
        )
    if config.epochs < saved["epochs"]:
        raise SettingError(f"epochs: the run in {folder} is one of {saved['epochs']}, got {config.epochs}")
