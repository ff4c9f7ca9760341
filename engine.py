"""One pass over the data: `train_one_epoch`, `evaluate`, `predict`. They take any network and any loader."""

import contextlib
import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sized

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

import distributed
from config import Runtime, choose_runtime
from errors import NonFiniteLossError
from on_device import Captured


@dataclasses.dataclass
class Meter:
    """What an epoch has come to so far: batches and images met, seconds of training, and sums over the images.

    If `losses` is a list, that of each image (of a mixed one, of the mix) is appended, a tensor (B,) per batch.
    """

    sums: Tensor  # (2,): of the loss in nats, and of the right answers
    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    losses: list[Tensor] | None = None


def train_one_epoch(
    model: nn.Module,
    loader: DataLoader,
    optimizer: Optimizer,
    scheduler: LRScheduler | None = None,
    *,
    runtime: Runtime | None = None,
    label_smoothing: float = 0.0,
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    title: str = "train",
    progress: bool | None = None,
    meter: Meter | None = None,
    after_step: Callable[[], None] | None = None,
    step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> tuple[float, float]:
    """One pass over `loader`, a step of optimizer and scheduler per batch.

    Args:
        model: Any network from (N, 3, H, W) to (N, classes), logits or log-probabilities; must be on the device.
        runtime: From `choose_runtime`; by default what that finds best on the model's device.
        mix: Called with images and labels, int64 (N,), of every batch, and returns what to train on in their place;
            the labels may then be float (N, classes), the share of each. `torchvision.transforms.v2.CutMix` is such.
        title: Stands before the bar.
        progress: Whether to show a bar; by default on a terminal and in a notebook.
        meter: Counts here, from where it stands: an epoch that was interrupted goes on, if the loader does so, too.
        step: What is done with a batch, from `training_step`; by default made anew. For several epochs, make it once:
            on a CUDA device it is captured as a graph.
        after_step: Called after every step, when all is in a state to be saved.

    Returns:
        Mean loss (negative log-likelihood in nats, without smoothing, as `evaluate` gives it) and accuracy in percent,
        over the images as they were met in training: augmented, and with the weights of that moment. Of mixed images,
        the loss is to all shares, and the class with the largest is the right answer.

    Raises:
        NonFiniteLossError: The loss is infinite or NaN.
        ValueError: The loader gives no images.
    """
    runtime = runtime or _runtime_of(model)
    model.train()
    meter = Meter(torch.zeros(2, device=runtime.device)) if meter is None else meter
    before, started = meter.seconds, time.perf_counter()
    step = step or training_step(model, optimizer, runtime, label_smoothing)
    with _bar(title, loader, meter.images, progress) as bar:
        for images, labels in loader:
            images, labels = runtime.place(images), labels.to(runtime.device, non_blocking=True)
            if mix:
                images, labels = mix(images, labels)
            sums, losses = step(images, labels)
            count = len(labels)
            if distributed.world_size() > 1:
                count = int(distributed.sum_over_ranks(sums.new_tensor([count])))
            if meter.losses is not None:
                meter.losses.append(distributed.interleave_over_ranks(losses, count))
            if scheduler:
                scheduler.step()
            meter.sums += sums
            meter.steps += 1
            meter.images += count
            meter.seconds = before + time.perf_counter() - started
            if meter.steps % (5 if runtime.device.type == "cpu" else 1000) == 0:  # reading the sums makes a GPU wait
                mean_loss, accuracy = _means(meter, title)
                bar.set_postfix(loss=f"{mean_loss:.3f}", accuracy=f"{accuracy:.1f}%", refresh=False)
            bar.update(count)
            if after_step:
                after_step()
    return _means(meter, title)


def training_step(
    model: nn.Module, optimizer: Optimizer, runtime: Runtime, label_smoothing: float = 0.0
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What is done with a batch: forward, backward, and a step of the optimizer.

    Takes images and labels, and returns the sums of `_sums` over all processes and the loss of each image, (B,).
    """

    def step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with runtime.autocast():
            scores = model(images).float()  # (N, classes)
        loss = F.cross_entropy(scores, labels, label_smoothing=label_smoothing)
        sums = _sums(scores.detach(), labels)
        if distributed.world_size() > 1:
            whole = distributed.sum_over_ranks(torch.cat([sums, sums.new_tensor([len(labels)])]))
            loss = loss * len(labels) * distributed.world_size() / whole[2]  # a mean over images, not over processes
            sums = whole[:2]
        losses = F.cross_entropy(scores.detach(), labels, reduction="none")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return sums, losses

    return Captured(step) if runtime.device.type == "cuda" and distributed.world_size() == 1 else step


def _means(meter: Meter, title: str) -> tuple[float, float]:
    loss_sum, correct = meter.sums.tolist()
    if not meter.images:
        raise ValueError(f"{title}: the loader gives no images")
    if not math.isfinite(loss_sum):
        raise NonFiniteLossError(
            f"{title}: the loss became {loss_sum} at step {meter.steps}. Try a lower lr, precision fp32, or look for "
            "broken images in your data."
        )
    return loss_sum / meter.images, 100 * correct / meter.images


@contextlib.contextmanager
def answering(model: nn.Module) -> Iterator[None]:
    """Puts a model into eval mode inside the `with`, then back into the mode in which it came."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def predict(model: nn.Module, loader: DataLoader, *, runtime: Runtime | None = None) -> tuple[Tensor, Tensor]:
    """Log-probabilities float32 (N, classes) and labels int64 (N,) of all images, in the loader's order, on the CPU.

    The model is left in the mode, train or eval, in which it came.
    """
    runtime = runtime or _runtime_of(model)
    scores, labels = [], []
    with answering(model):
        for images, batch_labels in loader:
            with runtime.autocast():
                scores.append(model(runtime.place(images)).float().log_softmax(1).cpu())
            labels.append(batch_labels.cpu())
    if not scores:
        raise ValueError("the loader gives no images")
    return torch.cat(scores), torch.cat(labels)


def evaluate(model: nn.Module, loader: DataLoader, *, runtime: Runtime | None = None) -> tuple[float, float]:
    """Mean loss (negative log-likelihood in nats) and accuracy (percent) over all images, each counted once."""
    runtime = runtime or _runtime_of(model)
    log_probs, labels = predict(model, loader, runtime=runtime)
    sums = torch.tensor([*_sums(log_probs, labels).tolist(), len(labels)], dtype=torch.float32, device=runtime.device)
    loss_sum, correct, count = distributed.sum_over_ranks(sums).tolist()
    return loss_sum / count, 100 * correct / count


def _runtime_of(model: nn.Module) -> Runtime:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return dataclasses.replace(choose_runtime(device.type), device=device)


def _sums(scores: Tensor, labels: Tensor) -> Tensor:
    """(2,): the summed negative log-likelihood, and how many answers are right: of shares of classes, the largest."""
    right = labels if labels.ndim == 1 else labels.argmax(1)
    return torch.stack([F.cross_entropy(scores, labels, reduction="sum"), (scores.argmax(1) == right).sum()])


def _bar(title: str, loader: DataLoader, initial: int, progress: bool | None) -> tqdm:
    if distributed.rank() > 0:
        disable = True
    elif progress is not None:
        disable = not progress
    elif "ipykernel" in sys.modules:  # whose bars are no matter of a terminal, and ignore the variable
        disable = "TQDM_DISABLE" in os.environ
    else:
        disable = None  # tqdm shows none where there is no terminal
    total = len(loader.sampler) * distributed.world_size() if isinstance(loader.sampler, Sized) else None
    return tqdm(
        total=total, initial=initial, desc=title, unit=" images", leave=False, disable=disable, dynamic_ncols=True
    )
