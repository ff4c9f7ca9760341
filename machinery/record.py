"""metrics.json: what was trained, on what and with what; and what must agree when a run resumes.

`Config` is not imported, since its module builds on others.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from machinery import checkpoint, distributed
from machinery.device import Runtime, describe_hardware, fastest_precision
from machinery.distributed import print_rank0
from machinery.errors import CheckpointError, SettingError

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("torch", "torchvision", "albumentations", "albucore", "opencv-python-headless", "numpy")


def new_record(config: Any, parts: dict[str, Any], runtime: Runtime, sets: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The record of a new run, from its parts and the facts of both sets."""
    train, model = sets["train_set"], parts["model"]
    return {
        "data": train["source"] if train["source"] in ("cifar10", "synthetic") else "your own",
        "network": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "classes": list(train["classes"]) if train["classes"] else None,
        "images": {name: train[name] for name in ("size", "mean", "std")},
        "before": parents_of(config.weights),
        "history": {},
        "config": dataclasses.asdict(config),
        **sets,
        **{name: type(parts[name]).__name__ if parts[name] else "None" for name in ("optimizer", "scheduler")},
        "runtime": str(runtime),
        "processes": distributed.world_size(),
        "wall_seconds": 0.0,
        "hardware": describe_hardware(),
        "versions": {"python": platform.python_version(), **versions()},
        "code": code_digests(),
    }


def parents_of(weights: str | None) -> list[dict[str, Any]]:
    """The records of the runs behind these weights, oldest first, from a metrics.json beside them."""
    path = REPOSITORY / "weights" if weights == "pretrained" else Path(weights or "")
    try:
        record = json.loads((path / "metrics.json" if path.is_dir() else path.with_name("metrics.json")).read_text())
        records = [*record.pop("before", []), record]
        return records if all(run["data"] and {**run["config"]} and {**run["history"]} for run in records) else []
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return []


def known_of_data(config: Any, state: dict[str, Any] | None) -> dict[str, Any]:
    """The "split", "mean" and "std" of the resumed `state`; else the "split" behind its weights."""
    if state:
        train, test = (state["result"].get(name) or {} for name in ("train_set", "test_set"))
        return {"split": test.get("split"), "mean": train.get("mean"), "std": train.get("std")}
    splits = [parent.get("test_set", {}).get("split") for parent in reversed(parents_of(config.weights))]
    return {"split": next(filter(None, splits), None)}


def go_on(record: dict[str, Any], state: dict[str, Any], items: dict[str, Any], by_recipe: bool, path: Path) -> None:
    """Takes over the history of the run in `path`; SettingError if `record` describes another run."""
    try:
        saved, anew = state["result"], f"give the same, or begin a new run with --weights {path / 'model.pt'}"
        for kind in ("optimizer", "scheduler"):
            if saved[kind] != record[kind]:
                raise SettingError(f"resume: it was begun with the {kind} {saved[kind]}, got {record[kind]}; {anew}")
        planned, epochs = saved["config"]["epochs"], record["config"]["epochs"]
        if epochs != planned and record["scheduler"] != "None" and not by_recipe:
            raise SettingError(f"epochs: the run's own scheduler was made for {planned}, got {epochs}; {anew}")
        for name in ("train_set", "test_set"):
            if all(saved[name][key] == record[name][key] for key in ("digest", "length")):
                continue
            old, new = state["items"][name], items[name]
            if old is None or new is None or record["config"]["skip"] or not torch.isin(old, new).all():
                raise SettingError(f"resume: {name} has other images or labels than at first; {anew}")
            print_rank0(f"note: {name} has {len(new) - len(old)} new pictures")
        was, now = _surroundings(saved), _surroundings(record)
        others = [f"{k} {was.get(k)} (now {now.get(k)})" for k in was | now if was.get(k) != now.get(k)]
        if others:
            print_rank0(f"note: the run began with other {', '.join(others)}, so it may not go on bit for bit")
        if epochs != planned and by_recipe:
            print_rank0(f"note: epochs {planned} -> {epochs}: the learning rate goes on as in a run of {epochs}")
        record |= {field: saved[field] for field in ("before", "history", "wall_seconds")}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / 'last.pt'} is incomplete or damaged: {error!r}") from error


def _surroundings(record: dict[str, Any]) -> dict[str, Any]:
    """What may change the last digits of a result."""
    return {
        **{name: record[name] for name in ("runtime", "processes", "hardware")},
        **record["versions"],
        **record["code"],
    }


def versions() -> dict[str, str]:
    """Versions of the installed packages that a result may depend on."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def code_digests() -> dict[str, str]:
    """The start of the sha256 of every module that takes part in training, by path."""
    files = [REPOSITORY / name for name in ("dataset.py", "model.py", "train.py")]
    files += sorted(REPOSITORY.glob("machinery/**/*.py"))
    names = [file.relative_to(REPOSITORY).as_posix() for file in files]
    return {name: hashlib.sha256((REPOSITORY / name).read_bytes()).hexdigest()[:8] for name in names}


def facts_of_machine(config: Any, runtime: Runtime) -> dict[str, str]:
    """What must agree on all machines that train together: packages, settings, arithmetic and code."""
    settings = {name: repr(value) for name, value in dataclasses.asdict(config).items()}
    del settings["data_dir"], settings["workers"]  # of each machine's own
    arithmetic = {"the arithmetic": str(runtime), "the optimizer's precision": fastest_precision(runtime.device.type)}
    return {**versions(), **arithmetic, **settings, **code_digests()}


def refuse_separate(folder: Path) -> None:
    """Raises SettingError if the machines do not share this folder, OSError if it is not writable."""

    def mark() -> str:  # by a new name, which no network file system remembers as absent
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix=".shared-", dir=folder)

    if distributed.several_machines():
        name = distributed.broadcast_from_rank_0(mark)
        seen = "shared" if os.path.exists(name) else "another folder (share it: NFS, sshfs)"
        try:
            distributed.refuse_differences({f"{folder}/": seen})
        finally:
            if distributed.rank() == 0:
                os.rmdir(name)


def after_restart(config: Any) -> Any:
    """The settings to resume with if torchrun has restarted all processes because one died."""
    if config.resume or not distributed.can_restart():
        return config
    if not config.name or distributed.launch_id() == "none":
        raise SettingError("name: with --max-restarts, a run needs a --name, and torchrun a --rdzv-id")
    path = Path("runs") / config.name / "last.pt"
    ours = distributed.broadcast_from_rank_0(
        lambda: path.exists() and checkpoint.load(path).get("launch") == distributed.launch_id()
    )
    return dataclasses.replace(config, resume=str(path.parent), overwrite=False) if ours else config
