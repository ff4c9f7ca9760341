"""For `torch.hub.load(folder, "net", source="local", pretrained=True)`."""

import importlib.machinery
import pathlib
import sys
import types

from torch import nn

dependencies = ["torch"]


def net(pretrained: bool = False, num_classes: int = 10) -> nn.Module:
    """`Net`: fresh, or pretrained on CIFAR-10 in eval mode; for other than 10 classes, with a fresh classifier."""
    path = str(pathlib.Path(__file__).with_name("model.py"))
    name = f"_model_of_hub_{abs(hash(path))}"  # so that a user's own `model` is neither taken nor replaced
    if name not in sys.modules:
        sys.modules[name] = types.ModuleType(name)  # where pickle looks for the class
        sys.modules[name].__file__ = path
        importlib.machinery.SourceFileLoader(name, path).exec_module(sys.modules[name])
    made = sys.modules[name].Net
    return made.from_pretrained(num_classes=num_classes) if pretrained else made(num_classes)
