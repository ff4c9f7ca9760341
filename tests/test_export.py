"""The exported network says what the network says, for any number of images."""

import errno
import io
import json
import math
import os
import re
import sys

import onnxruntime
import pytest
import torch

import export
from dataset import CIFAR10, CLASSES, MEAN, STD
from model import Net


def test_the_command_exports_and_checks_on_real_batches(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "BATCHES", (1, 7, 50))
    torch.save(Net().state_dict(), tmp_path / "model.pt")
    file = tmp_path / "net.onnx"
    assert export.main([str(file), "--weights", str(tmp_path / "model.pt")]) == 0
    printed = capsys.readouterr().out
    assert "on batches of (1, 7, 50) images of the test set" in printed
    assert file.stat().st_size > 8e6
    metadata = onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map
    assert {name: tuple(json.loads(text)) for name, text in metadata.items()} == {
        "mean": MEAN,
        "std": STD,
        "classes": CLASSES,
    }
    images = torch.stack([image for image, _ in CIFAR10(train=False)])
    trained = Net.from_pretrained(tmp_path / "model.pt")
    assert all(difference <= 1e-4 for difference in export.differences(trained, file, images.split(20)))
    assert all(difference > 1e-4 for difference in export.differences(Net(), file, images.split(20)))

    monkeypatch.setattr(export, "differences", lambda *_: [0.0, math.nan, 0.0])
    assert export.main([str(file), "--weights", str(tmp_path / "model.pt")]) == 1
    assert "do not use the file" in capsys.readouterr().err


def test_names_that_do_not_fit_the_network_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must name the 2 that the network tells apart, got 10"):
        export.export(Net(num_classes=2), tmp_path / "net.onnx")


def test_a_file_that_cannot_be_written_is_named(tmp_path, capsys, monkeypatch):
    def full(model: Net, file: str, classes: tuple[str, ...]) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file)

    monkeypatch.setattr(export, "export", full)
    for file, cause in (("none/net.onnx", "there is no folder"), ("net.onnx", "No space left")):
        with pytest.raises(SystemExit):
            export.main([str(tmp_path / file)])
        assert re.search(rf"cannot write .*{file}: .*{cause}", capsys.readouterr().err)


def test_missing_weights_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        export.main([str(tmp_path / "net.onnx"), "--weights", str(tmp_path / "none.pt")])
    assert "none.pt" in capsys.readouterr().err
    assert not (tmp_path / "net.onnx").exists()


def test_a_network_is_exported_with_its_own_classes_size_and_normalisation(tmp_path, capsys, monkeypatch):
    net = Net(num_classes=3).eval()
    net.classes = ("ant", "bee", "cat")
    net.size, net.mean, net.std = 48, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)  # type: ignore[assignment]
    monkeypatch.setattr(Net, "from_pretrained", lambda file=None: net)
    monkeypatch.setattr(export, "BATCHES", (1, 3))
    monkeypatch.setenv("CIFAR10_ROOT", str(tmp_path / "none"))  # it is not looked for
    file = tmp_path / "net.onnx"
    assert export.main([str(file)]) == 0
    assert capsys.readouterr().out.endswith("on batches of (1, 3) synthetic images\n")
    session = onnxruntime.InferenceSession(file)
    assert session.get_inputs()[0].shape[1:] == [3, 48, 48]
    metadata = session.get_modelmeta().custom_metadata_map
    assert {name: tuple(json.loads(text)) for name, text in metadata.items()} == {
        "mean": net.mean,
        "std": net.std,
        "classes": net.classes,
    }


def test_the_command_works_wherever_its_output_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "BATCHES", (2,))
    monkeypatch.setattr(export, "export", lambda model, file, classes: None)
    monkeypatch.setattr(export, "differences", lambda *_: [0.0])
    closed = io.StringIO()
    closed.close()
    for stream in (closed, None):
        monkeypatch.setattr(sys, "stdout", stream)
        assert export.main([str(tmp_path / "net.onnx")]) == 0
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written := io.BytesIO(), encoding="ascii"))
    assert export.main(["\xe9\udcff.onnx"]) == 0
    assert written.getvalue().startswith(b"\\xe9\\udcff.onnx: log-probabilities differ by at most 0.0e+00")
