"""The metrics of an epoch, its bar, and the temperature of a network's probabilities."""

import math
import os
import sys
import time
from collections.abc import Sized
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from machinery import distributed
from machinery.errors import NonFiniteLossError, duration


class Meter:
    """Steps and images of an epoch over all processes, training seconds, and sums over the images.

    With `keeps_losses`, also the loss of each image, (B,) per batch.
    """

    def __init__(self, device: torch.device, *, keeps_losses: bool = False) -> None:
        self.device, self.keeps_losses = device, keeps_losses
        self.reset()

    def reset(self) -> None:
        """Begins another epoch."""
        self.sums = torch.zeros(2, device=self.device)  # of the loss in nats, and of the right predictions
        self.steps = self.images = 0
        self.seconds = 0.0
        self.losses: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("sums", "steps", "images", "seconds", "losses")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.images, self.seconds = state["steps"], state["images"], state["seconds"]
        self.sums = state["sums"].to(self.device)
        self.losses = [part.to(self.device) for part in state["losses"] or ()]

    def start(self, title: str, loader: object, progress: bool | None) -> tqdm:
        """Starts the clock, and returns the epoch's bar, to be passed to `add` and closed."""
        self.title, self.began = title, time.perf_counter() - self.seconds
        hidden = None if progress is None else not progress  # None: tqdm shows a bar where there is a terminal
        if progress is None and "ipykernel" in sys.modules:  # whose bars do not depend on one
            hidden = "TQDM_DISABLE" in os.environ
        sampler = getattr(loader, "sampler", None)
        return tqdm(
            total=len(sampler) * distributed.world_size() if isinstance(sampler, Sized) else None,
            initial=self.images,
            desc=title,
            unit=" images",
            leave=False,
            disable=distributed.rank() > 0 or getattr(sys.stderr, "closed", sys.stderr is None) or hidden,
            dynamic_ncols=True,
        )

    def add(self, sums: Tensor, losses: Tensor, bar: tqdm) -> None:
        """Adds a step: its sums (2,) of loss and correct predictions over all processes, and its losses."""
        count = len(losses) * distributed.world_size()
        if self.keeps_losses:
            self.losses.append(distributed.interleave_over_ranks(losses))
        self.sums += sums
        self.steps += 1
        self.images += count
        self.seconds = time.perf_counter() - self.began
        if self.steps % (5 if sums.device.type == "cpu" else 1000) == 0:  # reading the sums makes a GPU wait
            mean_loss, accuracy = self.means()
            bar.set_postfix(loss=f"{mean_loss:.3f}", accuracy=f"{accuracy:.1f}%", refresh=False)
        bar.update(count)

    def means(self) -> tuple[float, float]:
        """Loss in nats and accuracy in percent; NonFiniteLossError, or ValueError without images."""
        loss_sum, correct = self.sums.tolist()  # waits for a GPU, whose steps are only begun when they are added
        self.seconds = time.perf_counter() - self.began
        if not self.images:
            raise ValueError(f"{self.title}: the loader gives no images")
        if not math.isfinite(loss_sum):
            raise NonFiniteLossError(
                f"{self.title}: the loss became {loss_sum} at step {self.steps}. Try a lower lr, precision fp32, or "
                "look for broken images in your data."
            )
        return loss_sum / self.images, 100 * correct / self.images


class Forecast:
    """Prints the expected training time, from ten steps after the first three, which are slower."""

    def __init__(self, images: int) -> None:
        self.images, self.steps = images, 0  # that are still to be met, by all processes together

    def step(self, met: int) -> None:
        """Takes the number of images of the epoch so far, after each step."""
        self.steps += 1
        if self.steps == 3:
            self.met, self.began = met, time.perf_counter()
        elif self.steps == 13 and met > self.met:  # no other epoch has begun
            pace = (time.perf_counter() - self.began) / (met - self.met)
            with tqdm.external_write_mode():
                distributed.print_rank0(f"about {duration(pace * self.images)} of training on this machine")


def temperature_of(log_probs: Tensor, labels: Tensor) -> float:
    """The divisor of the logits, 0.05 to 20, that makes these labels likeliest (Guo et al., 2017).

    Above 1, the probabilities move closer together; the predicted classes stay. Use images that the network was not
    trained on. A correct prediction is smoothed by 1 / (N + 2), so that few images without a mistake do not make all
    certain (J. Platt, 1999).

    Args:
        log_probs: float (N, classes), from `train.predict`; ValueError if one is not finite, or N is 0.
        labels: int64 (N,).
    """
    logits = log_probs.double()
    count, classes = logits.shape
    if not count or not logits.isfinite().all():
        raise ValueError(
            f"expected finite log-probabilities of at least one image, got {count} images, "
            f"{(~logits.isfinite()).sum()} values infinite or NaN"
        )
    if classes == 1:
        return 1.0
    right, doubt = logits.gather(1, labels[:, None]).squeeze(1), 1 / (count + 2)
    target = (1 - doubt) * right + doubt * (logits.sum(1) - right) / max(1, classes - 1)
    low, high = 0.05, 20.0  # of the temperature's inverse, in which the loss is convex
    for _ in range(50):
        middle = (low * high) ** 0.5
        slope = ((middle * logits).softmax(1) * logits).sum() - target.sum()
        low, high = (low, middle) if slope > 0 else (middle, high)
    return 1 / (low * high) ** 0.5
