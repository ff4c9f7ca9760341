"""Pictures of one's own, from a folder to trained weights and predictions."""

import json
from pathlib import Path

import pytest
from PIL import Image

import predict
import train
from machinery.data.cifar10 import draw_synthetic
from model import Net

NAMES = ("bars", "checks", "disc")


def draw(folder: Path) -> Path:
    """Eight pictures of each class, of several sizes, modes and formats."""
    images, labels = draw_synthetic(train=True, count=80)
    for k, name in enumerate(NAMES):
        (folder / name).mkdir(parents=True)
        for i, image in enumerate(images[labels == k]):
            suffix, mode = (("png", "RGB"), ("jpg", "L"), ("webp", "RGBA"), ("bmp", "RGB"))[i % 4]
            Image.fromarray(image).resize((50 + i, 50)).convert(mode).save(folder / name / f"{i}.{suffix}")
    return folder


def test_from_a_folder_to_predictions_and_on_with_more_of_them(tmp_path, capsys):
    folder = draw(tmp_path / "shapes")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    common = f"--data {folder} --epochs 1 --batch-size 8 --workers 0 --size 48 --precision fp32".split()
    assert train.main([*common, "--name", "first", "--weights", "pretrained"]) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    first = Net.from_pretrained("runs/first")
    assert (first.classes, first.size) == (NAMES, 48)
    assert json.loads(Path("runs/first/metrics.json").read_text())["history"]["tested_on"] == ["held-out"]
    assert train.main([*common, "--name", "fresh"]) == 0
    fresh = Net.from_pretrained("runs/fresh")
    assert fresh.mean != pytest.approx(first.mean, abs=1e-3)
    (folder / "disc/0.png").unlink()  # so the mean changes
    assert train.main([*common, "--name", "more", "--weights", "runs/fresh/model.pt"]) == 0
    assert Net.from_pretrained("runs/more").mean == fresh.mean
    capsys.readouterr()
    pictures = sorted(map(str, (folder / "disc").iterdir()))[:3]
    assert predict.main(["--weights", "runs/more/model.pt", *pictures]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(line.count("%") == 3 and sum(name in line for name in NAMES) == 3 for line in lines)
