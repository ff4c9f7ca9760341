"""What every benchmark needs: timing side by side, and a table that is printed and saved."""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from machinery.device import keep_freed_memory  # noqa: E402
from train import (  # noqa: E402
    Config,
    choose_runtime,
    describe_hardware,
    train_one_epoch,
)

K = TypeVar("K")
DEFAULT = json.loads(json.dumps(dataclasses.asdict(Config())))  # settings as a metrics.json has them


def alternate(candidates: Mapping[K, Callable[[], Any]], rounds: int) -> dict[K, list[float]]:
    """Seconds of each candidate in each round; they take turns, so that a busy machine harms all of them alike.

    Each is called once before, uncounted.
    """
    for run in candidates.values():
        run()
    seconds: dict[K, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def median_and_half_iqr(seconds: Iterable[float]) -> tuple[float, float]:
    """The median, and half the distance between the quartiles."""
    low, median, high = statistics.quantiles(seconds, n=4)
    return median, (high - low) / 2


def rate(count: int, seconds: Iterable[float]) -> tuple[int, int]:
    """How many a second if `count` take so long: at the median, and the half distance between the quartiles."""
    median, spread = median_and_half_iqr(seconds)
    return round(count / median), round(count * spread / median**2)


def largest_convolution(batch_size: int = 500, channels: int = 256, size: int = 16) -> tuple[Callable[[], Any], float]:
    """Forward and backward of one large 3x3 convolution in bf16, channels_last, and its floating-point operations.

    What it reaches is taken for the limit of the machine.
    """
    layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False).bfloat16().to(memory_format=torch.channels_last)
    images = torch.randn(batch_size, channels, size, size).bfloat16().contiguous(memory_format=torch.channels_last)
    images.requires_grad_()
    gradient = torch.randn_like(images)
    return lambda: layer(images).backward(gradient), 3 * 2 * batch_size * size**2 * channels**2 * 9


def random_batch(batch_size: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) float32 channels_last and labels (N,), at random."""
    images = torch.randn(batch_size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(10, (batch_size,))


def multiply_adds(model: nn.Module) -> int:
    """For one image of 32x32 pixels, in convolutions and linear layers."""
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops() // 2


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch_size: int) -> Callable[[], Any]:
    """An epoch of one step, on random images, with the arithmetic that is best here."""
    keep_freed_memory()
    model.to(memory_format=torch.channels_last)
    images, labels = random_batch(batch_size)
    options: dict[str, Any] = {"runtime": choose_runtime("cpu"), "progress": False}
    options["label_smoothing"] = Config().label_smoothing
    one_batch = DataLoader(TensorDataset(images[None], labels[None]), batch_size=None)
    return lambda: train_one_epoch(model, one_batch, optimizer, **options)


def record_of(run: Path) -> dict[str, Any]:
    """The metrics.json of a run, as it may be published: without where the images lay, in the runs before it, too."""
    record = json.loads((run / "metrics.json").read_text())
    for one in (record, *record["before"]):
        one["config"]["data_dir"] = None
    return record


def taken_up(config: Config) -> Config:
    """These settings, to go on with what runs/ holds of the run, if it does; of a finished one, `fit` reads the end."""
    folder = Path("runs", str(config.name))
    return dataclasses.replace(config, resume=str(folder)) if (folder / "last.pt").exists() else config


def report(
    name: str, columns: tuple[str, ...], rows: list[tuple], runs: Sequence[Mapping[str, Any]] = (), **notes: Any
) -> None:
    """Prints rows as a table and saves them, with the machine and the version of torch, in benchmarks/`name`.json."""
    result = result_of(columns, rows, runs, **notes)
    show(result)
    save(result, FOLDER / f"{name}.json")


def result_of(
    columns: tuple[str, ...], rows: list[tuple], runs: Sequence[Mapping[str, Any]] = (), **notes: Any
) -> dict[str, Any]:
    """What `report` saves.

    Fractions in the table are rounded to three digits; what each of the `runs` behind it gave is saved as it is.
    """
    rows = [tuple(float(f"{v:.3g}") if isinstance(v, float) else v for v in row) for row in rows]
    return {
        "hardware": describe_hardware(),
        "torch": torch.__version__,
        **notes,
        "rows": [dict(zip(columns, row, strict=True)) for row in rows],
        **({"runs": runs} if runs else {}),
    }


def show(result: Mapping[str, Any]) -> None:
    """Prints the table of a result, and its notes below."""
    rows = result["rows"]
    texts = [tuple(rows[0]), *[tuple(map(as_text, row.values())) for row in rows]]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for text in texts:
        print("  ".join(cell.ljust(width) for cell, width in zip(text, widths, strict=True)).rstrip())
    for note, value in result.items():
        if note not in ("hardware", "torch", "rows", "runs"):
            print(f"{note.replace('_', ' ')}: {as_text(value)}")


def save(result: Mapping[str, Any], path: Path) -> None:
    """Writes a result as JSON, whole or not at all."""
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    beside.replace(path)


def as_mean(values: Sequence[float], digits: int = 2) -> str:
    """Their mean and standard deviation, such as 93.12 ± 0.01; a single one as it is."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def as_text(value: float | str) -> str:
    """A cell of a table."""
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:,g}"
