"""Training: `train_one_epoch`, `evaluate` and `predict`, and `fit`, a whole run of them.

From a notebook: `history = fit(Config(epochs=4), model)`. From a terminal: `python train.py --epochs 4`.
"""

import contextlib
import io
import math
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import Dataset

from dataset import CLASSES, SIZE, Images, make_loaders
from machinery import checks, device, distributed, optim
from machinery.checkpoint import stop_requests, unwrapped
from machinery.config import Config, parse_args, resumed
from machinery.data.augment import EpochSampler, cutmix, views_of
from machinery.data.images import facts_of
from machinery.data.loader import end_workers
from machinery.device import Runtime, choose_runtime, describe_hardware
from machinery.errors import (
    CheckpointError,
    DataError,
    MachineError,
    NonFiniteLossError,
    SettingError,
    StoppedError,
    UnsavedError,
    print_line,
)
from machinery.metrics import Forecast, Meter, temperature_of
from machinery.optim import recipe_optimizer
from machinery.record import facts_of_machine, known_of_data
from machinery.run import Run
from model import Net, WeightsError

__all__ = ["Config", "evaluate", "fit", "make_loaders", "predict", "resumed", "train_one_epoch", "training_step"]
__all__ += ["choose_runtime", "describe_hardware", "recipe_optimizer", "temperature_of"]
__all__ += ["CheckpointError", "DataError", "MachineError", "NonFiniteLossError", "SettingError", "StoppedError"]
__all__ += ["UnsavedError", "WeightsError"]

Batches = Iterable[tuple[Tensor, Tensor]]  # images (N, 3, H, W), normalised, and labels, int64 (N,)

STOP_STEPS = 10  # between two questions whether to stop, for which the processes of a GPU would wait each time
CALIBRATION_IMAGES = 500  # at least, for a temperature


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
    """One pass over `loader`, with a step of optimizer and scheduler per batch.

    Args:
        model: Any network from (N, 3, H, W) to (N, classes), logits or log-probabilities, on the device.
        loader: Any iterable of batches, such as a DataLoader or a list.
        scheduler: Stepped after every batch, not after the epoch; TypeError if it cannot be.
        runtime: From `choose_runtime`; by default the fastest on the model's device.
        mix: Replaces images and labels, int64 (N,), of every batch; its labels may be float (N, classes), as from
            `torchvision.transforms.v2.CutMix`.
        title, progress: Of the bar, and whether to show one; by default on a terminal and in a notebook.
        meter: Counts on from where it stands, as when an epoch resumes.
        after_step: Called after every step.
        step: From `training_step`; by default made anew.

    Returns:
        Mean loss (negative log-likelihood in nats, without smoothing) and accuracy in percent, on the images as
        augmented. Of a mixed image, the class with the largest share counts as correct.

    Raises:
        NonFiniteLossError: The loss is infinite or NaN.
        ValueError: A batch is not (images, labels), or the network's outputs are not (N, classes).
    """
    if isinstance(scheduler, ReduceLROnPlateau):
        raise TypeError("scheduler is stepped after every batch; step ReduceLROnPlateau yourself, after evaluate")
    runtime = runtime or device.runtime_of(model)
    meter = meter or Meter(runtime.device)
    batches = checks.batches_of(loader, runtime, None if step else model)
    step = step or training_step(model, optimizer, runtime, label_smoothing)
    device.training_mode(model)
    with meter.start(title, loader, progress) as bar:
        for images, labels in batches:
            images, labels = runtime.place(images), runtime.move(labels)
            if mix:
                images, labels = mix(images, labels)
            sums, losses = step(images, labels)
            if scheduler and (runtime.precision != "fp16" or optim.has_stepped(optimizer, scheduler)):
                scheduler.step()
            meter.add(sums, losses, bar)
            if after_step:
                after_step()
    return meter.means()


def training_step(
    model: nn.Module,
    optimizer: Optimizer,
    runtime: Runtime,
    label_smoothing: float = 0.0,
    scaler: torch.amp.GradScaler | None = None,
) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """A function of images and labels: forward, loss, backward, and a step of the optimizer.

    It returns `_sums` over all processes, and the loss of each image, (B,). fp16 skips steps whose gradients overflow;
    NonFiniteLossError if every one does.
    """
    scaler = scaler or runtime.scaler()

    def step(images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        scores = runtime.scores(model, images)  # (N, classes)
        if labels.ndim == 1:
            checks.refuse_labels_beyond(labels, scores.shape[1])
        loss = F.cross_entropy(scores, labels, label_smoothing=label_smoothing)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        sums = distributed.sum_over_ranks(_sums(scores.detach(), labels))
        losses = F.cross_entropy(scores.detach(), labels, reduction="none")
        return (sums, losses) if runtime.precision != "fp16" else checks.in_range(scaler, sums, losses)

    return step


@torch.no_grad()
def predict(
    model: nn.Module, loader: Batches, *, runtime: Runtime | None = None, views: int = 1
) -> tuple[Tensor, Tensor]:
    """Log-probabilities float32 (N, classes) and labels int64 (N,), in the loader's order, on the CPU.

    Args:
        model, loader, runtime: As in `train_one_epoch`; the model runs in eval mode, and returns to its own.
        views: With 6, test-time augmentation: the mean over the image (half of the weight) and two copies shifted by a
            pixel, each with its mirror image. Mention it wherever you report the accuracy.

    Raises ValueError as `train_one_epoch` or for no images, NonFiniteLossError if a prediction is infinite or NaN.
    """
    runtime = runtime or device.runtime_of(model)
    predictions, labels = [], []
    with device.eval_mode(model):
        for number, (images, batch_labels) in enumerate(checks.batches_of(loader, runtime), 1):
            mean: Tensor | int = 0
            for view, weight in views_of(runtime.move(images), views):
                scores = runtime.scores(model, runtime.place(view))  # (N, classes)
                if number == 1:
                    checks.warn_of_probabilities(scores)
                mean = mean + weight * scores.log_softmax(1)
            mean = torch.as_tensor(mean)
            predictions.append((mean if views == 1 else mean.log_softmax(1)).cpu())
            labels.append(batch_labels.cpu())
            if not predictions[-1].isfinite().all():
                raise NonFiniteLossError(
                    f"batch {number}: predictions are infinite or NaN; are its images, or weights?"
                )
    if not predictions:
        raise ValueError("the loader gives no images")
    return torch.cat(predictions), torch.cat(labels)


def evaluate(
    model: nn.Module, loader: Batches, *, runtime: Runtime | None = None, views: int = 1
) -> tuple[float, float]:
    """Mean loss (negative log-likelihood in nats) and accuracy (percent) over all images; arguments as in `predict`."""
    runtime = runtime or device.runtime_of(model)
    log_probs, labels = predict(model, loader, runtime=runtime, views=views)
    checks.refuse_labels_beyond(labels, log_probs.shape[1])
    sums = torch.cat([_sums(log_probs, labels), torch.tensor([float(len(labels))])]).to(runtime.device)
    loss_sum, correct, count = distributed.sum_over_ranks(sums).tolist()
    return loss_sum / count, 100 * correct / count


def _sums(scores: Tensor, labels: Tensor) -> Tensor:
    """(2,): the summed negative log-likelihood, and the number of correct predictions, by the largest share."""
    right = (scores.argmax(1) == (labels if labels.ndim == 1 else labels.argmax(1))).sum()
    return torch.stack([F.cross_entropy(scores, labels, reduction="sum"), right])


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
    """Trains `model`, a new `Net` by default, in place, and saves the results in runs/<name>/.

    Args:
        config: All settings.
        model: Any network from (N, 3, H, W) to (N, classes), trained from its present weights. The default starts as
            `Net()` made after `torch.manual_seed(config.seed)`.
        train_set, test_set: Any Datasets of (float tensor (3, H, W), label), instead of CIFAR-10.
        optimizer, scheduler: Of your own, over the model's parameters; the scheduler is stepped after every batch.
        on_epoch: Called after every epoch, once saved, with its row of the history.
        progress: Whether to show bars.

    Returns:
        The history, a list with a value per epoch under each of "epoch", "train_loss", "train_accuracy", "test_loss",
        "test_accuracy" (losses in nats, accuracies in percent), "lr" (of the first group, at the epoch's start),
        "seconds" (of training, cumulative), "data", and "tested_on" ("test", or "held-out" for validation images).

    Raises:
        SettingError: A setting or argument does not fit the data, the machine or the folder.
        DataError, CheckpointError, WeightsError: Data, run or weights are missing, damaged or unfit.
        NonFiniteLossError, MachineError: The loss, memory or a process failed; the last checkpoint is from before.
        StoppedError: Training was asked to stop; all is saved, and the message says how to resume.
        UnsavedError: Training ended, but the result could not be written.
    """
    runtime = choose_runtime(config.device, config.precision, config.layout)
    group = distributed.process_group(runtime.device.type, facts_of_machine(config, runtime))
    with group, Run(config) as run, contextlib.ExitStack() as stack:
        config = run.config
        weights = None if run.state else config.weights
        checks.refuse_half_given(weights, model, optimizer, scheduler)
        by_recipe, is_fresh = optimizer is None, model is None and not config.weights

        # Data
        if model is None and weights:  # a damaged file is refused before a long download
            distributed.broadcast_from_rank_0(lambda: bool(_new_network(weights, 10)))
        known = known_of_data(config, run.state)
        train_loader, test_loader = make_loaders(config, runtime.device, train_set, test_set, known=known)
        stack.callback(end_workers, train_loader)
        sampler: EpochSampler = train_loader.sampler  # type: ignore[assignment]
        data, test_data = facts_of(train_loader.dataset), facts_of(test_loader.dataset)
        distributed.refuse_differences({"train_set": str(data["digest"]), "test_set": str(test_data["digest"])})

        # Network
        torch.manual_seed(config.seed)
        if model is None:
            names = data["classes"]
            model = distributed.broadcast_from_rank_0(lambda: _new_network(weights, len(names or CLASSES), names))
        if distributed.rank():  # else the dropout and CutMix of all processes would be the same
            torch.manual_seed(config.seed + distributed.rank())
        device.keep_freed_memory()
        model.to(runtime.device).to(memory_format=runtime.layout)  # type: ignore[call-overload]
        runtime, outputs = checks.check_network(model, train_loader, test_loader, runtime, config.layout)
        bare: Any = unwrapped(model)
        classes = data["classes"] if len(data["classes"] or ()) == outputs else None
        bare.trained_on = {"classes": classes, **{name: data[name] for name in ("size", "mean", "std")}}
        mix = cutmix(config.cutmix, outputs)

        # Optimizer and schedule
        steps = [math.ceil(sampler.count(epoch) / config.batch_size) for epoch in range(config.epochs)]
        if optimizer is None:
            optimizer = recipe_optimizer(model, config.lr)
            scheduler = optim.linear_schedule(optimizer, steps)
        scaler = runtime.scaler()

        # What is saved, and, of a run that goes on, restored
        meter = Meter(runtime.device, keeps_losses=bool(config.skip))
        run.parts = {"model": bare, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
        run.parts |= {"sampler": sampler, "meter": meter, "random": device.RandomStates()}
        run.describe(runtime, {"train_set": data, "test_set": test_data}, by_recipe)
        run.restore()
        if by_recipe:
            optim.set_rates(optimizer, scheduler)  # others if `epochs` has changed
        optim.refuse_unfit(model, optimizer, scheduler, sum(steps))  # after restoring, which may change total_steps
        sampler.epoch, sampler.start = run.epochs, meter.images
        run.packed()  # what could not be read again is refused now

        # Training
        run.introduce(sampler.size)
        forecast = Forecast(sum(map(sampler.count, range(run.epochs, config.epochs))) - meter.images)
        with stop_requests() as request, distributed.parallel(model) as network:
            step = training_step(network, optimizer, runtime, config.label_smoothing, scaler)
            if device.graphs_fit(config.graphs, runtime, by_recipe, is_known=type(bare) is Net and on_epoch is None):
                step = device.Captured(step)
                optim.set_rates(optimizer, scheduler, runtime.device)

            def after_step() -> None:
                forecast.step(meter.images)
                asks = meter.steps % STOP_STEPS == 0 or runtime.device.type == "cpu"
                stop = distributed.max_over_ranks(request.signal) if asks else 0  # for the signal may reach one alone
                if stop or run.is_due():
                    run.save()
                run.stop_if(stop)

            options: dict[str, Any] = {"runtime": runtime, "mix": mix, "meter": meter, "progress": progress}
            options |= {"step": step, "after_step": after_step}
            for epoch in range(run.epochs, config.epochs):
                title = run.begin_epoch()
                train = train_one_epoch(network, train_loader, optimizer, scheduler, title=title, **options)
                if config.skip:
                    sampler.note(epoch, torch.cat(meter.losses))
                test = evaluate(model, test_loader, runtime=runtime)
                row = run.end_epoch(title, train, test)
                _draw(run, "curves.png", "plot_curves", run.history, f"{'Muon ' if by_recipe else ''}learning rate")
                if on_epoch and distributed.rank() == 0:
                    with distributed.alone():
                        on_epoch(row)
                if epoch + 1 < config.epochs:
                    run.stop_if(distributed.max_over_ranks(request.signal))
        _finish(run, bare, test_loader, runtime, is_fresh)
    return run.history


def _new_network(weights: str | None, classes: int, names: tuple[str, ...] | None = None) -> Net:
    """A `Net` with fresh weights or those of a file, whose classifier is kept if its classes match."""
    if not weights:
        return Net(classes)
    net = Net.from_pretrained(None if weights == "pretrained" else weights, num_classes=classes)
    if names and net.classes and names != net.classes:  # as many, or fewer, but others
        net.fc = Net(classes).fc
    return net


def _finish(run: Run, model: Any, test_loader: Any, runtime: Runtime, is_fresh: bool) -> None:
    """Calibrates a fresh `Net` on validation images, saves it and pictures of its mistakes, and prints where."""
    log_probs, labels = (torch.cat(distributed.gather(part)) for part in predict(model, test_loader, runtime=runtime))
    if is_fresh and run.record["test_set"]["is_validation"] and len(labels) >= CALIBRATION_IMAGES:
        temperature = temperature_of(log_probs, labels)
        model.apply_temperature(temperature)
        log_probs = (log_probs / temperature).log_softmax(1)
        run.record["temperature"] = temperature
        distributed.print_rank0(f"calibrated on {len(labels):,} validation images: logits / {temperature:.3f}")
        run.write_results()
    names = model.trained_on["classes"] or [f"class {k}" for k in range(log_probs.shape[1])]
    _draw(run, "confusion.png", "plot_confusion", log_probs, labels, names)
    if isinstance(test_loader.dataset, Images) and distributed.world_size() == 1:  # else in another order
        _draw(run, "misclassified.png", "plot_misclassified", test_loader.dataset, log_probs, labels)
    _draw(run, "summary.txt", "show_summary", model, run.record["images"]["size"] or SIZE)
    run.end()


def _draw(run: Run, name: str, function: str, *arguments: Any) -> None:
    """Saves what this function of utils draws or prints; a failure is only a warning."""
    if distributed.rank():
        return
    picture, text = io.BytesIO(), io.StringIO()
    try:
        import utils  # noqa: PLC0415  Matplotlib, which only the end of an epoch has to wait for

        with contextlib.redirect_stdout(text):
            figure = getattr(utils, function)(*arguments)
        if name.endswith(".png"):
            figure.savefig(picture, format="png")
    except Exception as error:  # whatever styles, backends, fonts or networks raise
        distributed.print_rank0(f"warning: {name} cannot be made: {error}")
    else:
        run.write(name, picture.getvalue() or text.getvalue().encode())


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    status, speaks = 1, not distributed.launch_id() or os.environ.get("LOCAL_RANK") == "0"  # one on each machine
    try:
        fit(parse_args(arguments))
        return 0
    except StoppedError as stopped:
        status, message = 128 + stopped.signal, f"\n{stopped}"
    except MachineError as error:  # of this process; the others only see that it is gone
        process = "" if speaks else f"process {os.environ['RANK']}: "
        message, speaks = f"{process}error: {error}", True
    except (SettingError, DataError, CheckpointError, WeightsError, NonFiniteLossError, UnsavedError) as error:
        message = f"error: {error}"
    except KeyboardInterrupt:
        status, message = 130, "\nstopped at once; if there is a runs/NAME/last.pt, --resume runs/NAME goes on"
    if speaks:
        print_line(message, sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
