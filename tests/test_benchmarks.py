"""The baseline is the network it stands for, and what the benchmarks say is counted right."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")


def test_the_original_has_its_parameters_and_its_24_by_24_pixels():
    model = importlib.import_module("baselines").original_network().eval()
    assert sum(p.numel() for p in model.parameters()) == 2_034_040
    pool = next(layer for layer in model if isinstance(layer, nn.AvgPool2d))
    sizes = []
    pool.register_forward_hook(lambda layer, inputs, output: sizes.extend([inputs[0].shape, output.shape]))
    assert model(torch.zeros(2, 3, 32, 32)).exp().sum(1).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert sizes == [(2, 128, 24, 24), (2, 128, 8, 8)]


def test_airbench94_muon_has_its_parameters_and_map_sizes():
    model = importlib.import_module("baselines").airbench94_muon_network().eval()
    assert sum(p.numel() for p in model.parameters()) == 1_972_792
    sizes = []
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d):
            layer.register_forward_hook(lambda layer, inputs, output: sizes.append(output.shape[2]))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sizes == [31, 31, 15, 15, 15, 7, 7, 7, 3, 3, 1]


def test_candidates_take_turns_and_the_first_call_does_not_count():
    calls = []
    common = importlib.import_module("common")
    seconds = common.alternate({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=3)
    assert "".join(calls) == "abababab"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    assert common.middle([1.0, 2.0, 3.0]) == (2.0, 1.0)


def test_a_report_is_saved_with_the_machine(tmp_path, monkeypatch, capsys):
    common = importlib.import_module("common")
    monkeypatch.setattr(common, "FOLDER", tmp_path)
    common.report("speed", ("layer", "ms"), [("conv", 1.25), ("pool", 1194.4)], batch_size=500)
    saved = json.loads((tmp_path / "speed.json").read_text())
    assert saved["rows"] == [{"layer": "conv", "ms": 1.25}, {"layer": "pool", "ms": 1190.0}]
    assert (saved["batch_size"], saved["torch"]) == (500, torch.__version__)
    assert saved["hardware"]
    printed = capsys.readouterr().out
    assert "batch size: 500" in printed
    assert "pool   1,190" in printed
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    common.report("speed", ("layer", "ms"), [("conv", 1.25)])
    assert json.loads((tmp_path / "speed_avx2.json").read_text())["instructions"] == "AVX2"


def test_operations_are_those_of_the_multiply_adds():
    step = importlib.import_module("step")
    layer = nn.Conv2d(8, 16, 3, padding=1, groups=2, bias=False)
    multiply_adds = 2 * 16 * 10 * 10 * 4 * 9
    assert step.operations(layer, layer(torch.zeros(2, 8, 10, 10))) == 6 * multiply_adds
    assert step.operations(nn.SiLU(), torch.zeros(2, 8)) == 0


def test_six_views_of_a_symmetric_network_are_one():
    six_views = importlib.import_module("time_to_accuracy").SixViews
    images = torch.rand(2, 3, 32, 32)
    mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    torch.testing.assert_close(six_views(mean)(images), mean(images), rtol=0.1, atol=0.05)
    centre = nn.Flatten()
    weights = six_views(centre)(torch.ones(1, 3, 32, 32))
    torch.testing.assert_close(weights, torch.ones(1, 3072))


def test_a_wider_network_keeps_its_layers():
    wide = importlib.import_module("growth").widened(importlib.import_module("model").Net(), 1.5)
    assert wide(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert wide.c3[0][0].conv.weight.shape == (336, 336, 3, 3)
    depthwise = wide.c4[1].depthwise.conv
    assert depthwise.groups == depthwise.in_channels == 486
    same = importlib.import_module("growth").widened(importlib.import_module("model").Net(), 1.0)
    assert sum(p.numel() for p in same.parameters()) == 2_034_040
