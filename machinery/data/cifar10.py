"""CIFAR-10 on disk: found, checked, unpacked, downloaded; or synthetic images in its place.

Nothing is unpickled before its md5 has been checked, and nothing half-written is left behind.
`python -m machinery.data` does it all and says where the data is; status 3 means out of reach, 1 damaged.
"""

import contextlib
import errno
import http.client
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torchvision import datasets
from torchvision.datasets.utils import check_integrity, download_url, extract_archive

from machinery.errors import DataError, DataUnreachableError

FOLDER = datasets.CIFAR10.base_folder  # cifar-10-batches-py
ARCHIVE = datasets.CIFAR10.filename  # cifar-10-python.tar.gz
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO}
SYNTHETIC_COUNTS = {True: 6_000, False: 1_000}  # images to train and to test: enough to see that all works


def load_cifar10(
    train: bool, data_dir: str | Path | None = None, download: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """The training or the test set as (uint8 (N, 32, 32, 3) RGB 0-255, int64 (N,)); see `prepare` for the rest."""
    dataset = Checked(folder_in(prepare(data_dir, download)), train)
    return dataset.data, np.asarray(dataset.targets, dtype=np.int64)


class Checked(datasets.CIFAR10):
    """CIFAR-10 from a folder of files that `prepare` has checked; torchvision would check them again."""

    def __init__(self, folder: Path, train: bool) -> None:
        self.base_folder = folder.name
        super().__init__(folder.parent, train=train, download=False)

    def _check_integrity(self) -> bool:
        return True


def prepare(data_dir: str | Path | None = None, download: bool = True) -> Path:
    """The folder that holds a complete, checked `cifar-10-batches-py`; unpacked or downloaded if need be.

    Looks in `data_dir`, `$CIFAR10_ROOT` and `./data`, in that order, first for the folder, then for the archive
    `cifar-10-python.tar.gz`. Found nowhere, it is downloaded into the first of them, from `$CIFAR10_URL` or else
    from where torchvision says.

    Raises:
        DataError: A file is damaged or missing, or there is no data and it cannot be downloaded.
    """
    roots = search_path(data_dir)
    for root in roots:
        place = root
        if folder_in(root).is_dir():
            _refuse_damage(root)
        elif (root / ARCHIVE).exists():
            place = next(filter(_can_be_written, [root, *roots]), root)
            if (place / FOLDER).is_dir():
                _refuse_damage(place)
            else:
                _install(place, root / ARCHIVE)
        else:
            continue
        if data_dir and place != roots[0]:
            print(f"CIFAR-10 is not in {roots[0]}; taking that in {place}", file=sys.stderr)
        return place
    if not download:
        raise DataUnreachableError(_not_found(roots, "it may not be downloaded (download=False)"))
    _download(roots[0], roots)
    return roots[0]


def search_path(data_dir: str | Path | None = None) -> list[Path]:
    """The folders where CIFAR-10 is looked for, in order; `cifar-10-batches-py` itself stands for its parent."""
    candidates = [data_dir, os.environ.get("CIFAR10_ROOT"), "data"]
    roots = [Path(c).expanduser() for c in candidates if c]
    roots = [root.parent if root.name == FOLDER else root for root in roots]
    return list(dict.fromkeys(roots))


def folder_in(root: Path) -> Path:
    """Where the batch files are, or would be: `cifar-10-batches-py` in `root`, or that itself by another name."""
    inside = root / FOLDER
    itself = not inside.exists() and (root / "data_batch_1").exists()
    return root.absolute() if itself else inside


def _can_be_written(root: Path) -> bool:
    while not root.exists() and root != root.parent:
        root = root.parent
    return os.access(root, os.W_OK)


def _refuse_damage(root: Path) -> None:
    """Raises DataError unless every file of the dataset is there and has the md5 that torchvision expects."""
    expected = [*datasets.CIFAR10.train_list, *datasets.CIFAR10.test_list]
    expected.append([datasets.CIFAR10.meta["filename"], datasets.CIFAR10.meta["md5"]])
    faults = []
    for name, md5 in expected:
        path = folder_in(root) / name
        if not check_integrity(path, md5):
            faults.append(f"  {path}: " + ("altered or truncated (its md5 is wrong)" if path.exists() else "missing"))
    if faults:
        raise DataError(
            "CIFAR-10 is damaged, and was not read:\n"
            + "\n".join(faults)
            + f"\nDelete the folder {folder_in(root)} and run again: it is then unpacked or downloaded anew."
        )


def _install(root: Path, archive: Path) -> None:
    """Checks the archive and unpacks it beside its final place, then renames: the folder is whole or not there."""
    if not check_integrity(archive, datasets.CIFAR10.tgz_md5):
        raise DataError(
            f"{archive} is not the CIFAR-10 archive (its md5 is wrong): an unfinished download, an error page, "
            "or another file. Delete it and run again, or put the right file there "
            f"(md5 {datasets.CIFAR10.tgz_md5})."
        )
    with _scratch_folder(root) as scratch:
        extract_archive(archive, scratch)
        _refuse_damage(scratch)
        try:
            os.rename(scratch / FOLDER, root / FOLDER)
        except OSError:  # another process was faster
            _refuse_damage(root)


def _download(root: Path, looked: list[Path]) -> None:
    """Downloads the archive into a scratch folder and installs it from there; raises DataError if that fails."""
    url = os.environ.get("CIFAR10_URL") or datasets.CIFAR10.url
    existed, timeout = root.exists(), socket.getdefaulttimeout()
    try:
        with _scratch_folder(root) as scratch:
            socket.setdefaulttimeout(30)  # seconds without a byte, not for the whole download
            try:
                download_url(url, scratch, ARCHIVE)
            except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
                if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                    raise  # the network is not to blame
                fault = f"downloading it from {url} failed: {error or type(error).__name__}"
                raise DataUnreachableError(_not_found(looked, fault)) from error
            if not check_integrity(scratch / ARCHIVE, datasets.CIFAR10.tgz_md5):
                fault = f"what {url} sent is not that archive (its md5 is wrong): it broke off, or is another file"
                raise DataError(_not_found(looked, fault))
            _install(root, scratch / ARCHIVE)
    finally:
        socket.setdefaulttimeout(timeout)
        if not existed:
            with contextlib.suppress(OSError):  # never more than an empty folder
                root.rmdir()


def _not_found(looked: list[Path], fault: str) -> str:
    """What to say when no data was found or could be downloaded: where, why, and the three ways out."""
    places = "\n".join(f"  {place.absolute()}" for place in looked)
    return (
        f"CIFAR-10 was not found, neither the folder {FOLDER} nor the archive {ARCHIVE}, in\n{places}\n"
        f"and {fault}\n"
        "Three ways out:\n"
        f"  1. put {ARCHIVE} into one of these folders, or name its folder with --data-dir or CIFAR10_ROOT;\n"
        "  2. name a mirror of the archive with CIFAR10_URL and run again;\n"
        "  3. go on with synthetic images instead: --data synthetic."
    )


@contextlib.contextmanager
def _scratch_folder(root: Path) -> Iterator[Path]:
    """A folder inside `root`, gone afterwards; DataError if the disk does not let it be made or filled."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".cifar10-") as scratch:
            yield Path(scratch)
    except OSError as error:
        raise DataError(f"cannot write CIFAR-10 to {root}: {error}; make room there, or name another folder") from error


def draw_synthetic(train: bool, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """In the place of CIFAR-10: ten kinds of drawn shapes, as (uint8 (N, 32, 32, 3), int64 (N,)), always the same.

    Class k is one shape (disc, ring, square, frame, cross, saltire, bars, columns, checks, triangle) of random
    place, size and colours over a noisy background. Classes take turns, so any count is balanced.
    """
    count = SYNTHETIC_COUNTS[train] if count is None else count
    rng = np.random.default_rng([2034040, int(train)])
    labels = np.arange(count) % 10
    images = np.empty((count, 32, 32, 3), dtype=np.uint8)
    for start in range(0, count, 1000):  # a thousand at a time keeps the scratch arrays small
        kinds = labels[start : start + 1000]
        n = len(kinds)
        centre, half = rng.uniform(12, 20, (2, n, 1, 1)), rng.uniform(6, 11, (n, 1, 1))
        y, x = np.arange(32).reshape(1, 32, 1) - centre[0], np.arange(32).reshape(1, 1, 32) - centre[1]
        radius, side, near = np.hypot(x, y), np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
        square = side < half
        shapes = np.stack(
            [
                radius < half,
                (radius < half) & (radius > half - 3),
                square,
                square & (side > half - 3),
                square & (near < 2.5),
                square & (abs(abs(x) - abs(y)) < 3),
                square & (y % 6 < 3),
                square & (x % 6 < 3),
                square & ((x % 8 < 4) ^ (y % 8 < 4)),
                square & (abs(x) < (y + half) / 2),
            ]
        )[kinds, np.arange(n)]
        dark, light = rng.uniform(0, 100, (n, 1, 1, 3)), rng.uniform(155, 255, (n, 1, 1, 3))
        picture = np.where(shapes[..., None], light, dark) + rng.normal(0, 15, (n, 32, 32, 3))
        images[start : start + n] = picture.clip(0, 255)
    return images, labels
