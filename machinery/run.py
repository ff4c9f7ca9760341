"""A training, from its settings to its saved result, alone or as one of several processes."""

import contextlib
import dataclasses
import functools
import io
import json
import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader

from machinery import checkpoint, distributed, machines
from machinery.calibration import temperature_of
from machinery.checks import told_by, try_out
from machinery.config import Config
from machinery.data.loader import end_workers
from machinery.data.sampler import EpochSampler
from machinery.device import Runtime, choose_runtime, keep_freed_memory
from machinery.errors import CheckpointError, MachineError, NonFiniteLossError, SettingError, StoppedError, UnsavedError
from machinery.folder import NOTED, Folder, facts_of, new_record
from machinery.metrics import Meter
from machinery.optim import optimizer_and_scheduler
from machinery.words import remaining, say

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextlib.contextmanager
def running(
    config: Config,
    model: nn.Module | None,
    optimizer: Optimizer | None,
    scheduler: LRScheduler | None,
    *,
    network: Callable[[str | None, int, tuple[str, ...] | None], nn.Module],
    loaders: Callable[[Config, torch.device], tuple[DataLoader, DataLoader]],
    draw: Callable[[dict[str, list]], "Figure"],
) -> Iterator["Run"]:
    """The run that these settings begin or take up, ready for its next epoch; at the end, all is saved or said.

    Args:
        config: All settings.
        model: What is trained, in place; if None, what `network` returns.
        optimizer: Of its parameters; if None, that of the recipe.
        scheduler: Of the optimizer; if None, that of the recipe with its optimizer, and none with another.
        network: Makes one that begins with the weights in this file, or, given None, with fresh ones, for so many
            classes, of these names if they are the user's own.
        loaders: Makes the loader of the training images and that of the images to test on.
        draw: The picture of a history.
    """
    runtime = choose_runtime(config.device, config.precision, config.layout)
    meet = functools.partial(machines.meet, facts=facts_of(config, runtime) if machines.several() else {})
    machines.refuse_unknown_leader()
    with distributed.process_group(runtime.device.type, meet), Folder(config) as folder:
        config, state = folder.config, folder.read()
        if model is None and config.weights and not state:
            distributed.broadcast_from_rank_0(
                lambda: bool(network(config.weights, 10, None))
            )  # refused before a long download
        both = train_loader, test_loader = loaders(config, runtime.device)
        machines.refuse_other_data(train_loader.dataset, test_loader.dataset)
        names = told_by(train_loader.dataset, "classes")
        torch.manual_seed(config.seed)
        if model is None:
            weights, count = None if state else config.weights, len(names or range(10))
            own = names if told_by(train_loader.dataset, "source") == "your own" else None
            model = distributed.broadcast_from_rank_0(lambda: network(weights, count, own))
            if optimizer:
                raise SettingError("an optimizer of your own needs the model whose parameters it has")
        elif config.weights and not state:
            raise SettingError("weights and a model of your own both say where training starts; give one of them")
        if distributed.rank():  # else the dropout and CutMix of all processes would be the same
            torch.manual_seed(config.seed + distributed.rank())
        keep_freed_memory()
        layout = torch.channels_last if runtime.channels_last else torch.contiguous_format
        model.to(runtime.device).to(memory_format=layout)  # type: ignore[call-overload]
        share = config.batch_size // distributed.world_size()
        sets = train_loader.dataset, test_loader.dataset
        try:
            runtime, classes = try_out(model, *sets, share, runtime, config.layout)
            run = Run(config, model, classes, optimizer, scheduler, runtime, both, folder, draw)
            if state:
                run.take_up(state)
            run.introduce()
            with checkpoint.stop_requests() as run.request, distributed.parallel(model) as run.network:
                yield run
        except (RuntimeError, MemoryError, OSError, EOFError) as error:
            if cause := distributed.failure_of_the_machine(error):
                raise MachineError(f"{cause}\n{folder.how_to_go_on()}") from error
            raise
        finally:
            end_workers(train_loader)
        run.check()


class Run:
    """What a training consists of, and what is saved of it in runs/<name>/.

    Saved together: last.pt (weights, optimizer, schedule, place in the epoch, losses where `skip` needs them, history,
    settings, random states), and after every epoch metrics.json (history, settings, versions, hardware, times, and the
    same of the runs before if it began with weights of theirs), curves.png and model.pt.
    """

    request: checkpoint.StopRequest  # by `running`
    network: nn.Module  # by `running`: the model as all processes train it together

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        classes: int,
        optimizer: Optimizer | None,
        scheduler: LRScheduler | None,
        runtime: Runtime,
        loaders: tuple[DataLoader, DataLoader],
        folder: Folder,
        draw: Callable[[dict[str, list]], "Figure"],
    ) -> None:
        self.config, self.model, self.classes, self.runtime = config, model, classes, runtime
        self.folder, self.draw = folder, draw
        self.train_loader, self.test_loader = loaders
        self.sampler = cast(EpochSampler, self.train_loader.sampler)
        self.bare = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
        self.data = told_by(self.train_loader.dataset, "source") or "your own"
        self.tested_on = "held-out" if told_by(self.test_loader.dataset, "is_held_out") else "test"
        names = told_by(self.train_loader.dataset, "classes")
        self.result = new_record(config, self.bare, runtime)
        self.result |= {"data": self.data, "classes": list(names) if names else None}
        self.result["images"] = told_by(self.train_loader.dataset, "kind")
        self.by_recipe = optimizer is None
        lengths = [math.ceil(self.sampler.count(epoch) / config.batch_size) for epoch in range(config.epochs)]
        self.optimizer, self.scheduler = optimizer_and_scheduler(model, optimizer, scheduler, config.lr, lengths)
        self.result |= {
            "optimizer": type(self.optimizer).__name__,
            "scheduler": type(self.scheduler).__name__ if self.scheduler else "None",
        }
        self._rates_to_device()
        self.scaler = runtime.scaler()
        self.meter = self._empty_meter()
        self.started = self.saved_at = self.began = time.perf_counter()
        self.sitting = 0  # epochs since then

    @property
    def mix(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
        """What makes CutMix (Yun et al., 2019) of `config.cutmix` of the batches; None for 0."""
        if not self.config.cutmix:
            return None
        from torchvision.transforms import v2  # noqa: PLC0415  takes a second, and only this needs it

        return v2.RandomApply([v2.CutMix(num_classes=self.classes)], self.config.cutmix)

    @property
    def history(self) -> dict[str, list]:
        return self.result["history"]

    @property
    def epochs(self) -> int:
        """How many are finished."""
        return len(self.history.get("epoch", ()))

    def introduce(self) -> None:
        """Says what is trained, on what, and where the results go."""
        ranks = distributed.world_size()
        self.say(
            f"{self.result['network']}, {self.result['parameters']:,} parameters, on {self.sampler.size:,} images "
            f"of {self.data}; {self.runtime}{f', {ranks} processes' if ranks > 1 else ''}\n"
            f"results in {self.folder.path}"
            + (f", going on after {self.epochs} epochs and {self.meter.steps} steps" if self.config.resume else "")
        )

    def say(self, text: str) -> None:
        """Prints, once for all processes."""
        if distributed.rank() == 0:
            say(text)

    def epochs_left(self) -> Iterator[str]:
        """A title for each epoch that the run still lacks."""
        for epoch in range(self.epochs + 1, self.config.epochs + 1):
            self.title = f"epoch {epoch}/{self.config.epochs}" + (" (synthetic)" if self.data == "synthetic" else "")
            if not self.meter.steps:
                self.rate = float(self.optimizer.param_groups[0]["lr"])
            yield self.title

    def after_step(self) -> None:
        """Saves if it is time to, and ends the run if someone asked for it."""
        stop = distributed.max_over_ranks(self.request.signal)  # of all, which are asked at different moments
        if stop or time.perf_counter() - self.saved_at > 60 * self.config.save_minutes:
            self.save()
        self._end_if(stop)

    def finish_epoch(
        self,
        train: tuple[float, float],
        test: tuple[float, float],
        on_epoch: Callable[[dict[str, Any]], object] | None = None,
    ) -> None:
        """Adds an epoch to the history, says how it went, and saves everything.

        Args:
            train: Mean loss in nats, and accuracy in percent.
            test: Likewise.
            on_epoch: Called afterwards with what the history got, by the first of several processes.

        Raises:
            NonFiniteLossError: The loss or a weight became infinite or NaN; what was saved before is kept.
            StoppedError: Someone asked for an end, and there are epochs left.
        """
        if self.meter.losses is not None:
            self.sampler.note(self.epochs, torch.cat(self.meter.losses))
        if not math.isfinite(test[0]):
            raise NonFiniteLossError(
                f"{self.title}: the weights became infinite or NaN. Try a lower lr, or precision fp32."
            )
        config, before = self.config, self.history.get("seconds", [0.0])[-1]
        row = {
            "epoch": self.epochs + 1,
            "train_loss": train[0],
            "train_accuracy": train[1],
            "test_loss": test[0],
            "test_accuracy": test[1],
            # By the recipe's own formula, which rounding in the optimizer does not reach.
            "lr": config.lr * (1 - self.epochs / config.epochs) if self.by_recipe else self.rate,
            "seconds": round(before + self.meter.seconds, 2),
            "data": self.data,
            "tested_on": self.tested_on,
        }
        for column, value in row.items():
            self.history.setdefault(column, []).append(value)
        self.meter = self._empty_meter()
        self.say(
            f"{self.title}: train {train[1]:.2f} % (loss {train[0]:.3f}), "
            f"{row['tested_on']} {test[1]:.2f} % (loss {test[0]:.3f}), {row['seconds']:.0f} s{self._time_left()}"
        )
        self.save()
        self.write_results()
        if on_epoch and distributed.rank() == 0:
            on_epoch(row)
        if self.epochs < config.epochs:
            self._end_if(distributed.max_over_ranks(self.request.signal))

    def _time_left(self) -> str:
        """After the first epoch of a sitting, how long the others will take, if there are any."""
        now, self.sitting = time.perf_counter(), self.sitting + 1
        if self.sitting > 1 or self.epochs == self.config.epochs:
            return ""
        done, *left = (self.sampler.count(epoch) for epoch in range(self.epochs - 1, self.config.epochs))
        return f"; {remaining(now - self.began, done, sum(left))} left"

    def _end_if(self, stop: int) -> None:
        if stop:
            distributed.max_over_ranks(0)  # the others wait until it is saved, for torchrun ends all when one ends
            where = f"saved after {self.epochs} epochs and {self.meter.steps} steps"
            if "last.pt" in self.folder.errors:
                where = "not saved: the last save that worked counts"
            raise StoppedError(f"stopped, {where}\n{self.folder.how_to_go_on()}", stop)

    def _empty_meter(self) -> Meter:
        return Meter(torch.zeros(2, device=self.runtime.device), losses=[] if self.config.skip else None)

    def _rates_to_device(self) -> None:
        """On CUDA, a graph reads the learning rates from there."""
        for group in self.optimizer.param_groups if self.runtime.device.type == "cuda" else ():
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=self.runtime.device)

    def write_results(self) -> None:
        """Writes metrics.json, curves.png and model.pt, on rank 0."""
        if distributed.rank() > 0:
            return
        picture, weights = io.BytesIO(), io.BytesIO()
        self.draw(self.history).savefig(picture, format="png")
        torch.save(self.bare.state_dict(), weights)
        self.folder.write("metrics.json", (json.dumps(self.result, indent=1) + "\n").encode())
        self.folder.write("curves.png", picture.getvalue())
        self.folder.write("model.pt", weights.getvalue())

    def calibrate(self, predict: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """Calibrates a network that can be, in place, and its model.pt, if it was tested on held-out images.

        Args:
            predict: Returns log-probabilities (N, classes) and labels (N,) of these images, or of this process's share.
        """
        divide_logits = getattr(self.bare, "divide_logits", None)
        if self.tested_on != "held-out" or not divide_logits or not isinstance(self.bare.fc, nn.Linear):
            return
        if self._may_know_held_out():
            self.say("not calibrated: the weights that it began with may have been trained on the held-out images")
            return
        log_probs, labels = map(torch.cat, zip(*distributed.gather(predict()), strict=True))
        temperature = temperature_of(log_probs, labels)
        divide_logits(temperature)
        self.result["temperature"] = temperature
        self.say(f"calibrated on {len(labels):,} held-out images: logits are divided by {temperature:.3f}")
        self.write_results()

    def _may_know_held_out(self) -> bool:
        """Whether the weights that the run began with may have been trained on the images that it holds out."""

        def kept_aside(record: dict[str, Any]) -> bool:
            if record["data"] != self.data:
                return True
            if record["history"].get("tested_on", ["test"])[-1] != "held-out":
                return False
            if self.data == "cifar10":  # of which fewer are some of the same
                return self.config.holdout <= record["config"]["holdout"]
            return all(record["config"].get(name) == getattr(self.config, name) for name in ("holdout", "seed"))

        before = self.result["before"]
        return bool(self.config.weights) and not (before and all(map(kept_aside, before)))

    def check(self) -> None:
        """Raises UnsavedError if a file is not as it should be at the end."""
        for name, error in self.folder.errors.items():
            path = self.folder.path / name
            raise UnsavedError(f"training ended, but {path} could not be written: {error}", self.history)

    def save(self) -> None:
        """Writes last.pt, on rank 0.

        Raises:
            NonFiniteLossError: A weight is infinite or NaN; such a state is not saved.
        """
        if distributed.rank() > 0:
            return
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise NonFiniteLossError("a weight became infinite or NaN. Try a lower lr, or precision fp32.")
        now = time.perf_counter()
        self.result["wall_seconds"] = round(self.result["wall_seconds"] + now - self.started, 2)
        self.started = self.saved_at = now
        state = {
            "result": self.result,
            "meter": dataclasses.asdict(self.meter),
            "model": self.bare.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "scaler": self.scaler.state_dict(),
            "rate": self.rate,
            "losses": self.sampler.losses if self.config.skip else None,
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        }
        self.folder.write("last.pt", checkpoint.packed(state))

    def take_up(self, state: dict[str, Any]) -> None:
        """Puts everything back as it was when `state` was saved.

        Raises:
            CheckpointError: It does not fit this network, or lacks something.
        """
        try:
            result, meter = state["result"], state["meter"]
            kinds = {"optimizer": "Muon", "scheduler": "LambdaLR"}  # of checkpoints that do not say
            for what, kind in kinds.items():
                if result.get(what, kind) != self.result[what]:
                    raise SettingError(
                        f"resume: the run was begun with the {what} {result.get(what, kind)}, got "
                        f"{self.result[what]}; give the same, or begin a new run"
                    )
            self.bare.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scheduler:
                self.scheduler.load_state_dict(state["scheduler"])
            if state["losses"] is not None:
                self.sampler.losses.copy_(state["losses"])
            if distributed.rank() == 0:  # the others would all draw as this one does
                torch.set_rng_state(state["random"])
                if torch.cuda.is_available() and state["cuda_random"] is not None:
                    torch.cuda.set_rng_state(state["cuda_random"])
            device = self.runtime.device
            losses = None if meter["losses"] is None else [part.to(device) for part in meter["losses"]]
            self.meter = Meter(**{**meter, "sums": meter["sums"].to(device), "losses": losses})
            lengths = {len(values) for values in result["history"].values()}
            if len(lengths) > 1 or not set(meter) == {field.name for field in dataclasses.fields(Meter)}:
                raise ValueError("its history or its place in the epoch is incomplete")
            self.result |= {field: result[field] for field in ("before", "history", "wall_seconds")}
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(state["scaler"])
            self.rate = state.get("rate", 0.0)  # in checkpoints from before, all rates are those of the recipe
            other = [field for field in NOTED if result[field] != self.result[field]]
            planned = result["config"]["epochs"]
        except SettingError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            path = self.folder.path / "last.pt"
            raise CheckpointError(f"{path} does not fit this network, or is damaged: {error}") from error
        if self.by_recipe:  # other rates if `epochs` has changed
            scheduler = cast(LambdaLR, self.scheduler)
            for group, base, factor in zip(
                self.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
            ):
                group["lr"] = float(base) * factor(scheduler.last_epoch)
        self._rates_to_device()
        for field in other:
            self.say(f"note: the run began with {field} {result[field]}, so it may not go on bit for bit")
        if self.config.epochs != planned:
            self.say(
                f"epochs {planned} -> {self.config.epochs}: the learning rate goes on as in a run of "
                f"{self.config.epochs} epochs; those so far had the shorter schedule, so the end will not be that of "
                f"a run of {self.config.epochs} from the beginning"
            )
        self.sampler.epoch, self.sampler.start = self.epochs, self.meter.images
        if self.epochs and not self.meter.steps:
            self.write_results()  # whoever was killed may have had no time for them
