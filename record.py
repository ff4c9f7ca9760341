"""What is written down of a run beside its weights, and what has to be the same for it to go on."""

import contextlib
import dataclasses
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

import distributed
from config import FREE, Config, Runtime, SettingError, describe_hardware

NOTED = ("runtime", "processes", "hardware", "versions")  # with others, a run may not go on bit for bit
PACKAGES = ("torch", "torchvision", "albumentations", "albucore", "opencv-python-headless", "numpy")


def new_record(config: Config, model: nn.Module, runtime: Runtime) -> dict[str, Any]:
    """Of a run that begins: its settings, and on what it runs; history and time are filled in as it goes."""
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

    Empty if there is none, as for weights that come from elsewhere.
    """
    try:
        record = json.loads(Path(weights).with_name("metrics.json").read_text())
        return [*record.pop("before", []), record]
    except (OSError, ValueError, TypeError, AttributeError):
        return []


def _versions() -> dict[str, str]:
    """Of Python and of the packages that a result may depend on, as far as they are installed by these names."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


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
