"""The exported network predicts what the network does, for any number of images."""

import json
import math
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

import export
from dataset import CLASSES, MEAN, STD
from model import Net


def test_a_network_is_exported_out_of_its_wrapper_with_what_it_knows_and_is_left_in_its_mode(tmp_path):
    net, file = (
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3), nn.Dropout()),
        tmp_path / "net.onnx",
    )
    net.trained_on = {"classes": ("ant", "bee", "cat"), "size": 48, "mean": [0.5] * 3, "std": [0.2] * 3}
    export.export(nn.DataParallel(net), file)
    assert net.training
    session = onnxruntime.InferenceSession(file)
    assert session.get_inputs()[0].shape[1:] == [3, 48, 48]
    metadata = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
    assert metadata == {**net.trained_on, "classes": ["ant", "bee", "cat"]}
    assert export.difference(net, file) <= export.TOLERANCE
    nn.init.constant_(net[2].weight, 2.0)
    assert export.difference(net, file) > export.TOLERANCE


def test_what_the_network_does_not_say_is_asked_for(tmp_path, capsys):
    with pytest.raises(ValueError, match="--mean R G B"):
        export.export(Net(num_classes=2), tmp_path / "net.onnx")
    with pytest.raises(ValueError, match="2 different names"):
        export.export(Net(num_classes=2), tmp_path / "net.onnx", CLASSES, mean=MEAN, std=STD)
    torch.save(Net().state_dict(), "mine.pt")
    for weights, fault in (("none.pt", "none.pt cannot be read"), ("mine.pt", "--mean R G B")):
        with pytest.raises(SystemExit):
            export.main([str(tmp_path / "net.onnx"), "--weights", weights])
        assert fault in capsys.readouterr().err
    assert not (tmp_path / "net.onnx").exists()


def test_the_status_says_whether_the_two_agree_and_what_cannot_be_written_is_named(capsys, monkeypatch):
    monkeypatch.setattr(export, "export", lambda model, file: Path(file).write_bytes(b""))
    with pytest.raises(SystemExit):
        export.main(["none/net.onnx"])
    assert "cannot write none/net.onnx" in capsys.readouterr().err
    for difference, status in ((1e-5, 0), (1e-3, 1), (math.nan, 1)):
        monkeypatch.setattr(export, "difference", lambda *_: difference)  # noqa: B023
        assert export.main(["net.onnx"]) == status
        assert ("do not use the file" in capsys.readouterr().err) == bool(status)
