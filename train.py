"""Training: `train_one_epoch`, `evaluate` and `predict`, and `fit`, which makes a whole run of them.

From a notebook: `history = fit(Config(epochs=4), model)`. From a terminal: `python train.py --epochs 4`.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import Dataset

from dataset import CLASSES, make_loaders
from machinery import distributed
from machinery.calibration import temperature_of
from machinery.checks import batches_of, in_range, refuse_labels_beyond, refuse_non_finite, views_of
from machinery.config import Config, parse_args, resumed
from machinery.device import Captured, Runtime, answering, choose_runtime, describe_hardware, runtime_of, training_mode
from machinery.errors import (
    CheckpointError,
    DataError,
    MachineError,
    NonFiniteLossError,
    SettingError,
    StoppedError,
    UnsavedError,
)
from machinery.metrics import Meter
from machinery.optim import recipe_optimizer
from machinery.run import running
from model import Net, WeightsError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Config", "evaluate", "fit", "make_loaders", "predict", "resumed", "train_one_epoch", "training_step"]
__all__ += ["choose_runtime", "describe_hardware", "recipe_optimizer", "temperature_of"]
__all__ += ["CheckpointError", "DataError", "MachineError", "NonFiniteLossError", "SettingError", "StoppedError"]
__all__ += ["UnsavedError", "WeightsError"]

Batches = Iterable[tuple[Tensor, Tensor]]  # images (N, 3, H, W), normalised, and labels, int64 (N,)


def train_one_epoch(
    model: nn.Module,
    loader: Batches,
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
    step: Callable[[Tensor, Tensor], tuple[Tensor, ...]] | None = None,
) -> tuple[float, float]:
    """One pass over `loader`, a step of optimizer and scheduler per batch.

    Args:
        model: Any network from (N, 3, H, W) to (N, classes), logits or log-probabilities; must be on the device.
        loader: Any iterable of batches, such as a DataLoader or a list.
        scheduler: Stepped after every batch, not after the epoch.
        runtime: From `choose_runtime`; by default what that finds best on the model's device.
        mix: Called with images and labels, int64 (N,), of every batch, and returns what to train on in their place;
            the labels may then be float (N, classes), the share of each. `torchvision.transforms.v2.CutMix` is such.
        title: Stands before the bar.
        progress: Whether to show a bar; by default on a terminal and in a notebook.
        meter: Counts here, from where it stands: an epoch that was interrupted goes on, if the loader does so, too.
        after_step: Called after every step, when all is in a state to be saved.
        step: What is done with a batch, from `training_step`, with the optimizer and the label smoothing that it was
            made with; by default made anew. For several epochs, make it once: on a CUDA device it is captured as a
            graph.

    Returns:
        Mean loss (negative log-likelihood in nats, without smoothing, as `evaluate` gives it) and accuracy in percent,
        over the images as they were met in training: augmented, and with the weights of that moment. Of mixed images,
        the loss is to all shares, and the class with the largest is the right answer.

    Raises:
        NonFiniteLossError: The loss is infinite or NaN.
        ValueError: The loader gives no images, or something else than (images, labels); or the network answers with
            something else than scores (N, classes) for these labels.
        TypeError: The scheduler cannot be stepped so.
    """
    if isinstance(scheduler, ReduceLROnPlateau):
        raise TypeError("scheduler is stepped after every batch; step ReduceLROnPlateau yourself, after evaluate")
    runtime = runtime or runtime_of(model)
    meter = meter or Meter(torch.zeros(2, device=runtime.device))
    step = step or training_step(model, optimizer, runtime, label_smoothing)
    training_mode(model)
    with meter.start(title, loader, progress) as bar:
        for images, labels in batches_of(loader):
            images, labels = runtime.place(images), labels.to(runtime.device, non_blocking=True)
            if mix:
                images, labels = mix(images, labels)
            sums, losses = step(images, labels)
            if scheduler:
                scheduler.step()
            meter.add(sums, losses, bar)
            if after_step:
                after_step()
    return meter.means(title)


def training_step(
    model: nn.Module,
    optimizer: Optimizer,
    runtime: Runtime,
    label_smoothing: float = 0.0,
    scaler: torch.amp.GradScaler | None = None,
) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """What is done with a batch: forward, backward, and a step of the optimizer.

    Takes images and labels, and returns the sums of `_sums` over all processes, and the loss of each image, (B,). In
    fp16, the scaler leaves out steps whose gradients overflow, and such a loss counts as 0; if every step overflows, a
    NonFiniteLossError is raised.
    """
    scaler = scaler or runtime.scaler()

    def step(images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        scores = runtime.scores(model, images)  # (N, classes)
        if labels.ndim == 1:
            refuse_labels_beyond(labels, scores.shape[1], "labels")
        loss = F.cross_entropy(scores, labels, label_smoothing=label_smoothing)
        sums = distributed.sum_over_ranks(_sums(scores.detach(), labels))
        losses = F.cross_entropy(scores.detach(), labels, reduction="none")
        optimizer.zero_grad()
        scaler.scale(distributed.mean_over_ranks(loss, len(labels), sums[2])).backward()
        scaler.step(optimizer)
        scaler.update()
        return (sums, losses) if runtime.precision != "fp16" else in_range(scaler, sums, losses)

    capturable = runtime.device.type == "cuda" and runtime.precision != "fp16" and distributed.world_size() == 1
    return Captured(step) if capturable else step


@torch.no_grad()
def predict(
    model: nn.Module, loader: Batches, *, runtime: Runtime | None = None, views: int = 1
) -> tuple[Tensor, Tensor]:
    """Log-probabilities float32 (N, classes) and labels int64 (N,) of all images, in the loader's order, on the CPU.

    The model is left in the mode, train or eval, in which it came.

    Args:
        model: As in `train_one_epoch`.
        loader: Likewise.
        runtime: Likewise.
        views: With 6, test-time augmentation: the mean of the log-probabilities for the image (half of the weight) and
            for two copies moved by a pixel, each with its mirror image. Say so wherever you report the accuracy.

    Raises:
        ValueError: The loader gives no images, or something else than (images, labels).
        NonFiniteLossError: An answer is infinite or NaN.
    """
    runtime = runtime or runtime_of(model)
    answers, labels = [], []
    with answering(model):
        for number, (images, batch_labels) in enumerate(batches_of(loader), 1):
            answer: Tensor | int = 0
            for view, weight in views_of(runtime.place(images), views):
                answer = answer + weight * runtime.scores(model, view).log_softmax(1)  # (N, classes)
            answers.append(torch.as_tensor(answer).cpu())
            labels.append(batch_labels.cpu())
            refuse_non_finite(answers[-1], number)
    if not answers:
        raise ValueError("the loader gives no images")
    return torch.cat(answers), torch.cat(labels)


def evaluate(
    model: nn.Module, loader: Batches, *, runtime: Runtime | None = None, views: int = 1
) -> tuple[float, float]:
    """Mean loss (negative log-likelihood in nats) and accuracy (percent) over all images, each counted once.

    Arguments and errors are those of `predict`.
    """
    runtime = runtime or runtime_of(model)
    log_probs, labels = predict(model, loader, runtime=runtime, views=views)
    refuse_labels_beyond(labels, log_probs.shape[1], "labels")
    sums = _sums(log_probs, labels).to(runtime.device)
    loss_sum, correct, count = distributed.sum_over_ranks(sums).tolist()
    return loss_sum / count, 100 * correct / count


def _sums(scores: Tensor, labels: Tensor) -> Tensor:
    """(3,): the summed negative log-likelihood, how many answers are right, and of how many images.

    Of shares of classes, the largest is the right one.
    """
    right = (scores.argmax(1) == (labels if labels.ndim == 1 else labels.argmax(1))).sum()
    loss = F.cross_entropy(scores, labels, reduction="sum")
    return torch.stack([loss, right, torch.full_like(right, len(labels))])


def fit(
    config: Config,
    model: nn.Module | None = None,
    *,
    train_set: Dataset | None = None,
    test_set: Dataset | None = None,
    optimizer: Optimizer | None = None,
    scheduler: LRScheduler | None = None,
    on_epoch: Callable[[dict[str, Any]], object] | None = None,
    progress: bool | None = None,
) -> dict[str, list]:
    """Trains `model`, a new `Net` by default, in place, and saves what comes of it in runs/<name>/.

    If it is a `Net` and was tested on held-out images, its logits are divided by `temperature_of` these in the end, so
    that its probabilities are right as often as they say.

    Args:
        config: All settings.
        model: Any network from (N, 3, H, W) to (N, classes). Its weights are where training starts; pass `Net()` made
            after `torch.manual_seed(config.seed)` to start where the default starts. Not together with
            `config.weights`, which says the same for a `Net`.
        train_set: Any Dataset of (float tensor (3, H, W), label), in the place of CIFAR-10. A `Net` made here has an
            output for each of its `classes`.
        test_set: Likewise, together with a train_set; without it, `config.holdout` says how many of the training
            images are kept aside.
        optimizer: Of your own, over the model's parameters. The learning rate then stays what it is, but for a
            scheduler; `config.lr` is not used.
        scheduler: Of your own, of that optimizer; stepped after every batch.
        on_epoch: Called after every epoch, when it is saved, with what the history got of it.
        progress: Whether to show bars; by default on a terminal and in a notebook.

    Returns:
        The history, a list with a value per epoch under each of "epoch", "train_loss", "train_accuracy", "test_loss",
        "test_accuracy" (losses in nats, accuracies in percent), "lr" (of the filters, when the epoch starts),
        "seconds" (of training alone, since the start), "data", and "tested_on" ("test", or "held-out" with `holdout`).

        Saved in the folder: see `machinery.run.Run`.

    Raises:
        SettingError: A setting, or what was given besides, does not fit the data or the machine, or the folder already
            holds a run.
        DataError: CIFAR-10 is missing or damaged.
        CheckpointError: The run to be resumed is missing, damaged, or of another network.
        WeightsError: The file in `config.weights` is missing, damaged or of another network.
        NonFiniteLossError: The loss is infinite or NaN; the last checkpoint is from before.
        MachineError: Memory ran out, a process that prepares images died, or another one of this run died or cannot be
            reached; the last checkpoint is from before.
        StoppedError: Someone asked for an end; all is saved, and the message says how to go on.
        UnsavedError: Training ended, but the disk did not take the result.
    """
    loaders = functools.partial(make_loaders, train_set=train_set, test_set=test_set)
    with running(config, model, optimizer, scheduler, network=_network, loaders=loaders, draw=_curves) as run:
        step = training_step(run.network, run.optimizer, run.runtime, config.label_smoothing, run.scaler)
        for title in run.epochs_left():
            train = train_one_epoch(
                run.network,
                run.train_loader,
                run.optimizer,
                run.scheduler,
                runtime=run.runtime,
                mix=run.mix,
                title=title,
                progress=progress,
                meter=run.meter,
                after_step=run.after_step,
                step=step,
            )
            test = evaluate(run.model, run.test_loader, runtime=run.runtime)
            run.finish_epoch(train, test, on_epoch)
        run.calibrate(lambda: predict(run.model, run.test_loader, runtime=run.runtime))
    return run.history


def _network(weights: str | None, classes: int, names: tuple[str, ...] | None = None) -> Net:
    if not weights:
        return Net(classes)
    net = Net.from_pretrained(None if weights == "pretrained" else weights, num_classes=classes)
    if names and names != (net.classes or CLASSES):  # as many as those of the weights, or fewer, but others
        net.fc = Net(classes).fc
    return net


def _curves(history: dict[str, list]) -> "Figure":
    from utils import plot_curves  # noqa: PLC0415  Matplotlib, which only the end of an epoch has to wait for

    return plot_curves(history)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    rank = os.environ["RANK"] if distributed.launch_id() else "0"
    first = rank == "0" or os.environ.get("LOCAL_RANK") == "0"  # of torchrun's processes, on each machine one speaks
    try:
        fit(parse_args(arguments))
    except StoppedError as stopped:
        if first:
            print(f"\n{stopped}", file=sys.stderr)
        return 128 + stopped.signal
    except MachineError as error:  # of this process; the others only see that it is gone
        print(f"{'' if first else f'process {rank}: '}error: {error}", file=sys.stderr)
        return 1
    except (SettingError, DataError, CheckpointError, WeightsError, NonFiniteLossError, UnsavedError) as error:
        if first:
            print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if first:
            print("\nstopped at once; if there is a runs/NAME/last.pt, --resume runs/NAME goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
