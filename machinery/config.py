"""The settings of a run, and their command line."""

import argparse
import dataclasses
import numbers
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machinery import checkpoint
from machinery.data.augment import AUGMENTATIONS, DEFAULT_AUGMENT, MAX_PADDING, MAX_SKIP, PADDING
from machinery.errors import CheckpointError, SettingError

SETS = ("cifar10", "synthetic")  # that have a name of their own
# Settings that do not change what a run computes, so that a resumed run may have others.
FREE = ("name", "data_dir", "weights", "workers", "graphs", "resume", "overwrite", "save_minutes")


def setting(default: Any, text: str, low: Any = None, high: Any = None, choices: tuple[str, ...] = ()) -> Any:
    """A field of `Config`: default, help text and allowed values."""
    return dataclasses.field(default=default, metadata={"help": text, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class Config:
    """All settings of a run: each is a flag of `python train.py`, and is saved with the result."""

    data: str = setting("cifar10", "cifar10; or synthetic, drawn shapes; or a folder with one of pictures per class")
    data_dir: str | None = setting(None, "where CIFAR-10 is or goes; then $CIFAR10_ROOT, then ./data are looked at")
    name: str | None = setting(None, "results go to runs/NAME, which must be new (default: data, seed and time)")
    weights: str | None = setting(None, "begin with a Net's weights in this file, runs/NAME/model.pt, or pretrained")
    epochs: int = setting(20, "passes over the training set; the learning rate falls linearly to 0", 1, 10_000)
    batch_size: int = setting(500, "images per step", 2, 50_000)
    lr: float = setting(0.12, "learning rate of Muon at the start; those of Adam are in proportion", 0, 10)
    label_smoothing: float = setting(0.2, "share of the target spread over all classes", 0, 0.99)
    augment: tuple[str, ...] = setting(DEFAULT_AUGMENT, "augmentations, in any number", choices=AUGMENTATIONS)
    padding: int = setting(PADDING, "pixels by which crop moves an image at most", 0, MAX_PADDING)
    cutmix: float = setting(0.0, "share of the batches in which images and labels are mixed (CutMix)", 0, 1)
    skip: float = setting(0.0, "data pruning: share of easy images left out, but in first and last epoch", 0, MAX_SKIP)
    size: int = setting(32, "side in pixels to which your own pictures are brought", 16, 512)
    holdout: int = setting(0, "validate on this many training images in the place of the test set", 0, 40_000)
    seed: int = setting(0, "of initial weights, order, augmentation and CutMix", 0, 2**32 - 1)
    workers: int | None = setting(None, "processes that prepare images, where that takes long; same result", 0, 64)
    device: str = setting("auto", "auto is CUDA, else MPS, else the CPU", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = setting("auto", "auto is the fastest of the device", choices=("auto", "bf16", "fp16", "fp32"))
    layout: str = setting("auto", "memory layout of images", choices=("auto", "channels_last", "contiguous"))
    graphs: str = setting("auto", "CUDA graphs; auto where all inside is known", choices=("auto", "on", "off"))
    resume: str | None = setting(None, "go on with the run in this folder, runs/NAME, with its settings")
    overwrite: bool = setting(False, "replace what runs/NAME holds of an earlier run")
    save_minutes: float = setting(5, "save this often within an epoch, and after each", 0, 1440)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        if self.resume and self.overwrite:
            raise SettingError("overwrite would replace the run that resume is to go on with; give one of them")
        if self.resume and self.name and self.name != Path(self.resume).name:
            raise SettingError(f"name: the run goes on in its own folder, {self.resume}; leave out name {self.name!r}")


def _checked(field: dataclasses.Field, value: Any) -> Any:
    """The value as plain Python, paths as text; SettingError if the field does not allow it."""
    low, high, choices = (field.metadata[key] for key in ("low", "high", "choices"))
    is_path = isinstance(value, str | os.PathLike) and bool(str(value))
    if value is None and field.default is None:
        return None
    if low is not None:
        whole = field.type in (int, int | None)
        expected = f"{'an integer' if whole else 'a number'} from {low} to {high}"
        kind = numbers.Integral if whole else numbers.Real  # NumPy's, too
        ok = isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high
        value = (int if whole else float)(value) if ok else value
    elif field.name == "augment":
        value = tuple(value) if isinstance(value, list | tuple) else (value,)
        ok, expected = all(name in choices for name in value), f"any of {', '.join(choices)}"
    elif choices:
        ok, expected = value in choices, f"one of {', '.join(choices)}"
    elif field.type is bool:
        ok, expected = isinstance(value, bool), "True or False"
    elif field.name == "name":
        ok = is_path and Path(value).name == str(value) and str(value) != ".." and str(value).isprintable()
        expected = "a plain name, without folders"
    elif field.name == "data":
        ok = is_path and (value in SETS or os.path.isdir(value))
        expected = f"{' or '.join(SETS)}, or a folder of pictures that is there"
    else:
        ok, expected = is_path, "a path"
    if not ok:
        raise SettingError(f"{field.name} must be {expected}, got {value!r}")
    if field.name in ("data", "data_dir") and value not in SETS:  # is looked for again, maybe from another folder
        return os.path.abspath(os.path.expanduser(value))
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def parse_args(arguments: list[str] | None = None) -> Config:
    """The command line as a `Config`; with --resume, that of the run, or CheckpointError."""
    parser = argparse.ArgumentParser(
        description="Train Net on CIFAR-10 and save model.pt, metrics.json and pictures in runs/NAME.",
        epilog="25 minutes to 3 hours on 2 CPU cores; a minute to see it work: --data synthetic --epochs 1.",
    )
    types: dict[Any, type] = {int: int, int | None: int, float: float}
    for field in dataclasses.fields(Config):
        default: Any = field.default
        default = " ".join(default) if field.name == "augment" else default
        text = field.metadata["help"] + (f" (default: {default})" if default else "")
        options: dict[str, Any] = {"action": "store_true"}
        if field.type is not bool:
            options = {"type": types.get(field.type, str), "choices": field.metadata["choices"] or None}
            options["nargs"] = "*" if field.name == "augment" else None
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **options)
    given = vars(parser.parse_args(arguments))
    try:
        return resumed(given.pop("resume"), **given) if "resume" in given else Config(**given)
    except SettingError as error:
        parser.error(str(error))


def resumed(folder: str | Path, **changes: Any) -> Config:
    """The settings that resume the run in `folder`, runs/NAME: its own, but for `changes`.

    CheckpointError if the run is missing or damaged; SettingError if its folder of pictures is gone.
    """
    folder = folder_of(folder)
    saved = settings_of(checkpoint.load(folder / "last.pt"), folder)
    return Config(**{**saved, "name": folder.name or None, "overwrite": False, **changes, "resume": folder})


def folder_of(run: str | Path) -> Path:
    """The folder of a run, given by itself or a file in it; CheckpointError if there is none."""
    path = Path(run).parent if Path(run).is_file() else Path(run)
    if not path.is_dir():
        raise CheckpointError(f"there is no run to resume in {path}")
    return path


def settings_of(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The settings in a run's checkpoint; CheckpointError if another version wrote it."""
    try:
        saved = dict(state["result"]["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'last.pt'} holds no settings of a run, so it is no checkpoint") from error
    if other := saved.keys() ^ {field.name for field in dataclasses.fields(Config)}:
        raise CheckpointError(
            f"{folder / 'last.pt'} is of another version of this repository, with other settings "
            f"({', '.join(sorted(other))}): go on with that version, or begin a new run"
        )
    return saved


def refuse_other_settings(config: Config, saved: dict[str, Any], folder: Path) -> None:
    """Raises SettingError if the run in `folder`, with the settings `saved`, cannot resume with `config`."""
    other = [
        f"{field} {wanted!r} (the run has {saved[field]!r})"
        for field, wanted in dataclasses.asdict(config).items()
        if field not in (*FREE, "data", "epochs") and wanted != saved[field]  # of data, the images are compared
    ]
    if other:
        raise SettingError(
            f"resume: {folder} was begun with other settings, with which it would not be the same run: "
            f"{'; '.join(other)}. Give the same, or begin a new run."
        )
    if config.epochs < saved["epochs"] or (config.skip and config.epochs != saved["epochs"]):
        why = "a run with skip keeps its length, on which its images depend; " if config.skip else ""
        raise SettingError(f"epochs: {why}the run in {folder} is one of {saved['epochs']}, got {config.epochs}")
