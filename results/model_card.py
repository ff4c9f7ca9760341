"""The parts of weights/README.md, from what weights/card.py measured and from the record of the training."""

import itertools

from collect import DEFAULT
from tables import markdown, minutes, saved

from config import FREE


def weights() -> str:
    measured, run = saved("weights/card"), saved("weights/metrics")
    return (
        f"The trained network, {run['parameters']:,} parameters in {measured['bytes'] / 1e6:.1f} MB: "
        f"**{measured['accuracy']:.2f} %** of the CIFAR-10 test images right, plain, after the last of "
        f"{run['config']['epochs']} epochs."
    )


def recipe() -> str:
    """The commands that trained the weights, and what it took."""
    run = saved("weights/metrics")
    config, history = run["config"], run["history"]
    first, *longer = sittings(config["lr"], history["lr"])
    command = f"python train.py --name {config['name']}"
    for field, value in {**config, "epochs": first}.items():
        if field not in FREE and value != DEFAULT[field]:
            command += f" --{field.replace('_', '-')} {' '.join(value) if isinstance(value, list) else value}"
    commands = [command, *[f"python train.py --resume runs/{config['name']} --epochs {epochs}" for epochs in longer]]
    shown = "\n".join(commands)
    return (
        f"```bash\n{shown}\n```\n\n{minutes(history['seconds'][-1])} minutes of training on "
        f"{run['hardware']} ({run['runtime']}), torch {run['versions']['torch']}; "
        f"{history['train_accuracy'][-1]:.2f} % of the augmented training images right in the last epoch."
    )


def sittings(lr: float, rates: list[float]) -> list[int]:
    """How many epochs a run was to have, first and each time it was made longer, from the rate of each of its epochs.

    The rate falls in a line from `lr` to 0 over them.
    """
    planned = [round(epoch / (1 - rate / lr)) for epoch, rate in enumerate(rates) if epoch]
    return [epochs for epochs, _ in itertools.groupby(planned)] or [1]


def per_class() -> str:
    measured = saved("weights/card")
    names = list(measured["per_class"])
    return markdown(
        ("all", *names, "expected calibration error"),
        (
            f"**{measured['accuracy']:.2f} %**",
            *[f"{measured['per_class'][name]:.1f} %" for name in names],
            f"{measured['expected_calibration_error']:.1f} %",
        ),
    )


def corruptions() -> str:
    rows = [
        (name, *[f"{accuracy:.1f} % ({strength})" for strength, accuracy in accuracies.items()])
        for name, accuracies in saved("weights/card")["corrupted"].items()
    ]
    return markdown(("accuracy (strength)", "weakest", "", "", "", "strongest"), *rows)
