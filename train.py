"""Training: one `Config`, `train_one_epoch`, `evaluate`, and `fit`, which puts them together.

From a notebook: `history = fit(Config(epochs=4), model)`. From a terminal: `python train.py --epochs 4`.
"""

import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

import distributed
from checkpoint import CheckpointError, StopRequest, stop_requests
from config import Config, Runtime, SettingError, choose_runtime, parse_args
from dataset import CIFAR10, end_workers, make_loader
from model import Net
from optim import recipe_optimizer
from runs import (
    MachineError,
    Meter,
    NonFiniteLossError,
    Run,
    StoppedError,
    UnsavedError,
    after_restart,
    failure_of_the_machine,
    free_folder,
)
from storage import DataError, prepare


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
    meter: Meter | None = None,
    after_step: Callable[[], None] | None = None,
) -> tuple[float, float]:
    """One pass over `loader`, a step of optimizer and scheduler per batch.

    Args:
        model: Any network from (N, 3, H, W) to (N, classes), logits or log-probabilities; must be on the device.
        runtime: From `choose_runtime`; by default what that finds best on the model's device.
        title: Stands before the bar.
        progress: Whether to show a bar; by default on a terminal and in a notebook.
        meter: Counts here, from where it stands: an epoch that was interrupted goes on, if the loader does so, too.
        after_step: Called after every step, when all is in a state to be saved.

    Returns:
        Mean loss (negative log-likelihood in nats, without smoothing, as `evaluate` gives it) and accuracy in percent,
        over the images as they were met in training: augmented, and with the weights of that moment.

    Raises:
        NonFiniteLossError: The loss is infinite or NaN.
    """
    runtime = runtime or _runtime_of(model)
    model.train()
    meter = Meter(torch.zeros(2, device=runtime.device)) if meter is None else meter
    before, started = meter.seconds, time.perf_counter()
    with _bar(title, len(loader.dataset), meter.images, progress) as bar:
        for images, labels in loader:
            images, labels = runtime.place(images), labels.to(runtime.device, non_blocking=True)
            with runtime.autocast():
                scores = model(images).float()  # (N, classes)
            loss = F.cross_entropy(scores, labels, label_smoothing=label_smoothing)
            sums, count = _sums(scores.detach(), labels), len(labels)
            if distributed.world_size() > 1:
                whole = distributed.add_up(torch.cat([sums, sums.new_tensor([count])]))
                loss = loss * count * distributed.world_size() / whole[2]  # a mean over images, not over processes
                sums, count = whole[:2], int(whole[2])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if scheduler:
                scheduler.step()
            meter.sums += sums
            meter.steps += 1
            meter.images += count
            meter.seconds = before + time.perf_counter() - started
            if meter.steps % 5 == 0:  # reading the sums makes a GPU wait
                mean_loss, accuracy = _means(meter, title)
                bar.set_postfix(loss=f"{mean_loss:.3f}", accuracy=f"{accuracy:.1f}%", refresh=False)
            bar.update(count)
            if after_step:
                after_step()
    return _means(meter, title)


def _means(meter: Meter, title: str) -> tuple[float, float]:
    loss_sum, correct = meter.sums.tolist()
    if not math.isfinite(loss_sum):
        raise NonFiniteLossError(
            f"{title}: the loss became {loss_sum} at step {meter.steps}. Try a lower lr, precision fp32, or look for "
            "broken images in your data."
        )
    return loss_sum / meter.images, 100 * correct / meter.images


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
    runtime = runtime or _runtime_of(model)
    log_probs, labels = predict(model, loader, runtime=runtime)
    sums = torch.tensor([*_sums(log_probs, labels).tolist(), len(labels)], dtype=torch.float32, device=runtime.device)
    loss_sum, correct, count = distributed.add_up(sums).tolist()
    return loss_sum / count, 100 * correct / count


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
    size, ranks = len(train_set), distributed.world_size()
    if config.batch_size > size:
        raise SettingError(f"batch_size must be at most the {size} training images, got {config.batch_size}")
    if config.batch_size % ranks or 0 < size % config.batch_size < ranks:
        raise SettingError(
            f"batch_size must be a multiple of the {ranks} processes and leave none of them without images in the last "
            f"batch of the {size}, got {config.batch_size}"
        )
    options = {"batch_size": config.batch_size, "pin_memory": pin_memory, "rank": distributed.rank(), "ranks": ranks}
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

        Saved in the folder: see `runs.Run`.

    Raises:
        SettingError: A setting does not fit the data or the machine, or the folder already holds a run.
        storage.DataError: CIFAR-10 is missing or damaged.
        CheckpointError: The run to be resumed is missing, damaged, or of another network.
        NonFiniteLossError: The loss is infinite or NaN; the last checkpoint is from before.
        MachineError: Memory ran out, or a process that prepares images died; the last checkpoint is from before.
        StoppedError: Someone asked for an end; all is saved, and the message says how to go on.
        UnsavedError: Training ended, but the disk did not take the result.
    """
    runtime = choose_runtime(config.device, config.precision, config.layout)
    with distributed.process_group(runtime.device.type):
        return _fit(after_restart(config), model, runtime, progress)


def _fit(config: Config, model: nn.Module | None, runtime: Runtime, progress: bool | None) -> dict[str, list[float]]:
    if not config.resume:
        distributed.from_rank_0(lambda: free_folder(config))  # refused now, and not after a long download
    torch.manual_seed(config.seed)
    model = Net() if model is None else model
    if distributed.rank():
        torch.manual_seed(config.seed + distributed.rank())  # else the dropout of all processes would be the same
    if config.data == "cifar10":
        distributed.first_on_each_machine(lambda: prepare(config.data_dir))
    model.to(runtime.device)
    if runtime.channels_last:
        model.to(memory_format=torch.channels_last)
    train_loader, test_loader = make_loaders(config, pin_memory=runtime.device.type == "cuda")
    optimizer = recipe_optimizer(model, config.lr)
    steps = config.epochs * len(train_loader)
    scheduler = LambdaLR(optimizer, lambda step: 1 - step / steps)
    run = Run(config, model, optimizer, scheduler, runtime)
    train_loader.sampler.epoch, train_loader.sampler.start = run.epochs, run.meter.images

    ranks = distributed.world_size()
    run.say(
        f"{type(model).__name__}, {run.result['parameters']:,} parameters, on {len(train_loader.dataset):,} images of "
        f"{config.data}; {runtime}{f', {ranks} processes' if ranks > 1 else ''}; results in {run.folder}"
        + (f", going on after {run.epochs} epochs and {run.meter.steps} steps" if config.resume else "")
    )
    try:
        with stop_requests() as request, distributed.parallel(model) as network:
            _run_epochs(run, network, train_loader, test_loader, runtime, request, progress)
    except (RuntimeError, MemoryError, ConnectionError, EOFError) as error:
        if cause := failure_of_the_machine(error):
            raise MachineError(f"{cause}\n{run.how_to_go_on()}") from error
        raise
    finally:
        run.release()
        end_workers(train_loader)
    run.check()
    return run.history


def _run_epochs(
    run: Run,
    network: nn.Module,
    train_loader: DataLoader,
    test_loader: DataLoader,
    runtime: Runtime,
    request: StopRequest,
    progress: bool | None,
) -> None:
    """The epochs that `run` still lacks."""
    config = run.config

    def after_step() -> None:
        stop = distributed.largest(request.signal)  # of all processes, which are asked at different moments
        if stop or run.is_due():
            run.save()
        if stop:
            distributed.largest(0)  # the others wait until it is saved, for torchrun ends all when one ends
            raise StoppedError(run, stop)

    for epoch in range(run.epochs + 1, config.epochs + 1):
        title = f"epoch {epoch}/{config.epochs}" + (" (synthetic)" if config.data == "synthetic" else "")
        train_loss, train_accuracy = train_one_epoch(
            network,
            train_loader,
            run.optimizer,
            run.scheduler,
            runtime=runtime,
            label_smoothing=config.label_smoothing,
            title=title,
            progress=progress,
            meter=run.meter,
            after_step=after_step,
        )
        test_loss, test_accuracy = evaluate(run.model, test_loader, runtime=runtime)
        if not math.isfinite(test_loss):
            raise NonFiniteLossError(f"{title}: the weights became infinite or NaN. Try a lower lr, or precision fp32.")
        row = {
            "epoch": epoch,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "lr": config.lr * (1 - (epoch - 1) / config.epochs),
            "seconds": round(run.history.get("seconds", [0.0])[-1] + run.meter.seconds, 2),
            "data": config.data,
            "tested_on": "held-out" if config.holdout else "test",
        }
        run.say(
            f"{title}: train {train_accuracy:.2f} % (loss {train_loss:.3f}), "
            f"{row['tested_on']} {test_accuracy:.2f} % (loss {test_loss:.3f}), {row['seconds']:.0f} s"
        )
        run.finish_epoch(row)
        stop = distributed.largest(request.signal)
        if stop and epoch < config.epochs:
            distributed.largest(0)
            raise StoppedError(run, stop)


def _bar(title: str, total: int, initial: int, progress: bool | None) -> tqdm:
    if distributed.rank() > 0:
        disable = True
    elif progress is not None:
        disable = not progress
    elif "ipykernel" in sys.modules:  # a notebook is no terminal, but shows bars; tqdm's there ignores the variable
        disable = "TQDM_DISABLE" in os.environ
    else:
        disable = None  # without a terminal
    return tqdm(
        total=total, initial=initial, desc=title, unit=" images", leave=False, disable=disable, dynamic_ncols=True
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    config = parse_args(arguments)
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started, the one that speaks
    try:
        fit(config)
    except StoppedError as stopped:
        if first:
            print(f"\n{stopped}", file=sys.stderr)
        return 128 + stopped.signal
    except (SettingError, DataError, CheckpointError, NonFiniteLossError, MachineError, UnsavedError) as error:
        if first:
            print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if first:
            print("\nstopped at once; what was saved before is in runs/, and --resume goes on from it", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
