"""Training: `fit`, which puts settings, data, network, optimizer and loops together.

From a notebook: `history = fit(Config(epochs=4), model)`. From a terminal: `python train.py --epochs 4`.
"""

import itertools
import math
import os
import sys
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import distributed
from checkpoint import CheckpointError, StopRequest, stop_requests
from config import Config, Runtime, SettingError, choose_runtime, keep_freed_memory, parse_args
from dataset import CIFAR10, CLASSES, EpochSampler, end_workers, make_loader
from engine import evaluate, predict, train_one_epoch, training_step
from errors import MachineError, NonFiniteLossError, StoppedError, UnsavedError, failure_of_the_machine
from model import Net, WeightsError
from on_device import AUGMENTATIONS as ON_DEVICE
from on_device import DeviceLoader
from optim import recipe_optimizer
from runs import Run, after_restart, unused_folder
from storage import DataError, prepare

__all__ = ["Config", "evaluate", "fit", "make_loaders", "predict", "train_one_epoch"]


def make_loaders(
    config: Config, pin_memory: bool = False, device: torch.device | None = None
) -> tuple[DataLoader, DataLoader]:
    """The training loader and the test loader (or that of the held-out training images) for these settings.

    On a CUDA `device` the images live there and are drawn there, where their augmentations can be: see `DeviceLoader`.
    """
    source: dict[str, Any] = {"data": config.data, "data_dir": config.data_dir, "seed": config.seed}
    train_set = CIFAR10(train=True, augment=config.augment, padding=config.padding, **source)
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
    # Those of the second epoch, the first that may skip.
    shorter = EpochSampler(size, skip=config.skip, epochs=config.epochs).count(1)
    if config.batch_size % ranks or any(0 < images % config.batch_size < ranks for images in (size, shorter)):
        raise SettingError(
            f"batch_size must be a multiple of the {ranks} processes and leave none of them without images in the last "
            f"batch of the {size}{f' or {shorter}' if shorter < size else ''}, got {config.batch_size}"
        )
    if device is not None and device.type == "cuda" and set(config.augment) <= ON_DEVICE:
        sampler = EpochSampler(size, config.seed, distributed.rank(), ranks, skip=config.skip, epochs=config.epochs)
        parts = (train_set, sampler), (test_set, range(distributed.rank(), len(test_set), ranks))
        loaders: Any = [DeviceLoader(part, config.batch_size, order, device) for part, order in parts]
        return loaders[0], loaders[1]
    options: dict[str, Any] = {"batch_size": config.batch_size, "pin_memory": pin_memory}
    options |= {"rank": distributed.rank(), "ranks": ranks}
    return (
        make_loader(train_set, train=True, workers=config.workers, skip=config.skip, epochs=config.epochs, **options),
        make_loader(test_set, train=False, **options),
    )


def fit(config: Config, model: nn.Module | None = None, *, progress: bool | None = None) -> dict[str, list[float]]:
    """Trains `model`, a new `Net` by default, in place, and saves what comes of it in runs/<name>/.

    Args:
        config: All settings.
        model: Any network from (N, 3, 32, 32) to (N, 10). Its weights are where training starts; pass `Net()` made
            after `torch.manual_seed(config.seed)` to start where the default starts. Not together with
            `config.weights`, which says the same for a `Net`.
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
        WeightsError: The file in `config.weights` is missing, damaged or of another network.
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
        distributed.broadcast_from_rank_0(lambda: unused_folder(config))  # refused now, and not after a long download
    torch.manual_seed(config.seed)
    if config.weights and not config.resume:
        if model is not None:
            raise SettingError("weights and a model of your own both say where training starts; give one of them")
        model = distributed.broadcast_from_rank_0(lambda: Net.from_pretrained(config.weights))
    model = Net() if model is None else model
    if distributed.rank():
        # Else the dropout and CutMix of all processes would be the same.
        torch.manual_seed(config.seed + distributed.rank())
    if config.data == "cifar10":
        distributed.once_per_machine(lambda: prepare(config.data_dir))
    keep_freed_memory()
    model.to(runtime.device)
    if runtime.channels_last:
        model.to(memory_format=torch.channels_last)
    train_loader, test_loader = make_loaders(config, runtime.device.type == "cuda", runtime.device)
    optimizer = recipe_optimizer(model, config.lr)
    if runtime.device.type == "cuda":  # for the graph, which reads the rates from there
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], device=runtime.device)
    sampler = cast(EpochSampler, train_loader.sampler)
    lengths = (math.ceil(sampler.count(epoch) / config.batch_size) for epoch in range(config.epochs))
    ends = [0, *itertools.accumulate(lengths)]  # the steps at which epochs end
    scheduler = LambdaLR(optimizer, lambda step: 1 - float(np.interp(step, ends, range(len(ends)))) / config.epochs)
    run = Run(config, model, optimizer, scheduler, sampler, runtime)

    ranks = distributed.world_size()
    run.say(
        f"{type(model).__name__}, {run.result['parameters']:,} parameters, on {sampler.size:,} images of "
        f"{config.data}; {runtime}{f', {ranks} processes' if ranks > 1 else ''}\nresults in {run.folder}"
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
    mix = v2.RandomApply([v2.CutMix(num_classes=len(CLASSES))], config.cutmix) if config.cutmix else None

    def after_step() -> None:
        stop = distributed.max_over_ranks(request.signal)  # of all processes, which are asked at different moments
        if stop or run.is_due():
            run.save()
        if stop:
            distributed.max_over_ranks(0)  # the others wait until it is saved, for torchrun ends all when one ends
            raise StoppedError(run.how_it_stopped(), stop)

    step = training_step(network, run.optimizer, runtime, config.label_smoothing)
    for epoch in range(run.epochs + 1, config.epochs + 1):
        title = f"epoch {epoch}/{config.epochs}" + (" (synthetic)" if config.data == "synthetic" else "")
        train_loss, train_accuracy = train_one_epoch(
            network,
            train_loader,
            run.optimizer,
            run.scheduler,
            runtime=runtime,
            label_smoothing=config.label_smoothing,
            mix=mix,
            title=title,
            progress=progress,
            meter=run.meter,
            after_step=after_step,
            step=step,
        )
        if run.meter.losses is not None:
            run.sampler.note(epoch - 1, torch.cat(run.meter.losses))
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
        stop = distributed.max_over_ranks(request.signal)
        if stop and epoch < config.epochs:
            distributed.max_over_ranks(0)
            raise StoppedError(run.how_it_stopped(), stop)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    config = parse_args(arguments)
    rank = os.environ["RANK"] if distributed.launch_id() else "0"
    first = rank == "0"  # of the processes that torchrun started, the one that speaks
    try:
        fit(config)
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
