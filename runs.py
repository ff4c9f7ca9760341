"""A run's folder: claimed once, saved so that a kill at any instant costs at most the steps since the last save."""

import dataclasses
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import checkpoint
import distributed
from checkpoint import CheckpointError
from config import Config, Runtime, SettingError, settings_of
from dataset import EpochSampler
from engine import Meter
from errors import NonFiniteLossError, UnsavedError
from record import NOTED, new_record, refuse_other_settings
from utils import plot_curves

FILES = ("last.pt", "metrics.json", "curves.png", "model.pt")


class Run:
    """What is saved of a run, and where: runs/<name>/, new or, with `config.resume`, taken up where it was left.

    Saved together: last.pt (weights, optimizer, schedule, place in the epoch, losses where `skip` needs them, history,
    settings, random states), and after every epoch metrics.json (history, settings, versions, hardware, times, and the
    same of the runs before if it began with weights of theirs), curves.png and model.pt.

    Raises:
        SettingError: The folder holds a run already, cannot be written, or has other settings than `config`.
        CheckpointError: What is to be resumed is missing, damaged, or of another network.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LambdaLR,
        sampler: EpochSampler,
        runtime: Runtime,
    ) -> None:
        self.config, self.started, self.saved_at = config, time.perf_counter(), time.perf_counter()
        self.model, self.optimizer, self.scheduler, self.sampler = model, optimizer, scheduler, sampler
        self.meter = self._empty_meter(runtime.device)
        self.lock: io.TextIOBase | None = None
        self.errors: dict[str, OSError] = {}  # why the last writing of a file failed
        self.result = new_record(config, model, runtime)
        if config.resume:
            self.folder = Path(config.resume)
            # Before it is read, for another may be about to save.
            distributed.broadcast_from_rank_0(self._take_possession)
            try:
                self._take_up(distributed.broadcast_from_rank_0(lambda: checkpoint.load(self.folder / "last.pt")))
            except (SettingError, CheckpointError):
                self.release()
                raise
            if self.epochs and not self.meter.steps:
                self._write_results()  # whoever was killed may have had no time for them
        else:
            self.folder = distributed.broadcast_from_rank_0(lambda: unused_folder(config))
            distributed.broadcast_from_rank_0(self._take_possession)

    @property
    def history(self) -> dict[str, list]:
        return self.result["history"]

    @property
    def epochs(self) -> int:
        """How many are finished."""
        return len(self.history.get("epoch", ()))

    def say(self, text: str) -> None:
        """Prints, once for all processes."""
        if distributed.rank() == 0:
            print(text, flush=True)

    def how_to_go_on(self) -> str:
        if not (self.folder / "last.pt").exists():
            return "nothing was saved yet: begin anew"
        folder = self.folder.as_posix()
        if distributed.launch_id():
            return f"go on with the same torchrun command, but for train.py --resume {folder}"
        return f'go on with\n  python train.py --resume {folder}\nor, in the notebook, with resume = "{folder}"'

    def how_it_stopped(self) -> str:
        where = f"saved after {self.epochs} epochs and {self.meter.steps} steps"
        if "last.pt" in self.errors:
            where = "not saved: the last save that worked counts"
        return f"stopped, {where}\n{self.how_to_go_on()}"

    def is_due(self) -> bool:
        """Whether `config.save_minutes` have passed since the last save."""
        return time.perf_counter() - self.saved_at > 60 * self.config.save_minutes

    def finish_epoch(self, row: dict[str, Any]) -> None:
        """Adds a row to the history and saves everything."""
        for column, value in row.items():
            self.history.setdefault(column, []).append(value)
        self.meter = self._empty_meter(self.meter.sums.device)
        self.save()
        self._write_results()

    def _empty_meter(self, device: torch.device) -> Meter:
        return Meter(torch.zeros(2, device=device), losses=[] if self.config.skip else None)

    def _write_results(self) -> None:
        if distributed.rank() > 0:
            return
        picture, weights = io.BytesIO(), io.BytesIO()
        plot_curves(self.history).savefig(picture, format="png")
        torch.save(self.model.state_dict(), weights)
        self._write("metrics.json", (json.dumps(self.result, indent=1) + "\n").encode())
        self._write("curves.png", picture.getvalue())
        self._write("model.pt", weights.getvalue())

    def check(self) -> None:
        """Raises UnsavedError if a file is not as it should be at the end."""
        for name, error in self.errors.items():
            raise UnsavedError(f"training ended, but {self.folder / name} could not be written: {error}", self.history)

    def release(self) -> None:
        """Lets others write to the folder, now and not when the last traceback that knows this run is forgotten."""
        if self.lock:
            self.lock.close()

    def save(self) -> None:
        """Writes last.pt, on rank 0.

        If writing fails, says so and goes on: the file before is still there, and the next save may work.

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
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "losses": self.sampler.losses if self.config.skip else None,
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        }
        self._write("last.pt", checkpoint.packed(state))

    def _write(self, name: str, content: bytes) -> None:
        self.errors.pop(name, None)
        try:
            checkpoint.write_whole(self.folder / name, content)
        except OSError as error:
            self.errors[name] = error
            print(
                f"warning: cannot write {self.folder / name}: {error.strerror or error}. What was saved before is "
                "kept, training goes on, and the next save is tried. Make room or give back the rights to the folder.",
                file=sys.stderr,
                flush=True,
            )

    def _take_possession(self) -> None:
        field = "resume" if self.config.resume else "name"
        if self.config.resume and not self.folder.is_dir():
            raise CheckpointError(f"there is no run to resume in {self.folder}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = checkpoint.lock(self.folder, distributed.launch_id())
            checkpoint.remove_scratch(self.folder)
            for name in FILES if self.config.overwrite else ():
                (self.folder / name).unlink(missing_ok=True)
        except BlockingIOError as error:
            raise SettingError(f"{field}: {error}") from error
        except OSError as error:
            raise SettingError(f"{field}: cannot write to {self.folder}: {error}") from error

    def _take_up(self, state: dict[str, Any]) -> None:
        """Puts everything back as it was when `state` was saved."""
        try:
            result, meter = state["result"], state["meter"]
            refuse_other_settings(self.config, settings_of(state, self.folder), self.folder)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            if state["losses"] is not None:
                self.sampler.losses.copy_(state["losses"])
            if distributed.rank() == 0:  # the others would all draw as this one does
                torch.set_rng_state(state["random"])
                if torch.cuda.is_available() and state["cuda_random"] is not None:
                    torch.cuda.set_rng_state(state["cuda_random"])
        except (SettingError, CheckpointError):
            raise
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{self.folder / 'last.pt'} does not fit this network: {error}") from error
        scheduler, groups = self.scheduler, self.optimizer.param_groups
        for group, base, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            rate = float(base) * factor(scheduler.last_epoch)  # another one if `epochs` has changed
            device = group["params"][0].device
            group["lr"] = torch.tensor(rate, device=device) if device.type == "cuda" else rate
        for field in NOTED:
            if result[field] != self.result[field]:
                self.say(f"note: the run began with {field} {result[field]}, so it may not go on bit for bit")
        if self.config.epochs != result["config"]["epochs"]:
            self.say(
                f"epochs {result['config']['epochs']} -> {self.config.epochs}: the rate goes on as in a run of "
                f"{self.config.epochs} epochs; those so far had the shorter schedule, so the end will not be that of "
                f"a run of {self.config.epochs} from the beginning"
            )
        device = self.meter.sums.device
        losses = None if meter["losses"] is None else [part.to(device) for part in meter["losses"]]
        self.meter = Meter(**{**meter, "sums": meter["sums"].to(device), "losses": losses})
        self.result |= {field: result[field] for field in ("before", "history", "wall_seconds")}
        self.sampler.epoch, self.sampler.start = self.epochs, self.meter.images


def after_restart(config: Config) -> Config:
    """The settings with which to go on if torchrun has started all processes anew because one of them died."""
    if config.resume or not distributed.can_restart():
        return config
    if not config.name or distributed.launch_id() == "none":
        raise SettingError(
            "name: with --max-restarts, a run needs a --name by which it is found again, and torchrun a --rdzv-id "
            "(--standalone makes one)"
        )
    folder = Path("runs") / config.name

    def look() -> tuple[bool, bool]:
        return checkpoint.last_launch_id(folder) == distributed.launch_id(), (folder / "last.pt").exists()

    ours, saved = distributed.broadcast_from_rank_0(look)
    return dataclasses.replace(config, resume=str(folder) if saved else None, overwrite=not saved) if ours else config


def unused_folder(config: Config) -> Path:
    """Where a new run goes under runs/; refused if that holds another one, unless `config.overwrite` says so."""
    name = config.name or f"{config.data}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path("runs") / name
    taken = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
    if taken and not config.overwrite:
        raise SettingError(
            f"name: {folder} holds a run already; go on with it (resume), delete it (overwrite), or choose another"
        )
    return folder
