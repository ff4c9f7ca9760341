"""Measures the trained weights on the test set, for weights/README.md: `make card`, which needs CIFAR-10.

Accuracy, plain and per class; calibration; and accuracy on test images spoilt in five ways at five strengths, made with
Albumentations after the idea of CIFAR-10-C (Hendrycks & Dietterich, 2019), whose images these are not. All in fp32.
With `make card RUN=runs/NAME SIBLING=runs/OTHER`, the weights of a run are first put in the place of those that ship;
with RUN="runs/A runs/B", the mean of theirs. Nothing is left on which they could be calibrated, so this is done by the
temperature of the sibling, a run of the same recipe that kept training images aside.
"""

import argparse
import hashlib
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import albumentations as A
import numpy as np
import torch
from common import DEFAULT, FOLDER, record_of
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.data import DataLoader

from dataset import CIFAR10, Images, make_loader
from machinery.data.augment import JPEG
from machinery.errors import DataError
from machinery.plots import picture_grid
from machinery.weights import WeightsError
from model import WEIGHTS, Net
from train import Config, choose_runtime, describe_hardware, make_loaders, predict
from utils import expected_calibration_error, per_class_accuracy, plot_reliability

MODEL = FOLDER.parent / "model.py"
RECIPE = "augment", "padding", "cutmix", "label_smoothing", "batch_size"  # what decides how sure a network becomes


# What spoils a picture -> strengths, and the transform for one of them.
CORRUPTIONS = {
    "noise (standard deviation, of 255)": (
        (5, 10, 15, 25, 40),
        lambda s: A.GaussNoise(std_range=(s / 255, s / 255), p=1),
    ),
    "blur (standard deviation, px)": (
        (0.4, 0.6, 0.8, 1.2, 1.8),
        lambda s: A.GaussianBlur(sigma_limit=(s, s), blur_limit=0, p=1),
    ),
    "brightness (added, of 1)": (
        (0.1, 0.2, 0.3, 0.4, 0.5),
        lambda s: A.RandomBrightnessContrast(brightness_limit=(s, s), contrast_limit=(0, 0), p=1),
    ),
    "contrast (factor)": (
        (0.8, 0.6, 0.4, 0.25, 0.15),
        lambda s: A.ColorJitter((1, 1), (s, s), (1, 1), (0, 0), p=1),
    ),
    "JPEG (quality)": (
        (90, 70, 50, 30, 15),
        lambda s: JPEG(quality_range=(s, s), p=1),
    ),
}


def ship(runs: Sequence[Path], sibling: Path, data_dir: str | None = None) -> None:
    """Makes the mean of the weights of finished runs those that ship, calibrated, and puts their sha256 into model.py.

    The records of all runs go beside them, under the names that their folders have; the sibling's as such.

    Args:
        runs: On all training images.
        sibling: Of the recipe of the last run, maybe shorter, but with held-out images.
        data_dir: Where CIFAR-10 is, of which the mean of several runs needs the training images.

    Raises:
        DataError: CIFAR-10 is needed and missing or damaged.
        WeightsError: They are no weights of a `Net`.
        ValueError: A run is named twice, is not finished, or did not train on all of CIFAR-10's training images and
            nothing else; or the sibling is none.
    """
    nets = [Net.from_pretrained(run / "model.pt") for run in runs]
    records = [named_record_of(run) for run in runs]
    for run, record in zip(runs, records, strict=True):
        refuse_other_images(run, record)
    last, other = records[-1], named_record_of(sibling)
    refuse_no_sibling(sibling, other, runs[-1], last)
    names = [record["config"]["name"] for record in records]
    if len(set(names)) < len(names):
        raise ValueError(f"each run counts once, got {', '.join(names)}")
    if len(runs) == 1:
        net = nets[0]
    else:  # the images of the last run, but without CutMix
        settings = {**DEFAULT, **last["config"]}  # of which a record lacks those that came later
        images = {name: settings[name] for name in ("augment", "padding", "seed")}
        net = mean_of(nets, make_loaders(Config(data_dir=data_dir, **images))[0])
    last |= {"before": all_before(records), "mean_of": names}
    net.divide_logits(other["temperature"])
    torch.save(net.state_dict(), WEIGHTS)
    WEIGHTS.with_name("metrics.json").write_text(json.dumps({**last, "sibling": other}, indent=1) + "\n")
    digest = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    MODEL.write_text(re.sub('WEIGHTS_SHA256 = ".*"', f'WEIGHTS_SHA256 = "{digest}"', MODEL.read_text()))


def named_record_of(run: Path) -> dict[str, Any]:
    """Its record with its name, which the settings lack if it is the default."""
    record = record_of(run)
    record["config"]["name"] = run.resolve().name
    return record


def refuse_other_images(run: Path, record: dict[str, Any]) -> None:
    """Raises ValueError if it is not finished, or may have trained on other images than all of CIFAR-10's."""
    done, config = len(record["history"]["epoch"]), record["config"]
    if done < config["epochs"] or record["data"] != "cifar10" or config["holdout"]:
        raise ValueError(f"{run}: {done} of {config['epochs']} epochs on {record['data']}, holdout {config['holdout']}")
    if (config["weights"] and not record["before"]) or any(other["data"] != "cifar10" for other in record["before"]):
        raise ValueError(f"{run}: it began with {config['weights']}, trained on other images or nobody knows on which")


def refuse_no_sibling(sibling: Path, other: dict[str, Any], run: Path, record: dict[str, Any]) -> None:
    """Raises ValueError if `other`, the record of `sibling`, has no temperature that may calibrate this run."""
    settings, others = ({**DEFAULT, **found["config"]} for found in (record, other))
    unlike = [f"{name} is {others[name]}, not {settings[name]}" for name in RECIPE if others[name] != settings[name]]
    if other["data"] != "cifar10" or unlike:
        raise ValueError(f"{sibling} is no sibling of {run}: {'; '.join(unlike) or 'it trained on other images'}")
    if others["weights"]:
        raise ValueError(f"{sibling} began with {others['weights']}, which may know the images it held out; train anew")
    if "temperature" not in other:
        raise ValueError(f"{sibling} has no temperature: train it to its end with --holdout 5000")


def all_before(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs that these went through, and these, each once; but the last of these."""
    runs: list[dict[str, Any]] = []
    known = [records[-1]["history"]]  # two runs have the same seconds by no chance
    for record in records:
        own = {field: value for field, value in record.items() if field != "before"}
        for run in (*record["before"], own):
            if run["history"] not in known:
                runs.append(run)
                known.append(run["history"])
    return runs


def mean_of(nets: list[Net], loader: DataLoader) -> Net:
    """A network with the mean of these weights (Wortsman et al., 2022), and with BatchNorm statistics of its own.

    They should have trained on from the same weights, and not for too long; of others, the mean is good for nothing
    (Frankle et al., 2020).

    Args:
        loader: Of the training images, over which the statistics are taken.
    """
    mean = AveragedModel(nets[0])
    for net in nets:
        mean.update_parameters(net)
    update_bn(loader, mean.module)
    return cast(Net, mean.module)


def log_probs_of(model: nn.Module, dataset: Images) -> Tensor:
    """(N, 10) of all images, in fp32."""
    return predict(model, make_loader(dataset, 500, train=False), runtime=choose_runtime("cpu", "fp32"))[0]


def spoilt(dataset: Images, transform: A.BasicTransform) -> Images:
    """A copy of the dataset after `transform`, whose draws for an image depend on its place alone."""
    copy = dataset.subset(range(len(dataset)))
    for i, picture in enumerate(dataset.images.numpy()):
        transform.set_random_state(np.random.default_rng(i), random.Random(i))
        copy.images[i] = torch.from_numpy(transform(image=picture)["image"])
    return copy


def plot_corruptions(dataset: Images, accuracy: float, corrupted: dict[str, dict[str, float]], index: int) -> Figure:
    """Image `index` as it is and under each corruption, with the accuracies in percent on all images spoilt alike."""
    figure, grid = picture_grid(len(CORRUPTIONS), 6, width=8, title_height=0.1)
    one = dataset.subset([index])
    for row, (name, (strengths, make)) in zip(grid, CORRUPTIONS.items(), strict=True):
        pictures = {f"as it is: {accuracy:.1f} %": one.images[0]}
        for strength in strengths:
            title = f"{strength}: {corrupted[name][str(strength)]:.1f} %"
            pictures[title] = spoilt(one, make(strength)).images[0]
        for axes, (title, picture) in zip(row, pictures.items(), strict=True):
            axes.imshow(picture.numpy(), interpolation="nearest")
            axes.set_title(title, fontsize=10)
        row[0].text(-0.15, 0.5, name.replace(" (", "\n("), transform=row[0].transAxes, ha="right", va="center")
    return figure


def measure(model: nn.Module, test_set: Images) -> dict:
    """All that the card says of the weights; also draws its pictures."""
    labels = test_set.labels

    def accuracy(log_probs: Tensor) -> float:
        return round(100 * (log_probs.argmax(1) == labels).float().mean().item(), 2)

    right = accuracy(log_probs := log_probs_of(model, test_set))
    print(f"{right:.2f} % of {len(labels):,} test images", flush=True)
    plot_reliability(log_probs, labels).savefig(WEIGHTS.with_name("reliability.png"), dpi=110)
    corrupted: dict[str, dict[str, float]] = {}
    for name, (strengths, make) in CORRUPTIONS.items():
        corrupted[name] = {str(s): accuracy(log_probs_of(model, spoilt(test_set, make(s)))) for s in strengths}
        print(name, corrupted[name], flush=True)
    picture = plot_corruptions(test_set, right, corrupted, index=1)
    picture.savefig(WEIGHTS.with_name("corruptions.png"), dpi=110)
    per_class = per_class_accuracy(log_probs, labels, test_set.classes)
    return {
        "sha256": hashlib.sha256(WEIGHTS.read_bytes()).hexdigest(),
        "bytes": WEIGHTS.stat().st_size,
        "hardware": describe_hardware(),
        "accuracy": right,
        "per_class": {name: round(accuracy, 2) for name, accuracy in per_class.items()},
        "expected_calibration_error": round(expected_calibration_error(log_probs, labels), 2),
        "mean_confidence": round(100 * log_probs.exp().amax(1).mean().item(), 2),
        "corrupted": corrupted,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, nargs="+", metavar="DIR", help="ship the mean of the weights of these runs")
    parser.add_argument("--sibling", type=Path, metavar="DIR", help="calibrated by the temperature of this run")
    parser.add_argument("--data-dir", metavar="DIR", help="where CIFAR-10 is; then $CIFAR10_ROOT, then ./data")
    options = parser.parse_args()
    if (options.run is None) != (options.sibling is None):
        parser.error("give both --run and --sibling, or none of them")
    if options.run:
        try:
            ship(options.run, options.sibling, options.data_dir)
        except (ValueError, OSError, DataError, WeightsError) as error:
            parser.error(str(error))
    result = measure(Net.from_pretrained(WEIGHTS), CIFAR10(options.data_dir, train=False))
    WEIGHTS.with_name("card.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
