"""Puts saved numbers and pictures into READMEs and notebook; `make readme` does it, and a test keeps them true.

The numbers come from results/cifar10-seed*.json, copies of the runs' metrics.json, from benchmarks/*.json and from
weights/*.json; the picture of mistakes comes from the committed notebook, which is the run of seed 0.
"""

import base64
import json
import re
import sys
from pathlib import Path

import nbformat
import torch
from tables import REPOSITORY, markdown, minutes, saved
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

RESULTS = Path(__file__).parent
READMES = tuple(REPOSITORY / name for name in ("README.md", "benchmarks/README.md", "weights/README.md"))
NOTEBOOK = REPOSITORY / "S9_Final.ipynb"
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

import model_card  # noqa: E402
from baselines import airbench94_muon_network, original_network  # noqa: E402
from common import as_mean, as_text  # noqa: E402

from machinery.settings import FREE  # noqa: E402
from model import Net  # noqa: E402
from utils import (  # noqa: E402
    ORIGINAL_ACCURACY,
    plot_architecture,
    plot_curves,
)


def saved_runs() -> list[dict]:
    """The runs behind the README, one for each seed, the notebook's first; all with the same settings but the seed."""
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("cifar10-seed*.json"))]
    for run in runs:
        for field, value in run["config"].items():
            if field not in (*FREE, "seed") and value != runs[0]["config"][field]:
                raise ValueError(f"the saved runs differ in {field}, so their mean would mean nothing")
    return runs


def last_accuracies(runs: list[dict]) -> list[float]:
    """On the test set after the last epoch, in percent."""
    return [run["history"]["test_accuracy"][-1] for run in runs]


def summary(runs: list[dict]) -> str:
    first, epochs = runs[0]["history"], runs[0]["config"]["epochs"]
    measured, long = saved("weights/card"), model_card.training()
    return (
        "A notebook and a set of short modules that train a "
        f"{runs[0]['parameters']:,}-parameter network on CIFAR-10 to "
        f"**{as_mean(last_accuracies(runs))} %** test accuracy in {epochs} epochs: "
        f"{minutes(first['seconds'][-1])} minutes without a GPU ({runs[0]['hardware']}). "
        f"Trained weights ship with it: **{measured['accuracy']:.2f} %**, after {model_card.epochs_of(long)} epochs."
    )


# Published of others: network and source, test accuracy, parameters, million multiply-adds, epochs, needs.
AIRBENCH = "https://github.com/KellerJordan/cifar10-airbench"
PUBLISHED = (
    (f"[airbench95]({AIRBENCH}), larger", "95.01 % (6 views, mean)", "", "", "15", "an NVIDIA GPU"),
    (
        "[WRN-40-2](https://arxiv.org/abs/1605.07146)",
        "94.67 %; with AutoAugment 96.3 % ([Lim et al., 2019](https://arxiv.org/abs/1905.00397))",
        "2.2 million",
        "327 million",
        "200",
        "",
    ),
    ("[PyramidNet-110, α = 48](https://arxiv.org/abs/1610.02915)", "95.42 %", "1.7 million", "", "300", ""),
    ("[DenseNet-BC-100](https://arxiv.org/abs/1608.06993)", "95.49 %", "0.8 million", "", "300", ""),
)


def table(runs: list[dict]) -> str:
    """`Net` beside the original."""
    first, measured, long = runs[0], saved("weights/card"), model_card.training()
    accuracies = last_accuracies(runs)
    each = ": " + ", ".join(f"{accuracy:.2f}" for accuracy in accuracies) if len(runs) > 1 else ""
    size, work = f"{first['parameters']:,}", f"{multiply_adds(Net()) / 1e6:.0f} million"
    rows = [
        (
            "**this network**, `make run`",
            f"**{as_mean(accuracies)} %** (n = {len(runs)}{each})",
            *(size, work, f"{first['config']['epochs']}", minutes(first["history"]["seconds"][-1])),
        ),
        (
            "**this network**, [as it ships](weights/README.md)",
            f"**{measured['accuracy']:.2f} %** (n = 1)",
            *(size, work, f"{model_card.epochs_of(long)}", minutes(model_card.seconds_of(long))),
        ),
        (
            "[the original](https://github.com/ShikhaERAV2/Session9)",
            f"{ORIGINAL_ACCURACY:.2f} % (best epoch)",
            *(size, f"{multiply_adds(original_network()) / 1e6:.0f} million", "20"),
            "about " + minutes(saved("benchmarks/time_to_accuracy")["seconds_of_the_original"]),
        ),
    ]
    head = "network", "test accuracy", "parameters", "multiply-adds per image", "epochs", "training, minutes"
    return (
        f"{markdown(head, *rows)}\n\nMinutes of training without a GPU: of `make run` on {first['hardware']}; of the "
        f"network as it ships on {model_card.hardware_of(long)}; of the original, from the time of a training step of "
        f"the same layers, on {saved('benchmarks/time_to_accuracy')['hardware']}. n is the number of trainings."
    )


def peers() -> str:
    """`Net` as it ships beside published networks of about its size."""
    measured, long = saved("weights/card"), model_card.training()
    work = [f"{multiply_adds(net) / 1e6:.0f} million" for net in (Net(), airbench94_muon_network())]
    rows = [
        (
            "**this network**, as it ships",
            f"**{measured['accuracy']:.2f} %**",
            *(f"{long[-1]['parameters']:,}", work[0], f"{model_card.epochs_of(long)}"),
            *(minutes(model_card.seconds_of(long)), "a CPU (GPUs untried)"),
        ),
        (
            f"[airbench94_muon]({AIRBENCH})",
            "94.01 % (6 views, mean); 93.2 % (plain, one run of ours)",
            *("1,972,792", work[1], "8"),
            *(
                "about " + minutes(saved("benchmarks/time_to_accuracy")["seconds_of_airbench94_muon"]),
                "an NVIDIA GPU, as published",
            ),
        ),
        *[(*row[:5], "", row[5]) for row in PUBLISHED],
    ]
    head = "network", "test accuracy", "parameters", "multiply-adds per image", "epochs", "training, minutes", "runs on"
    return (
        f"{markdown(head, *rows)}\n\nMinutes of training without a GPU: of this network on "
        f"{model_card.hardware_of(long)}; of airbench94_muon, from the time of a training step of the same layers, on "
        f"{saved('benchmarks/time_to_accuracy')['hardware']}. Empty cells were not measured here or are not given by "
        "the source."
    )


def multiply_adds(model: nn.Module) -> int:
    """For one image of 32x32 pixels, in convolutions and linear layers."""
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops() // 2


def survival() -> str:
    """What benchmarks/survival.py counted when it last ran."""
    result = saved("benchmarks/survival")
    kills, corruptions = result["kills"], result["corruptions"]
    inside = f"{kills.get('inside a write', 0)} of them inside the writing of a checkpoint"
    anew = f"{kills.get('begun anew', 0)} killed before the first save and begun anew"
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
    )


def benchmark_table(name: str) -> str:
    """The table that a benchmark saved, and where it ran."""
    result = saved(f"benchmarks/{name}")
    rows = result.pop("rows")
    result.pop("runs", None)
    table = markdown(tuple(rows[0]), *[tuple(map(as_text, row.values())) for row in rows])
    notes = [result.pop("hardware"), f"torch {result.pop('torch')}"]
    notes += [f"{note.replace('_', ' ')}: {as_text(value)}" for note, value in result.items()]
    return f"{table}\n\n{'; '.join(notes)}."


def with_numbers(text: str, runs: list[dict]) -> str:
    """A README, or a cell of text, with the parts between `<!-- name -->` and `<!-- /name -->` written anew."""
    own = {
        "summary": lambda: summary(runs),
        "table": lambda: table(runs),
        "peers": peers,
        "survival": survival,
    }
    own |= {name: getattr(model_card, name) for name in ("weights", "recipe", "per_class", "corruptions")}
    for name in re.findall(r"^<!-- (\w+) -->$", text, re.MULTILINE):
        before, rest = text.split(f"<!-- {name} -->\n")
        after = rest.split(f"<!-- /{name} -->")[1]
        part = own[name]() if name in own else benchmark_table(name)
        text = f"{before}<!-- {name} -->\n{part}\n<!-- /{name} -->{after}"
    return text


def main() -> None:
    runs = saved_runs()
    for readme in READMES:
        readme.write_text(with_numbers(readme.read_text(), runs))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in text_cells(notebook):
        cell.source = with_numbers(cell.source, runs)
    nbformat.write(notebook, NOTEBOOK)
    plot_architecture(Net()).savefig(RESULTS / "architecture.png", dpi=110)
    plot_curves(runs[0]["history"]).savefig(RESULTS / "curves.png", dpi=110)
    (RESULTS / "misclassified.png").write_bytes(picture_of("plot_misclassified(test_set, log_probs)"))


def text_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """Its cells in Markdown."""
    return [cell for cell in notebook.cells if cell.cell_type == "markdown"]


def picture_of(call: str) -> bytes:
    """The PNG that a cell of the committed notebook drew; `call` is the cell's last line."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (cell,) = [cell for cell in notebook.cells if cell.source.endswith(call)]
    (png,) = [o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]
    return base64.b64decode(png)


if __name__ == "__main__":
    main()
