"""Picture files of any size, mode and format as pixels, and a folder of classes as arrays."""

import contextlib
import functools
import hashlib
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

from machinery.errors import DataError, printable

# The composed Unicode form; macOS and archives made there decompose "é" into two code points.
nfc = functools.partial(unicodedata.normalize, "NFC")
# The words in the name of a folder that say that it is to train, to test or to validate on.
SPLITS = ("train|training", "test|testing", "val|valid|validation|dev|eval")
# What operating systems put beside pictures; other such names begin with a dot, as macOS's "._photo.jpg".
SYSTEM_NAMES = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "Thumbs.db", "desktop.ini"}


class PictureError(DataError, ValueError):
    """A file is missing or not a picture, or a folder holds none."""


class LoadedFolder(NamedTuple):
    """Images uint8 (N, size, size, 3), RGB 0-255; labels int64 (N,)."""

    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: tuple[str, ...]  # the names of the folders, sorted, for the labels 0, 1, ...
    is_validation: bool  # no folder is for testing, so the test images are a validation split of the others


def load_picture(path: str | Path, size: int = 32) -> np.ndarray:
    """A picture file of any size and mode -> uint8 (size, size, 3), RGB 0-255.

    Turned upright by its EXIF data, transparency on white, first frame of an animation; resized so that the shorter
    side fits, then cropped to the centre square. PictureError if the file is missing or not a picture.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe could wait for ever, reading a device never end
            raise ValueError("this is no regular file; save the picture as one")
        with Image.open(path) as picture:
            if picture.mode in ("I", "F"):
                raise ValueError("its grey values have 32 bits and no white; save it with 8 or 16")
            picture.draft(None, (8 * size, 8 * size))  # a large JPEG is read at a half, a quarter or an eighth
            picture.load()  # first, for in a PNG metadata may stand behind the pixels
            orientation = 1
            with contextlib.suppress(Exception):  # damaged metadata cost no picture
                orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
            upright: Image.Image = picture
            if picture.mode.startswith("I;16"):  # which Pillow would cut off at 255
                upright = Image.fromarray((np.asarray(picture) / 257).astype(np.uint8))
            upright = upright.convert("RGBA")
    except Exception as error:  # damage makes Pillow raise nearly anything
        raise PictureError(printable(f"{path}: not a picture that can be read ({error})")) from error
    upright.info.clear()  # `exif_transpose` writes the metadata anew, and fails where they are damaged
    upright.getexif()[ExifTags.Base.Orientation] = orientation
    upright = ImageOps.exif_transpose(upright)
    upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB")
    return np.asarray(ImageOps.fit(upright, (size, size), Image.Resampling.BOX))


def load_pictures(paths: Sequence[str], size: int) -> list[np.ndarray | PictureError]:
    """For each path what `load_picture` returns or raises."""

    def attempt(path: str) -> np.ndarray | PictureError:
        try:
            return load_picture(path, size)
        except PictureError as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # each may hold a large picture some times over
        return list(pool.map(attempt, paths))


def find_pictures(folder: str | Path, entered: set[str]) -> tuple[list[str], list[str], list[PictureError]]:
    """In a folder and below, sorted: files with a suffix that Pillow reads, other visible files, unreadable folders.

    Links are followed, but not to the real paths in `entered`, which collects the folders read.
    """
    suffixes = tuple(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)
    found: tuple[list[str], list[str]] = ([], [])
    errors: list[OSError] = []
    for root, folders, files in os.walk(folder, onerror=errors.append, followlinks=True):
        folders[:] = _in_order(folders)
        if (real := os.path.realpath(root)) in entered:
            errors.append(OSError(0, "a link to a folder that is read elsewhere", root))
            folders[:], files = [], []
        entered.add(real)
        for name in _in_order(files):  # a link to nothing, or a pipe, is found out when it is read
            found[not name.lower().endswith(suffixes)].append(os.path.join(root, name))
    if not found[0]:
        errors.append(OSError(0, "there is no picture in this folder of a kind that is read", str(folder)))
    for paths in found:
        paths.sort(key=lambda path: nfc(path).split(os.sep))
    return *found, [PictureError(printable(f"{error.filename}: {error.strerror}")) for error in errors]


def load_image_folder(
    folder: str | Path, size: int = 32, share: float = 0.2, seed: int = 0, warn: Callable[[str], object] = print
) -> LoadedFolder:
    """Reads a folder of pictures, one sub-folder per class, into memory as `load_picture` does.

    Sub-folders are splits if each name contains a word of `SPLITS`, set off by "_", "-", "." or spaces, or if one for
    training and one for testing or validation share a class name; otherwise they are classes. Folders inside a class
    belong to it. Without a test split, pictures whose hash of seed and relative path lies below `share` are for
    validation, a choice that is stable when the folder grows; at least one of each class, and not all. `warn` gets a
    line for each file left out.

    DataError if the folder is missing or laid out otherwise, there are fewer than two classes, a class has no picture
    (or only one, where some are for validation), or over a tenth of its files cannot be read.
    """
    if not 0 < share < 1:
        raise ValueError(f"share, of the pictures for validation, must be above 0 and below 1, got {share}")
    try:
        splits = _splits(Path(folder), warn)
        train, test = [*(_folders_in(split) for split in splits), {}][:2]
    except OSError as error:
        raise _layout_error(error.filename, str(error.strerror)) from error
    classes = tuple(train)
    if len(train) < 2 or (len(splits) == 2 and not test):
        raise _layout_error(folder, f"there are {len(train)} classes to train on, and {len(test)} to test on")
    if unknown := sorted(test.keys() - train.keys()):
        raise DataError(printable(f"{splits[1]}: there are classes that {splits[0]} lacks: {', '.join(unknown)}"))
    entered = set(map(os.path.realpath, (folder, *splits)))
    images, labels, paths = _read(train, classes, size, entered, warn)
    if test:
        test_images, test_labels, _ = _read(test, classes, size, entered, warn)
        return LoadedFolder(images, labels, test_images, test_labels, classes, is_validation=False)
    if min(counts := np.bincount(labels)) < 2:
        raise DataError(f"{classes[counts.argmin()]}: one picture is too few; one is to train on and one to validate")
    aside = validation_split([os.path.relpath(path, splits[0]) for path in paths], labels, share, seed)
    return LoadedFolder(images[~aside], labels[~aside], images[aside], labels[aside], classes, is_validation=True)


def validation_split(paths: Sequence[str], labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which pictures are for validation, bool (N,), by their relative paths."""
    keys = (f"{seed}/{nfc(Path(path).as_posix())}".encode("utf-8", "surrogateescape") for path in paths)
    draws = np.array([int.from_bytes(hashlib.sha256(key).digest()[:6], "big") / 2**48 for key in keys])  # 0 to 1
    chosen = draws < share
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        chosen[of_class[draws[of_class].argmin()]] = True
        chosen[of_class[draws[of_class].argmax()]] = False
    return chosen


def _splits(folder: Path, warn: Callable[[str], object]) -> list[Path]:
    """The folders that hold the classes: `folder` itself, or its training split and, if any, its test split."""
    holds = {path: frozenset(_folders_in(path)) for path in _folders_in(folder).values()}
    train, test, val = (
        [path for path in holds if re.search(rf"(^|[-_. ])({words})($|[-_. ])", path.name.lower())] for words in SPLITS
    )
    if not (holds and holds.keys() == {*train, *test, *val}) and not any(
        holds[a] & holds[b] for a in train for b in test + val
    ):
        if len(holds) > 1 and len(set(holds.values())) == 1 and any(holds.values()):
            raise _layout_error(folder, "all folders in it hold folders of the same names, as classes do not")
        return [folder]
    read = train + (test or val)
    taken = " and ".join(path.name for path in read)
    if len(train) != 1 or len(read) > 2:
        raise _layout_error(folder, f"one folder to train on and one to test on are needed, not {taken}")
    if unread := [path.name for path in holds if path not in read]:
        warn(printable(f"{folder}: read {taken}, left out {', '.join(unread)}"))
    return read


def _folders_in(folder: Path) -> dict[str, Path]:
    """The sub-folders by their names, sorted."""
    paths = [folder / name for name in _in_order(os.listdir(folder))]
    return {printable(nfc(path.name)): path for path in paths if path.is_dir()}


def _read(
    folders: dict[str, Path], classes: tuple[str, ...], size: int, entered: set[str], warn: Callable[[str], object]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Pictures uint8 (N, size, size, 3), labels int64 (N,), and paths; warns of files left out."""
    images: dict[str, np.ndarray] = {}
    labels: list[int] = []
    for name, folder in folders.items():
        pictures, others, faults = find_pictures(folder, entered)
        results = dict(zip(pictures, load_pictures(pictures, size), strict=True))
        read = {path: result for path, result in results.items() if not isinstance(result, PictureError)}
        lost = [str(error) for error in (*faults, *results.values()) if isinstance(error, PictureError)]
        lost += [printable(f"{path}: not of a kind that is read") for path in others]
        for line in lost:
            warn(f"left out: {line}")
        if not read or 9 * len(lost) > len(read):
            raise DataError(
                f"{printable(folder)}: of this class {len(read)} files can be read as pictures and {len(lost)} cannot, "
                "which is more than a tenth or all; take these away, or save them as JPEG or PNG"
            )
        images |= read
        labels += [classes.index(name)] * len(read)
    return np.stack(list(images.values())), np.array(labels), list(images)


def _in_order(names: Iterable[str]) -> list[str]:
    """The names in a folder without hidden and system files, sorted independently of their Unicode form."""
    return sorted((name for name in names if name[0] != "." and name not in SYSTEM_NAMES), key=nfc)


def _layout_error(folder: str | Path, fault: str) -> DataError:
    expected = "expected sub-folders of pictures, one for each of two or more classes, or such in train/ and test/"
    return DataError(printable(f"{folder}: {fault}; {expected}"))
