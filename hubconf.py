"""The entry for `torch.hub`: `torch.hub.load(folder, "net", source="local", pretrained=True)`."""

from model import Net

dependencies = ["torch"]


def net(pretrained: bool = False, num_classes: int | None = None) -> Net:
    """`Net` for 10 classes, or `num_classes`: fresh, or trained on CIFAR-10 and in eval mode.

    Trained for another number of classes, it has a fresh classifier, as in `Net.from_pretrained`.
    """
    if pretrained:
        return Net.from_pretrained(num_classes=num_classes)
    return Net() if num_classes is None else Net(num_classes)
