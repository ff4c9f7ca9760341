"""Training: one `Config`, `train_one_epoch`, `evaluate`, and `fit`, which puts them together.

From a notebook: `history = fit(Config(epochs=4), model)`. From a terminal: `python train.py --epochs 4`.
"""

import dataclasses
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from config import Config, Runtime, SettingError, choose_runtime, describe_hardware, parse_args
from dataset import CIFAR10, make_loader
from model import Net
from optim import recipe_optimizer
from storage import DataError
from utils import plot_curves

PACKAGES = ("torch", "torchvision", "albumentations", "albucore", "opencv-python-headless", "numpy")


class NonFiniteLossError(FloatingPointError):
    """The loss became infinite or NaN, so training on would be useless."""


def train_one_epoch(
    model: nn.Module,
    loader: DataLoader,
    optimizer: Optimizer,
    scheduler: LRScheduler | None = None,
    *,
    runtime: Runtime | None = None,
    label_smoothing: float = 0.0,
    title: str = "train",
    progress: bool | None = None,
) -> tuple[float, float]:
    """One pass over `loader`, a step of optimizer and scheduler per batch.

    Args:
        model: Any network from (N, 3, H, W) to (N, classes), logits or log-probabilities; must be on the device.
        runtime: From `choose_runtime`; by default what that finds best on the model's device.
        title: Stands before the bar.
        progress: Whether to show a bar; by default on a terminal and in a notebook.

    Returns:
        Mean loss (negative log-likelihood in nats, without smoothing, as `evaluate` gives it) and accuracy in percent,
        over the images as they were met in training: augmented, and with the weights of that moment.

    Raises:
        NonFiniteLossError: The loss is infinite or NaN.
    """
    runtime = runtime or _runtime_of(model)
    model.train()
    sums, count = torch.zeros(2, device=runtime.device), 0  # sums of loss and of correct answers
    with _bar(title, len(loader.dataset), progress) as bar:
        for step, (images, labels) in enumerate(loader, 1):
            images, labels = runtime.place(images), labels.to(runtime.device, non_blocking=True)
            with runtime.autocast():
                scores = model(images).float()  # (N, classes)
            loss = F.cross_entropy(scores, labels, label_smoothing=label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if scheduler:
                scheduler.step()
            sums += _sums(scores.detach(), labels)
            count += len(labels)
            if step % 5 == 0 or step == len(loader):  # reading the sums makes a GPU wait
                loss_sum, correct = sums.tolist()
                if not math.isfinite(loss_sum):
                    raise NonFiniteLossError(
                        f"{title}: the loss became {loss_sum} at step {step}. Try a lower lr, "
                        "precision fp32, or look for broken images in your data."
                    )
                bar.set_postfix(loss=f"{loss_sum / count:.3f}", accuracy=f"{100 * correct / count:.1f}%", refresh=False)
            bar.update(len(labels))
    return loss_sum / count, 100 * correct / count


@torch.no_grad()
def predict(model: nn.Module, loader: DataLoader, *, runtime: Runtime | None = None) -> tuple[Tensor, Tensor]:
    """Log-probabilities float32 (N, classes) and labels int64 (N,) of all images, in the loader's order, on the CPU.

    The model is left in the mode, train or eval, in which it came.
    """
    runtime, was_training = runtime or _runtime_of(model), model.training
    scores, labels = [], []
    model.eval()
    try:
        for images, batch_labels in loader:
            with runtime.autocast():
                scores.append(model(runtime.place(images)).float().log_softmax(1).cpu())
            labels.append(batch_labels)
    finally:
        model.train(was_training)
    return torch.cat(scores), torch.cat(labels)


def evaluate(model: nn.Module, loader: DataLoader, *, runtime: Runtime | None = None) -> tuple[float, float]:
    """Mean loss (negative log-likelihood in nats) and accuracy (percent) over all images, each counted once."""
    log_probs, labels = predict(model, loader, runtime=runtime)
    loss_sum, correct = _sums(log_probs, labels).tolist()
    return loss_sum / len(labels), 100 * correct / len(labels)


def _runtime_of(model: nn.Module) -> Runtime:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return dataclasses.replace(choose_runtime(device.type), device=device)


def _sums(scores: Tensor, labels: Tensor) -> Tensor:
    """(2,): the summed negative log-likelihood, and how many answers are right."""
    return torch.stack([F.cross_entropy(scores, labels, reduction="sum"), (scores.argmax(1) == labels).sum()])


def make_loaders(config: Config, pin_memory: bool = False) -> tuple[DataLoader, DataLoader]:
    """The training loader and the test loader (or that of the held-out training images) for these settings."""
    source = {"data": config.data, "data_dir": config.data_dir, "seed": config.seed}
    train_set = CIFAR10(train=True, augment=config.augment, **source)
    if config.holdout:
        if config.holdout >= len(train_set):
            raise SettingError(f"holdout must be below the {len(train_set)} training images, got {config.holdout}")
        order = torch.randperm(len(train_set), generator=torch.Generator().manual_seed(2034040))
        test_set = train_set.subset(order[: config.holdout])
        train_set = train_set.subset(order[config.holdout :], config.augment)
    else:
        test_set = CIFAR10(train=False, **source)
    if config.batch_size > len(train_set):
        raise SettingError(f"batch_size must be at most the {len(train_set)} training images, got {config.batch_size}")
    options = {"batch_size": config.batch_size, "pin_memory": pin_memory}
    return (
        make_loader(train_set, train=True, workers=config.workers, **options),
        make_loader(test_set, train=False, **options),
    )


def fit(config: Config, model: nn.Module | None = None, *, progress: bool | None = None) -> dict[str, list[float]]:
    """Trains `model`, a new `Net` by default, in place, and saves what comes of it in runs/<name>/.

    Args:
        config: All settings.
        model: Any network from (N, 3, 32, 32) to (N, 10). Its weights are where training starts; pass `Net()` made
            after `torch.manual_seed(config.seed)` to start where the default starts.
        progress: Whether to show bars; by default on a terminal and in a notebook.

    Returns:
        The history, a list with a value per epoch under each of "epoch", "train_loss", "train_accuracy", "test_loss",
        "test_accuracy" (losses in nats, accuracies in percent), "lr" (of the filters, when the epoch starts),
        "seconds" (of training alone, since the start), "data", and "tested_on" ("test", or "held-out" with `holdout`).

        Saved after every epoch: metrics.json (history, settings, versions, hardware, times), curves.png, model.pt.

    Raises:
        SettingError: A setting does not fit the data or the machine, or the folder already holds a run.
        storage.DataError: CIFAR-10 is missing or damaged.
        NonFiniteLossError: The loss is infinite or NaN.
    """
    started = time.perf_counter()
    runtime = choose_runtime(config.device, config.precision, config.layout)
    torch.manual_seed(config.seed)
    model = Net() if model is None else model
    model.to(runtime.device)
    if runtime.channels_last:
        model.to(memory_format=torch.channels_last)
    train_loader, test_loader = make_loaders(config, pin_memory=runtime.device.type == "cuda")
    optimizer = recipe_optimizer(model, config.lr)
    steps = config.epochs * len(train_loader)
    scheduler = LambdaLR(optimizer, lambda step: 1 - step / steps)
    folder = _new_folder(config)

    parameters = sum(p.numel() for p in model.parameters())
    images = f"{len(train_loader.dataset):,} images of {config.data}"
    print(f"{type(model).__name__}, {parameters:,} parameters, on {images}; {runtime}; results in {folder}", flush=True)
    tested_on = "held-out" if config.holdout else "test"
    history: dict[str, list] = {}
    result = {
        "data": config.data,
        "network": type(model).__name__,
        "parameters": parameters,
        "history": history,
        "config": dataclasses.asdict(config),
        "runtime": str(runtime),
        "wall_seconds": 0.0,
        "hardware": describe_hardware(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }
    seconds = 0.0
    for epoch in range(1, config.epochs + 1):
        title = f"epoch {epoch}/{config.epochs}" + (" (synthetic)" if config.data == "synthetic" else "")
        epoch_started = time.perf_counter()
        train_loss, train_accuracy = train_one_epoch(
            model,
            train_loader,
            optimizer,
            scheduler,
            runtime=runtime,
            label_smoothing=config.label_smoothing,
            title=title,
            progress=progress,
        )
        seconds += time.perf_counter() - epoch_started
        test_loss, test_accuracy = evaluate(model, test_loader, runtime=runtime)
        row = {
            "epoch": epoch,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "lr": config.lr * (1 - (epoch - 1) / config.epochs),
            "seconds": round(seconds, 2),
            "data": config.data,
            "tested_on": tested_on,
        }
        for column, value in row.items():
            history.setdefault(column, []).append(value)
        print(
            f"{title}: train {train_accuracy:.2f} % (loss {train_loss:.3f}), "
            f"{tested_on} {test_accuracy:.2f} % (loss {test_loss:.3f}), {seconds:.0f} s",
            flush=True,
        )
        result["wall_seconds"] = round(time.perf_counter() - started, 2)
        _write(folder / "metrics.json", lambda path: path.write_text(json.dumps(result, indent=1, default=str) + "\n"))
        _write(folder / "curves.png", lambda path: plot_curves(history).savefig(path, format="png"))
        _write(folder / "model.pt", lambda path: torch.save(model.state_dict(), path))
    return history


def _new_folder(config: Config) -> Path:
    name = config.name or f"{config.data}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path("runs") / name
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise SettingError(f"name: {folder} is there already; choose another name, or move it away") from error
    except OSError as error:
        raise SettingError(f"name: cannot write to {folder}: {error}") from error
    return folder


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes beside the final place, then renames, so that the file is always whole."""
    scratch = path.with_name(f".{path.name}.new")
    write(scratch)
    os.replace(scratch, path)


def _bar(title: str, total: int, progress: bool | None) -> tqdm:
    if progress is not None:
        disable = not progress
    elif "ipykernel" in sys.modules:  # a notebook is no terminal, but shows bars; tqdm's there ignores the variable
        disable = "TQDM_DISABLE" in os.environ
    else:
        disable = None  # without a terminal
    return tqdm(total=total, desc=title, unit=" images", leave=False, disable=disable, dynamic_ncols=True)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    config = parse_args(arguments)
    try:
        fit(config)
    except (SettingError, DataError, NonFiniteLossError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; what was finished is saved in runs/", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
