"""Files of pictures: one of any size, mode and format as pixels, and all those in a folder. They are only read."""

import io
import os
import select
import stat
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

from machinery.errors import DataError
from machinery.words import printable

TURNS = {  # by EXIF orientation, what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
HIDDEN = ("__MACOSX", "Thumbs.db", "desktop.ini")  # beside names that begin with a dot, such as macOS's "._photo.jpg"
PIPE_SECONDS = 30  # without a byte
PIPE_BYTES = 2**28


class PictureError(DataError, ValueError):
    """A file is missing or not a picture, or a folder holds none; the message names it, in one line."""


class Found(NamedTuple):
    """What is in a folder and in the folders in it, each in the order of the names."""

    folder: str
    pictures: list[str]  # files with the suffix of a format that Pillow reads
    others: list[str]  # files of other kinds
    faults: list[PictureError]  # broken links, pipes, folders that cannot be read


def load_picture(path: str | Path, size: int = 32) -> np.ndarray:
    """A picture file of any size and mode -> uint8 (size, size, 3), RGB 0-255.

    Turned upright as its EXIF data say, transparent parts on white, of an animation the first image; shrunk until the
    shorter side fits, then cut to the square in the middle. The path may also be that of a pipe.

    Raises:
        PictureError: The file is missing, not a picture, or a folder.
    """
    source = _source(path)
    try:
        with Image.open(source) as picture:
            if picture.mode in ("I", "F"):
                raise ValueError("its grey values have 32 bits and no white; save it with 8 or 16")
            picture.draft(None, (8 * size, 8 * size))  # a large JPEG is read at a half, a quarter or an eighth
            if picture.format == "TIFF":  # Pillow would turn it itself, and fail on metadata that it cannot write
                picture.load_end = lambda: None  # type: ignore[method-assign]
            else:
                picture.load()  # first, for in a PNG metadata may stand behind the pixels
            turn = _turn(picture)
            upright: Image.Image = picture
            if picture.mode.startswith("I;16"):  # which Pillow would cut off at 255
                upright = Image.fromarray((np.asarray(picture) / 257).astype(np.uint8))
            upright = upright.convert("RGBA")
    except Exception as error:  # damage makes Pillow raise nearly anything
        raise PictureError(printable(f"{path}: not a picture that can be read ({error})")) from error
    if turn is not None:
        upright = upright.transpose(turn)
    upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB")
    return np.asarray(ImageOps.fit(upright, (size, size), Image.Resampling.BOX))


def _turn(picture: Image.Image) -> Image.Transpose | None:
    try:
        return TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata make Pillow raise nearly anything, but cost no picture
        return None


def _source(path: str | Path) -> str | Path | io.BytesIO:
    """What Pillow can open; PictureError if the path is not that of a file or a pipe."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISFIFO(mode):
            return io.BytesIO(_read_pipe(path))
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise PictureError(printable(f"{path}: {_reason(path, error)}")) from error
    if stat.S_ISREG(mode):
        return path
    kind = "a folder" if stat.S_ISDIR(mode) else "a device or a socket"
    raise PictureError(printable(f"{path}: {kind}, where the file of a picture was expected"))


def _reason(path: str | Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "a link to nothing" if os.path.islink(path) else "there is no such file"
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _read_pipe(path: str | Path) -> bytes:
    """All that comes through a named pipe; OSError if nothing comes, where reading would wait for ever, or too much."""
    content = bytearray()
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as pipe:
        while select.select([pipe], [], [], PIPE_SECONDS)[0]:
            piece = pipe.read(2**20)
            if piece == b"":
                return bytes(content)
            content += piece or b""
            if len(content) > PIPE_BYTES:
                raise OSError(f"more than {PIPE_BYTES:,} bytes came through this pipe; save the picture as a file")
    raise OSError(f"nothing came through this pipe for {PIPE_SECONDS} seconds; save the picture as a file")


def find_pictures(folder: str | Path, closed: Iterable[str] = ()) -> Found:
    """The files in a folder and its sub-folders, those that may be pictures apart from the others.

    Links are followed, but no folder is entered twice. Hidden files and folders are left out.

    Args:
        closed: Real paths of folders that are not entered.
    """
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found, entered = Found(str(folder), [], [], []), set(closed) - {os.path.realpath(folder)}
    paths = [found.folder]  # still to be looked at, the next one last
    while paths:
        path = paths.pop()
        try:
            mode = os.stat(path).st_mode
            if stat.S_ISDIR(mode):
                real = os.path.realpath(path)
                if real not in entered:
                    entered.add(real)
                    paths += [os.path.join(path, name) for name in reversed(names_in(path))]
                continue
        except OSError as error:
            found.faults.append(PictureError(printable(f"{path}: {_reason(path, error)}")))
            continue
        if not stat.S_ISREG(mode):
            found.faults.append(PictureError(printable(f"{path}: neither a file nor a folder, and not read")))
        elif _kind(path) in suffixes:
            found.pictures.append(path)
        else:
            found.others.append(path)
    return found


def no_picture(folder: str | Path, others: Iterable[str]) -> PictureError:
    """The error for a folder without pictures, which says of which kinds the `others` in it are."""
    kinds = kinds_of(others)
    rest = f" of a kind that is read, only {kinds}; save pictures as JPEG or PNG" if kinds else ""
    return PictureError(printable(f"{folder}: there is no picture in this folder{rest}"))


def kinds_of(files: Iterable[str]) -> str:
    """How many files there are of each kind, by their suffixes, the most frequent first: "2 .heic, 1 .txt"."""
    counts = Counter(_kind(file) or "without a suffix" for file in files)
    return printable(", ".join(f"{count} {kind}" for kind, count in counts.most_common()))


def _kind(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def names_in(folder: str | Path) -> list[str]:
    """What a folder holds, sorted, without what is hidden."""
    return sorted(name for name in os.listdir(folder) if not name.startswith(".") and name not in HIDDEN)
