"""Pictures of one's own, from a folder to trained weights and answers."""

import json
from pathlib import Path

import pytest
from PIL import Image

import export
import predict
import train
from machinery.data.cifar10 import draw_synthetic
from model import Net

NAMES = ("bars", "checks", "disc", "ring", "cross")


def draw(folder: Path, count: int, names=NAMES[:3], size: int = 50) -> Path:
    """Drawn pictures of several sizes, modes and formats, a folder for each class."""
    images, labels = draw_synthetic(train=True, count=10 * count)
    for k, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i, image in enumerate(images[labels == k]):
            suffix, mode = (("png", "RGB"), ("jpg", "L"), ("webp", "RGBA"), ("bmp", "RGB"))[i % 4]
            picture = Image.fromarray(image).resize((size + i % 7, size)).convert(mode if suffix != "jpg" else "RGB")
            picture.save(folder / name / f"{i}.{suffix}")
    return folder


def contents(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


@pytest.fixture
def few_images(monkeypatch):
    """As many as the tiny CIFAR-10 has, for export.py to compare answers on."""
    monkeypatch.setattr(export, "BATCHES", (1, 7, 50))


def test_from_folder_to_answer(tmp_path, capsys):
    folder = draw(tmp_path / "shapes", 24, NAMES, size=40)
    before = contents(folder)
    flags = f"--data {folder} --weights pretrained --name shapes --epochs 3 --batch-size 20 --lr 0.03 --workers 0"
    assert train.main(flags.split()) == 0
    out = capsys.readouterr().out
    assert "bars 19 and 5" in out
    assert "held-out" in out
    assert contents(folder) == before
    net = Net.from_pretrained("runs/shapes")
    assert (net.classes, net.size) == (tuple(sorted(NAMES)), 32)
    record = json.loads(Path("runs/shapes/metrics.json").read_text())
    assert record["history"]["test_accuracy"][-1] > 40  # chance is 20
    pictures = sorted(map(str, (folder / "disc").iterdir()))[:3]
    assert predict.main(["--weights", "runs/shapes/model.pt", *pictures]) == 0
    answers = capsys.readouterr().out
    assert answers.count("%") == 9
    assert all(name in " ".join(NAMES) for name in {line.split(": ")[1].split()[0] for line in answers.splitlines()})
    predict.plot_answers(predict.classify(pictures, net))


@pytest.mark.usefixtures("few_images")
def test_the_normalisation_is_that_of_the_data_or_of_the_weights(tmp_path):
    folder = draw(tmp_path / "shapes", 8)
    common = f"--data {folder} --epochs 1 --batch-size 8 --workers 0 --size 48 --precision fp32".split()
    assert train.main([*common, "--name", "fresh"]) == 0
    fresh = Net.from_pretrained("runs/fresh")
    assert fresh.size == 48
    assert fresh.mean != pytest.approx((0.4914, 0.4822, 0.4465), abs=1e-3)
    (folder / "disc/0.png").unlink()
    assert train.main([*common, "--name", "more", "--weights", "runs/fresh/model.pt"]) == 0
    assert Net.from_pretrained("runs/more").mean == fresh.mean
    assert export.main(["more.onnx", "--weights", "runs/more"]) == 0
