"""Puts saved numbers and pictures into the two READMEs; `make readme` does it, and a test keeps them true.

The numbers come from results/cifar10-seed*.json, copies of the runs' metrics.json, and from benchmarks/*.json; the
picture of mistakes comes from the committed notebook, which is the run of seed 0.
"""

import base64
import json
import re
import statistics
import sys
from pathlib import Path

import nbformat
import torch
from torch.utils.flop_counter import FlopCounterMode

RESULTS = Path(__file__).parent
REPOSITORY = RESULTS.parent
READMES = (REPOSITORY / "README.md", REPOSITORY / "benchmarks/README.md")
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from common import as_text  # noqa: E402

from config import FREE  # noqa: E402
from model import Net  # noqa: E402
from utils import ORIGINAL_ACCURACY, plot_architecture, plot_curves  # noqa: E402


def saved_runs() -> list[dict]:
    """The runs behind the README, one for each seed, the notebook's first; all with the same settings but the seed."""
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("cifar10-seed*.json"))]
    for run in runs:
        for field, value in run["config"].items():
            if field not in (*FREE, "seed") and value != runs[0]["config"][field]:
                raise ValueError(f"the saved runs differ in {field}, so their mean would mean nothing")
    return runs


def summary(runs: list[dict]) -> str:
    first, epochs = runs[0]["history"], runs[0]["config"]["epochs"]
    processor, threads = runs[0]["hardware"].split(", ")[:2]
    return (
        "A notebook and a handful of short modules that train a "
        f"{runs[0]['parameters']:,}-parameter network on CIFAR-10 to "
        f"**{mean(runs, 'test_accuracy')} %** test accuracy in {epochs} epochs, which take "
        f"{first['seconds'][-1] / 60:.0f} minutes on {threads} of an {processor} processor."
    )


def table(runs: list[dict]) -> str:
    first = runs[0]
    accuracies = [run["history"]["test_accuracy"][-1] for run in runs]
    spread = f" ± {statistics.stdev(accuracies):.2f}" if len(runs) > 1 else ""
    each = ": " + ", ".join(f"{accuracy:.2f}" for accuracy in accuracies) if len(runs) > 1 else ""
    ours = (
        "**this network**",
        f"**{mean(runs, 'test_accuracy')} %**{spread} (last epoch, n = {len(runs)}{each})",
        f"{mean(runs, 'train_accuracy')} % (augmented images, while learning)",
        f"{first['parameters']:,}",
        f"{multiply_adds() / 1e6:.0f} million",
        f"{first['config']['epochs']}",
        f"{first['history']['seconds'][-1]:,.0f} s ({first['hardware']}; {first['runtime']})",
    )
    head = ("", "test accuracy", "train accuracy", "parameters", "multiply-adds per image", "epochs", "training time")
    original = (
        "[the original](https://github.com/ShikhaERAV2/Session9)",
        f"{ORIGINAL_ACCURACY:.2f} % (best epoch)",
        "68.34 %",
        "2,034,040",
        "about 700 million",
        "20",
        "not recorded",
    )
    return markdown(head, ours, original)


def multiply_adds() -> int:
    """Of `Net` for one image of 32x32 pixels, in convolutions and the classifier."""
    with FlopCounterMode(display=False) as counter:
        Net().eval()(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops() // 2


def survival() -> str:
    """What benchmarks/survival.py counted when it last ran."""
    result = json.loads((REPOSITORY / "benchmarks/survival.json").read_text())
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


def measured(name: str) -> str:
    """The table that a benchmark saved, and where it ran."""
    result = json.loads((REPOSITORY / f"benchmarks/{name}.json").read_text())
    rows = result.pop("rows")
    table = markdown(tuple(rows[0]), *[tuple(map(as_text, row.values())) for row in rows])
    notes = [result.pop("hardware"), f"torch {result.pop('torch')}"]
    notes += [f"{note.replace('_', ' ')}: {as_text(value)}" for note, value in result.items()]
    return f"{table}\n\n{'; '.join(notes)}."


def markdown(*rows: tuple[str, ...]) -> str:
    """A table, the head first."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ("---",) * len(rows[0]), *rows[1:]))


def mean(runs: list[dict], quantity: str) -> str:
    return f"{statistics.fmean(run['history'][quantity][-1] for run in runs):.2f}"


def with_numbers(text: str, runs: list[dict]) -> str:
    """A README with the parts between `<!-- name -->` and `<!-- /name -->` written anew."""
    own = {"summary": lambda: summary(runs), "table": lambda: table(runs), "survival": survival}
    for name in re.findall(r"^<!-- (\w+) -->$", text, re.MULTILINE):
        before, rest = text.split(f"<!-- {name} -->\n")
        after = rest.split(f"\n<!-- /{name} -->")[1]
        part = own[name]() if name in own else measured(name)
        text = f"{before}<!-- {name} -->\n{part}\n<!-- /{name} -->{after}"
    return text


def main() -> None:
    runs = saved_runs()
    for readme in READMES:
        readme.write_text(with_numbers(readme.read_text(), runs))
    plot_architecture(Net()).savefig(RESULTS / "architecture.png", dpi=110)
    plot_curves(runs[0]["history"]).savefig(RESULTS / "curves.png", dpi=110)
    notebook = nbformat.read(REPOSITORY / "S9_Final.ipynb", as_version=4)
    pictures = [
        output.data["image/png"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    (RESULTS / "misclassified.png").write_bytes(base64.b64decode(pictures[-1]))


if __name__ == "__main__":
    main()
