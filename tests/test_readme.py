"""The pages say what the saved runs gave, their commands, links and examples are real, and the README stays short."""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import nbformat
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import predict
import train
from machinery import checkpoint
from machinery.config import FREE, parse_args
from model import Net
from train import Config

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()
CARD = (REPOSITORY / "weights/README.md").read_text()
PAGES = [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("docs/*.md"))]
PAGES += [REPOSITORY / "benchmarks/README.md", REPOSITORY / "weights/README.md"]
TEXT = "\n".join(page.read_text() for page in PAGES)


@pytest.fixture
def publish(monkeypatch):
    """The module that writes the pages."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return importlib.import_module("publish")


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(REPOSITORY / "S9_Final.ipynb", as_version=4)


def test_the_readme_is_for_somebody_with_five_minutes():
    assert len(README.splitlines()) <= 150
    assert len(README.encode()) <= 9_000
    first_screen, _, _ = README.partition("\n## ")
    assert [first_screen.count(part) for part in ("\n```bash\n", "\n![")] == [1, 1]
    assert 4 <= len(re.findall(r"^\| \S", first_screen, re.MULTILINE)) - 1 <= 6  # without the line under the head
    limits = re.search(r"\n## Limits\n(.*?)\n## ", README, re.DOTALL)
    assert limits
    assert len(limits[1].strip().splitlines()) <= 10


def test_the_numbers_are_those_of_the_saved_runs(publish, notebook):
    runs = publish.saved_runs()
    assert [run["config"]["seed"] for run in runs] == list(range(len(runs)))
    for run in runs:
        assert (run["data"], run["parameters"]) == ("cifar10", 2_034_040)
        assert run["history"]["tested_on"] == ["test"] * run["config"]["epochs"]
        assert publish.is_default(run)
    assert set(publish.PAGES) == set(PAGES)
    for page in PAGES:
        begun, ended = (re.findall(rf"<!-- {slash}(\w+) -->", page.read_text()) for slash in ("", "/"))
        assert begun == ended, page
        assert publish.with_numbers(page.read_text()) == page.read_text(), f"{page} is old: run `make readme`"
    assert any("<!-- ablation" in cell.source for cell in notebook.cells)
    for cell in notebook.cells:
        assert publish.with_numbers(cell.source) == cell.source, "the notebook is old: run `make readme`"


def test_a_part_is_written_anew_and_what_is_around_it_stays(publish):
    page = "before\n<!-- weights -->\n{}\n<!-- /weights -->\nafter <!-- weights -->\n"
    assert publish.with_numbers(page.format("old")) == page.format(publish.weights())
    assert "| batch size |" in publish.with_numbers("<!-- memory -->\n<!-- /memory -->")


def test_the_cost_counts_multiply_adds_six_times_for_each_image(publish):
    rows = {row.split(" | ")[0]: row.split(" | ") for row in publish.table().splitlines()}
    assert publish.multiply_adds(Net()) == pytest.approx(196e6, rel=0.005)
    for name, images, millions in (
        ("| **`make run`**", 20 * 50_000, 196),
        ("| **the short run**", 4.8 * 50_000, 196),
        ("| [the original](https://github.com/ShikhaERAV2/Session9)", 20 * 50_000, 710),
    ):
        assert float(rows[name][4]) == pytest.approx(6 * millions * 1e6 * images / 1e15, rel=0.03), name


def test_only_runs_of_net_with_the_default_settings_are_counted(publish, tmp_path, monkeypatch):
    is_default, (run, *_) = publish.is_default, publish.saved_runs()
    assert is_default({**run, "config": {**run["config"], "seed": 7, "workers": 0}})
    other = {"network": "MyNetwork", "parameters": 2_034_041, "processes": 2, "runtime": "cuda, bf16, channels_last"}
    other |= {"config": {**run["config"], "lr": 0.1}}
    for field, value in other.items():
        assert not is_default({**run, field: value}), field
    rates = run["history"]["lr"]
    for history in (rates[:-1], [*rates, 0.003], [rate * 1.01 for rate in rates]):
        assert not is_default({**run, "history": {**run["history"], "lr": history}})
    monkeypatch.setattr(publish, "RESULTS", tmp_path)
    (tmp_path / "cifar10-seed0.json").write_text(json.dumps({**run, **other}))
    with pytest.raises(ValueError, match=r"cifar10-seed0\.json"):
        publish.saved_runs()


def test_results_takes_runs_of_the_default_name_only(publish, tmp_path, monkeypatch):
    run, *_ = publish.saved_runs()
    monkeypatch.setattr(publish, "RESULTS", tmp_path)
    for seed, name in enumerate(("cifar10-seed0-20261126-072420", "ablation-20-dilation-off-seed1")):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        config = {**run["config"], "seed": seed, "data_dir": "/home/me/data"}
        (folder / "metrics.json").write_text(json.dumps({**run, "config": config}))
    publish.take(tmp_path / "runs")
    assert [path.name for path in tmp_path.glob("*.json")] == ["cifar10-seed0.json"]
    assert json.loads((tmp_path / "cifar10-seed0.json").read_text()) == run, "without where the images lay"


def test_the_committed_notebook_and_the_picture_of_mistakes_are_the_run_of_seed_0(publish, notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    history = json.loads((REPOSITORY / "results/cifar10-seed0.json").read_text())["history"]
    epochs = re.findall(r"^epoch \d+/\d+: train ([\d.]+) % .*?, test ([\d.]+) %", printed, re.MULTILINE)
    saved = zip(history["train_accuracy"], history["test_accuracy"], strict=True)
    assert epochs == [(f"{train:.2f}", f"{test:.2f}") for train, test in saved]
    picture = publish.picture_of("plot_misclassified(test_set, log_probs)")
    assert (REPOSITORY / "results/misclassified.png").read_bytes() == picture


def test_only_a_notebook_that_ran_whole_with_the_default_settings_is_taken(publish, notebook):
    assert publish.fault(notebook) is None
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    code[-1].outputs = [nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])]
    assert publish.fault(notebook) == "did not run to its end"
    code[-1].outputs, code[-1].execution_count = [], None
    assert publish.fault(notebook) == "did not run to its end"
    code[0].metadata["tags"] = ["injected-parameters"]
    assert publish.fault(notebook) == "has other settings"


def test_a_notebook_is_committed_small_and_without_notes_of_what_ran_it(publish, tmp_path):
    Image.effect_noise((64, 64), 50).convert("RGBA").save(tmp_path / "a.png")
    picture = publish.base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    cell = nbformat.v4.new_code_cell("1", metadata={"tags": ["parameters"], "papermill": {"duration": 1}})
    cell.outputs = [nbformat.v4.new_output("stream", text=f"{k}\n") for k in range(2)]
    cell.outputs += [nbformat.v4.new_output("display_data", {"image/png": picture})]
    kept = {"kernelspec": {"name": "python3", "display_name": "Python 3"}, "language_info": {"name": "python"}}
    taken = publish.committed(nbformat.v4.new_notebook(cells=[cell], metadata={**kept, "papermill": {}}))
    assert taken.metadata == kept
    assert taken.cells[0].metadata == {"tags": ["parameters"]}
    text, drawn = taken.cells[0].outputs
    assert text.text == "0\n1\n"
    (tmp_path / "b.png").write_bytes(publish.base64.b64decode(drawn.data["image/png"]))
    assert len(Image.open(tmp_path / "b.png").convert("RGB").getcolors()) <= 256


def test_the_committed_notebook_stays_as_it_is_when_taken_again(publish, notebook):
    executed = nbformat.from_dict({**notebook, "metadata": {**notebook.metadata, "papermill": {}}})
    taken = publish.committed(executed)
    assert taken.metadata == notebook.metadata
    assert [cell.metadata for cell in taken.cells] == [cell.metadata for cell in notebook.cells]


def test_colab_gets_the_same_versions_of_what_it_lacks():
    pinned = re.findall(r"^\w\S+==\S+", (REPOSITORY / "requirements.txt").read_text(), re.MULTILINE)
    lacking = re.findall(r"^\w\S+", (REPOSITORY / "requirements-colab.txt").read_text(), re.MULTILINE)
    assert set(lacking) < set(pinned)
    needed = {
        "albumentations",
        "captum",
        "torchsummary",
    }  # beside what is installed there, of what the notebook imports
    assert {line.split("==")[0] for line in lacking} == needed
    assert "pip install -q -r requirements-colab.txt" in README


def test_the_commands_shown_are_accepted(monkeypatch):
    Path("pets").mkdir()
    commands = re.findall(r"train\.py (--(?!help).*?)(?:\s+#.*|`.*)?$", TEXT, re.MULTILINE)
    assert len(commands) > 5
    monkeypatch.setattr(checkpoint, "load", lambda path: {"result": {"config": dataclasses.asdict(Config())}})
    for command in commands:
        parse_args(command.split())
    for script in re.findall(r"python ([\w/]+\.py)", TEXT):
        assert (REPOSITORY / script).exists(), script


def test_the_card_shows_the_commands_that_trained_the_weights(publish):
    commands = iter(re.findall(r"^python train\.py (.*)$", CARD, re.MULTILINE))
    names: list[str] = []
    for run in publish.long_runs():
        saved, rates = run["config"], run["history"]["lr"]
        shown = parse_args(next(commands).split())
        planned = [shown.epochs] * shown.epochs
        while len(planned) < len(rates):  # made longer afterwards
            name, epochs = re.fullmatch(r"--resume runs/(\w+) --epochs (\d+)", next(commands)).groups()
            assert name == shown.name
            planned += [int(epochs)] * (int(epochs) - len(planned))
        assert rates == pytest.approx([shown.lr * (1 - k / epochs) for k, epochs in enumerate(planned)])
        assert shown.weights == (f"runs/{names[-1]}/model.pt" if names else None)
        names.append(shown.name)
        for field, value in json.loads(json.dumps(dataclasses.asdict(shown))).items():
            if field in saved and field not in (*FREE, "weights", "epochs"):
                assert saved[field] == value, field
        assert saved["name"] == shown.name
    record = publish.saved("weights/metrics")
    assert f'make card RUN="{" ".join(f"runs/{name}" for name in record["mean_of"])}" SIBLING=runs/sibling' in CARD
    sibling, shown = record["sibling"], parse_args(next(commands).split())
    for field, value in json.loads(json.dumps(dataclasses.asdict(shown))).items():
        if field not in FREE:
            assert sibling["config"][field] == value, field
    assert len(sibling["history"]["epoch"]) == shown.epochs
    assert f"of {sibling['temperature']:.3f}," in CARD
    assert next(commands, None) is None


def test_the_commands_of_predict_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("holiday").mkdir()
    for name in ("photo.jpg", "holiday/beach.png"):
        Image.new("RGB", (60, 40)).save(name)
    commands = re.findall(r"^python predict\.py (.*?)(?:\s+[#>].*)?$", README + CARD, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        assert predict.main(command.split()) == 0
        assert "beach.png" in capsys.readouterr().out


def test_the_make_targets_shown_exist():
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`)make (\w+)", TEXT, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_file_picture_and_heading_linked_is_there(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for path in set(re.findall(r"\]\((?!http)([^)]+)\)", text)):
        file, _, heading = path.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{path}, in {page}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in anchors, f"{path}, in {page}"


def test_the_file_map_names_every_file_and_only_what_is_there():
    named = re.findall(r"`([\w./]+)`", "".join(re.findall(r"^\| (`.*?) \|", README, re.MULTILINE)))
    for name in named:
        assert (REPOSITORY / name).exists(), name
    for module in REPOSITORY.glob("*.py"):
        assert module.name in named, module
    behind = re.search(r"^\| `machinery/` \|(.*)\|$", README, re.MULTILINE)
    assert behind
    for module in REPOSITORY.glob("machinery/[!_]*.py"):
        assert f"`{module.stem}`" in behind[1], module
    scripts = (REPOSITORY / "benchmarks/README.md").read_text()
    for script in REPOSITORY.glob("benchmarks/*.py"):
        assert f"`{script.name}`" in scripts, script
    for page in REPOSITORY.glob("docs/*.md"):
        assert f"](docs/{page.name})" in README, page


def test_the_python_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Net()
    my_network = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(48, 10))
    train.fit(Config(name="NAME", epochs=1, batch_size=100, workers=0), my_network)
    for name in ("first", "second"):
        Path("runs", name).mkdir()
        torch.save(model.state_dict(), f"runs/{name}/model.pt")
    Image.new("RGB", (60, 40)).save("photo.jpg")
    my_loader = DataLoader(TensorDataset(torch.randn(20, 3, 32, 32), torch.arange(20) % 2), batch_size=10)
    small = {"Config(epochs=40)": "Config(epochs=1, batch_size=100, workers=0)", "workers=2": "workers=0"}
    small["Config(epochs=2"] = "Config(epochs=2, batch_size=100, workers=0"
    found = {}
    for page in PAGES:
        torch.save(model.state_dict(), "runs/NAME/model.pt")
        names = {"__name__": "__main__", "my_network": my_network, "my_loader": my_loader}
        names |= {"images": torch.zeros(2, 3, 32, 32), "held_out_loader": my_loader, "test_loader": my_loader}
        for example in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            needed = re.search(r"^# needs (\w+)", example)
            if needed and not importlib.util.find_spec(needed[1]):
                continue
            for real, quick in small.items():
                example = example.replace(real, quick)
            exec(example, names)
        found[str(page.relative_to(REPOSITORY))] = names
    assert len(found["README.md"]["history"]["epoch"]) == 1
    assert found["docs/training.md"]["history"]["epoch"] == [1]
    assert torch.equal(found["README.md"]["log_probs"], Net.from_pretrained()(torch.zeros(2, 3, 32, 32)))
    assert torch.equal(found["weights/README.md"]["log_probs"], found["README.md"]["log_probs"])
    assert found["README.md"]["net"].fc.weight.shape == (2, model.fc.in_features)
    assert Path("log.csv").read_text().count("\n") == 3  # a head and two epochs
    assert Path("answers.png").stat().st_size > 1000
    assert torch.equal(found["docs/training.md"]["mean"].module.fc.weight, model.fc.weight)
    assert next(iter(found["docs/data.md"]["loader"]))[0].shape == (128, 3, 32, 32)
    assert torch.equal(found["weights/README.md"]["mine"].fc.weight, model.fc.weight)
