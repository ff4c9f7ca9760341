"""CIFAR-10 on disk: found, checked by md5, unpacked or downloaded; and synthetic images."""

import http.client
import os
import socket
import urllib.error
from pathlib import Path

import numpy as np
from filelock import FileLock
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, download_url, extract_archive

from machinery.errors import DataError, DataUnreachableError

FOLDER, ARCHIVE = CIFAR10.base_folder, CIFAR10.filename
PART = f".{ARCHIVE}.part"  # the name of the archive while it is downloaded
NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ValueError)
SYNTHETIC_COUNTS = {True: 2_000, False: 1_000}  # images to train and to test: enough to see that all works


def load_cifar10(train: bool, root: str | Path | None = None, download: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """The training or test set as (uint8 (N, 32, 32, 3) RGB 0-255, int64 (N,)); DataError as `prepare`."""
    dataset = CIFAR10(prepare(root, download), train)
    return dataset.data, np.asarray(dataset.targets, dtype=np.int64)


def prepare(data_dir: str | Path | None = None, download: bool = True) -> Path:
    """The folder that holds a complete, checked `cifar-10-batches-py`, unpacked or downloaded if need be.

    Searches `data_dir`, `$CIFAR10_ROOT` and `./data`, each for the folder, then for `cifar-10-python.tar.gz`, which can
    repair a damaged folder; else downloads that into the first, from `$CIFAR10_URL` or torchvision's address. DataError
    if data is damaged or out of reach.
    """
    roots = [Path(root).expanduser() for root in (data_dir, os.environ.get("CIFAR10_ROOT"), "data") if root]
    roots = [root.parent if root.name == FOLDER else root for root in roots]
    root = next((root for root in roots if (root / FOLDER).is_dir() or (root / ARCHIVE).exists()), roots[0])
    archive, is_unpacked = root / ARCHIVE, (root / FOLDER).is_dir()
    if archive.exists() and not is_unpacked:  # beside itself, or where that is read-only, elsewhere
        root = next((place for place in (root, *roots) if os.access(place, os.W_OK)), root)
    if damaged := damaged_files(root / FOLDER):
        if (is_unpacked or archive.exists()) and not check_integrity(archive, CIFAR10.tgz_md5):
            faults = [str(root / FOLDER / name) for name in damaged] if is_unpacked else [str(archive)]
            raise DataError(
                f"CIFAR-10 is damaged, and was not read; altered, truncated or missing: {', '.join(faults)}; delete "
                f"{root / FOLDER if is_unpacked else archive} and run again, and it is unpacked or downloaded anew"
            )
        _install(root, archive, download, ", ".join(str(place.absolute()) for place in roots))
    return root


def damaged_files(folder: Path) -> list[str]:
    """The dataset's files that are missing or differ from torchvision's md5."""
    expected = [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]
    return [name for name, md5 in expected if not check_integrity(folder / name, md5)]


def _install(root: Path, archive: Path, download: bool, looked: str) -> None:
    """Unpacks the archive, downloaded if missing, unless another process has."""
    url = os.environ.get("CIFAR10_URL") or CIFAR10.url
    try:
        if not archive.exists() and not download:
            raise ValueError("it may not be downloaded (download=False)")
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".cifar10.lock"):
            timeout = socket.getdefaulttimeout()
            socket.setdefaulttimeout(30)  # seconds without a byte, not for the whole download
            try:
                if not archive.exists():
                    download_url(url, root, PART, CIFAR10.tgz_md5)
                    (root / PART).replace(archive)
                if damaged_files(root / FOLDER):
                    extract_archive(archive, root)
            finally:
                socket.setdefaulttimeout(timeout)
    except (*NETWORK_ERRORS, OSError, RuntimeError) as error:  # RuntimeError for a wrong md5, as of an error page
        raise (DataUnreachableError if isinstance(error, NETWORK_ERRORS) else DataError)(
            f"CIFAR-10 was not found in {looked}, and cannot be brought from {url} to {root}: "
            f"{error or type(error).__name__}; put {ARCHIVE} into one of these folders, name its folder with "
            "--data-dir or CIFAR10_ROOT, name a mirror with CIFAR10_URL, or take synthetic images: --data synthetic"
        ) from error


def draw_synthetic(train: bool, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Drawn shapes of ten classes in place of CIFAR-10: (uint8 (N, 32, 32, 3), int64 (N,))."""
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
