"""The baseline is the network it stands for, and what the benchmarks say is counted right."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from small_runs import plain_network
from torch import nn

from model import Net, Residual

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
    assert common.median_and_half_iqr([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert (common.as_mean([93.0, 94.0]), common.as_mean([93.0])) == ("93.50 ± 0.71", "93.00")


def test_a_report_is_saved_with_the_machine(tmp_path, monkeypatch, capsys):
    common = importlib.import_module("common")
    monkeypatch.setattr(common, "FOLDER", tmp_path)
    rows = [("conv", 1.25), ("pool", 1194.4)]
    common.report("speed", ("layer", "ms"), rows, [{"seed": 0, "ms": 1.2512}], batch_size=500)
    saved = json.loads((tmp_path / "speed.json").read_text())
    assert saved["rows"] == [{"layer": "conv", "ms": 1.25}, {"layer": "pool", "ms": 1190.0}]
    assert saved["runs"] == [{"seed": 0, "ms": 1.2512}]
    assert (saved["batch_size"], saved["torch"]) == (500, torch.__version__)
    assert saved["hardware"]
    printed = capsys.readouterr().out
    assert "batch size: 500" in printed
    assert "pool   1,190" in printed


def test_operations_are_those_of_the_multiply_adds():
    step = importlib.import_module("step")
    layer = nn.Conv2d(8, 16, 3, padding=1, groups=2, bias=False)
    multiply_adds = 2 * 16 * 10 * 10 * 4 * 9
    assert step.operations(layer, layer(torch.zeros(2, 8, 10, 10))) == 6 * multiply_adds
    assert step.operations(nn.SiLU(), torch.zeros(2, 8)) == 0


def test_six_views_are_three_places_and_their_mirror_images():
    seen = []

    def network(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return images.flatten(1)

    images = torch.rand(2, 3, 32, 32)
    averaged = importlib.import_module("time_to_accuracy").SixViews(network)(images)
    assert torch.equal(seen[0], images)
    assert torch.equal(seen[2][:, :, 1:, 1:], images[:, :, :-1, :-1])  # moved down and right
    assert torch.equal(seen[4][:, :, :-1, :-1], images[:, :, 1:, 1:])
    for view, mirrored in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(view.flip(3), mirrored)
    weights = torch.tensor([1 / 4, 1 / 4, 1 / 8, 1 / 8, 1 / 8, 1 / 8])
    expected = sum(weight * view.flatten(1) for weight, view in zip(weights, seen, strict=True))
    torch.testing.assert_close(averaged, expected)


def test_a_row_of_time_to_accuracy_compares_with_the_baselines():
    runs = [
        {"epochs": 0.5, "seed": seed, "passes": 0.5, "seconds": 40.0 + 4 * seed, "plain": 78.0, "averaged": 79.0 + seed}
        for seed in (0, 1)
    ]
    row = importlib.import_module("time_to_accuracy").row(runs, original=10_500, peer=420, limit=850)
    assert row == ("0.5", "0.5", 2, "78.00 ± 0.00", "79.50 ± 0.71", "42.0 ± 2.8", 84, "1/250", "0.10")


def test_time_to_accuracy_times_the_baselines_before_each_length_and_at_the_end(tmp_path, monkeypatch):
    module, calls = importlib.import_module("time_to_accuracy"), []

    def run(epochs: float, seed: int) -> dict[str, float]:
        calls.append(f"{epochs:g}")
        return {"epochs": epochs, "seed": seed, "passes": epochs, "seconds": 10.0, "plain": 90.0, "averaged": 91.0}

    def alternate(candidates: dict, rounds: int) -> dict[str, list[float]]:
        calls.append("baselines")
        return {"original": [0.1] * rounds, "peer": [2.0] * rounds, "limit": [0.5] * rounds}

    monkeypatch.setattr("common.FOLDER", tmp_path)
    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(module, "alternate", alternate)
    monkeypatch.setattr(module, "baselines", lambda: (dict.fromkeys(("original", "peer", "limit")), 5e11))
    monkeypatch.setattr("sys.argv", ["time_to_accuracy.py", "--seeds", "0", "1"])
    module.main()
    assert calls == [call for epochs in ("0.4", "0.5", "1", "9") for call in ("baselines", epochs, epochs)] + [
        "baselines"
    ]
    saved = json.loads((tmp_path / "time_to_accuracy.json").read_text())
    assert [row["epochs"] for row in saved["rows"]] == ["0.4", "0.5", "1", "9"]
    assert [run["seed"] for run in saved["runs"]] == 4 * [0, 1]
    assert saved["seconds_of_the_original"] == 3125  # 20 epochs of 1,562.5 steps
    assert saved["seconds_of_airbench94_muon"] == 400  # 8 epochs of 25 steps
    assert saved["gflops_of_one_large_convolution"] == 1000
    for refused in ("0.1", "1.5", "0", "inf", "nan"):
        monkeypatch.setattr("sys.argv", ["time_to_accuracy.py", "--epochs", refused])
        with pytest.raises(SystemExit):
            module.main()


def test_a_part_of_an_epoch_leaves_out_images_and_is_trained_once(monkeypatch):
    module = importlib.import_module("time_to_accuracy")
    monkeypatch.setattr(module, "TRAIN_COUNT", 200)
    monkeypatch.setattr(module, "Net", plain_network)
    small = {"batch_size": 50, "workers": 0, "precision": "fp32"}
    monkeypatch.setattr(module, "SHORT_SETTINGS", {**module.SHORT_SETTINGS, **small})
    first = module.run(0.5, seed=1)
    assert (first["epochs"], first["seed"], first["passes"]) == (0.5, 1, 0.5)
    assert 0 < first["plain"] <= 100
    assert 0 < first["averaged"] <= 100
    record = json.loads(Path("runs/time-0.5-seed1/metrics.json").read_text())
    assert (record["config"]["holdout"], record["config"]["skip"], record["config"]["padding"]) == (100, 0.6, 2)
    assert module.run(0.5, seed=1) == first
    assert module.run(4, seed=1)["passes"] == 2.8  # two whole epochs and two without 60 %


def test_a_wider_network_keeps_its_layers():
    wide = importlib.import_module("growth").widened(Net(), 1.5)
    assert wide(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert wide.c3[0][0].conv.weight.shape == (336, 336, 3, 3)
    depthwise = wide.c4[1].depthwise.conv
    assert depthwise.groups == depthwise.in_channels == 486
    same = importlib.import_module("growth").widened(Net(), 1.0)
    assert sum(p.numel() for p in same.parameters()) == 2_034_040


BATCH_NORM = "BatchNorm off but for scale and shift, Muon's rescaling off"
DEPTHWISE = "depthwise filters off, only 1×1 kept"


def test_each_switch_of_the_ablation_turns_off_what_it_says():
    ablation = importlib.import_module("ablation")
    names = {name: make(Net()) for name, make in ablation.NETWORKS.items()}
    images = torch.randn(2, 3, 32, 32)
    for net in names.values():
        assert net(images).shape == (2, 10)
    count = {name: sum(p.numel() for p in net.parameters()) for name, net in names.items()}
    assert count["dilation off"] == count["shortcuts off"] == count[BATCH_NORM] == 2_034_040
    layers = {name: list(net.modules()) for name, net in names.items()}
    convolutions = [m for m in layers["dilation off"] if isinstance(m, nn.Conv2d)]
    assert {conv.dilation for conv in convolutions} == {(1, 1)}
    assert not [m for m in layers[BATCH_NORM] if isinstance(m, nn.BatchNorm2d)]
    assert not [m for m in layers["shortcuts off"] if isinstance(m, Residual)]
    for name in (DEPTHWISE, "dense 3×3 instead of depthwise-separable"):
        assert {m.groups for m in layers[name] if isinstance(m, nn.Conv2d)} == {1}
    assert count[DEPTHWISE] == 2_034_040 - 2 * (9 + 2) * 324
    assert ablation.SETTINGS["crop off"] == {"augment": ("flip", "cutout")}


def test_the_ablation_trains_once_and_then_reads(monkeypatch):
    ablation = importlib.import_module("ablation")
    small = {"batch_size": 50, "workers": 0, "precision": "fp32"}
    monkeypatch.setattr(ablation, "SETTINGS", {"label smoothing off": {"label_smoothing": 0.0, **small}})
    first = ablation.train("label smoothing off", 1, 0)
    assert Path("runs/ablation-1-label-smoothing-off-seed0/last.pt").exists()
    assert ablation.train("label smoothing off", 1, 0) == first
    assert first[2] == 2_034_040


def test_the_ablation_compares_what_was_asked_for_and_saves_it_by_its_length(tmp_path, monkeypatch):
    ablation = importlib.import_module("ablation")
    monkeypatch.setattr("common.FOLDER", tmp_path)
    monkeypatch.setattr(
        ablation, "train", lambda switch, epochs, seed: (90.0 + seed - (switch == "crop off"), 95.0, 10)
    )
    monkeypatch.setattr("sys.argv", ["ablation.py", "--epochs", "8", "--seeds", "1", "2", "--switches", "crop off"])
    ablation.main()
    saved = json.loads((tmp_path / "ablation_8_epochs.json").read_text())
    assert [(row["switch"], row["difference, points"]) for row in saved["rows"]] == [
        ("all on", "+0.00"),
        ("crop off", "-1.00"),
    ]


def test_a_run_of_the_ablation_that_diverges_is_named():
    rows = importlib.import_module("ablation").rows
    found = rows(
        {"all on": [(90.0, 95.0, 10), (91.0, 96.0, 10)], "this off": [(80.0, 85.0, 9), (math.nan,) * 2 + (9,)]}
    )
    assert found == [("all on", "90.50 ± 0.71", "+0.00", "95.50", 10), ("this off", "diverged, 1 of 2", "", "", 9)]
    assert rows({"all on": [(90.0, 95.0, 10)], "that off": [(89.0, 94.0, 10)]})[1][1:3] == ("89.00", "-1.00")


def test_inference_is_timed_for_networks_that_answer_alike(tmp_path):
    ways = importlib.import_module("inference").candidates(net := Net(), tmp_path)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = net.eval()(images)
    for name in ("PyTorch, fp32", "PyTorch, bf16", "ONNX Runtime, fp32"):
        answer = ways[name](images)
        answer = torch.from_numpy(answer[0]) if isinstance(answer, list) else answer
        torch.testing.assert_close(answer, expected, rtol=0, atol=0.2 if "bf16" in name else 1e-3)


def test_mirrored_filters_give_a_picture_and_its_mirror_image_one_answer():
    mirrored = importlib.import_module("mirrored")
    torch.manual_seed(0)
    net = mirrored.MirroredNet().eval()
    assert sum(p.numel() for p in net.parameters()) == 2_034_040
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(net(images), net(images.flip(3)), rtol=0, atol=1e-4)
    for layer in net.modules():
        if isinstance(layer, mirrored.MirroredConv2d):
            x = torch.randn(1, layer.in_channels, 8, 8)
            partners = x if layer.in_channels == 3 else x.roll(layer.in_channels // 2, 1)
            swapped = layer(partners.flip(3)).flip(3).roll(layer.out_channels // 2, 1)
            torch.testing.assert_close(layer(x), swapped, rtol=0, atol=1e-4)


def test_the_search_takes_turns_and_says_how_sure_it_is(tmp_path, monkeypatch):
    search = importlib.import_module("search")
    monkeypatch.setattr(search, "SAVED", tmp_path / "search.json")
    done = []

    def run(name: str, seed: int, epochs: int, holdout: int) -> dict:
        done.append((name, seed))
        return {"seed": seed, "test_accuracy": 90.0 + seed}

    clock = iter(range(100))
    monkeypatch.setattr(search, "run", run)
    monkeypatch.setattr(search.time, "monotonic", lambda: 60.0 * next(clock))
    search.main(["--minutes", "4", "--candidates", "net", "mirrored"])
    assert done == [("net", 0), ("mirrored", 0), ("net", 1), ("mirrored", 1)]
    saved = json.loads((tmp_path / "search.json").read_text())["candidates"]
    assert saved["net"] == {"n": 2, "mean": 90.5, "standard_error": 0.5, "runs": saved["net"]["runs"]}
