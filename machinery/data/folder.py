"""A folder of pictures, a sub-folder for each class, as arrays in memory."""

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from machinery.errors import DataError
from machinery.data.pictures import (
    Found,
    PictureError,
    find_pictures,
    load_picture,
    names_in,
    no_picture,
)
from machinery.words import printable

READ_AT_ONCE = 64  # files, so that an interruption waits for no more
MAX_THREADS = 8  # each may hold a large picture some times over
LOST = 0.1  # the share of a class's files that may be left out
HELD_OUT = 6  # stands behind the seed, as those in sampling.py
LAYOUTS = (
    "expected a folder with a sub-folder of pictures for each of two or more classes, "
    "or with train/ and test/ (or val/) that hold such sub-folders"
)


def load_image_folder(
    folder: str | Path, size: int = 32, holdout: float = 0.0, seed: int = 0, warn: Callable[[str], object] = print
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
    """A folder of pictures, a sub-folder for each class, as arrays in memory; each is read as `load_picture` reads it.

    Args:
        folder: Holds the classes, or `train/` and `test/` (or `val/`, if there is no `test/`) that hold them. Folders
            inside that of a class belong to the class. Hidden files are left out, links are followed.
        size: Of the square that a picture becomes, in pixels.
        holdout: Where there is no `test/` or `val/`, the share of each class, at least 0 and below 1, that is kept out
            of training and returned to test on.
        seed: Of the draw of what is held out, >= 0.
        warn: Is called with a line for each file that is left out, and for whatever else a user should know.

    Returns:
        (train_images, train_labels, test_images, test_labels, classes): images uint8 (N, size, size, 3), RGB 0-255;
        labels int64 (N,), in order; classes the names of the folders, sorted, those of the labels 0, 1, ... Without
        `test/` and `holdout` there is nothing to test on: (0, size, size, 3) and (0,).

    Raises:
        DataError: There is no such folder, it is laid out otherwise, there are fewer than two classes, a class has no
            picture or more than a tenth of its files cannot be read, or `test/` has a class that `train/` lacks.
        ValueError: `holdout` is out of range.
    """
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout, the share to keep out of training, must be at least 0 and below 1, got {holdout}")
    parts = _parts(Path(folder), warn)
    train, *others = _classes(Path(folder), parts)
    test = others[0] if others else {}
    if len(train) == 1:
        raise DataError(printable(f"{parts[0]}: there is only one class, {next(iter(train))}; {LAYOUTS}"))
    if unknown := [name for name in test if name not in train]:
        raise DataError(printable(f"{parts[1]}: there are classes that {parts[0]} lacks: {', '.join(unknown)}"))
    for found in (*train.values(), *test.values()):  # before reading, which takes longer
        if not found.pictures:
            raise DataError(f"{no_picture(found.folder, found.others)}; each class needs some")
        _refuse_losses(found, _losses(found))
    for part in parts:
        if stray := sum((part / name).is_file() for name in names_in(part)):
            warn(printable(f"{part}: left out what is in no class's folder, files: {stray}"))
    classes = tuple(train)
    images, labels = _read(train, classes, size, warn)
    test_images, test_labels = _read(test, classes, size, warn)
    counts = np.bincount(labels)
    if max(counts) > 2 * min(counts):
        shown = ", ".join(f"{name} {count:,}" for name, count in zip(classes, counts, strict=True))
        warn(f"{printable(parts[0])}: the classes are unbalanced, in pictures: {shown}")
    if holdout and test:
        warn(f"{printable(parts[1])} is tested on, so nothing of {printable(parts[0])} is held out")
    elif holdout:
        aside = draw_aside(labels, classes, holdout, seed)
        images, labels, test_images, test_labels = images[~aside], labels[~aside], images[aside], labels[aside]
    return images, labels, test_images, test_labels, classes


def _parts(folder: Path, warn: Callable[[str], object]) -> list[Path]:
    """The folders that hold those of the classes: `folder` itself, or its train/ and, if it is there, its test/."""
    folders = _subfolders(folder)
    parts = {path.name.lower(): path for path in folders if path.name.lower() in ("train", "test", "val")}
    tests = [parts[name] for name in ("test", "val") if name in parts]
    # A folder "train" with nothing but pictures in it, among others, is the class of trains.
    if len(parts) < len(folders) and not ("train" in parts and tests and _folders_in(parts["train"])):
        return [folder]
    if "train" not in parts:
        raise DataError(printable(f"{folder}: there is no train/ beside {tests[0].name}/; {LAYOUTS}"))
    read = [parts["train"], *tests[:1]]
    if unread := [f"{path.name}/" for path in folders if path not in read]:
        warn(printable(f"{folder}: left out {', '.join(unread)}"))
    return read


def _subfolders(folder: Path) -> list[Path]:
    """In the order of their names; DataError if there are none, or one is a link to nothing."""
    if not (found := _folders_in(folder)):
        raise DataError(printable(f"{folder}: there are no folders in it; {LAYOUTS}"))
    return found


def _folders_in(folder: Path) -> list[Path]:
    try:
        return [path for path in map(folder.joinpath, names_in(folder)) if stat.S_ISDIR(os.stat(path).st_mode)]
    except OSError as error:
        path, reason = Path(error.filename or folder), error.strerror
        if isinstance(error, FileNotFoundError):
            reason = "a link to nothing" if path.is_symlink() else "there is no such folder"
        elif isinstance(error, NotADirectoryError):
            reason = "this is a file"
        raise DataError(printable(f"{path}: {reason}; {LAYOUTS}")) from error


def _classes(folder: Path, parts: list[Path]) -> list[dict[str, Found]]:
    """For each part, what is in the folder of each class; DataError if two of these folders are the same one."""
    folders = [_subfolders(part) for part in parts]
    real = [os.path.realpath(path) for of_part in folders for path in of_part]
    if twice := [path for path, count in Counter(real).items() if count > 1]:
        raise DataError(printable(f"{twice[0]}: two of the classes or parts are this one folder; each needs its own"))
    closed = {*real, *map(os.path.realpath, (folder, *parts))}  # a link to one of these leads to other classes
    return [{printable(path.name): find_pictures(path, closed) for path in of_part} for of_part in folders]


def _read(
    found: dict[str, Found], classes: tuple[str, ...], size: int, warn: Callable[[str], object]
) -> tuple[np.ndarray, np.ndarray]:
    """The pictures of all classes as uint8 (N, size, size, 3), and their labels, int64 (N,)."""
    images, labels = [np.empty((0, size, size, 3), np.uint8)], [np.empty(0, np.int64)]
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:  # Pillow decodes without Python's lock
        for label, name in enumerate(classes):
            if name in found:
                of_class = list(_pictures_of(found[name], size, warn, pool))
                images.append(np.stack(of_class))
                labels.append(np.full(len(of_class), label))
    return np.concatenate(images), np.concatenate(labels)


def _pictures_of(
    found: Found, size: int, warn: Callable[[str], object], pool: ThreadPoolExecutor
) -> Iterator[np.ndarray]:
    """Each (size, size, 3); names what is left out, and raises DataError if that is too much."""

    def attempt(path: str) -> np.ndarray | PictureError:
        try:
            return load_picture(path, size)
        except PictureError as error:
            return error

    lost = _losses(found)
    for loss in lost:
        warn(f"left out: {loss}")
    for start in range(0, len(found.pictures), READ_AT_ONCE):
        for picture in pool.map(attempt, found.pictures[start : start + READ_AT_ONCE]):
            if isinstance(picture, PictureError):
                warn(f"left out: {picture}")
                lost.append(str(picture))
                _refuse_losses(found, lost)
            else:
                yield picture


def _losses(found: Found) -> list[str]:
    """A line for each file that is known not to be readable before it is read."""
    return [*map(str, found.faults), *(printable(f"{path}: not of a kind that is read") for path in found.others)]


def _refuse_losses(found: Found, lost: list[str]) -> None:
    files = len(found.pictures) + len(found.others) + len(found.faults)
    if len(lost) > LOST * files:
        raise DataError(
            printable(
                f"{found.folder}: more than a tenth of the {files} files in this class cannot be read as pictures"
            )
            + f": {'; '.join(lost[:3])}{' ...' if len(lost) > 3 else ''}; take them away, or save them as JPEG or PNG"
        )


def draw_aside(labels: np.ndarray, classes: tuple[str, ...], share: float, seed: int) -> np.ndarray:
    """Which pictures are held out, bool (N,): the share of each class, but at least one, and not all."""
    rng, aside = np.random.default_rng((seed, HELD_OUT)), np.zeros(len(labels), bool)
    for label, name in enumerate(classes):
        of_class = np.flatnonzero(labels == label)
        if len(of_class) < 2:
            raise DataError(f"{name}: one picture is too few to hold some of the class out; two are needed")
        count = min(max(1, round(share * len(of_class))), len(of_class) - 1)
        aside[rng.permutation(of_class)[:count]] = True
    return aside
