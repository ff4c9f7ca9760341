"""Pictures of one's own, from a folder to trained weights and answers; bad input is named, and nothing is touched."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import export
import predict
import train
from machinery import pictures
from machinery.data import draw_synthetic
from machinery.pictures import find_pictures, load_classes
from model import Net
from train import DataError

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


@pytest.mark.parametrize("test", ["test", "val"])
def test_folders_to_train_and_to_test_on(tmp_path, test):
    draw(tmp_path / "train", 6)
    draw(tmp_path / test, 3)
    said = []
    training, testing, classes = load_classes(tmp_path, size=48, say=said.append)
    assert classes == ("bars", "checks", "disc")
    assert (training.images.shape, training.images.dtype) == ((18, 48, 48, 3), np.uint8)
    assert training.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert testing.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert not testing.is_held_out
    assert said == ["pictures to train on and to test on: bars 6 and 3, checks 6 and 3, disc 6 and 3"]


def test_of_one_level_a_share_of_each_class_is_kept_aside_the_same_each_time(tmp_path):
    draw(tmp_path, 10)
    for image in (tmp_path / "disc").glob("[5-9].*"):
        image.unlink()
    before = contents(tmp_path)
    training, testing, _ = load_classes(tmp_path, say=lambda line: None)
    again, _, _ = load_classes(tmp_path, say=lambda line: None)
    assert np.bincount(testing.labels).tolist() == [2, 2, 1]  # a fifth of 10, 10 and 5
    assert np.bincount(training.labels).tolist() == [8, 8, 4]
    assert testing.is_held_out
    assert np.array_equal(training.images, again.images)
    assert np.bincount(load_classes(tmp_path, holdout=10, say=lambda line: None)[1].labels).tolist() == [4, 4, 2]
    other = load_classes(tmp_path, seed=1, say=lambda line: None)[0]
    assert not np.array_equal(training.images, other.images)
    assert contents(tmp_path) == before


def test_what_is_no_picture_is_named_and_left_out_and_too_much_of_it_refused(tmp_path):
    draw(tmp_path, 10)
    (tmp_path / "bars/broken.png").write_text("hello")
    (tmp_path / "bars/notes.txt").write_text("hello")
    (tmp_path / "bars/._0.png").write_text("of macOS")
    (tmp_path / ".hidden").mkdir()
    said = []
    training, testing, _ = load_classes(tmp_path, say=said.append)
    assert len(training.labels) + len(testing.labels) == 30
    assert "broken.png: not a picture that can be read" in said[0]
    assert "bars: 1 .txt, which Pillow does not read" in said[1]
    (tmp_path / "bars/more.png").write_text("hello")
    with pytest.raises(DataError, match="bars: 2 of 12 files cannot be read, more than a tenth"):
        load_classes(tmp_path, say=said.append)


def no_folder(root: Path) -> Path:
    return root / "nowhere"


def a_file(root: Path) -> Path:
    (root / "file").write_text("")
    return root / "file"


def one_class(root: Path) -> Path:
    return draw(root / "one", 2, NAMES[:1])


def an_empty_class(root: Path) -> Path:
    draw(root / "data", 2)
    (root / "data/empty").mkdir()
    return root / "data"


def a_class_without_pictures(root: Path) -> Path:
    draw(root / "data", 2)
    (root / "data/text").mkdir()
    (root / "data/text/a.heic").write_text("")
    return root / "data"


def a_class_to_test_on_only(root: Path) -> Path:
    draw(root / "data/train", 2)
    draw(root / "data/test", 2, NAMES[:4])
    return root / "data"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_folder, "nowhere is not there; expected a folder with a folder per class"),
        (a_file, "file is a file; expected"),
        (one_class, "has 1 folders with pictures; expected one for each of two or more classes"),
        (an_empty_class, r"empty holds no picture that can be read \(it is empty\)"),
        (a_class_without_pictures, r"text holds no picture that can be read \(1 .heic\)"),
        (a_class_to_test_on_only, "has classes that .*train lacks: ring"),
    ],
)
def test_folders_that_do_not_fit_are_refused_with_what_was_expected(tmp_path, make, message):
    with pytest.raises(DataError, match=message):
        load_classes(make(tmp_path), say=lambda line: None)


@pytest.fixture
def few_images(monkeypatch):
    """As many as the tiny CIFAR-10 has, for export.py to compare answers on."""
    monkeypatch.setattr(export, "BATCHES", (1, 7, 50))


@pytest.mark.usefixtures("few_images")
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
    assert export.main(["shapes.onnx", "--weights", "runs/shapes/model.pt"]) == 0


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


def test_any_exif_is_no_reason_to_refuse_a_picture(tmp_path):
    turned, as_text = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0), struct.pack("<HHI4s", 0x0128, 2, 4, b"in\0\0")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + turned + as_text + bytes(4)  # the second of an unusual type
    upright = Image.new("RGB", (40, 40))
    upright.paste("white", (0, 0, 40, 20))
    upright.rotate(90).save(tmp_path / "a.jpg", exif=exif)
    seen = pictures.load_picture(tmp_path / "a.jpg")
    assert seen[:14].min() > 200
    assert seen[18:].max() < 50


def test_a_folder_says_what_it_leaves_out(tmp_path, capsys):
    Image.new("RGB", (40, 40)).save(tmp_path / "a\nb.png")
    for name in ("a.HEIC", "b.heic", "c.txt", ".hidden.png", "._a.png"):
        (tmp_path / name).write_text("")
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "round").symlink_to(tmp_path, target_is_directory=True)
    os.mkfifo(tmp_path / "pipe.png")
    assert predict.main([str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    assert r"a\nb.png: " in out
    assert "left out 2 .heic, 1 .txt" in err
    assert "gone.png: a link to nothing" in err
    assert "pipe.png: neither a file nor a folder" in err
    only = tmp_path / "only"
    only.mkdir()
    (only / "a.heic").write_text("")
    assert predict.main([str(only)]) == 1
    assert "no picture in this folder (1 .heic)" in capsys.readouterr().err


def test_links_to_folders_are_entered_once(tmp_path):
    (tmp_path / "far").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "far/a.png")
    (tmp_path / "near").mkdir()
    (tmp_path / "near/link").symlink_to(tmp_path / "far", target_is_directory=True)
    (tmp_path / "far/back").symlink_to(tmp_path / "near", target_is_directory=True)
    assert [Path(path).name for path in find_pictures(tmp_path / "near").pictures] == ["a.png"]


def test_a_pipe_is_read_and_a_silent_one_does_not_hang(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "PATIENCE", 0.1)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(pictures.PictureError, match="nothing came through this pipe"):
        pictures.load_picture(tmp_path / "pipe")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    reading = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)  # so that the writer need not wait
    writing = os.open(tmp_path / "pipe", os.O_WRONLY)
    os.write(writing, (tmp_path / "a.png").read_bytes())
    monkeypatch.setattr(pictures.os, "open", lambda *_: os.dup(reading))
    os.close(writing)
    assert (pictures.load_picture(tmp_path / "pipe")[0, 0] == (255, 0, 0)).all()


def test_names_that_are_no_text_are_shown_with_escapes(tmp_path, capsys):
    name = os.fsdecode(b"\xff\xfe.png")
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / name)
    answers = predict.classify([tmp_path])
    predict.plot_answers(answers).canvas.draw()
    assert predict.main([str(tmp_path / name)]) == 0
    assert r"\udcff\udcfe.png: " in capsys.readouterr().out


class Stream:
    """As the one of a notebook's kernel: it has no `reconfigure`."""

    encoding = "ascii"

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        text.encode("ascii")
        self.text += text

    def flush(self) -> None:
        pass


@pytest.mark.usefixtures("few_images")
def test_commands_work_with_any_standard_output(tmp_path, monkeypatch):
    Image.new("RGB", (40, 40)).save(tmp_path / "é.png")
    stream = Stream()
    monkeypatch.setattr("sys.stdout", stream)
    assert predict.main([str(tmp_path / "é.png")]) == 0
    assert r"\xe9.png: " in stream.text
    torch.save(Net().state_dict(), tmp_path / "net.pt")
    assert export.main([str(tmp_path / "é.onnx"), "--weights", str(tmp_path / "net.pt")]) == 0
    with open(tmp_path / "closed", "w") as closed:
        pass
    monkeypatch.setattr("sys.stdout", closed)
    assert predict.main([str(tmp_path / "é.png")]) == 0
    monkeypatch.setattr("sys.stdout", None)
    assert predict.main([str(tmp_path / "é.png")]) == 0
