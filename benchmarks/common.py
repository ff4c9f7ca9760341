"""What every benchmark needs: timing side by side, and a table that is printed and saved with the machine."""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

FOLDER = Path(__file__).parent  # where results are saved
REPOSITORY = FOLDER.parent
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from machinery import checkpoint  # noqa: E402
from machinery.device import keep_freed_memory  # noqa: E402
from train import Config, choose_runtime, describe_hardware, train_one_epoch  # noqa: E402

K = TypeVar("K")
DEFAULT = json.loads(json.dumps(dataclasses.asdict(Config())))  # the settings, as a metrics.json has them
SHORT: dict[str, Any] = {"augment": ("crop", "flip"), "padding": 2, "skip": 0.6}  # settings of the short run


def alternate(candidates: Mapping[K, Callable[[], Any]], rounds: int) -> dict[K, list[float]]:
    """Seconds of each candidate in each round; they take turns, so that a busy machine slows all of them alike.

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


def median_and_half_iqr(values: Iterable[float]) -> tuple[float, float]:
    """The median, and half of the interquartile range."""
    low, median, high = statistics.quantiles(values, n=4)
    return median, (high - low) / 2


def random_batch(batch_size: int) -> tuple[Tensor, Tensor]:
    """Random images (N, 3, 32, 32) float32 channels_last and labels (N,)."""
    images = torch.randn(batch_size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(10, (batch_size,))


def multiply_adds(model: nn.Module) -> int:
    """For one image of 32x32 pixels, in convolutions and linear layers."""
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops() // 2


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch_size: int) -> Callable[[], Any]:
    """An epoch of one step on random images, in the precision and layout that `fit` chooses on this CPU."""
    keep_freed_memory()
    model.to(memory_format=torch.channels_last)
    options: dict[str, Any] = {"runtime": choose_runtime("cpu"), "label_smoothing": Config().label_smoothing}
    batches = [random_batch(batch_size)]
    return lambda: train_one_epoch(model, batches, optimizer, progress=False, **options)


def record_of(run: Path) -> dict[str, Any]:
    """The metrics.json of a run as it may be published: with its name, and without the path of the images."""
    record = json.loads((run / "metrics.json").read_text())
    record["config"]["name"] = run.resolve().name  # which the settings lack if it is the default one
    for one in (record, *record["before"]):
        one["config"]["data_dir"] = None
    return record


def end_of(run: Path) -> dict[str, Any]:
    """The weights and the history of a finished run, but for its seconds."""
    state = checkpoint.load(run / "last.pt")
    del state["result"]["history"]["seconds"]
    return {"model": state["model"], "history": state["result"]["history"]}


def same(a: Any, b: Any) -> bool:
    """Whether dicts of tensors and plain data are equal, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def continued(config: Config) -> Config:
    """These settings, to resume what runs/ holds of the run, if anything; of a finished run, `fit` reads the end."""
    folder = Path("runs", str(config.name))
    return dataclasses.replace(config, resume=str(folder)) if (folder / "last.pt").exists() else config


def report(name: str, columns: tuple[str, ...], rows: list[tuple], **notes: Any) -> None:
    """Prints rows as a table and saves them, see `result_of`, in benchmarks/`name`.json."""
    result = result_of(columns, rows, **notes)
    print(as_page(result))
    save(result, FOLDER / f"{name}.json")


def result_of(columns: tuple[str, ...], rows: list[tuple], **notes: Any) -> dict[str, Any]:
    """The machine, the version of torch, the notes, and the rows, fractions rounded to three digits.

    The note `runs` is for the values behind the rows; it is saved, and not printed.
    """
    rows = [tuple(float(f"{v:.3g}") if isinstance(v, float) else v for v in row) for row in rows]
    table = [dict(zip(columns, row, strict=True)) for row in rows]
    return {"hardware": describe_hardware(), "torch": torch.__version__, "rows": table, **notes}


def as_page(result: Mapping[str, Any]) -> str:
    """The table of a saved result in Markdown, and its notes."""
    shown = markdown(tuple(result["rows"][0]), *[tuple(map(as_text, row.values())) for row in result["rows"]])
    notes = [f"{key.replace('_', ' ')}: {as_text(result[key])}" for key in result if key not in ("rows", "runs")]
    return f"{shown}\n\n{'; '.join(notes)}." if notes else shown


def markdown(*rows: tuple[str, ...]) -> str:
    """A table, the head first."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ("---",) * len(rows[0]), *rows[1:]))


def as_text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:,g}"


def as_mean(values: Sequence[float], digits: int = 2) -> str:
    """Their mean and standard deviation, such as 93.12 ± 0.01; a single one as it is."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def save(result: Mapping[str, Any], path: Path) -> None:
    """Writes a result as JSON, whole or not at all."""
    scratch = path.with_suffix(".new")
    scratch.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    scratch.replace(path)
