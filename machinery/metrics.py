"""What an epoch has come to so far, and its bar."""

import math
import os
import sys
import time
from collections.abc import Sized
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm.auto import tqdm

from machinery import distributed
from machinery.errors import NonFiniteLossError


@dataclass
class Meter:
    """Batches and images met, by all processes together, seconds of training, and sums over the images.

    If `losses` is a list, that of each image (of a mixed one, of the mix) is appended, a tensor (B,) per batch.
    """

    sums: Tensor = field(default_factory=lambda: torch.zeros(2))  # of the loss in nats, and of the right answers
    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    losses: list[Tensor] | None = None

    def start(self, title: str, loader: object, progress: bool | None) -> tqdm:
        """The clock, and a bar for the epoch, to be given to `add` and closed at the end."""
        self.title, self.began = title, time.perf_counter() - self.seconds
        if distributed.rank() > 0:
            disable = True
        elif progress is not None:
            disable = not progress
        elif "ipykernel" in sys.modules:  # whose bars are no matter of a terminal, and ignore the variable
            disable = "TQDM_DISABLE" in os.environ
        else:
            disable = None  # tqdm shows none where there is no terminal
        sampler = getattr(loader, "sampler", None)
        return tqdm(
            total=len(sampler) * distributed.world_size() if isinstance(sampler, Sized) else None,
            initial=self.images,
            desc=title,
            unit=" images",
            leave=False,
            disable=disable,
            dynamic_ncols=True,
        )

    def add(self, sums: Tensor, losses: Tensor, bar: tqdm) -> None:
        """A step: its sums (3,) of loss, right answers and images over all processes, and the losses of its own."""
        count = len(losses) if distributed.world_size() == 1 else int(sums[2])
        if self.losses is not None:
            self.losses.append(distributed.interleave_over_ranks(losses, count))
        self.sums += sums[:2]
        self.steps += 1
        self.images += count
        self.seconds = time.perf_counter() - self.began
        if self.steps % (5 if sums.device.type == "cpu" else 1000) == 0:  # reading the sums makes a GPU wait
            mean_loss, accuracy = self.means(self.title)
            bar.set_postfix(loss=f"{mean_loss:.3f}", accuracy=f"{accuracy:.1f}%", refresh=False)
        bar.update(count)

    def means(self, title: str) -> tuple[float, float]:
        """Loss in nats and accuracy in percent.

        Raises:
            NonFiniteLossError: The loss is infinite or NaN.
            ValueError: There was no image.
        """
        loss_sum, correct = self.sums.tolist()  # waits for a GPU, whose steps are only begun when they are added
        self.seconds = time.perf_counter() - self.began
        if not self.images:
            raise ValueError(f"{title}: the loader gives no images")
        if not math.isfinite(loss_sum):
            raise NonFiniteLossError(
                f"{title}: the loss became {loss_sum} at step {self.steps}. Try a lower lr, precision fp32, or look "
                "for broken images in your data."
            )
        return loss_sum / self.images, 100 * correct / self.images
