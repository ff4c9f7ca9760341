"""Checks of batches, labels and predictions, and of the network with its images before a run."""

import copy
import dataclasses
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from machinery.data.augment import random_states
from machinery.device import Runtime, eval_mode
from machinery.errors import NonFiniteLossError, SettingError, failure_of_the_machine


def batches_of(loader: Iterable[Any], runtime: Runtime, model: nn.Module | None = None) -> Iterator[tuple]:
    """Yields (images, int64 labels) of any iterable; ValueError for other batches, or labels that would crash a GPU."""
    outputs = 0
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
        if model is not None and runtime.device.type != "cpu":
            outputs = outputs or trial_scores(model, images[:2], runtime).shape[1]
            refuse_labels_beyond(labels, outputs)
        yield images, labels.long()


def refuse_labels_beyond(labels: Tensor, classes: int) -> None:
    """Raises ValueError if a label (N,) on the CPU is not from 0 to classes - 1; elsewhere checking would wait."""
    if labels.device.type == "cpu" and len(wrong := labels[(labels < 0) | (labels >= classes)]):
        raise ValueError(f"labels: label {wrong[0]} is not one of the network's {classes} outputs, 0 to {classes - 1}")


def warn_of_probabilities(scores: Tensor) -> None:
    """Warns if scores (N, classes) look like probabilities rather than logits."""
    if scores.shape[1] > 1 and bool((scores >= 0).all()) and bool(((scores.sum(1) - 1).abs() < 1e-3).all()):
        warnings.warn(
            "the network returns probabilities, which are taken for logits here, so that its losses and confidences "
            "are wrong: leave out its softmax, or return probabilities.log()",
            stacklevel=3,
        )


def in_range(scaler: torch.amp.GradScaler, *values: Tensor) -> tuple[Tensor, ...]:
    """The values of an fp16 step, 0 where they overflowed; NonFiniteLossError once the scale is below 1."""
    if scaler.get_scale() < 1:
        raise NonFiniteLossError("the loss or its gradients are infinite or NaN in every step. Try precision fp32.")
    return tuple(value.nan_to_num(0, 0, 0) for value in values)


def trial_scores(model: nn.Module, images: Tensor, runtime: Runtime, *, training: bool = False) -> Tensor:
    """The model's outputs (N, classes) for images on any device; model and random states stay unchanged."""
    with torch.random.fork_rng([runtime.device] if runtime.device.type == "cuda" else []), torch.no_grad():
        if training:
            return runtime.scores(copy.deepcopy(model).train(), runtime.place(images))
        with eval_mode(model):
            return runtime.scores(model, runtime.place(images))


def check_network(
    model: nn.Module, train_loader: Any, test_loader: Any, runtime: Runtime, layout: str
) -> tuple[Runtime, int]:
    """Runs the network on the first images of both sets, and tells the loaders its number of outputs.

    Returns the runtime, contiguous if the network needs that and `layout` is "auto", and the number of outputs. Raises
    SettingError if the network does not take these images.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise SettingError("model: none of its parameters requires a gradient, so there is nothing to train")
    with random_states():
        sets = (train_loader.dataset, test_loader.dataset)
        images, others = (torch.stack([dataset[i][0] for i in range(len(dataset))[:2]]) for dataset in sets)
    if images.shape[1:] != others.shape[1:]:
        shapes = [tuple(images.shape[1:]), tuple(others.shape[1:])]
        raise SettingError(f"test_set: its images are {shapes[1]}, those of train_set {shapes[0]}")
    try:
        scores = trial_scores(model, images, runtime)
    except (RuntimeError, ValueError) as error:
        if layout == "auto" and runtime.channels_last and "view size is not compatible" in str(error):
            model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            runtime = dataclasses.replace(runtime, channels_last=False)
            return check_network(model, train_loader, test_loader, runtime, layout)
        if failure_of_the_machine(error):
            raise
        raise SettingError(f"model: it does not take images of shape {tuple(images.shape)}: {error}") from error
    warn_of_probabilities(scores)
    for loader in (train_loader, test_loader):
        loader.set_outputs(scores.shape[1])
    sampler = train_loader.sampler
    lasts = {sampler.count(epoch) // sampler.ranks % train_loader.share for epoch in (0, 1)}
    if 1 in lasts and any(isinstance(layer, _BatchNorm) for layer in model.modules()):
        try:
            trial_scores(model, images[:1], runtime, training=True)
        except ValueError as error:
            raise SettingError(f"batch_size: the last batch of an epoch has only one image: {error}") from error
    return runtime, scores.shape[1]


def refuse_half_given(weights: object, model: object, optimizer: object, scheduler: object) -> None:
    """Raises SettingError if arguments of `fit` contradict or lack each other."""
    if model is not None and weights:
        raise SettingError("weights and a model of your own both say where training starts; give one of them")
    if model is None and optimizer is not None:
        raise SettingError("an optimizer of your own needs the model whose parameters it has")
    if optimizer is None and scheduler is not None:
        raise SettingError("scheduler: it needs the optimizer that it is of; give fit both")
