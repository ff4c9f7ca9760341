"""Reads files of `torch.save`: checked, loaded as plain data, unwrapped.

Needs nothing but torch, since model.py loads it by its path.
"""

import io
import pickle
import textwrap
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HOLDERS = ("model", "state_dict", "net", "model_state_dict")  # the keys under which checkpoints hold a state dict
WRAPPERS = ("module", "_orig_mod")  # parts of names, of DistributedDataParallel and its like, and of torch.compile
END, END_SIZE = b"PK\5\6", 22  # how the last record of a zip archive begins, and its bytes


class FileError(RuntimeError):
    """A file is missing, damaged, or holds something else; the message names it."""


def read_plain(path: str | Path) -> dict[Any, Any]:
    """The dict of tensors and plain values in a file of `torch.save`, on the CPU; FileError for anything else."""
    try:
        saved = load_plain(Path(path).read_bytes())
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from error
    except pickle.UnpicklingError:  # whose text would advise to run what is in the file
        raise FileError(
            f"{path} holds a whole model or other Python objects, which could run code, so it was not opened; save "
            "tensors and plain values alone, such as torch.save(model.state_dict(), file)"
        ) from None
    except Exception as error:  # damage makes zipfile and torch raise nearly anything
        raise FileError(
            f"{path} is damaged, or not a file of torch.save since version 1.6: restore it from a copy"
        ) from error
    if not isinstance(saved, dict):
        raise FileError(f"{path} holds a {type(saved).__name__}, expected a dict, such as model.state_dict()")
    return saved


def load_plain(content: bytes) -> Any:
    """What `torch.save` wrote as `content`, if whole and plain data; else one of many errors.

    Torch compares no checksums, so it gets an archive written anew from parts whose checksums are right.
    """
    if content[-END_SIZE:][: len(END)] != END:
        raise zipfile.BadZipFile("the end is missing, or more follows")
    checked = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(checked, "w") as copy:
        for part in archive.infolist():
            copy.writestr(part.filename, archive.read(part))
    checked.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a TorchScript archive
        return torch.load(checked, map_location="cpu", weights_only=True)


def read_weights(path: str | Path) -> dict[str, Any]:
    """The weights in a state dict, checkpoint or run's folder as "model", beside the entries of `Net.trained_on`.

    Names are those of the network without wrappers. FileError if there is no state dict.
    """
    path = Path(path)
    if path.is_dir():
        path = next((path / name for name in ("model.pt", "last.pt") if (path / name).exists()), path / "model.pt")
    saved = read_plain(path)
    state = next((saved[key] for key in HOLDERS if isinstance(saved.get(key), dict)), saved)
    if not state or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()):
        raise FileError(f"{path} does not hold the weights of a network, which are names and tensors in a state dict")
    parts = {name: name.split(".") for name in state if name != "n_averaged"}  # the counter of AveragedModel
    weights = {".".join(p for p in parts[name] if p not in WRAPPERS): state[name] for name in parts}
    size = saved.get("size")
    return {
        "model": weights,
        "classes": _sequence(saved.get("classes"), str, tuple),
        "size": size if isinstance(size, int) and size > 0 else None,
        "mean": _sequence(saved.get("mean"), float | int, list),
        "std": _sequence(saved.get("std"), float | int, list),
    }


def read_network(path: str | Path, make: Callable[[int], Any]) -> Any:
    """`make(outputs)` with a file's weights and `trained_on`; FileError if they are of another network."""
    saved = read_weights(path)
    state = saved.pop("model")
    shape = state.get("fc.weight", torch.empty(0)).shape or (0,)
    model = make(max(shape[0], 1))
    try:
        model.load_state_dict(state)
    except Exception as error:  # of other names and shapes, sparse or quantised tensors, and what else there may be
        reason = textwrap.shorten(str(error), 300)
        raise FileError(f"{path} does not hold the weights of a {type(model).__name__}: {reason}") from error
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise FileError(f"{path} holds weights that are infinite or NaN")
    if len(saved["classes"] or ()) != shape[0]:
        saved["classes"] = None
    model.trained_on = saved
    return model


def _sequence(values: Any, kind: Any, make: Callable[[Any], Any]) -> Any:
    """A list or tuple of values of a kind, as a `make`; None for anything else."""
    plain = isinstance(values, list | tuple) and all(isinstance(value, kind) for value in values)
    return make(values) if plain else None
