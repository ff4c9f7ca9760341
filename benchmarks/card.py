"""Measures the pretrained weights on the test set of CIFAR-10, or replaces them first; for weights/README.md.

`make card` measures; `make card RUN="runs/A runs/B" SIBLING=runs/OTHER` first takes the mean of the weights of runs.

Corruptions follow the idea of CIFAR-10-C (Hendrycks & Dietterich, 2019), but are made by Albumentations. The runs have
trained on all images, which leaves none for calibration; so the temperature is that of the sibling, a run of the same
recipe with validation images.
"""

import argparse
import hashlib
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import albumentations as A
import matplotlib.pyplot as plt
import numpy as np
import torch
from common import DEFAULT, REPOSITORY, record_of, save
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from dataset import CIFAR10, Images, make_loader
from machinery import checkpoint
from machinery.data.transforms import JPEG
from model import WEIGHTS, Net
from train import Config, choose_runtime, describe_hardware, make_loaders, predict
from utils import expected_calibration_error, per_class_accuracy, plot_reliability

MODEL = REPOSITORY / "model.py"

# Corruption -> strengths, and the transform for one of them.
CORRUPTIONS: dict[str, tuple[tuple[float, ...], Callable[[Any], A.BasicTransform]]] = {
    "noise (standard deviation, of 255)": ((5, 10, 15, 25, 40), lambda s: A.GaussNoise((s / 255, s / 255), p=1)),
    "blur (standard deviation, px)": ((0.4, 0.6, 0.8, 1.2, 1.8), lambda s: A.GaussianBlur(0, (s, s), p=1)),
    "brightness (added, of 1)": ((0.1, 0.2, 0.3, 0.4, 0.5), lambda s: A.RandomBrightnessContrast((s, s), (0, 0), p=1)),
    "contrast (factor)": ((0.8, 0.6, 0.4, 0.25, 0.15), lambda s: A.ColorJitter((1, 1), (s, s), (1, 1), (0, 0), p=1)),
    "JPEG (quality)": ((90, 70, 50, 30, 15), lambda s: JPEG(quality_range=(s, s), p=1)),
}
COLOURS = "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#D55E00"  # of the corruptions; colour-blind safe (Okabe & Ito)


def publish_weights(runs: Sequence[Path], sibling: Path) -> None:
    """Makes the calibrated mean of the weights of finished runs the pretrained ones.

    Their sha256 goes into model.py, and the records of all runs, and of the sibling, beside them.
    """
    nets = [Net.from_pretrained(run / "model.pt") for run in runs]
    *_, last = records = [record_of(run) for run in runs]
    refuse_unfit(records, other := record_of(sibling))
    net, settings = nets[0], {**DEFAULT, **last["config"]}
    if len(runs) > 1:  # BatchNorm statistics over the images of the last run, but without CutMix
        images = {name: settings[name] for name in ("augment", "padding", "seed")}
        net = mean_of(nets, make_loaders(Config(**images))[0])
    net.apply_temperature(other["temperature"])
    checkpoint.write_whole(WEIGHTS, checkpoint.weights_file(net))
    names = [record["config"]["name"] for record in records]
    behind = {"before": parents_of(records), "mean_of": names, "sibling": other}
    save({**last, **behind}, WEIGHTS.with_name("metrics.json"))
    digest = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    MODEL.write_text(re.sub('WEIGHTS_SHA256 = ".*"', f'WEIGHTS_SHA256 = "{digest}"', MODEL.read_text()))


def refuse_unfit(records: list[dict[str, Any]], sibling: dict[str, Any]) -> None:
    """Raises ValueError unless all runs were trained to the end on all of CIFAR-10, and the sibling was calibrated."""
    for record in records:
        config, trained_on = record["config"], {run["data"] for run in (record, *record["before"])}
        if trained_on != {"cifar10"} or config["holdout"] or len(record["history"]["epoch"]) < config["epochs"]:
            raise ValueError(f"{config['name']} was not trained to its end on all training images of CIFAR-10 alone")
    if "temperature" not in sibling:
        raise ValueError("the sibling has no temperature; train it to its end with --holdout 5000, without --weights")


def parents_of(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All runs behind these and these, each once, without the last; no two runs have the same seconds."""
    runs = [run for record in records for run in (*record["before"], {**record, "before": []})]
    return list({str(run["history"]["seconds"]): run for run in runs[:-1]}.values())


def mean_of(nets: list[Net], loader: Any) -> Net:
    """A network with the mean of these weights (Wortsman et al., 2022), and BatchNorm statistics over the loader."""
    mean = AveragedModel(nets[0])
    for net in nets:
        mean.update_parameters(net)
    update_bn(loader, mean.module)
    return cast(Net, mean.module)


def log_probs_of(model: nn.Module, dataset: Images) -> Tensor:
    """(N, 10) of all images, in fp32."""
    return predict(model, make_loader(dataset, 500, train=False), runtime=choose_runtime("cpu", "fp32"))[0]


def corrupt(dataset: Images, transform: A.BasicTransform) -> Images:
    """A copy of the dataset after `transform`, whose random numbers depend on the place of an image alone."""
    copy = dataset.subset(range(len(dataset)))
    for i, picture in enumerate(dataset.images.numpy()):
        transform.set_random_state(np.random.default_rng(i), random.Random(i))
        copy.images[i] = torch.from_numpy(transform(image=picture)["image"])
    return copy


def plot_corruptions(dataset: Images, accuracy: float, corrupted: dict[str, dict[str, float]], index: int) -> Figure:
    """Test accuracy in percent against strength, a line per corruption; below, image `index` under the strongest."""
    mosaic: Any = [["chart"] * (1 + len(CORRUPTIONS)), ["clean", *CORRUPTIONS]]
    figure, axes = plt.subplot_mosaic(mosaic, figsize=(9, 6.4), height_ratios=(3, 1), layout="constrained")
    one = dataset.subset([index])
    pictures = {"clean": one.images[0]}
    for (name, (strengths, make)), colour, marker in zip(CORRUPTIONS.items(), COLOURS, "osD^v", strict=True):
        values = [accuracy, *corrupted[name].values()]
        label = f"{name}: {strengths[0]} to {strengths[-1]}"
        axes["chart"].plot(values, color=colour, marker=marker, label=label)
        pictures[name] = corrupt(one, make(strengths[-1])).images[0]
    axes["chart"].set(title="Test accuracy on corrupted images", xlabel="strength", ylabel="test accuracy (%)")
    axes["chart"].set_xticks(range(6), ["clean", "1", "2", "3", "4", "5"])
    axes["chart"].grid(alpha=0.3)
    axes["chart"].legend(loc="lower left")
    for name, picture in pictures.items():
        axes[name].imshow(picture.numpy(), interpolation="nearest")
        axes[name].set_title(name if name == "clean" else f"{name.split()[0]}, 5", fontsize=10)
        axes[name].axis("off")
    plt.close(figure)
    return figure


def measure(model: nn.Module, test_set: Images) -> dict[str, Any]:
    """Everything that the card says of the weights; also draws its pictures."""
    labels, log_probs = test_set.labels, log_probs_of(model, test_set)

    def accuracy(log_probs: Tensor) -> float:
        return round(100 * (log_probs.argmax(1) == labels).float().mean().item(), 2)

    corrupted = {
        name: {str(s): accuracy(log_probs_of(model, corrupt(test_set, make(s)))) for s in strengths}
        for name, (strengths, make) in CORRUPTIONS.items()
    }
    plot_reliability(log_probs, labels).savefig(WEIGHTS.with_name("reliability.png"), dpi=110)
    picture = plot_corruptions(test_set, accuracy(log_probs), corrupted, index=1)
    picture.savefig(WEIGHTS.with_name("corruptions.png"), dpi=110)
    per_class = per_class_accuracy(log_probs, labels, test_set.classes)
    return {
        "sha256": hashlib.sha256(WEIGHTS.read_bytes()).hexdigest(),
        "bytes": WEIGHTS.stat().st_size,
        "hardware": describe_hardware(),
        "accuracy": accuracy(log_probs),
        "per_class": {name: round(value, 2) for name, value in per_class.items()},
        "expected_calibration_error": round(expected_calibration_error(log_probs, labels), 2),
        "mean_confidence": round(100 * log_probs.exp().amax(1).mean().item(), 2),
        "corrupted": corrupted,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, nargs="+", metavar="DIR", help="publish the mean of the weights of these")
    parser.add_argument("--sibling", type=Path, metavar="DIR", help="calibrated by the temperature of this run")
    options = parser.parse_args(arguments)
    if (options.run is None) != (options.sibling is None):
        parser.error("give both --run and --sibling, or none of them")
    if options.run:
        publish_weights(options.run, options.sibling)
    result = measure(Net.from_pretrained(WEIGHTS), CIFAR10(train=False))
    save(result, WEIGHTS.with_name("card.json"))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
