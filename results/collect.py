"""Takes finished runs of the default settings from runs/ into the repository; `make results` does it.

Each runs/cifar10-seed*/metrics.json, as runs are named by default, becomes results/cifar10-seed<seed>.json, and
runs/S9_Final.ipynb, which `make run` wrote, becomes the committed notebook if its settings are the default ones:
without what its execution noted, and with pictures of 256 colours, a third of the bytes.
"""

import base64
import dataclasses
import io
import json
import sys
from pathlib import Path

import nbformat
from PIL import Image

RESULTS = Path(__file__).parent
REPOSITORY = RESULTS.parent
sys.path.insert(0, str(REPOSITORY))

from config import FREE, Config  # noqa: E402
from model import Net  # noqa: E402

DEFAULT = json.loads(json.dumps(dataclasses.asdict(Config())))  # settings as a metrics.json has them


def is_default(run: dict) -> bool:
    """Whether `Net` was trained to the end, by one process on a CPU, with the default settings but `FREE` and seed."""
    wanted = {"network": "Net", "parameters": sum(p.numel() for p in Net().parameters()), "processes": 1}
    settings = {field: value for field, value in DEFAULT.items() if field not in (*FREE, "seed")}
    epochs, rates = DEFAULT["epochs"], run["history"]["lr"]  # those of a run made longer afterwards are others
    return (
        run["runtime"].startswith("cpu")
        and wanted.items() <= run.items()
        and all(run["config"].get(field) == value for field, value in settings.items())
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
    """The notebook as it goes into the repository."""
    notebook.metadata = {key: notebook.metadata[key] for key in ("kernelspec", "language_info")}
    for cell in notebook.cells:
        tags = {"tags": ["parameters"]} if "parameters" in cell.metadata.get("tags", []) else {}
        cell.metadata = tags | {key: cell.metadata[key] for key in ("alt",) if key in cell.metadata}
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
            for output in cell.outputs:
                data = output.get("data", {})
                if "image/png" in data:
                    data["image/png"] = base64.b64encode(smaller(base64.b64decode(data["image/png"]))).decode()
    return notebook


def joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """The outputs with consecutive pieces of printed text in one, as a notebook's window shows them."""
    whole: list[nbformat.NotebookNode] = []
    for output in outputs:
        last = whole[-1] if whole else None
        if last and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            whole.append(output)
    return whole


def smaller(png: bytes) -> bytes:
    """The picture in its 256 best colours."""
    picture, file = Image.open(io.BytesIO(png)).convert("RGB"), io.BytesIO()
    picture.quantize(256, kmeans=3, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


def main() -> None:
    for path in sorted((REPOSITORY / "runs").glob("cifar10-seed*/metrics.json"), key=lambda path: path.stat().st_mtime):
        run = json.loads(path.read_text())
        if is_default(run):
            target = RESULTS / f"cifar10-seed{run['config']['seed']}.json"
            target.write_text(path.read_text())
            print(f"{path.parent.name}: {run['history']['test_accuracy'][-1]:.2f} %, to {target.name}")
    executed = REPOSITORY / "runs/S9_Final.ipynb"
    if executed.exists():
        notebook = nbformat.read(executed, as_version=4)
        if reason := fault(notebook):
            print(f"{executed} {reason} and is not taken")
        else:
            nbformat.write(committed(notebook), REPOSITORY / "S9_Final.ipynb")


if __name__ == "__main__":
    main()
