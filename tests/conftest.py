"""A tiny CIFAR-10 in the real on-disk format, on which every test runs; no test needs a network."""

import contextlib
import hashlib
import os
import pickle
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are of the code, on the CPU that every machine has
os.environ["OMP_NUM_THREADS"] = "1"  # the tests run side by side, and those of one run in two processes round alike
os.environ["MPLBACKEND"] = "Agg"
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # a test may import it before `transforms` says so

import nbformat
import torch
from PIL import Image
from small_runs import few_images, plain, quick, small_network, weights
from torch import Tensor
from torchvision import datasets

import train
from machinery.data.cifar10 import ARCHIVE, FOLDER, draw_synthetic
from train import fit

TRAIN_COUNT, TEST_COUNT = 200, 100
DRAW = train._draw


class TinyCIFAR10:
    """Where the tiny CIFAR-10 lies, and the md5 sums that torchvision has to expect for it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        folder = root / FOLDER
        folder.mkdir()
        images, labels = draw_synthetic(train=True, count=TRAIN_COUNT)
        test_images, test_labels = draw_synthetic(train=False, count=TEST_COUNT)
        parts = [(f"data_batch_{k + 1}", images[k::5], labels[k::5]) for k in range(5)]
        for name, part, part_labels in [*parts, ("test_batch", test_images, test_labels)]:
            rows = part.transpose(0, 3, 1, 2).reshape(len(part), 3072)
            self._write(folder / name, {"data": rows, "labels": part_labels.tolist()})
        self._write(folder / "batches.meta", {"label_names": [str(k) for k in range(10)]})
        self.archive = root.parent / "archive" / ARCHIVE
        self.archive.parent.mkdir()
        with tarfile.open(self.archive, "w:gz") as archive:
            archive.add(folder, FOLDER)
        self.md5 = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in [*folder.iterdir(), self.archive]}

    @staticmethod
    def _write(path: Path, content: dict) -> None:
        path.write_bytes(pickle.dumps(content, protocol=2))

    def expectations(self) -> dict[str, object]:
        """Attributes of `torchvision.datasets.CIFAR10` that make it take this data for the real one."""
        return {
            "train_list": [[f"data_batch_{k}", self.md5[f"data_batch_{k}"]] for k in range(1, 6)],
            "test_list": [["test_batch", self.md5["test_batch"]]],
            "meta": {"filename": "batches.meta", "key": "label_names", "md5": self.md5["batches.meta"]},
            "tgz_md5": self.md5[ARCHIVE],
        }


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCIFAR10:
    root = tmp_path_factory.mktemp("tiny") / "data"
    root.mkdir()
    return TinyCIFAR10(root)


@pytest.fixture
def driver(tiny: TinyCIFAR10, tmp_path: Path) -> Callable[[str], Path]:
    """`driver(patch)` writes train.py's command line for processes of their own: on the tiny data, after `patch`."""

    def write(patch: str = "") -> Path:
        path = tmp_path / "driver.py"
        path.write_text(
            "import os, signal, sys\n"
            f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
            "import torch\nfrom torchvision import datasets\n"
            f"for name, value in {tiny.expectations()!r}.items():\n    setattr(datasets.CIFAR10, name, value)\n"
            f"import train\n{patch}\n"
            "if __name__ == '__main__':\n    sys.exit(train.main(sys.argv[1:]))\n"
        )
        return path

    return write


@pytest.fixture
def tiny_notebook(tiny: TinyCIFAR10, monkeypatch: pytest.MonkeyPatch) -> nbformat.NotebookNode:
    """The notebook without outputs, set to one epoch on the tiny data, for a kernel that finds our modules."""
    repository = Path(__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", str(repository))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel draws into the notebook
    notebook = nbformat.read(repository / "S9_Final.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source += (
        f"\ndata_dir, epochs, batch_size = {str(tiny.root)!r}, 1, 50\n"
        "from torchvision import datasets\n"
        f"for name, value in {tiny.expectations()!r}.items():\n    setattr(datasets.CIFAR10, name, value)"
    )
    return notebook


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder of pictures of thirteen classes."""
    images, _ = draw_synthetic(train=True, count=13 * 4)
    for k, image in enumerate(images):
        path = tmp_path / f"pictures/class {k % 13:02}/{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).resize((40, 36)).save(path)
    return tmp_path / "pictures"


@contextlib.contextmanager
def tiny_cifar10_in(folder: Path, tiny: TinyCIFAR10) -> Iterator[None]:
    """Inside the `with`, CIFAR-10 is the tiny one, no network is reached, and runs go to this folder, without pictures.

    To draw them would take most of the time of a small run; the fixture `drawing` is for tests that look at them.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in tiny.expectations().items():
            patch.setattr(datasets.CIFAR10, name, value)
        patch.setenv("CIFAR10_ROOT", str(tiny.root))
        patch.setenv("CIFAR10_URL", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # nobody listens there
        patch.setattr(train, "_draw", lambda *arguments: None)
        patch.chdir(folder)
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True)
def tiny_root(tiny: TinyCIFAR10, tmp_path: Path) -> Iterator[Path]:
    """Runs each test in an empty folder, on the tiny CIFAR-10."""
    with tiny_cifar10_in(tmp_path, tiny):
        yield tiny.root


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "_draw", DRAW)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny: TinyCIFAR10) -> tuple[Tensor, dict]:
    """The weights and the history of a small run that nobody stopped."""
    with tiny_cifar10_in(tmp_path_factory.mktemp("uninterrupted"), tiny):
        model = small_network()
        history = fit(quick(), model)
    return weights(model), history


@pytest.fixture(scope="session")
def held_out_run(tmp_path_factory: pytest.TempPathFactory, tiny: TinyCIFAR10) -> Path:
    """The folder of a run of a fresh `Net` on eight training images, with eight validation images."""
    folder = tmp_path_factory.mktemp("held-out")
    with tiny_cifar10_in(folder, tiny):
        fit(plain(epochs=1, batch_size=8, name="first"), **few_images(8, is_validation=True))
    return folder / "runs/first"
