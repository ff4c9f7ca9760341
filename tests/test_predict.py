"""`predict.py` takes whatever picture comes, names what it cannot read, and does the rest."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import predict
from dataset import CLASSES
from model import Net
from predict import PictureError, classify, load_picture, plot_answers


class Reddish(nn.Module):
    """Says "plane" of red pictures and "car" of others."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # (N, 3, 32, 32) -> (N, 10)
        scores = torch.zeros(len(images), 10)
        red = images[:, 0].mean((1, 2)) > images[:, 1].mean((1, 2))
        scores[torch.arange(len(images)), torch.where(red, 0, 1)] = 5
        return scores


def picture(path: Path, colour: Any = (255, 0, 0), size: tuple[int, int] = (60, 40), mode: str = "RGB") -> Path:
    Image.new(mode, size, colour).save(path)
    return path


@pytest.mark.parametrize(
    ("name", "mode", "colour"),
    [
        ("a.png", "RGB", (10, 20, 30)),
        ("a.png", "RGBA", (10, 20, 30, 255)),
        ("a.png", "L", 20),
        ("a.png", "LA", (20, 255)),
        ("a.png", "I;16", 20 * 257),
        ("a.gif", "RGB", (10, 20, 30)),  # is saved with a palette
        ("a.jpg", "CMYK", (0, 0, 0, 235)),
        ("a.png", "1", 1),
        ("a.tif", "RGB", (10, 20, 30)),
        ("a.webp", "RGB", (10, 20, 30)),
    ],
)
@pytest.mark.parametrize("size", [(1, 1), (32, 32), (500, 333), (20, 700)])
def test_a_picture_of_any_size_and_mode_becomes_32_by_32(tmp_path, name, mode, colour, size):
    seen = load_picture(picture(tmp_path / name, colour, size, mode))
    assert (seen.shape, seen.dtype) == ((32, 32, 3), np.uint8)
    expected = {"RGB": (10, 20, 30), "RGBA": (10, 20, 30), "1": 255}.get(mode, 20)
    assert np.abs(seen.astype(int) - expected).max() <= 3  # JPEG and WebP are lossy


def test_cifar10_pictures_come_through_unchanged(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(load_picture(tmp_path / "a.png"), pixels)


def test_transparent_parts_are_white_and_exif_turns(tmp_path):
    assert (load_picture(picture(tmp_path / "clear.png", (0, 0, 0, 0), mode="RGBA")) == 255).all()
    upright = Image.new("RGB", (40, 40), "black")
    upright.paste("white", (0, 0, 40, 20))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    upright.rotate(90).save(tmp_path / "turned.png", exif=exif)
    seen = load_picture(tmp_path / "turned.png")
    assert seen[:15].min() == 255
    assert seen[17:].max() == 0


def test_answers_come_in_the_order_of_the_files_and_of_the_probabilities(tmp_path):
    (tmp_path / "deep").mkdir()
    paths = [
        picture(tmp_path / "b.png", (0, 255, 0)),
        picture(tmp_path / "a.JPG"),
        picture(tmp_path / "deep/c.png"),
    ]
    (tmp_path / "notes.txt").write_text("not a picture, and not taken for one")
    answers = classify(paths, Reddish())
    assert [next(iter(answer.probabilities)) for answer in answers] == ["car", "plane", "plane"]
    for answer in answers:
        assert set(answer.probabilities) == set(CLASSES)
        assert list(answer.probabilities.values()) == sorted(answer.probabilities.values(), reverse=True)
        assert sum(answer.probabilities.values()) == pytest.approx(1, abs=1e-5)
    assert [answer.path for answer in classify([tmp_path], Reddish())] == [
        str(p) for p in (paths[1], paths[0], paths[2])
    ]
    assert classify([], Reddish()) == []


def test_many_pictures_are_taken_in_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "BATCH", 2)
    paths = [picture(tmp_path / f"{k}.png", (255, 0, 0) if k % 2 else (0, 255, 0)) for k in range(5)]
    answers = classify(paths, Reddish())
    assert [next(iter(answer.probabilities)) for answer in answers] == ["car", "plane", "car", "plane", "car"]


def test_the_figure_shows_each_picture_with_its_likeliest_classes(tmp_path):
    paths = [picture(tmp_path / f"${k}$_.png", (255, 0, 0) if k else (0, 255, 0)) for k in range(4)]
    answers = classify(paths, Reddish())
    figure = plot_answers(answers, top=2)
    figure.canvas.draw()
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in shown] == [f"${k}$_.png" for k in range(4)]
    assert (shown[1].images[0].get_array() == answers[1].picture).all()
    labels = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert len(labels) == 8
    assert labels[0].startswith(" car 9")
    assert plot_answers([]).axes


def test_grey_pictures_without_a_known_white_are_refused(tmp_path):
    for mode in ("I", "F"):
        with pytest.raises(PictureError, match="32 bits"):
            load_picture(picture(tmp_path / f"{mode}.tif", 20, mode=mode))


def test_a_folder_gives_its_pictures_in_order_and_an_empty_one_is_named(tmp_path):
    for name in ("b.PNG", "a.jpg", "sub/c.jfif", "sub/x.png/d.bmp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture, and passed over")
    (tmp_path / "empty").mkdir()
    found = [Path(answer.path).relative_to(tmp_path).as_posix() for answer in classify([tmp_path], Reddish())]
    assert found == ["a.jpg", "b.PNG", "sub/c.jfif", "sub/x.png/d.bmp"]
    with pytest.raises(PictureError, match="no picture in this folder"):
        classify([tmp_path / "empty"], Reddish())
    assert len(classify([tmp_path / "a.jpg"] * 2, Reddish())) == 2


def test_the_network_answers_in_eval_mode_and_is_left_as_it_was(tmp_path):
    net = Net()
    before = net.c1[0].bn.running_mean.clone()
    (answer,) = classify([picture(tmp_path / "a.png")], net)
    assert net.training
    assert torch.equal(net.c1[0].bn.running_mean, before)
    again = classify([picture(tmp_path / "a.png")], net.eval())[0]
    assert again.probabilities == answer.probabilities
    assert not net.training


def test_what_is_no_picture_is_named_and_the_rest_is_done(tmp_path, capsys, monkeypatch):
    good, bad, cut = picture(tmp_path / "good.png"), tmp_path / "bad.png", tmp_path / "cut.jpg"
    bad.write_text("hello")
    picture(cut, size=(300, 300))
    cut.write_bytes(cut.read_bytes()[:-300])
    missing = tmp_path / "missing.png"
    with pytest.raises(PictureError, match="bad"):
        classify([good, bad], Reddish())
    torch.save(Net().state_dict(), tmp_path / "model.pt")
    arguments = [*map(str, (bad, good, missing, cut)), "--weights", str(tmp_path / "model.pt")]
    assert predict.main(arguments) == 1
    out, err = capsys.readouterr()
    assert out.startswith(f"{good}: ")
    assert out.count("%") == 3
    for path, reason in ((bad, "cannot identify"), (missing, "no such file"), (cut, "truncated")):
        assert f"{path}: " in err
        assert reason in err
    assert predict.main([*arguments, "--json"]) == 1
    (answer,) = json.loads(capsys.readouterr().out)
    assert answer["path"] == str(good)
    assert len(answer["probabilities"]) == 10


def test_a_file_without_weights_ends_the_command_with_its_name(tmp_path, capsys):
    with pytest.raises(SystemExit) as leaving:
        predict.main([str(picture(tmp_path / "a.png")), "--weights", str(tmp_path / "none.pt")])
    assert leaving.value.code == 2
    assert "none.pt: the weights cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("top", ["0", "11", "few"])
def test_the_number_of_classes_to_name_is_checked(top, capsys):
    with pytest.raises(SystemExit):
        predict.main(["a.png", "--top", top])
    assert "--top" in capsys.readouterr().err
