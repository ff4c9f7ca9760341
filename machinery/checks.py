"""What a loop is given, looked at: batches, answers, and, before a run begins, the network with the first images."""

import copy
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from machinery.device import Runtime, answering
from machinery.distributed import failure_of_the_machine
from machinery.errors import NonFiniteLossError, SettingError

# Of 6 views: how far the image moves, in pixels (down, right), and the weight of that place; each with its mirror
# image. As in airbench (K. Jordan, 2024).
VIEWS = (((0, 0), 0.5), ((1, 1), 0.25), ((-1, -1), 0.25))


def batches_of(loader: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of any iterable, images and labels; labels of other integers as int64.

    Raises:
        ValueError: A batch is something else, in one sentence.
    """
    for batch in loader:
        if not isinstance(batch, tuple | list) or len(batch) != 2 or not all(isinstance(p, Tensor) for p in batch):
            length = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
            raise ValueError(f"a batch must be two tensors, (images, labels), got a {type(batch).__name__}{length}")
        images, labels = batch
        if labels.ndim != 1 or labels.is_floating_point() or len(labels) != len(images):
            raise ValueError(
                f"labels must be integers (N,), one for each of the N images, got {labels.dtype} {tuple(labels.shape)} "
                f"with images {tuple(images.shape)}; labels of shape (N, 1) become such by labels.squeeze(1)"
            )
        yield images, labels.long()


def views_of(images: Tensor, views: int) -> Iterator[tuple[Tensor, float]]:
    """The images themselves for 1, and their six views for 6, (N, C, H, W) each, with weights that sum to 1.

    Raises:
        ValueError: Another number of views.
    """
    if views not in (1, 6):
        raise ValueError(f"views must be 1 or 6 (the image, moved by a pixel two ways, each mirrored), got {views}")
    if views == 1:
        yield images, 1.0
        return
    height, width = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1), "reflect")
    for (down, right), weight in VIEWS:
        moved = padded[:, :, 1 - down : 1 - down + height, 1 - right : 1 - right + width]
        yield moved, weight / 2
        yield moved.flip(3), weight / 2


def refuse_labels_beyond(labels: Tensor, classes: int, where: str) -> None:
    """Raises ValueError if a label (N,) is below 0 or not below `classes`; looks on the CPU only, where it is free."""
    if labels.device.type == "cpu" and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        wrong = int(labels.max()) if int(labels.max()) >= classes else int(labels.min())
        raise ValueError(f"{where}: label {wrong} is not one of the network's {classes} outputs, 0 to {classes - 1}")


def refuse_non_finite(scores: Tensor, batch: int) -> None:
    """Raises NonFiniteLossError if an answer is infinite or NaN."""
    if not scores.isfinite().all():
        raise NonFiniteLossError(
            f"batch {batch}: answers are infinite or NaN; look for broken images there, or for such weights"
        )


def in_range(scaler: torch.amp.GradScaler, *values: Tensor) -> tuple[Tensor, ...]:
    """The values of a step in fp16, with 0 where they overflowed.

    Raises:
        NonFiniteLossError: Steps overflowed until the scale fell below 1, so it is not for its size.
    """
    if scaler.get_scale() < 1:
        raise NonFiniteLossError("the loss or its gradients are infinite or NaN in every step. Try precision fp32.")
    return tuple(value.nan_to_num(0, 0, 0) for value in values)


def try_out(
    model: nn.Module, train_set: Any, test_set: Any, batch_size: int, runtime: Runtime, layout: str
) -> tuple[Runtime, int]:
    """Lets the network, on its device, answer the first images of both sets, and leaves it and all random states as
    they were.

    Args:
        batch_size: Of a process.
        layout: As in `Config`; where it is "auto", a network that only takes contiguous images gets such.

    Returns:
        The runtime, maybe with another layout, and the number of classes that the network tells apart.

    Raises:
        SettingError: It does not take these images, or a set holds something else, in one sentence.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise SettingError("model: none of its parameters requires a gradient, so there is nothing to train")
    images = _first_images(train_set, "train_set")
    others = _first_images(test_set, "test_set")
    if images.shape[1:] != others.shape[1:]:
        raise SettingError(
            f"test_set: its images are {tuple(others.shape[1:])}, those of train_set {tuple(images.shape[1:])}"
        )
    try:
        scores = _answers(model, images, runtime)
    except RuntimeError as error:
        if failure_of_the_machine(error):
            raise
        if "view size is not compatible" not in str(error) or layout != "auto" or not runtime.channels_last:
            raise SettingError(f"model: it does not take images of shape {tuple(images.shape)}: {error}") from error
        runtime = dataclasses.replace(runtime, channels_last=False)
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        scores = _answers(model, images, runtime)
    except ValueError as error:
        raise SettingError(f"model: {error}") from error
    for name, dataset in (("train_set", train_set), ("test_set", test_set)):
        try:
            refuse_labels_beyond(torch.as_tensor(_labels_of(dataset)), scores.shape[1], name)
        except ValueError as error:
            raise SettingError(str(error)) from error
    if len(train_set) % batch_size == 1 and any(isinstance(layer, _BatchNorm) for layer in model.modules()):
        try:
            _answers(copy.deepcopy(model).train(), images[:1], runtime)
        except ValueError as error:
            raise SettingError(
                f"batch_size: the last batch of {len(train_set)} images has only one, of which BatchNorm cannot take a "
                f"variance, got {batch_size}"
            ) from error
    return runtime, scores.shape[1]


def _answers(model: nn.Module, images: Tensor, runtime: Runtime) -> Tensor:
    with torch.random.fork_rng(), torch.no_grad():
        if model.training and len(images) == 1:
            return runtime.scores(model, runtime.place(images))
        with answering(model):
            return runtime.scores(model, runtime.place(images))


def _first_images(dataset: Any, name: str) -> Tensor:
    """Of a Dataset, float32 (1 or 2, C, H, W)."""
    with torch.random.fork_rng():
        items = [dataset[i] for i in range(min(2, len(dataset)))]
    for item in items:
        image = item[0] if isinstance(item, tuple | list) and len(item) == 2 else None
        if not isinstance(image, Tensor) or image.ndim != 3 or not image.is_floating_point():
            found = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else f"a {type(item).__name__}"
            raise SettingError(f"{name}: an item must be (float tensor (C, H, W), label), got {found}")
        if isinstance(item[1], float) or (isinstance(item[1], Tensor) and item[1].ndim):
            raise SettingError(f"{name}: a label must be an integer, got {item[1]!r}")
    if len({item[0].shape for item in items}) > 1:
        raise SettingError(
            f"{name}: images must have one size, got {' and '.join(str(tuple(i[0].shape)) for i in items)}"
        )
    return torch.stack([item[0] for item in items])


def told_by(dataset: Any, *names: str) -> Any:
    """The first of these attributes that a Dataset has, or the one that it wraps; else None."""
    for name in names:
        if hasattr(dataset, name):
            return getattr(dataset, name)
    return told_by(dataset.dataset, *names) if hasattr(dataset, "dataset") else None


def _labels_of(dataset: Any) -> Any:
    """All labels, where a Dataset tells them without reading its images; else none."""
    if isinstance(dataset, torch.utils.data.Subset):
        inside = torch.as_tensor(_labels_of(dataset.dataset))
        return inside[torch.as_tensor(dataset.indices)] if len(inside) else ()
    if isinstance(dataset, torch.utils.data.ConcatDataset):
        return torch.cat([torch.as_tensor(_labels_of(part)) for part in dataset.datasets])
    if isinstance(dataset, torch.utils.data.TensorDataset):
        return dataset.tensors[-1]
    if hasattr(dataset, "dataset"):
        return _labels_of(dataset.dataset)
    labels = told_by(dataset, "labels", "targets")
    return () if labels is None else labels
