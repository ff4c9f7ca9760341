"""The parts of weights/README.md, from what weights/card.py measured and from the record of the training."""

import itertools

from collect import DEFAULT
from tables import markdown, minutes, saved

from machinery.settings import FREE


def weights() -> str:
    measured, runs = saved("weights/card"), training()
    return (
        f"The trained network, {runs[-1]['parameters']:,} parameters in {measured['bytes'] / 1e6:.1f} MB: "
        f"**{measured['accuracy']:.2f} %** of the CIFAR-10 test images right, plain, after the last of "
        f"{epochs_of(runs)} epochs."
    )


def training() -> list[dict]:
    """The records of the runs that the weights went through, the first one first."""
    last = saved("weights/metrics")
    return [*last["before"], last]


def epochs_of(runs: list[dict]) -> int:
    return sum(len(run["history"]["epoch"]) for run in runs)


def seconds_of(runs: list[dict]) -> float:
    """Of training alone."""
    return sum(run["history"]["seconds"][-1] for run in runs)


def hardware_of(runs: list[dict]) -> str:
    return ", then ".join(dict.fromkeys(run["hardware"] for run in runs))


def recipe() -> str:
    """The commands that trained the weights, and what it took."""
    runs = training()
    shown = "\n".join(itertools.chain.from_iterable(map(commands, runs, [None, *runs[:-1]])))
    rows = [
        (
            f"`{run['config']['name']}`",
            *(f"{len(run['history']['epoch'])}", minutes(run["history"]["seconds"][-1])),
            *(f"{run['history'][column][-1]:.2f} %" for column in ("train_accuracy", "test_accuracy")),
            f"{run['hardware']}; {run['runtime']}; torch {run['versions']['torch']}",
        )
        for run in runs
    ]
    head = "run", "epochs", "minutes of training", "right of the training images, as augmented", "of the test images"
    return f"```bash\n{shown}\n```\n\n{markdown((*head, 'on'), *rows)}"


def commands(run: dict, before: dict | None = None) -> list[str]:
    """What trains as this run did, which began with the weights of the one `before`."""
    config = run["config"]
    first, *longer = sittings(config["lr"], run["history"]["lr"])
    shown = {**config, "epochs": first}
    if before:
        shown["weights"] = f"runs/{before['config']['name']}/model.pt"
    command = f"python train.py --name {config['name']}"
    for field, value in shown.items():
        if field not in FREE and value != DEFAULT[field]:
            command += f" --{field.replace('_', '-')} {' '.join(value) if isinstance(value, list) else value}"
    return [command, *[f"python train.py --resume runs/{config['name']} --epochs {epochs}" for epochs in longer]]


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
