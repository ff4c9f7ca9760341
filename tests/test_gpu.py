"""The script that checks and times a GPU, tried on the CPU; the parts that need a GPU say so."""

import importlib
import json
from pathlib import Path

import pytest

from train import StoppedError

pytestmark = pytest.mark.usefixtures("quick_curves")
SAVED = Path("runs/gpu_quick.json")
ON_THE_CPU = [
    *("images made on the device, beside the host's", "two epochs in fp32", "two epochs in bf16"),
    *("one seed twice, by default", "stop and resume, by default"),
]
ON_A_GPU = ["two epochs in fp16", "steps as graphs, beside kernel by kernel", "an epoch in fp32, beside the CPU"]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("gpu")


def test_every_part_is_tried_and_saved(gpu, capsys):
    assert gpu.main(["--quick"]) == 0
    saved = json.loads(SAVED.read_text())
    assert list(saved) == list(gpu.PARTS)
    rows = {row["check"]: row for row in saved["checks"]["rows"]}
    assert {name: row["as it should be"] for name, row in rows.items()} == {
        **dict.fromkeys(ON_THE_CPU, "yes"),
        **dict.fromkeys(ON_A_GPU, ""),
    }
    assert {rows[name]["found"] for name in ON_A_GPU} == {"needs a GPU"}
    assert rows["stop and resume, by default"]["found"] == "the same weights, bit for bit"
    layers = [row["layers"] for row in saved["step"]["rows"]]
    assert (len(layers), layers[0][:9], layers[-1]) == (19, "c1.0.conv", "the whole step")
    rates = ("", "_with_the_loader", "_without_graphs", "_with_cudnn_benchmark", "_of_airbench94_muon_in_batches_of_5")
    assert all(saved["step"][f"images_per_second{rate}"] > 0 for rate in rates)
    for part, epochs, passes in (("short", 3, 2.4), ("default", 1, 1)):
        (row,) = saved[part]["rows"]
        assert (row["epochs"], row["passes"], row["n"]) == (epochs, passes, 2)
        assert [run["seed"] for run in saved[part]["runs"]] == [0, 1]
        assert all(0 < run["seconds"] < run["seconds_in_all"] for run in saved[part]["runs"])
    assert {row["GB of tensors at the peak"] for row in saved["memory"]["rows"]} == {"needs a GPU"}
    assert "seed 1, plain" in capsys.readouterr().out
    assert not Path("runs/benchmark-gpu").exists()


def result(number: int) -> dict:
    return {"rows": [{"number": number}]}


@pytest.fixture
def parts(gpu, monkeypatch):
    """Parts that only count, in the place of those of the script."""

    def failing(bench):
        yield result(1)
        raise RuntimeError("the card is gone")

    parts = {"good": lambda bench: iter([result(1), result(2)]), "bad": failing, "last": lambda bench: [result(3)]}
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu.Bench, "warm_up", lambda bench: None)
    return parts


def test_a_part_that_fails_keeps_what_it_had_and_the_others_go_on(gpu, parts, capsys):
    assert gpu.main(["--quick"]) == 1
    assert json.loads(SAVED.read_text()) == {"good": result(2), "bad": result(1), "last": result(3)}
    assert "RuntimeError: the card is gone" in capsys.readouterr().err


def test_a_cut_keeps_the_parts_before_it_and_others_can_follow(gpu, parts):
    def cut(error):
        raise error

    for error, leaves in ((KeyboardInterrupt(), KeyboardInterrupt), (StoppedError("stopped", 15), SystemExit)):
        parts["bad"] = lambda bench, error=error: cut(error)
        with pytest.raises(leaves):
            gpu.main(["--quick"])
        assert json.loads(SAVED.read_text()) == {"good": result(2)}
    parts["good"] = lambda bench: cut(AssertionError("not asked for"))
    assert gpu.main(["--quick", "--parts", "3"]) == 0
    assert json.loads(SAVED.read_text()) == {"good": result(2), "last": result(3)}


def test_a_check_that_finds_what_should_not_be_is_told_at_the_end(gpu, parts, capsys):
    rows = [{"check": name, "found": "", "as it should be": passed} for name, passed in (("one", "no"), ("two", "yes"))]
    parts.clear()
    parts["checks"] = lambda bench: [{"rows": rows}]
    assert gpu.main(["--quick"]) == 1
    assert "not as it should be: one" in capsys.readouterr().out
    parts["checks"] = lambda bench: []
    assert gpu.main(["--quick"]) == 0  # what was found by another call is told as such, and kept
    assert "from earlier: checks" in capsys.readouterr().out
    assert json.loads(SAVED.read_text())["checks"]["rows"] == rows


def test_no_training_begins_that_would_end_too_late(gpu, capsys):
    assert gpu.main(["--quick", "--minutes", "0", "--parts", "3"]) == 0
    assert "no time for seed 0" in capsys.readouterr().out
    assert not SAVED.exists()


def test_without_a_gpu_only_a_trial_is_offered(gpu, capsys):
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--quick tries the script without one" in capsys.readouterr().err
