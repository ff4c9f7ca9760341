"""The README's figures are those of the saved runs, and its commands are real."""

import dataclasses
import importlib
import json
import re
from pathlib import Path

import nbformat
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import checkpoint
import predict
from config import Config, parse_args
from model import Net

REPOSITORY = Path(__file__).parents[1]
README, CARD = ((REPOSITORY / name).read_text() for name in ("README.md", "weights/README.md"))


@pytest.fixture
def readme(monkeypatch):
    """The module that writes the READMEs."""
    monkeypatch.syspath_prepend(REPOSITORY / "results")
    return importlib.import_module("readme")


def test_the_numbers_are_those_of_the_saved_runs(readme):
    collect = importlib.import_module("collect")
    runs = readme.saved_runs()
    assert [run["config"]["seed"] for run in runs] == list(range(len(runs)))
    for run in runs:
        assert (run["data"], run["parameters"]) == ("cifar10", 2_034_040)
        assert run["history"]["tested_on"] == ["test"] * run["config"]["epochs"]
        assert collect.is_default(run)
    for path in readme.READMES:
        assert readme.with_numbers(path.read_text(), runs) == path.read_text(), f"{path} is old: run `make readme`"
    cells = readme.text_cells(nbformat.read(readme.NOTEBOOK, as_version=4))
    assert any("<!-- ablation" in cell.source for cell in cells)
    for cell in cells:
        assert readme.with_numbers(cell.source, runs) == cell.source, "the notebook is old: run `make readme`"


def test_only_a_run_of_net_with_the_default_settings_goes_into_the_readme(readme):
    is_default, (run, *_) = importlib.import_module("collect").is_default, readme.saved_runs()
    assert is_default({**run, "config": {**run["config"], "seed": 7, "workers": 0}})
    other = {"network": "MyNetwork", "parameters": 2_034_041, "processes": 2, "runtime": "cuda, bf16, channels_last"}
    other |= {"config": {**run["config"], "lr": 0.1}}
    for field, value in other.items():
        assert not is_default({**run, field: value}), field
    rates = run["history"]["lr"]
    for history in (rates[:-1], [*rates, 0.003], [rate * 1.01 for rate in rates]):
        assert not is_default({**run, "history": {**run["history"], "lr": history}})


def test_results_takes_runs_of_the_default_name_only(readme, tmp_path, monkeypatch):
    collect, (run, *_) = importlib.import_module("collect"), readme.saved_runs()
    monkeypatch.setattr(collect, "REPOSITORY", tmp_path)
    monkeypatch.setattr(collect, "RESULTS", tmp_path)
    for seed, name in enumerate(("cifar10-seed0-20261126-072420", "ablation-20-dilation-off-seed1")):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({**run, "config": {**run["config"], "seed": seed}}))
    collect.main()
    assert [path.name for path in tmp_path.glob("*.json")] == ["cifar10-seed0.json"]


def test_the_commands_of_a_training_made_longer_are_found_from_its_rates(readme):
    sittings = readme.model_card.sittings
    rates = [0.12 * (1 - epoch / 7) for epoch in range(7)]
    assert sittings(0.12, rates) == [7]
    assert sittings(0.12, rates + [0.12 * (1 - epoch / 16) for epoch in range(7, 16)]) == [7, 16]


def test_the_commands_of_a_training_in_two_runs_start_the_second_from_the_first(readme):
    def run(name: str, lr: float, **settings) -> dict:
        config = json.loads(json.dumps(dataclasses.asdict(Config(name=name, lr=lr, epochs=2, **settings))))
        return {"config": config, "history": {"lr": [lr, lr / 2]}}

    first, second = run("a", 0.12, seed=3), run("b", 0.06, weights="weights/cifar10.pt", augment=("crop", "flip"))
    assert readme.model_card.commands(first) == ["python train.py --name a --epochs 2 --seed 3"]
    (command,) = readme.model_card.commands(second, first)
    assert command == "python train.py --name b --weights runs/a/model.pt --epochs 2 --lr 0.06 --augment crop flip"


def test_the_committed_notebook_and_the_picture_of_mistakes_are_the_run_of_seed_0(readme):
    notebook = nbformat.read(readme.NOTEBOOK, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    history = json.loads((REPOSITORY / "results/cifar10-seed0.json").read_text())["history"]
    epochs = re.findall(r"^epoch \d+/\d+: train ([\d.]+) % .*?, test ([\d.]+) %", printed, re.MULTILINE)
    saved = zip(history["train_accuracy"], history["test_accuracy"], strict=True)
    assert epochs == [(f"{train:.2f}", f"{test:.2f}") for train, test in saved]
    picture = readme.picture_of("plot_misclassified(test_set, log_probs)")
    assert (REPOSITORY / "results/misclassified.png").read_bytes() == picture


def test_only_a_notebook_that_ran_whole_with_the_default_settings_is_taken(readme):
    fault = importlib.import_module("collect").fault
    notebook = nbformat.read(readme.NOTEBOOK, as_version=4)
    assert fault(notebook) is None
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    code[-1].outputs = [nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])]
    assert fault(notebook) == "did not run to its end"
    code[-1].outputs, code[-1].execution_count = [], None
    assert fault(notebook) == "did not run to its end"
    code[0].metadata["tags"] = ["injected-parameters"]
    assert fault(notebook) == "has other settings"


def test_the_committed_notebook_stays_as_it_is_when_taken_again(readme):
    committed = importlib.import_module("collect").committed
    notebook = nbformat.read(readme.NOTEBOOK, as_version=4)
    executed = nbformat.from_dict({**notebook, "metadata": {**notebook.metadata, "papermill": {}}})
    taken = committed(executed)
    assert taken.metadata == notebook.metadata
    assert [cell.metadata for cell in taken.cells] == [cell.metadata for cell in notebook.cells]


def test_the_commands_shown_are_accepted(monkeypatch):
    commands = re.findall(r"train\.py (--(?!help).*?)(?:\s+#.*|`.*)?$", README + CARD, re.MULTILINE)
    assert len(commands) > 5
    monkeypatch.setattr(checkpoint, "load", lambda path: {"result": {"config": dataclasses.asdict(Config())}})
    for command in commands:
        parse_args(command.split())


def test_the_commands_of_predict_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("holiday").mkdir()
    for name in ("photo.jpg", "holiday/beach.png"):
        Image.new("RGB", (60, 40)).save(name)
    commands = re.findall(r"^python predict\.py (.*?)(?:\s+[#>].*)?$", README, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert predict.main(command.split()) == 0
        assert "beach.png" in capsys.readouterr().out


def test_the_make_targets_shown_exist():
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_file_and_picture_named_is_there(readme):
    for page in readme.READMES:
        text = page.read_text()
        for path in set(re.findall(r"\]\((?!http)([^)]+)\)", text)) | set(re.findall(r"^\| `([\w./]+)`", text, re.M)):
            if "." in path or "/" in path:
                file, _, heading = path.partition("#")
                assert (page.parent / file).exists(), f"{path}, named in {page}"
                if heading:
                    headings = re.findall(r"^#+ (.*)$", (page.parent / file).read_text(), re.M)
                    assert heading in [title.lower().replace(" ", "-") for title in headings], f"{path}, in {page}"


def test_the_file_map_names_every_module():
    tracked = [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("results/*.py"), *REPOSITORY.glob("benchmarks/*.py")]
    for module in tracked:
        assert f"`{module.name}`" in README, module


def test_the_python_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Net()
    Path("runs/NAME").mkdir(parents=True)
    torch.save(model.state_dict(), "runs/NAME/model.pt")
    Image.new("RGB", (60, 40)).save("photo.jpg")
    my_loader = DataLoader(TensorDataset(torch.randn(20, 3, 32, 32), torch.arange(20) % 2), batch_size=10)
    small = {"Config(epochs=40)": "Config(epochs=1, batch_size=100, workers=0)", "workers=2": "workers=0"}
    names = {"__name__": "__main__", "my_network": Net(), "my_loader": my_loader}
    names["images"] = torch.zeros(2, 3, 32, 32)
    examples = re.findall(r"```python\n(.*?)```", CARD + README, re.DOTALL)
    for example in examples:
        for real, quick in small.items():
            example = example.replace(real, quick)
        exec(example, names)
    assert len(names["history"]["epoch"]) == 1
    assert torch.equal(names["log_probs"], Net.from_pretrained()(names["images"]))
    assert torch.equal(names["mine"].fc.weight, model.fc.weight)
    assert Path("answers.png").stat().st_size > 1000
    assert names["net"].fc.weight.shape == (2, model.fc.in_features)
    assert next(iter(names["loader"]))[0].shape == (128, 3, 32, 32)
