"""Writes saved numbers and pictures into the pages and the notebook: `make readme`. A test keeps them true.

Each part of a page between `<!-- name -->` and `<!-- /name -->` is written anew, from results/*.json, benchmarks/*.json
and weights/*.json. With `--take` (`make results`), finished runs are first taken from runs/ into the repository: each
runs/cifar10-seed*/metrics.json, as runs are named by default, becomes results/cifar10-seed<seed>.json, and
runs/S9_Final.ipynb, which `make run` wrote, becomes the committed notebook; both only with the default settings.
"""

import argparse
import base64
import io
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import nbformat
from baselines import airbench94_muon_network, original_network
from common import DEFAULT, FOLDER, as_mean, as_text, multiply_adds, record_of
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from PIL import Image

from machinery.config import FREE
from model import Net
from utils import ORIGINAL_ACCURACY, plot_architecture, plot_curves

REPOSITORY = FOLDER.parent
RESULTS, NOTEBOOK = REPOSITORY / "results", REPOSITORY / "S9_Final.ipynb"
PATTERNS = "README.md", "docs/*.md", "benchmarks/README.md", "weights/README.md"
PAGES = [page for pattern in PATTERNS for page in sorted(REPOSITORY.glob(pattern))]
COLOURS = 192  # of a picture in the notebook, whose file is to stay below 500 KB


def take(runs: Path) -> None:
    """Takes finished runs of the default settings, and the notebook, from this folder into the repository."""
    for path in sorted(runs.glob("cifar10-seed*/metrics.json"), key=lambda path: path.stat().st_mtime):
        run = record_of(path.parent)
        if is_default(run):
            target = RESULTS / f"cifar10-seed{run['config']['seed']}.json"
            target.write_text(json.dumps(run, indent=1) + "\n")
            print(f"{path.parent.name}: {run['history']['test_accuracy'][-1]:.2f} %, to {target.name}")
    if (executed := runs / NOTEBOOK.name).exists():
        notebook = nbformat.read(executed, as_version=4)
        if reason := fault(notebook):
            print(f"{executed} {reason} and is not taken")
        else:
            nbformat.write(committed(notebook), NOTEBOOK)


def is_default(run: dict) -> bool:
    """Whether `Net` was trained to the end, by one process on a CPU, with the default settings but `FREE` and seed."""
    wanted = {"network": "Net", "parameters": sum(p.numel() for p in Net().parameters()), "processes": 1}
    settings = {field: value for field, value in DEFAULT.items() if field not in (*FREE, "seed")}
    epochs, rates = DEFAULT["epochs"], run["history"]["lr"]  # those of a run made longer afterwards are others
    return (
        run["runtime"].startswith("cpu")
        and wanted.items() <= run.items()
        and all(run["config"].get(field, value) == value for field, value in settings.items())
        and rates == [DEFAULT["lr"] * (1 - epoch / epochs) for epoch in range(epochs)]
    )


def fault(notebook: nbformat.NotebookNode) -> str | None:
    """Why an executed notebook cannot be the committed one; None if it can."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if any("injected-parameters" in cell.metadata.get("tags", []) for cell in code):
        return "has other settings"
    failed = any(output.output_type == "error" for cell in code for output in cell.outputs)
    return "did not run to its end" if failed or not all(cell.execution_count for cell in code) else None


def committed(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook as it goes into the repository: without papermill's notes, with pictures of few colours."""
    notebook, _ = CoalesceStreamsPreprocessor().preprocess(notebook, {})
    notebook.metadata = {key: notebook.metadata[key] for key in ("kernelspec", "language_info")}
    for cell in notebook.cells:
        tags = {"tags": ["parameters"]} if "parameters" in cell.metadata.get("tags", []) else {}
        cell.metadata = tags | {key: cell.metadata[key] for key in ("alt",) if key in cell.metadata}
        for data in (output.get("data", {}) for output in cell.get("outputs", [])):
            if "image/png" in data:  # which becomes a third of its bytes
                file, picture = io.BytesIO(), Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
                fewer = picture.convert("RGB").quantize(COLOURS, kmeans=3, dither=Image.Dither.NONE)
                fewer.save(file, "PNG", optimize=True)
                data["image/png"] = base64.b64encode(file.getvalue()).decode()
    return notebook


def saved(name: str) -> dict:
    """What is in the JSON file of this name, such as benchmarks/step."""
    return json.loads((REPOSITORY / f"{name}.json").read_text())


def saved_runs() -> list[dict]:
    """The runs of the default settings, one for each seed, the notebook's first."""
    runs = {path.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob("cifar10-seed*.json"))}
    if other := [name for name, run in runs.items() if not is_default(run)]:
        raise ValueError(
            f"of other settings than the default, so no mean with the rest: {', '.join(other)} in results/"
        )
    return list(runs.values())


def long_runs() -> list[dict]:
    """The records of the runs that the weights that ship went through, the first one first."""
    record = saved("weights/metrics")
    return [*record["before"], record]


def last(runs: list[dict], column: str) -> list:
    """The last number in this column of each run's history."""
    return [run["history"][column][-1] for run in runs]


def markdown(*rows: tuple[str, ...]) -> str:
    """A table, the head first."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ("---",) * len(rows[0]), *rows[1:]))


def minutes(seconds: float) -> str:
    return f"{seconds / 60:,.0f}"


def summary() -> str:
    runs = saved_runs()
    time = minutes(statistics.median(last(runs, "seconds")))
    return (
        f"Train a {runs[0]['parameters']:,}-parameter network on CIFAR-10 to "
        f"**{as_mean(last(runs, 'test_accuracy'))} %** test accuracy in {last(runs, 'epoch')[0]} epochs: "
        f"{time} minutes on two CPU cores, in a notebook that explains each step."
    )


def table() -> str:
    """`Net`, the original and airbench94_muon: how good, and at what cost."""
    runs, long, timed = saved_runs(), long_runs(), saved("benchmarks/time_to_accuracy")
    short, accuracies = timed["rows"][-1], last(runs, "test_accuracy")
    epochs, all_epochs = last(runs, "epoch")[0], sum(last(long, "epoch"))
    networks = [  # with epochs, passes over the 50,000 images, and seconds of training
        (
            "**`make run`**",
            f"**{as_mean(accuracies)} %** (n = {len(runs)}: {', '.join(f'{accuracy:.2f}' for accuracy in accuracies)})",
            *(Net(), epochs, epochs, statistics.median(last(runs, "seconds"))),
        ),
        (
            "**the short run**",
            f"**{short['plain %']} %** (n = {short['n']}); {short['6 views %']} % with 6 views",
            *(Net(), short["epochs"], float(short["passes over the images"]), float(short["seconds"].split()[0])),
        ),
        (
            "**the weights that ship**",
            f"**{saved('weights/card')['accuracy']:.2f} %** (n = 1)",
            *(Net(), all_epochs, all_epochs, sum(last(long, "seconds"))),
        ),
        (
            "[the original](https://github.com/ShikhaERAV2/Session9)",
            f"{ORIGINAL_ACCURACY:.2f} % (best epoch)",
            *(original_network(), 20, 20, timed["seconds_of_the_original"]),
        ),
        (
            "[airbench94_muon](https://github.com/KellerJordan/cifar10-airbench)",
            "93.2 % (n = 1, run here); 94.01 % with 6 views (published)",
            *(airbench94_muon_network(), 8, 8, timed["seconds_of_airbench94_muon"]),
        ),
    ]
    rows = []
    for name, accuracy, network, epochs, passes, seconds in networks:
        cost = 3 * 2 * multiply_adds(network) * passes * 50_000 / 1e15  # forward, and backward to input and to weights
        parameters = sum(p.numel() for p in network.parameters())
        rows.append((name, accuracy, f"{parameters:,}", f"{epochs}", f"{cost:.2g}", minutes(seconds)))
    return markdown(("", "test accuracy", "parameters", "epochs", "PFLOP", "minutes"), *rows)


def survival() -> str:
    """What benchmarks/survival.py counted when it last ran."""
    kills, corruptions, weights = (saved("benchmarks/survival")[name] for name in ("kills", "corruptions", "weights"))
    inside = f"{kills.get('inside a write', 0)} of them inside the writing of a checkpoint"
    anew = f"{kills.get('begun anew', 0)} killed before the first save and begun anew"
    believed, unharmed, failed = (weights.get(outcome, 0) for outcome in ("believed", "unharmed", "another error"))
    refused = sum(count for outcome, count in corruptions.items() if outcome.startswith("refused"))
    accepted, other = corruptions.get("accepted", 0), corruptions.get("another error", 0)
    return markdown(
        ("harm", "times", "outcome"),
        (
            f"SIGKILL at a random instant, {inside}, then resumed ({anew})",
            f"{kills['kills']}",
            f"{kills.get('identical at the end', 0)} ended with the weights and metrics of a run left in peace",
        ),
        (
            "bits flipped, ends cut off, pieces swapped in batch files, archive and checkpoint",
            f"{corruptions['corruptions']:,}",
            f"{refused:,} refused with a clear error, {accepted} accepted, {other} ended in another error",
        ),
        (
            "the same in a file of weights, such as model.pt",
            f"{weights['corruptions']:,}",
            f"{weights.get('refused', 0):,} refused with a clear error, {unharmed} read with the weights that it had, "
            f"{believed} with others, {failed} ended in another error",
        ),
    )


def weights() -> str:
    measured, runs = saved("weights/card"), long_runs()
    return (
        f"The trained network, {runs[-1]['parameters']:,} parameters in {measured['bytes'] / 1e6:.1f} MB: "
        f"**{measured['accuracy']:.2f} %** of the CIFAR-10 test images right, plain, after {sum(last(runs, 'epoch'))} "
        "epochs in all."
    )


def recipe() -> str:
    """What the runs took that trained the weights, and what they gave."""
    runs, measured = long_runs(), saved("weights/card")
    rows = [
        (
            f"`{run['config']['name']}`",
            *(f"{run['history']['epoch'][-1]}", minutes(run["history"]["seconds"][-1])),
            *(f"{run['history'][column][-1]:.2f} %" for column in ("train_accuracy", "test_accuracy")),
            f"{run['hardware']}; {run['runtime']}; torch {run['versions']['torch']}",
        )
        for run in runs
    ]
    names = [f"`{name}`" for name in runs[-1]["mean_of"]]
    if len(names) > 1:
        accuracy, where = f"**{measured['accuracy']:.2f} %**", f"measured on {measured['hardware']}; cpu, fp32"
        rows.append((f"the mean of {', '.join(names)}", "", "", "", accuracy, where))
    return markdown(
        ("run", "epochs", "minutes of training", "training accuracy, as augmented", "test accuracy", "on"), *rows
    )


def per_class() -> str:
    measured = saved("weights/card")
    accuracies = [f"{accuracy:.1f} %" for accuracy in measured["per_class"].values()]
    return markdown(
        ("all", *measured["per_class"], "expected calibration error"),
        (f"**{measured['accuracy']:.2f} %**", *accuracies, f"{measured['expected_calibration_error']:.1f} %"),
    )


def corruptions() -> str:
    rows = [
        (name, *[f"{accuracy:.1f} % ({strength})" for strength, accuracy in accuracies.items()])
        for name, accuracies in saved("weights/card")["corrupted"].items()
    ]
    return markdown(("accuracy (strength)", "weakest", "", "", "", "strongest"), *rows)


def benchmark_table(name: str) -> str:
    """The table that a benchmark saved, and where it ran; gpu_NAME is that part of benchmarks/gpu.json."""
    result = saved("benchmarks/gpu")[name[4:]] if name.startswith("gpu_") else saved(f"benchmarks/{name}")
    rows = result.pop("rows")
    result.pop("runs", None)
    shown = markdown(tuple(rows[0]), *[tuple(map(as_text, row.values())) for row in rows])
    notes = [result.pop("hardware"), f"torch {result.pop('torch')}"]
    notes += [f"{note.replace('_', ' ')}: {as_text(value)}" for note, value in result.items()]
    return f"{shown}\n\n{'; '.join(notes)}."


PARTS: dict[str, Callable[[], str]] = {
    part.__name__: part for part in (summary, table, survival, weights, recipe, per_class, corruptions)
}


def with_numbers(text: str) -> str:
    """A page, or a cell of the notebook, its parts written anew; a name not in `PARTS` is that of a benchmark."""

    def written(part: re.Match) -> str:
        name = part[1]
        return f"<!-- {name} -->\n{PARTS[name]() if name in PARTS else benchmark_table(name)}\n<!-- /{name} -->"

    return re.sub(r"^<!-- (\w+) -->$.*?^<!-- /\1 -->$", written, text, flags=re.MULTILINE | re.DOTALL)


def picture_of(call: str) -> bytes:
    """The PNG that a cell of the committed notebook drew; `call` is the cell's last line."""
    (cell,) = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.source.endswith(call)]
    (png,) = [o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]
    return base64.b64decode(png)


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
    (RESULTS / "misclassified.png").write_bytes(picture_of("plot_misclassified(test_set, log_probs)"))


if __name__ == "__main__":
    main()
