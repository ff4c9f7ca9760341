"""`predict.py` takes whatever picture comes, names what it cannot read, and does the rest."""

import io
import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import nn

import predict
from dataset import CLASS_COLOURS, CLASSES, MEAN, STD
from machinery.data.folder import PictureError, load_picture
from model import Net
from predict import classify, plot_answers

PLAIN = Net().state_dict()
KNOWN = {"classes": CLASSES, "size": None, "mean": list(MEAN), "std": list(STD)}


class Reddish(nn.Module):
    """Predicts the first class for red pictures and the second for others; has a buffer and a method of our names."""

    def __init__(self, **known: Any) -> None:
        super().__init__()
        self.trained_on = {**KNOWN, **known}
        self.register_buffer("mean", torch.ones(3))
        self.size = lambda: 7

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # (N, 3, S, S) -> (N, 10), or as many as have names
        self.seen = images
        scores = torch.zeros(len(images), len(self.trained_on["classes"] or CLASSES))
        red = images[:, 0].mean((1, 2)) > images[:, 1].mean((1, 2))
        scores[torch.arange(len(images)), torch.where(red, 0, 1)] = 5
        return scores


def picture(path: Path, colour: Any = (255, 0, 0), size: tuple[int, int] = (60, 40), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


@pytest.mark.parametrize(
    ("name", "mode", "colour"),
    [
        ("a.png", "RGBA", (10, 20, 30, 255)),
        ("a.png", "L", 20),
        ("a.png", "LA", (20, 255)),
        ("a.png", "I;16", 20 * 257),
        ("a.gif", "RGB", (10, 20, 30)),  # is saved with a palette
        ("a.jpg", "CMYK", (0, 0, 0, 235)),
        ("a.png", "1", 1),
        ("a.webp", "RGB", (10, 20, 30)),
    ],
)
def test_a_picture_of_any_size_and_mode_becomes_a_square(tmp_path, name, mode, colour):
    for size in ((1, 1), (32, 32), (20, 700)):
        seen = load_picture(picture(tmp_path / name, colour, size, mode))
        assert (seen.shape, seen.dtype) == ((32, 32, 3), np.uint8)
        expected = {"RGB": (10, 20, 30), "RGBA": (10, 20, 30), "1": 255}.get(mode, 20)
        assert np.abs(seen.astype(int) - expected).max() <= 3  # JPEG and WebP are lossy


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_pixels_come_through_unchanged_and_upright_and_transparent_parts_are_white(tmp_path, suffix):
    assert (load_picture(picture(tmp_path / "clear.png", (0, 0, 0, 0), mode="RGBA")) == 255).all()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for orientation in range(10):
        file, data = tmp_path / f"a.{suffix}", Image.Exif()
        data[0x0112] = orientation
        Image.fromarray(pixels).save(file, exif=data)
        with Image.open(file) as turned:
            np.testing.assert_array_equal(load_picture(file), np.asarray(ImageOps.exif_transpose(turned)))


def test_damaged_metadata_cost_no_picture_nor_its_orientation(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    turned, unit_as_text = struct.pack("<HHII", 0x0112, 3, 1, 6), struct.pack("<HHII", 0x0128, 2, 4, 0x00636E69)
    metadata = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + turned + unit_as_text + bytes(4)
    for damage, times in ((metadata, -1), (b"Exif\0\0none", 0)):
        Image.fromarray(pixels).save(tmp_path / "a.png", exif=damage)
        np.testing.assert_array_equal(load_picture(tmp_path / "a.png"), np.rot90(pixels, times))


def test_a_large_photograph_is_read_at_a_fraction_and_comes_to_the_same(tmp_path):
    y, x = np.mgrid[:400, :600]
    photograph = np.stack([127 + 120 * np.sin(x / 37), 127 + 120 * np.cos(y / 32), 255 * x / 600], -1)
    for name in ("a.jpg", "a.png"):
        Image.fromarray(photograph.astype(np.uint8)).save(tmp_path / name, quality=95)
    difference = load_picture(tmp_path / "a.jpg").astype(int) - load_picture(tmp_path / "a.png")
    assert np.abs(difference).max() <= 6


def test_what_is_no_file_or_has_no_known_white_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    wide = picture(tmp_path / "wide.tif", 20, mode="F")
    refused = {"/dev/zero": "regular", tmp_path: "regular", tmp_path / "pipe.png": "regular", "a\0b": "null"}
    for path, why in {**refused, wide: "32 bits"}.items():
        with pytest.raises(PictureError, match=why):
            load_picture(path)


def test_predictions_come_in_the_order_of_the_files_and_of_the_probabilities(tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "BATCH", 2)
    colours = {"b.PNG": (0, 255, 0), "a.jpg": (255, 0, 0), "sub/x.png/d.bmp": (255, 0, 0), "sub/c.jfif": (0, 255, 0)}
    for name, colour in colours.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), colour).save(tmp_path / name)
    answers = classify([tmp_path / name for name in colours], Reddish())
    assert [next(iter(answer.probabilities)) for answer in answers] == ["car", "plane", "plane", "car"]
    for probabilities in (answer.probabilities for answer in answers):
        assert list(probabilities.values()) == sorted(probabilities.values(), reverse=True)
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
    found = [Path(answer.path).relative_to(tmp_path).as_posix() for answer in classify([tmp_path], Reddish())]
    assert found == ["a.jpg", "b.PNG", "sub/c.jfif", "sub/x.png/d.bmp"]
    assert len(classify([tmp_path / "a.jpg"] * 2, Reddish())) == 2
    assert classify([], Reddish()) == []


def test_a_folder_is_walked_through_links_but_never_twice_and_without_what_is_hidden(tmp_path, monkeypatch):
    folder, elsewhere = tmp_path / "holiday", tmp_path / "elsewhere"
    for file in ("b.png", "sub/c.png", ".thumbs/d.png", "._b.png", "__MACOSX/f.png", "@eaDir/f.png", "shut/h.png"):
        picture(folder / file)
    picture(elsewhere / "g.png")
    (elsewhere / "back").symlink_to(folder)
    (folder / "a").symlink_to(elsewhere)
    (folder / "sub/same").symlink_to(elsewhere)
    (folder / "z.png").symlink_to(folder / "b.png")
    entries = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("/shut"):
            raise PermissionError(13, "Permission denied", path)
        return entries(path)

    monkeypatch.setattr(os, "scandir", refuse)
    errors: list[PictureError] = []
    found = [Path(answer.path).relative_to(folder).as_posix() for answer in classify([folder], Reddish(), errors)]
    assert found == ["a/g.png", "b.png", "sub/c.png", "z.png"]
    assert sorted(str(e).split(": ")[0] for e in errors) == [f"{folder}/{p}" for p in ("a/back", "shut", "sub/same")]


def test_what_is_no_picture_is_named_or_counted_and_the_rest_is_done(tmp_path, capsys):
    good, bad, cut = picture(tmp_path / "good.png"), tmp_path / "bad.png", tmp_path / "cut.jpg"
    bad.write_text("hello")
    picture(cut, size=(300, 300))
    cut.write_bytes(cut.read_bytes()[:-300])
    with pytest.raises(PictureError, match="bad"):
        classify([good, bad], Reddish())
    for name in ("more/b.HEIC", "more/c.heic", "more/notes.txt", "more/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no picture")
    (tmp_path / "gone.png").symlink_to("nowhere")
    paths = [bad, good, tmp_path / "missing.png", tmp_path / "gone.png", cut, tmp_path / "more"]
    arguments = [*map(str, paths)]
    assert predict.main(arguments) == 1
    out, err = capsys.readouterr()
    assert out.startswith(f"{good}: ")
    assert out.count("%") == 3
    for path in (*paths[:1], *paths[2:]):
        assert f"{path}: " in err
    assert "left out 3 files of kinds that are not read: .heic, .txt\n" in err
    assert predict.main([*arguments, "--json", "--top", "1"]) == 1
    (answer,) = json.loads(capsys.readouterr().out)
    assert answer["path"] == str(good)
    assert set(answer["probabilities"]) == set(CLASSES)


@pytest.mark.parametrize(
    ("arguments", "refusal"),
    [
        (["--weights", "none.pt"], "none.pt cannot be read"),
        (["--top", "few"], "--top"),
        (["--weights", "mine.pt"], "--mean R G B"),
        (["--weights", "mine.pt", "--mean", "0.5", "0.5", "0.5"], "--std R G B"),
        (["--mean", "125", "122", "113"], "scale 0-1"),
        (["--std", "0.2", "0.2", "0"], "scale 0-1"),
        (["--classes", "cat", "dog"], "10 different names"),
        (["--classes", *"abcdefghii"], "10 different names"),
    ],
)
def test_the_command_refuses_what_does_not_fit_the_network(arguments, refusal, capsys):
    torch.save(PLAIN, "mine.pt")
    with pytest.raises(SystemExit) as leaving:
        predict.main(["a.png", *arguments])
    assert leaving.value.code == 2
    assert refusal in capsys.readouterr().err


def test_any_name_gets_one_line_and_a_title_wherever_output_goes(tmp_path, monkeypatch, capsys):
    net = Net.from_pretrained()
    monkeypatch.setattr(Net, "from_pretrained", lambda file=None: net)
    name = b"/two\nlines, not \xff UTF-8 \x1b[2J\xe2\x80\xa8.png"
    path, bad = Path(os.fsdecode(os.fsencode(tmp_path) + name)), tmp_path / "bad\nfile.png"
    picture(path)
    bad.write_text("no picture")
    assert predict.main([str(path), str(bad)]) == 1
    for text in capsys.readouterr():
        assert len(text.splitlines()) == 1
        assert text[:-1].isprintable()
    assert predict.main([str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["path"] == str(path)
    plot_answers(classify([path], Reddish())).canvas.draw()
    ascii_only, closed = io.TextIOWrapper(io.BytesIO(), encoding="ascii"), io.StringIO()
    closed.close()
    for stream in (ascii_only, closed, None):
        monkeypatch.setattr(sys, "stdout", stream)
        assert predict.main([str(path)]) == 0
    assert b"\\n" in ascii_only.buffer.getvalue()


def test_the_classes_the_size_and_the_normalisation_are_what_the_network_was_trained_on(tmp_path):
    names = ("red", *(f"x{k}" for k in range(11)))
    net = Reddish(classes=names, size=48, mean=[0.5, 0.25, 0.125], std=[0.5, 0.5, 0.25])
    answers = classify([picture(tmp_path / "$a$.png"), picture(tmp_path / "b.png", (0, 255, 0))], net)
    assert [next(iter(answer.probabilities)) for answer in answers] == ["red", "x0"]
    assert answers[0].classes == names
    assert answers[0].picture.shape == (48, 48, 3)
    torch.testing.assert_close(net.seen[0, :, 0, 0], torch.tensor([1.0, -0.5, -0.5]))
    figure = plot_answers(answers, top=12)
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in shown] == ["$a$.png", "b.png"]
    assert (shown[0].images[0].get_array() == answers[0].picture).all()
    bars = [axes.patches for axes in figure.axes if axes.patches]
    assert [len(patches) for patches in bars] == [12, 12]
    assert len({tuple(patch.get_facecolor()) for patch in bars[0]}) == len(CLASS_COLOURS)
    assert plot_answers([]).axes


def test_what_a_network_was_trained_on_is_seen_in_a_wrapper_and_in_its_file(tmp_path):
    net, paths = Net.from_pretrained().train(), [picture(tmp_path / "a.png"), picture(tmp_path / "b.png", (0, 9, 200))]
    net.trained_on = {"classes": tuple("abcdefghij"), "size": 40, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    before = net.c1[0].bn.running_mean.clone()
    expected = [answer.probabilities for answer in classify(paths, net)]
    assert net.training
    assert torch.equal(net.c1[0].bn.running_mean, before)
    torch.save({"model": net.state_dict(), **net.trained_on}, tmp_path / "model.pt")
    averaged = torch.optim.swa_utils.AveragedModel(net)
    for other in (Net.from_pretrained(tmp_path / "model.pt"), nn.DataParallel(net), averaged):
        answers = classify(paths, other)
        assert answers[0].picture.shape == (40, 40, 3)
        for answer, probabilities in zip(answers, expected, strict=True):
            assert answer.probabilities == pytest.approx(probabilities, abs=1e-5)
    compiled = nn.Module()  # as torch.compile returns, which takes seconds
    compiled._orig_mod = net
    assert predict.known_of(compiled) == net.trained_on


def test_nothing_is_taken_for_granted_that_the_network_does_not_say(tmp_path, capsys):
    file, net = picture(tmp_path / "a.png"), Reddish(classes=None, mean=None, std=None)
    with pytest.raises(ValueError, match="--mean R G B"):
        classify([file], net)
    values = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    with pytest.warns(UserWarning, match="--classes"):
        (answer,) = classify([file], net, **values)
    assert answer.classes == tuple(f"class {k}" for k in range(10))
    torch.testing.assert_close(net.seen[0, :, 0, 0], torch.tensor([2.0, -2.0, -2.0]))
    assert classify([file], net, classes=list("abcdefghij"), **values)[0].classes == tuple("abcdefghij")
    with pytest.raises(ValueError, match="10 different names"):
        classify([file], net, classes=["a", "b"], **values)

    torch.save(Net(num_classes=2).state_dict(), tmp_path / "mine.pt")
    flags = [str(file), "--weights", str(tmp_path / "mine.pt"), "--mean", *"000", "--std", *"111"]
    assert predict.main(flags) == 0
    out, err = capsys.readouterr()
    assert (out.count("class 0"), out.count("class 1"), err.count("--classes")) == (1, 1, 1)
    assert predict.main([*flags, "--top", "1", "--classes", "cat", "dog"]) == 0
    out, err = capsys.readouterr()
    assert (out.count("cat") + out.count("dog"), err) == (1, "")
