"""The benchmarks compare what they say they compare, and each script's main path runs."""

import functools
import importlib
import json
from pathlib import Path

import nbformat
import pytest
import torch
from small_runs import plain_network
from torch import nn

from machinery import checkpoint
from model import Net, Residual
from train import Config

REPOSITORY = Path(__file__).parents[1]
SMALL = functools.partial(Config, batch_size=50, workers=0, precision="fp32")


@pytest.fixture
def script(monkeypatch, tmp_path):
    """`script(name)` imports a benchmark, which saves its tables in an empty folder."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    monkeypatch.setattr(importlib.import_module("common"), "FOLDER", tmp_path)
    return importlib.import_module


def rows_of(name: str) -> list[dict]:
    return json.loads(Path(f"{name}.json").read_text())["rows"]


def test_the_networks_compared_with_have_their_parameters_and_map_sizes(script):
    baselines = script("baselines")
    for make, parameters, expected in (
        (baselines.original_network, 2_034_040, [32, 30, 30, 30, 28, 26, 24, 24, 24, 24, 24, 24, 24, 8]),
        (baselines.airbench94_muon_network, 1_972_792, [31, 31, 15, 15, 15, 7, 7, 7, 3, 3, 1]),
    ):
        model, sizes = make().eval(), []
        for layer in model:
            if isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
                layer.register_forward_hook(lambda layer, inputs, output, sizes=sizes: sizes.append(output.shape[2]))
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
        assert (sum(p.numel() for p in model.parameters()), sizes) == (parameters, expected)


def test_candidates_take_turns_and_a_report_is_saved_with_the_machine(script):
    calls, common = [], script("common")
    seconds = common.alternate({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=3)
    assert "".join(calls) == "abababab"  # the first call of each does not count
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    assert common.median_and_half_iqr([1.0, 2.0, 3.0]) == (2.0, 1.0)
    common.report("speed", ("layer", "ms"), [("conv", 1.25), ("pool", 1194.4)], runs=[{"ms": 1.2512}], batch_size=500)
    saved = json.loads(Path("speed.json").read_text())
    assert saved["rows"] == [{"layer": "conv", "ms": 1.25}, {"layer": "pool", "ms": 1190.0}]
    assert (saved["runs"], saved["batch_size"], saved["torch"]) == ([{"ms": 1.2512}], 500, torch.__version__)
    assert "| pool | 1,190 |" in common.as_page(saved)


def test_short_runs_are_trained_once_and_compared_with_the_baselines(script, monkeypatch):
    module = script("time_to_accuracy")
    steps = dict.fromkeys(module.STEPS, lambda: None)
    for name, value in {"TRAIN_COUNT": 200, "Net": plain_network, "Config": SMALL, "baselines": lambda: steps}.items():
        monkeypatch.setattr(module, name, value)
    module.main(["--epochs", "0.5", "4", "--seeds", "1"])
    part, whole = first = json.loads(Path("time_to_accuracy.json").read_text())["runs"]
    assert (part["passes"], whole["passes"]) == (0.5, 2.8)  # two epochs in four leave out 60 %
    record = json.loads(Path("runs/time-0.5-seed1/metrics.json").read_text())
    assert (record["config"]["holdout"], record["config"]["skip"], record["config"]["padding"]) == (100, 0.6, 2)
    module.main(["--epochs", "0.5", "4", "--seeds", "1"])
    assert json.loads(Path("time_to_accuracy.json").read_text())["runs"] == first
    runs = [{**part, "seconds": 40.0 + 4 * seed, "plain": 78.0, "averaged": 79.0 + seed} for seed in (0, 1)]
    row = module.row(runs, {"original": 10_500, "airbench94_muon": 420})
    assert row == ("0.5", "0.5", 2, "78.00 ± 0.00", "79.50 ± 0.71", "42.0 ± 2.8", "1/250", "0.10")


def test_each_switch_of_the_ablation_turns_off_what_it_says(script):
    ablation, images = script("ablation"), torch.randn(2, 3, 32, 32)
    layers = {}
    for name, make in ablation.NETWORKS.items():
        net = make(Net())
        assert net(images).shape == (2, 10)
        layers[name.split(" ")[0]] = list(net.modules())
    count = {name: sum(p.numel() for p in modules[0].parameters()) for name, modules in layers.items()}
    assert count["dilation"] == count["shortcuts"] == count["BatchNorm"] == 2_034_040
    assert count["depthwise"] == 2_034_040 - 2 * (9 + 2) * 324
    convolutions = {name: [m for m in modules if isinstance(m, nn.Conv2d)] for name, modules in layers.items()}
    assert {conv.dilation for conv in convolutions["dilation"]} == {(1, 1)}
    assert {conv.groups for name in ("depthwise", "dense") for conv in convolutions[name]} == {1}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in layers["BatchNorm"])
    assert not any(isinstance(m, Residual) for m in layers["shortcuts"])
    assert ablation.SETTINGS["crop off"] == {"augment": ("flip", "cutout")}


def test_the_ablation_trains_once(script, monkeypatch):
    ablation = script("ablation")
    monkeypatch.setattr(ablation, "Net", plain_network)
    monkeypatch.setattr(ablation, "Config", SMALL)
    for _ in range(2):
        ablation.main(["--epochs", "1", "--seeds", "0", "--switches", "crop off"])
        rows = rows_of("ablation_1_epochs")
        assert [row["switch"] for row in rows] == ["all on", "crop off"]
        monkeypatch.setattr("train.train_one_epoch", None)  # the second time, nothing is trained
    found = ablation.rows({"all on": [(90.0, 95.0, 10), (91.0, 96.0, 10)], "off": [(80.0, 85.0, 9)]})
    assert found == [("all on", "90.50 ± 0.71", "+0.00", "95.50", 10), ("off", "80.00", "-10.50", "85.00", 9)]


def test_all_ways_to_predict_are_timed_and_agree(script, monkeypatch):
    inference = script("inference")
    for name, value in {"ROUNDS": 2, "CALLS": {1: 1, 2: 1}, "Net": plain_network}.items():
        monkeypatch.setattr(inference, name, value)
    monkeypatch.setattr("torch.compile", lambda model, dynamic: model)
    ways, make = {}, inference.ways_to_predict
    monkeypatch.setattr(inference, "ways_to_predict", lambda *arguments: ways.update(make(*arguments)) or ways)
    inference.main()
    assert [row["images/s"] for row in rows_of("inference")] == list(ways)
    images, expected = torch.randn(2, 3, 32, 32), None
    for name, way in ways.items():
        predicted = torch.cat([torch.as_tensor(batch).float() for batch in way(images)]).reshape(2, 10)
        expected = predicted if expected is None else expected
        torch.testing.assert_close(predicted, expected, rtol=0, atol=0.2 if "bf16" in name else 1e-3)


def test_faults_are_injected_and_counted(script, monkeypatch):
    module = script("fault_injection")

    def trained(kills, folder, dice):
        run = folder / "runs/undisturbed"
        for name in ("last.pt", "model.pt"):
            checkpoint.write_whole(run / name, checkpoint.weights_file(Net()))
        return {}

    monkeypatch.setattr(module, "kill_and_resume", trained)
    module.main(["--kills", "0", "--damages", "5"])
    for row in rows_of("fault_injection")[1:]:
        assert "refused by name" in row["outcome"]
        assert "another" not in row["outcome"]


def test_the_script_for_gpus_trains_and_compares(script, monkeypatch):
    gpu = script("gpu")
    cases = ("fit, stopped and resumed", "train_one_epoch, accumulation")
    few = {"TRAININGS": gpu.TRAININGS[:1], "CASES": {case: gpu.CASES[case] for case in cases}, "Net": plain_network}
    for name, value in few.items():
        monkeypatch.setattr(gpu, name, value)
    assert gpu.main(["--images", "30"]) == 0
    saved = json.loads(Path("gpu_trial.json").read_text())
    assert [row["n"] for row in saved["trainings"]["rows"]] == [1]
    rows = saved["checks"]["rows"]
    assert [row["check"] for row in rows] == ["images, beside the CPU", *cases]
    assert {row["found"] for row in rows[1:]} == {"the same weights, bit for bit"}
    with pytest.raises(SystemExit):
        gpu.main([])  # without a GPU


def test_results_takes_only_runs_of_the_default_recipe_by_what_was_used(script):
    publish = script("publish")
    run = json.loads((REPOSITORY / "results/cifar10-seed0.json").read_text())
    assert publish.is_default(run)  # an older record
    facts = {"source": "cifar10", "transform": None}
    used = {"train_set": {**facts, "length": 50_000, "augment": ["crop", "flip", "cutout"]}}
    run |= used | {"test_set": {**facts, "length": 10_000, "augment": []}}
    assert publish.is_default({**run, "config": {**run["config"], "seed": 7, "workers": 0, "data_dir": "/data"}})
    for changes in (
        *({name: "another"} for name in ("network", "optimizer", "processes", "data", "before")),
        {"config": {**run["config"], "cutmix": 0.5}},
        {"history": {**run["history"], "tested_on": ["held-out"]}},
        {"history": {**run["history"], "lr": [*run["history"]["lr"], 0.003]}},  # made longer afterwards
        *(
            {name: {**run[name], **changed}}
            for name in ("train_set", "test_set")
            for changed in ({"source": "your own"}, {"transform": "Compose()"}, {"length": 100}, {"augment": ["flip"]})
        ),
    ):
        assert not publish.is_default({**run, **changes}), changes


def test_only_a_notebook_that_ran_whole_is_taken(script):
    publish = script("publish")
    cell = nbformat.v4.new_code_cell("1", execution_count=1, metadata={"tags": ["parameters"], "papermill": {}})
    kept = {"kernelspec": {"name": "python3", "display_name": "Python 3"}, "language_info": {"name": "python"}}
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={**kept, "papermill": {}})
    taken = publish.committed(notebook)
    assert (taken.metadata, taken.cells[0].metadata) == (kept, {"tags": ["parameters"]})
    for changes in ({"execution_count": None}, {"metadata": {"tags": ["injected-parameters"]}}):
        assert publish.is_whole(notebook)
        assert not publish.is_whole(nbformat.from_dict({**notebook, "cells": [{**cell, **changes}]}))
