"""Picture files of any kind as uint8 arrays: one by one, all of a folder, and a folder per class to train on."""

import contextlib
import os
import select
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from machinery.errors import DataError
from machinery.words import printable

ORIENTATION = 0x0112  # the EXIF tag
TURNS = {  # its values, and what undoes them
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PATIENCE = 10  # seconds that a pipe may be silent
TEST_FOLDERS = ("test", "val", "valid", "validation")
LARGEST_LOSS = 0.1  # of the files of a class that may be no pictures
DEFAULT_SHARE = 0.2  # of the pictures that are kept aside if nobody says how many


class PictureError(ValueError):
    """A file is missing or not a picture; the message names it."""


def load_picture(path: str | Path, size: int = 32) -> np.ndarray:
    """A picture file of any size and mode -> uint8 (size, size, 3), RGB 0-255.

    Turned upright as its EXIF data say, transparent parts on white, of an animation the first image; shrunk until the
    shorter side fits, then cut to the square in the middle. Of metadata, only the orientation is looked at.

    Raises:
        PictureError: The file is missing, not a picture, or a folder.
    """
    if Path(path).is_dir():
        raise PictureError(f"{printable(path)}: there is no picture in this folder")
    try:
        with Image.open(_opened(Path(path))) as picture:
            turn = _orientation(picture)
            upright = picture.transpose(TURNS[turn]) if turn in TURNS else picture.copy()
        if upright.mode in ("I", "F"):
            raise ValueError("its grey values have 32 bits and no white; save it with 8 or 16")
        if upright.mode.startswith("I;16"):  # which Pillow would cut off at 255
            upright = Image.fromarray((np.asarray(upright) / 257).astype(np.uint8))
        upright = upright.convert("RGBA")
    except FileNotFoundError as error:
        link = "a link to nothing" if Path(path).is_symlink() else "there is no such file"
        raise PictureError(f"{printable(path)}: {link}") from error
    except PictureError:
        raise
    except Exception as error:  # damage makes Pillow raise nearly anything
        raise PictureError(f"{printable(path)}: not a picture that can be read ({error})") from error
    upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB")
    return np.asarray(ImageOps.fit(upright, (size, size), Image.Resampling.BOX))


def _orientation(picture: Image.Image) -> int:
    with contextlib.suppress(Exception):  # whatever is in the metadata, the picture is there
        return int(picture.getexif().get(ORIENTATION, 1))
    return 1


def _opened(path: Path) -> Path | BytesIO:
    """What Pillow can open: the file, or what comes through a pipe."""
    mode = path.stat().st_mode
    if stat.S_ISREG(mode):
        return path
    if not stat.S_ISFIFO(mode):
        raise PictureError(f"{printable(path)}: neither a file nor a pipe")
    pipe, content = os.open(path, os.O_RDONLY | os.O_NONBLOCK), b""
    try:
        while select.select([pipe], [], [], PATIENCE)[0]:
            part = os.read(pipe, 1 << 20)
            content += part
            if not part:
                return BytesIO(content)
    finally:
        os.close(pipe)
    raise PictureError(f"{printable(path)}: nothing came through this pipe for {PATIENCE} s")


@dataclass
class Found:
    """What is in a folder and its subfolders, in the order of the names."""

    pictures: list[str] = field(default_factory=list)  # by the suffixes of the formats that Pillow reads
    others: Counter[str] = field(default_factory=Counter)  # suffix -> how many files have it
    faults: list[PictureError] = field(default_factory=list)  # broken links, and what is no file

    def kinds(self) -> str:
        """The files that are left out, such as "3 .heic, 1 .txt"."""
        return ", ".join(
            f"{count} {printable(suffix) or 'without suffix'}" for suffix, count in sorted(self.others.items())
        )


def find_pictures(folder: Path) -> Found:
    """The pictures in a folder, its subfolders and what links lead to; hidden files and folders are left out."""
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found, entered = Found(), set()

    def enter(place: Path) -> None:
        if place.resolve() in entered:  # a link back
            return
        entered.add(place.resolve())
        for path in sorted(place.iterdir()):
            if path.name.startswith("."):  # as those that macOS puts beside pictures
                continue
            if path.is_dir():
                enter(path)
            elif not path.exists():
                found.faults.append(PictureError(f"{printable(path)}: a link to nothing"))
            elif not path.is_file():
                found.faults.append(PictureError(f"{printable(path)}: neither a file nor a folder"))
            elif path.suffix.lower() in suffixes:
                found.pictures.append(str(path))
            else:
                found.others[path.suffix.lower()] += 1

    enter(folder)
    return found


@dataclass
class Labelled:
    """Pictures of known classes: uint8 (N, size, size, 3), RGB 0-255, and labels int64 (N,)."""

    images: np.ndarray
    labels: np.ndarray
    is_held_out: bool = False  # from training, and not given apart from it


def load_classes(
    folder: str | Path, size: int = 32, holdout: int = 0, seed: int = 0, say: Callable[[str], object] = print
) -> tuple[Labelled, Labelled, tuple[str, ...]]:
    """The pictures to train on, those to test on, and the names of the classes: those of the folders.

    Args:
        folder: A folder per class, of those to train on; or such folders in `train`, and in `test` or `val`. Nothing
            is written there.
        size: Side to which pictures are brought, in pixels, as `load_picture` does it.
        holdout: How many pictures to keep aside for testing, the same share of each class; without `test` and with 0,
            a fifth.
        seed: Of which these are.
        say: Is told what is left out, and how many pictures each class has.

    Raises:
        DataError: It is no such folder, or more than a tenth of a class cannot be read.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(
            f"{root} is {'a file' if root.exists() else 'not there'}; expected a folder with a folder per class"
        )
    inside = {path.name: path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")}
    tests = [inside[name] for name in TEST_FOLDERS if name in inside] if "train" in inside else []
    train_root = inside.get("train", root)
    classes = _class_folders(train_root)
    if len(classes) < 2:
        raise DataError(
            f"{train_root} has {len(classes)} folders with pictures; expected one for each of two or more classes"
        )
    images, labels = _load(classes, size, say)
    if tests and not holdout:
        test_classes = _class_folders(tests[0])
        if unknown := sorted(test_classes.keys() - classes.keys()):
            raise DataError(f"{tests[0]} has classes that {train_root} lacks: {', '.join(unknown)}")
        other_images, other_labels = _load(
            {name: test_classes[name] for name in classes if name in test_classes}, size, say, list(classes)
        )
        parts = Labelled(images, labels), Labelled(other_images, other_labels)
    else:
        aside = _stratified(labels, holdout / len(labels) if holdout else DEFAULT_SHARE, seed)
        parts = Labelled(images[~aside], labels[~aside]), Labelled(images[aside], labels[aside], True)
    counts = zip(
        classes, np.bincount(parts[0].labels), np.bincount(parts[1].labels, minlength=len(classes)), strict=True
    )
    say("pictures to train on and to test on: " + ", ".join(f"{name} {own} and {other}" for name, own, other in counts))
    return *parts, tuple(classes)


def _class_folders(root: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")}


def _load(
    folders: dict[str, Path], size: int, say: Callable[[str], object], names: list[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    images: list[np.ndarray] = []
    labels: list[int] = []
    for name, folder in folders.items():
        found = find_pictures(folder)
        faults, before = list(found.faults), len(images)
        for path in found.pictures:
            try:
                images.append(load_picture(path, size))
            except PictureError as error:
                faults.append(error)
        count = len(images) - before
        for fault in faults:
            say(f"left out: {fault}")
        if found.others:
            say(f"left out of {printable(folder)}: {found.kinds()}, which Pillow does not read")
        if not count:
            raise DataError(f"{printable(folder)} holds no picture that can be read ({found.kinds() or 'it is empty'})")
        if len(faults) > LARGEST_LOSS * (count + len(faults)):
            raise DataError(
                f"{printable(folder)}: {len(faults)} of {count + len(faults)} files cannot be read, more than a tenth"
            )
        labels += [(names or list(folders)).index(name)] * count
    return np.stack(images), np.array(labels, dtype=np.int64)


def _stratified(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which to keep aside, bool (N,): this share of each class, at least one and never all."""
    aside, rng = np.zeros(len(labels), dtype=bool), np.random.default_rng((2034040, seed))
    for k in np.unique(labels):
        of_class = rng.permutation(np.flatnonzero(labels == k))
        aside[of_class[: min(len(of_class) - 1, max(1, round(share * len(of_class))))]] = True
    return aside
