"""Files of trained weights: checked before they are believed, then taken out of whatever they are wrapped in."""

import contextlib
import hashlib
import io
import json
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

IN_A_RUN = ("model.pt", "last.pt")  # the files of a run's folder that hold weights, the first one first
HOLDERS = ("model", "state_dict", "net", "model_state_dict")  # the keys under which checkpoints hold a state dict
WRAPPERS = ("module", "_orig_mod")  # parts of names, of DistributedDataParallel and its like, and of torch.compile
DIGEST_SIZE = hashlib.sha256().digest_size  # of what follows the content of a last.pt
END, END_SIZE = b"PK\5\6", 22  # how the last record of a zip archive begins, and its bytes


class WeightsError(RuntimeError):
    """A file of weights is missing, damaged or of another network; the message names it."""


def read_weights(path: str | Path, sha256: str | None = None) -> dict[str, Any]:
    """The state dict in a file of `torch.save`, on the CPU, and what is known of its classes and images.

    Every checksum in the file is compared before anything is loaded, and nothing but plain data is ever unpickled.

    Args:
        path: A state dict, or a checkpoint that holds one as "model", "state_dict", "net" or "model_state_dict"; a
            run's last.pt, or its folder, which stands for model.pt or else last.pt.
        sha256: Of the whole file, in hexadecimal, if it is known.

    Returns:
        "model": name -> Tensor, named as in the network without wrappers; "classes": a tuple of names, or None; and
        "images": "size", "mean" and "std" of the images that it was trained on, or nothing; the last two from the
        checkpoint or from the metrics.json beside it.

    Raises:
        WeightsError: The file is missing, damaged, not the one with this sha256, or holds anything else.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in IN_A_RUN if (path / name).exists()]
        if not found:
            raise WeightsError(f"{path}: the weights cannot be read (the folder holds no {' or '.join(IN_A_RUN)})")
        path = found[0]
    try:
        content = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"{path}: the weights cannot be read ({error.strerror})") from error
    if sha256 and hashlib.sha256(content).hexdigest() != sha256:
        raise WeightsError(f"{path} is not the file that belongs to this model.py; take both anew from one version")
    saved = _plain_data(content, path)
    state = next((saved[key] for key in HOLDERS if isinstance(saved.get(key), dict)), saved)
    if not state or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()):
        raise WeightsError(f"{path} does not hold the weights of a Net: expected names and tensors, as in a state dict")
    beside = None
    with contextlib.suppress(OSError, ValueError):
        beside = json.loads(path.with_name("metrics.json").read_bytes())
    names = (_class_names(record) for record in (saved, saved.get("result"), beside))
    images = (record.get("images") for record in (saved.get("result"), beside) if isinstance(record, dict))
    kinds = filter(lambda images: isinstance(images, dict) and images.keys() == {"size", "mean", "std"}, images)
    return {"model": _unwrapped(state), "classes": next(filter(None, names), None), "images": next(kinds, {})}


def load_weights(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Copies `state` into `model`, in the model's own precision.

    Raises:
        WeightsError: They do not fit each other, or a weight is infinite or NaN; the message names `path`.
    """
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    given = {name: value.shape for name, value in state.items()}
    other = [name for name in {**wanted, **given} if wanted.get(name) != given.get(name)]
    if other:
        raise WeightsError(
            f"{path} does not hold the weights of a {type(model).__name__}: {len(other)} entries are missing, unknown "
            f"or of another shape, such as {other[0]}"
        )
    try:
        model.load_state_dict(state)
    except Exception as error:  # of sparse or quantised tensors, and what else a file may hold
        raise WeightsError(f"{path} does not hold the weights of a {type(model).__name__}: {error}") from error
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise WeightsError(f"{path} holds weights that are infinite or NaN")


def _plain_data(content: bytes, path: Path) -> dict[Any, Any]:
    """What `torch.save` wrote, if it is whole and no more than a dict of plain data; {} if it is plain, but no dict."""
    if hashlib.sha256(content[:-DIGEST_SIZE]).digest() == content[-DIGEST_SIZE:]:
        content = content[:-DIGEST_SIZE]
    try:
        if content[-END_SIZE:][: len(END)] != END:
            raise zipfile.BadZipFile("the end is missing, or more follows")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a TorchScript archive
            saved = torch.load(_checked(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # whose text would advise to run what is in the file
        raise WeightsError(
            f"{path} holds a whole model or other Python objects, which could run code, so it was not opened; save the "
            "weights alone: torch.save(model.state_dict(), file)"
        ) from None
    except Exception as error:  # damage makes zipfile and torch raise nearly anything
        raise WeightsError(
            f"{path} does not hold the weights of a Net: it is damaged, or not a file of torch.save since version 1.6"
        ) from error
    return saved if isinstance(saved, dict) else {}


def _checked(content: bytes) -> io.BytesIO:
    """The zip archive in `content`, written anew from its parts, each of which must have the right checksum.

    Torch compares no checksums, and believes a damaged table of contents where this reader does not; so it gets a table
    that is made anew.
    """
    checked = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(checked, "w") as copy:
        for part in archive.infolist():
            copy.writestr(part.filename, archive.read(part))
    checked.seek(0)
    return checked


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the names that the network has without wrappers, and without the counter of `AveragedModel`."""
    parts = {name: name.split(".") for name in state if name != "n_averaged"}
    return {".".join(p for p in parts[name] if p not in WRAPPERS): state[name] for name in parts}


def _class_names(record: Any) -> tuple[str, ...] | None:
    names = record.get("classes") if isinstance(record, dict) else None
    plain = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return tuple(names) if plain and names else None
