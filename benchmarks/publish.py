"""Writes saved numbers into the pages and the notebook (`make readme`); first takes finished runs (`make results`).

`python benchmarks/publish.py [--take]` fills what stands between `<!-- name -->` and `<!-- /name -->` on each page.
"""

import argparse
import base64
import io
import json
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import nbformat
from baselines import airbench94_muon_network, original_network
from common import DEFAULT, REPOSITORY, as_mean, as_page, markdown, multiply_adds, record_of
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from PIL import Image
from torch import nn

from machinery.config import FREE
from model import Net
from utils import ORIGINAL_ACCURACY, plot_architecture, plot_curves

RESULTS, NOTEBOOK = REPOSITORY / "results", REPOSITORY / "S9_Final.ipynb"
PAGES = [page for pattern in ("README.md", "docs/*.md", "*/README.md") for page in sorted(REPOSITORY.glob(pattern))]
COLOURS = 192  # of a picture in the notebook, whose file is to stay below 500 KB
ORIGINAL = "[the original](https://github.com/ShikhaERAV2/Session9)"
AIRBENCH = "[airbench94_muon](https://github.com/KellerJordan/cifar10-airbench)"
AIRBENCH_ACCURACY = "93.2 % (n = 1, run here); 94.01 % with 6 views (published)"


def take(runs: Path) -> None:
    """Takes finished runs of the default recipe and the notebook, by their default names, into the repository."""
    for path in sorted(runs.glob("cifar10-seed*/metrics.json"), key=lambda path: path.stat().st_mtime):
        run = record_of(path.parent)
        if is_default(run):
            seed = run["config"]["seed"]
            (RESULTS / f"cifar10-seed{seed}.json").write_text(json.dumps(run, indent=1) + "\n")
            if seed == 0 and (mistakes := path.with_name("misclassified.png")).exists():
                shutil.copy(mistakes, RESULTS)
            print(f"taken: {path.parent.name}, {run['history']['test_accuracy'][-1]:.2f} %")
    if (executed := runs / NOTEBOOK.name).exists():
        notebook = nbformat.read(executed, as_version=4)
        if is_whole(notebook):
            nbformat.write(committed(notebook), NOTEBOOK)
        else:
            print(f"not taken: {executed}, which has other settings or did not run to its end")


def is_default(run: dict) -> bool:
    """Whether the record says that `Net` was trained to the end by the default recipe, on one CPU, on all of CIFAR-10.

    What was used counts, where the record has it: older ones lack some fields.
    """
    epochs, of_cifar10 = DEFAULT["epochs"], {"source": "cifar10", "transform": None}
    expected = {
        "": {"data": "cifar10", "network": "Net", "optimizer": "Muon", "processes": 1, "before": []},
        "config": {name: value for name, value in DEFAULT.items() if name not in (*FREE, "seed")},
        "train_set": {**of_cifar10, "length": 50_000, "augment": DEFAULT["augment"]},
        "test_set": {**of_cifar10, "length": 10_000, "augment": []},
        "history": {  # the rates are others in a run made longer
            "lr": [DEFAULT["lr"] * (1 - epoch / epochs) for epoch in range(epochs)],
            "tested_on": ["test"] * epochs,
        },
    }
    return run["runtime"].startswith("cpu") and all(
        facts.get(name, value) == value
        for part, values in expected.items()
        for facts in [run.get(part, {}) if part else run]
        for name, value in values.items()
    )


def is_whole(notebook: nbformat.NotebookNode) -> bool:
    """Whether an executed notebook ran to its end, with its own settings."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    injected = any("injected-parameters" in cell.metadata.get("tags", []) for cell in code)
    failed = any(output.output_type == "error" for cell in code for output in cell.outputs)
    return all(cell.execution_count for cell in code) and not injected and not failed


def committed(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook as it goes into the repository: without papermill's metadata, with pictures of few colours."""
    notebook, _ = CoalesceStreamsPreprocessor().preprocess(notebook, {})
    notebook.metadata = {key: notebook.metadata[key] for key in ("kernelspec", "language_info")}
    for cell in notebook.cells:
        tags = {"tags": ["parameters"]} if "parameters" in cell.metadata.get("tags", []) else {}
        cell.metadata = tags | {key: cell.metadata[key] for key in ("alt",) if key in cell.metadata}
        for data in (output.get("data", {}) for output in cell.get("outputs", [])):
            if "image/png" in data:
                file, picture = io.BytesIO(), Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
                fewer = picture.convert("RGB").quantize(COLOURS, kmeans=3, dither=Image.Dither.NONE)
                fewer.save(file, "PNG", optimize=True)
                data["image/png"] = base64.b64encode(file.getvalue()).decode()
    return notebook


def saved(name: str) -> dict:
    return json.loads((REPOSITORY / f"{name}.json").read_text())


def saved_runs() -> list[dict]:
    """The runs of the default recipe, one for each seed, the notebook's first."""
    runs = {path.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob("cifar10-seed*.json"))}
    if other := [name for name, run in runs.items() if not is_default(run)]:
        raise ValueError(f"no runs of the default recipe, so no mean with the rest: {', '.join(other)} in results/")
    return list(runs.values())


def long_runs() -> list[dict]:
    """The runs that trained the pretrained weights, in their order."""
    record = saved("weights/metrics")
    return [*record["before"], record]


def last(runs: list[dict], column: str) -> list:
    return [run["history"][column][-1] for run in runs]


def table() -> str:
    """`Net`, the original and airbench94_muon: how good, and at what cost."""
    runs, timed = saved_runs(), saved("benchmarks/time_to_accuracy")
    short, of_seeds, epochs = timed["rows"][-1], last(runs, "test_accuracy"), sum(last(long_runs(), "epoch"))
    shown = f"**{as_mean(of_seeds)} %** (n = {len(runs)}: {', '.join(f'{a:.2f}' for a in of_seeds)})"
    of_card = f"**{saved('weights/card')['accuracy']:.2f} %** (n = 1)"
    in_short = f"**{short['plain %']} %** (n = {short['n']}); {short['6 views %']} % with 6 views"
    seconds = statistics.median(last(runs, "seconds")), float(short["seconds"].split()[0])
    trained: tuple[tuple[str, str, nn.Module, int, float, float | None], ...] = (  # passes over the images, seconds
        ("**`make run`**", shown, Net(), 20, 20, seconds[0]),
        ("**the short run**", in_short, Net(), 9, float(short["passes over the images"]), seconds[1]),
        ("**the pretrained weights**", of_card, Net(), epochs, epochs, None),
        (ORIGINAL, f"{ORIGINAL_ACCURACY:.2f} % (best epoch)", original_network(), 20, 20, timed["seconds_of_original"]),
        (AIRBENCH, AIRBENCH_ACCURACY, airbench94_muon_network(), 8, 8, timed["seconds_of_airbench94_muon"]),
    )
    rows = []
    for name, accuracy, network, epochs, passes, spent in trained:
        cost = 3 * 2 * multiply_adds(network) * passes * 50_000 / 1e15  # forward, and backward to input and to weights
        parameters = sum(p.numel() for p in network.parameters())
        minutes = f"{spent / 60:.0f}" if spent else ""  # none of those on several machines
        rows.append((name, accuracy, f"{parameters:,}", f"{epochs}", f"{cost:.2g}", minutes))
    return markdown(("", "test accuracy", "parameters", "epochs", "PFLOP", "minutes"), *rows)


def weights() -> str:
    measured, runs = saved("weights/card"), long_runs()
    size = f"{runs[-1]['parameters']:,} parameters in {measured['bytes'] / 1e6:.1f} MB"
    accuracy = f"**{measured['accuracy']:.2f} %** test accuracy"
    return f"The trained network, {size}: {accuracy}, after {sum(last(runs, 'epoch'))} epochs in all."


def recipe() -> str:
    """The runs that trained the weights, and what they gave."""
    rows = []
    for run in long_runs():
        accuracies = [f"{run['history'][column][-1]:.2f} %" for column in ("train_accuracy", "test_accuracy")]
        where = f"{run['hardware']}; {run['runtime']}; torch {run['versions']['torch']}"
        rows.append((f"`{run['config']['name']}`", f"{run['history']['epoch'][-1]}", *accuracies, where))
    return markdown(("run", "epochs", "training accuracy, as augmented", "test accuracy", "on"), *rows)


def per_class() -> str:
    measured = saved("weights/card")
    values = [measured["accuracy"], *measured["per_class"].values(), measured["expected_calibration_error"]]
    head = "all", *measured["per_class"], "expected calibration error"
    return markdown(head, tuple(f"{value:.1f} %" for value in values))


def benchmark_table(name: str) -> str:
    """The table that a benchmark saved, and its notes; gpu_NAME is that part of benchmarks/gpu.json."""
    return as_page(saved("benchmarks/gpu")[name[4:]] if name.startswith("gpu_") else saved(f"benchmarks/{name}"))


PARTS: dict[str, Callable[[], str]] = {part.__name__: part for part in (table, weights, recipe, per_class)}


def with_numbers(text: str) -> str:
    """A page, or a cell of the notebook, its parts written anew; a name not in `PARTS` is that of a benchmark."""

    def written(part: re.Match) -> str:
        name = part[1]
        return f"<!-- {name} -->\n{PARTS[name]() if name in PARTS else benchmark_table(name)}\n<!-- /{name} -->"

    return re.sub(r"^<!-- (\w+) -->$.*?^<!-- /\1 -->$", written, text, flags=re.MULTILINE | re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--take", action="store_true", help="first take finished runs from runs/ into the repository")
    if parser.parse_args().take:
        take(REPOSITORY / "runs")
    for page in PAGES:
        page.write_text(with_numbers(page.read_text()))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.source = with_numbers(cell.source)
    nbformat.write(notebook, NOTEBOOK)
    plot_architecture(Net()).savefig(RESULTS / "architecture.png", dpi=110)
    plot_curves(saved_runs()[0]["history"]).savefig(RESULTS / "curves.png", dpi=110)


if __name__ == "__main__":
    main()
