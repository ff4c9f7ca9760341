"""The settings of a run, and their command line."""

import argparse
import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machinery import checkpoint
from machinery.data.sampler import AUGMENTATIONS, DEFAULT_AUGMENT, MAX_PADDING, MAX_SKIP, PADDING
from machinery.errors import CheckpointError, SettingError

SETS = ("cifar10", "synthetic")  # that have a name of their own
# Settings that do not change what a run computes, so that a resumed run may have others.
FREE = ("name", "data_dir", "workers", "resume", "overwrite", "save_minutes")


def setting(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    """A field of `Config`: its default, what it means (for --help), and the values it may take."""
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Config:
    """All settings of a run. Each is a flag of `python train.py`, and all are saved with the result."""

    data: str = setting(
        "cifar10",
        "cifar10; or synthetic, drawn shapes, which need no files; or a folder with one of pictures per class",
    )
    data_dir: str | None = setting(None, "where CIFAR-10 is or goes; then $CIFAR10_ROOT, then ./data are looked at")
    name: str | None = setting(None, "results go to runs/NAME, which must be new (default: data, seed and time)")
    weights: str | None = setting(
        None,
        "begin with the weights of a Net in this file, such as runs/NAME/model.pt, or with those that ship: pretrained",
    )
    epochs: int = setting(
        20, "passes over the training set, with skip over a part of it; the learning rate falls linearly to 0 over all"
    )
    batch_size: int = setting(500, "images per step")
    lr: float = setting(0.12, "learning rate of the filters at the start; the other rates are in proportion to it")
    label_smoothing: float = setting(0.2, "share of the target spread over all classes")
    augment: tuple[str, ...] = setting(DEFAULT_AUGMENT, "augmentations, in any number", AUGMENTATIONS)
    padding: int = setting(PADDING, "pixels by which the augmentation crop moves an image at most")
    cutmix: float = setting(0.0, "share of the batches in which images, and labels, get a part of another (CutMix)")
    skip: float = setting(
        0.0, "share of the images, easy ones, left out of each epoch but the first and the last; for short runs"
    )
    size: int = setting(32, "side in pixels to which pictures of your own are brought")
    holdout: int = setting(0, "test on this many training images, kept out of training, instead of the test set")
    seed: int = setting(
        0, "seed of the initial weights, of the order of the images, of their augmentation and of CutMix"
    )
    workers: int | None = setting(
        None,
        "processes that prepare the images, with the same result for any number (default: 1, with a GPU all cores but "
        "one, up to 16)",
    )
    device: str = setting("auto", "auto takes CUDA, else MPS, else the CPU", ("auto", "cpu", "cuda", "mps"))
    precision: str = setting(
        "auto",
        "numbers to calculate with; auto is bf16 where the processor has it, fp16 on older GPUs that have that",
        ("auto", "bf16", "fp16", "fp32"),
    )
    layout: str = setting("auto", "order of an image's numbers in memory", ("auto", "channels_last", "contiguous"))
    resume: str | None = setting(None, "go on with the run in this folder, runs/NAME, with its settings")
    overwrite: bool = setting(False, "delete what runs/NAME holds of an earlier run")
    save_minutes: float = setting(5, "save this often within an epoch, and after each")

    def __post_init__(self) -> None:
        ranges = {
            "epochs": (1, 10_000),
            "batch_size": (2, 50_000),
            "lr": (0, 10),
            "label_smoothing": (0, 0.99),
            "padding": (0, MAX_PADDING),
            "cutmix": (0, 1),
            "skip": (0, MAX_SKIP),
            "size": (16, 512),
            "holdout": (0, 40_000),
            "seed": (0, 2**32 - 1),
            "workers": (0, 64),
            "save_minutes": (0, 1440),
        }
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            if field.name == "augment":
                object.__setattr__(self, "augment", tuple(value) if isinstance(value, list | tuple) else (value,))
                ok = all(v in choices for v in self.augment)
                expected = f"any of {', '.join(choices)}"
            elif field.name in ranges:
                low, high = ranges[field.name]
                whole = field.type in (int, int | None)
                kinds = int if whole else int | float
                ok = isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high
                ok |= value is None and field.default is None
                expected = f"{'an integer' if whole else 'a number'} from {low} to {high}"
            elif choices:
                ok, expected = value in choices, f"one of {', '.join(choices)}"
            elif field.type is bool:
                ok, expected = isinstance(value, bool), "True or False"
            elif field.name == "data":
                is_folder = isinstance(value, str | os.PathLike) and os.path.isdir(value)
                ok, expected = value in SETS or is_folder, f"{' or '.join(SETS)}, or a folder of pictures"
                if ok and value not in SETS:
                    object.__setattr__(self, "data", os.path.abspath(value))
            elif field.name == "name":
                ok = value is None or (isinstance(value, str) and value not in ("", "..") and Path(value).name == value)
                expected = "a plain name, without folders"
            else:
                ok, expected = value is None or (isinstance(value, str | os.PathLike) and bool(str(value))), "a path"
                if ok and value:
                    path = os.fspath(value)  # that of the data is sought again, maybe from another folder
                    path = os.path.abspath(os.path.expanduser(path)) if field.name == "data_dir" else path
                    object.__setattr__(self, field.name, path)
            if not ok:
                raise SettingError(f"{field.name} must be {expected}, got {value!r}")
        if self.resume and self.overwrite:
            raise SettingError("overwrite would delete the run that resume is to go on with; give one of them")
        if self.resume and self.name and self.name != Path(self.resume).name:
            raise SettingError(f"name: the run goes on in its own folder, {self.resume}; leave out name {self.name!r}")


def parse_args(arguments: list[str] | None = None) -> Config:
    """The command line as a `Config`; leaves with a message if something in it is wrong.

    With --resume, what is not given is as in the run that is resumed.

    Raises:
        CheckpointError: There is no run to resume, or its checkpoint is damaged.
    """
    parser = argparse.ArgumentParser(
        description="Train Net on CIFAR-10 and save metrics.json, curves.png and model.pt in runs/NAME.",
        epilog="About 25 minutes on 2 CPU cores with AMX; a minute to see it work: --data synthetic --epochs 1.",
    )
    for field in dataclasses.fields(Config):
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": field.metadata["help"]}
        if field.type is bool:
            options |= {"action": "store_true"}
        elif field.type in (int, int | None, float):
            options |= {"type": float, "metavar": "X"} if field.type is float else {"type": int, "metavar": "N"}
        elif field.metadata["choices"]:
            options |= {"choices": field.metadata["choices"]}
        else:
            options |= {"metavar": field.name.split("_")[-1].upper()}
        if field.name == "augment":
            options |= {"nargs": "*"}
        default: Any = field.default
        if default not in (None, False):
            options["help"] += f" (default: {' '.join(default) if field.name == 'augment' else default})"
        parser.add_argument("--" + field.name.replace("_", "-"), **options)
    given = vars(parser.parse_args(arguments))
    try:
        return resumed(given.pop("resume"), **given) if "resume" in given else Config(**given)
    except SettingError as error:
        parser.error(str(error))


def resumed(folder: str | Path, **changes: Any) -> Config:
    """The settings with which `fit` goes on with the run in `folder`: its own, but for `changes`.

    Args:
        folder: runs/NAME, or a file in it, such as last.pt.
        changes: Fields of `Config`.

    Raises:
        CheckpointError: There is no run, or its checkpoint is damaged.
    """
    folder = Path(folder).parent if Path(folder).is_file() else Path(folder)
    saved = settings_of(checkpoint.load(folder / "last.pt"), folder)
    return Config(**{**saved, "name": folder.name or None, "overwrite": False, **changes, "resume": folder})


def settings_of(state: dict[str, Any], folder: str | Path) -> dict[str, Any]:
    """Those of the run in `folder`, from its checkpoint.

    Raises:
        CheckpointError: Another version of this repository wrote it, with other settings.
    """
    path = Path(folder) / "last.pt"
    try:
        saved = dict(state["result"]["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds no settings of a run, so it is no checkpoint") from error
    if other := set(saved) ^ {field.name for field in dataclasses.fields(Config)}:
        raise CheckpointError(
            f"{path} is of another version of this repository, with other settings ({', '.join(sorted(other))}): go on "
            "with that version, or begin a new run"
        )
    try:
        Config(**saved)
    except SettingError as error:
        raise CheckpointError(f"{path} holds settings that no run can have: {error}") from error
    return saved
