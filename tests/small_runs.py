"""Runs that take a second, and what the tests of stopping and resuming do with them."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dataset import CIFAR10, DEFAULT_AUGMENT
from machinery import checkpoint
from train import Config


def plain(**settings) -> Config:
    """The recipe as it is by default, but short, and in fp32; for what has nothing to do with stopping."""
    return Config(**{"epochs": 2, "batch_size": 64, "workers": 0, "precision": "fp32", "name": "plain", **settings})


def plain_network(classes: int = 10) -> nn.Module:
    """Without anything that training and evaluation, or two passes, would treat differently."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))


def quick(**settings) -> Config:
    """With CutMix, whose random state has to survive, and skipping, whose losses have to."""
    return plain(**{"epochs": 3, "name": "quick", "save_minutes": 60, "cutmix": 0.5, "skip": 0.3, **settings})


def small_network() -> nn.Module:
    """With BatchNorm, whose statistics, and dropout, whose random state have to survive, too."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 5), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(8, 10))


def few_images(count: int = 16, *, is_validation: bool = False) -> dict[str, Any]:
    """What to train and test on where `Net` itself is needed, of which an image takes 10 ms."""
    test_set = CIFAR10(train=False).subset(range(8))
    test_set.is_validation = is_validation
    return {"train_set": CIFAR10(augment=DEFAULT_AUGMENT).subset(range(count)), "test_set": test_set}


def record_of(name: str) -> dict[str, Any]:
    return json.loads(Path("runs", name, "metrics.json").read_text())


def weights(model: nn.Module) -> Tensor:
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


def files_of(name: str) -> list[str]:
    return sorted(path.name for path in Path("runs", name).iterdir() if path.name != checkpoint.LOCK)


def timeless(history: dict) -> dict:
    return {column: values for column, values in history.items() if column != "seconds"}


def signal_at(model: nn.Module, step: int, number: int = signal.SIGINT) -> nn.Module:
    """Sends this process a signal in the middle of the given step of training, counted from 1."""
    count = 0

    def send(module: nn.Module, inputs: object, output: object) -> None:
        nonlocal count
        count += module.training
        if module.training and count == step:
            os.kill(os.getpid(), number)

    model.register_forward_hook(send)
    return model
