"""`predict.py` takes whatever picture comes, names what it cannot read, and does the rest."""

import io
import json
import os
import struct
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import nn

import predict
from dataset import CIFAR10, CLASS_COLOURS, CLASSES, MEAN, STD
from machinery.data import pictures
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


def exif(*entries: tuple[int, int, int, int]) -> bytes:
    """EXIF data with these entries: tag, type, count, value."""
    body = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4)


def random_pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_turned_upright(tmp_path, suffix, orientation):
    file, data = tmp_path / f"a.{suffix}", Image.Exif()
    data[0x0112] = orientation
    Image.fromarray(random_pixels()).save(file, exif=data)
    with Image.open(file) as turned:
        np.testing.assert_array_equal(load_picture(file), np.asarray(ImageOps.exif_transpose(turned)))


@pytest.mark.parametrize(
    ("metadata", "is_turned"),
    [
        (exif((0x0112, 3, 1, 6), (0x0128, 2, 4, 0x00636E69)), True),  # the unit of resolution as text
        (exif((0x0112, 3, 1, 6), (0x0128, 11, 1, 0x3F800000)), True),  # as a float
        (exif((0x0112, 3, 1, 6), (0x0131, 12, 1, 16)), True),  # the software as a number
        (exif((0x0112, 3, 1, 6), (0x8769, 2, 4, 0x41414141)), True),  # text where another list should begin
        (exif((0x0112, 2, 4, 0x00000036)), False),  # the orientation as text
        (exif((0x0112, 3, 1, 6))[:20], False),
        (b"Exif\0\0no metadata at all", False),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_no_metadata_cost_a_picture(tmp_path, suffix, metadata, is_turned):
    file = tmp_path / f"a.{suffix}"
    Image.fromarray(random_pixels()).save(file, exif=metadata)
    with Image.open(file) as picture:
        as_stored = picture.convert("RGB")
    expected = as_stored.transpose(Image.Transpose.ROTATE_270) if is_turned else as_stored
    np.testing.assert_array_equal(load_picture(file), np.asarray(expected))


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_no_metadata_cost_a_tiff(tmp_path, compression):
    pixels, content = random_pixels(), io.BytesIO()
    Image.fromarray(pixels).save(content, "TIFF", compression=compression, tiffinfo={0x0112: 6, 0x0131: 20 * "x"})
    software, xmp = struct.pack("<HHI", 0x0131, 2, 21), struct.pack("<HHI", 0x02BC, 3, 5)
    assert software in content.getvalue()
    (tmp_path / "a.tif").write_bytes(content.getvalue().replace(software, xmp))  # XMP that is no text
    np.testing.assert_array_equal(load_picture(tmp_path / "a.tif"), np.rot90(pixels, -1))


def test_a_large_photograph_is_read_at_a_fraction_and_comes_to_the_same(tmp_path):
    y, x = np.mgrid[:1600, :2400]
    photograph = np.stack([127 + 120 * np.sin(x / 150), 127 + 120 * np.cos(y / 130), 255 * x / 2400], -1)
    Image.fromarray(photograph.astype(np.uint8)).save(tmp_path / "a.jpg", quality=95)
    Image.fromarray(photograph.astype(np.uint8)).save(tmp_path / "a.png")
    difference = load_picture(tmp_path / "a.jpg").astype(int) - load_picture(tmp_path / "a.png")
    assert np.abs(difference).max() <= 6


def test_a_pipe_is_read_but_not_waited_for_without_end(tmp_path, monkeypatch):
    pipe, file = tmp_path / "pipe", picture(tmp_path / "a.png", (10, 20, 30))
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(file.read_bytes()))
    writer.start()
    assert (load_picture(pipe) == (10, 20, 30)).all()
    writer.join()
    monkeypatch.setattr(pictures, "PIPE_SECONDS", 0.1)
    with pytest.raises(PictureError, match=r"pipe: nothing came through this pipe for 0.1 seconds"):
        load_picture(pipe)
    monkeypatch.setattr(pictures, "PIPE_BYTES", 20)
    reading, writing = os.pipe()
    os.write(writing, bytes(30))
    with pytest.raises(PictureError, match="more than 20 bytes came through this pipe"):
        load_picture(f"/dev/fd/{reading}")
    os.close(reading)
    os.close(writing)


def test_what_is_no_file_is_refused(tmp_path):
    for path, kind in (("/dev/zero", "a device"), (tmp_path, "a folder"), (tmp_path / "a\0b", "null")):
        with pytest.raises(PictureError, match=kind):
            load_picture(path)


def test_a_folder_is_walked_through_links_but_never_in_circles_and_without_what_is_hidden(tmp_path):
    folder, elsewhere = tmp_path / "holiday", tmp_path / "elsewhere"
    for file in ("b.png", "sub/c.png", ".thumbs/d.png", "._b.png", ".e.png", "__MACOSX/f.png"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        picture(folder / file)
    elsewhere.mkdir()
    picture(elsewhere / "g.png")
    (elsewhere / "back").symlink_to(folder)
    (folder / "a").symlink_to(elsewhere)
    (folder / "sub/same").symlink_to(elsewhere)
    (folder / "sub/up").symlink_to("..")
    (folder / "z.png").symlink_to(folder / "b.png")
    found = [Path(answer.path).relative_to(folder).as_posix() for answer in classify([folder], Reddish())]
    assert found == ["a/g.png", "b.png", "sub/c.png", "z.png"]


def test_what_a_folder_cannot_give_is_named_or_counted(tmp_path, capsys):
    good = picture(tmp_path / "a.png")
    for name in ("b.HEIC", "c.heic", "notes.txt", "noname", ".hidden"):
        (tmp_path / name).write_text("no picture")
    assert predict.main([str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{good}: ")
    assert err == "files left out, for their kind is not read: 4 (2 .heic, 1 without a suffix, 1 .txt)\n"
    with pytest.warns(UserWarning, match=r"left out, for their kind is not read: 4 \(2 .heic"):
        classify([tmp_path], Reddish())

    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe.png")
    assert predict.main([str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out.startswith(f"{good}: ")
    lines = err.splitlines()
    assert lines[:2] == [
        f"{tmp_path}/gone.png: a link to nothing",
        f"{tmp_path}/loop: Too many levels of symbolic links",
    ]
    assert lines[2] == f"{tmp_path}/pipe.png: neither a file nor a folder, and not read"
    assert len(lines) == 4


def test_a_folder_in_which_nothing_can_be_read_says_what_is_there(tmp_path, capsys):
    for name in ("b.HEIC", "c.heic", "notes.txt"):
        (tmp_path / name).write_text("no picture")
    assert predict.main([str(tmp_path)]) == 1
    assert capsys.readouterr() == (
        "",
        f"{tmp_path}: there is no picture in this folder of a kind that is read, only 2 .heic, 1 .txt; "
        "save pictures as JPEG or PNG\n",
    )


def test_a_folder_that_may_not_be_read_is_named_and_the_others_are_read(tmp_path, monkeypatch):
    for name in ("a/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir()
        picture(tmp_path / name)
    names = os.listdir

    def refuse(path: str) -> list[str]:
        if path.endswith("/a"):
            raise PermissionError(13, "Permission denied", path)
        return names(path)

    monkeypatch.setattr(os, "listdir", refuse)
    errors: list[PictureError] = []
    assert [answer.path for answer in classify([tmp_path], Reddish(), errors)] == [f"{tmp_path}/b/2.png"]
    assert [str(error) for error in errors] == [f"{tmp_path}/a: Permission denied"]


@pytest.mark.parametrize("name", [b"two\nlines.png", b"not \xff UTF-8.png", b"\x1b[2J\xe2\x80\xa8.png"])
def test_any_name_gets_one_line_and_a_title(tmp_path, capsys, name):
    path, bad = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)), tmp_path / "bad\nfile.png"
    picture(path)
    bad.write_text("no picture")
    assert predict.main([str(path), str(bad)]) == 1
    out, err = capsys.readouterr()
    for text, last in ((out, "%\n"), (err, ")\n")):
        assert len(text.splitlines()) == 1
        assert text.endswith(last)
        assert text.isprintable() or text[:-1].isprintable()
    assert predict.main([str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["path"] == str(path)
    plot_answers(classify([path], Reddish())).canvas.draw()


class Bare:
    """Has nothing but what `print` needs."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text


def test_the_command_works_wherever_its_output_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(Net, "from_pretrained", lambda file=None: Net().eval())
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xc3\xa9\xff.png"))  # é, and no UTF-8
    arguments = [str(picture(file)), str(tmp_path / "none.png")]
    ascii_only, closed = io.TextIOWrapper(io.BytesIO(), encoding="ascii"), io.StringIO()
    closed.close()
    for stream in (io.StringIO(), Bare(), ascii_only, closed, None):
        monkeypatch.setattr(sys, "stdout", stream)
        assert predict.main(arguments) == 1
    monkeypatch.setattr(sys, "stdout", bare := Bare())
    monkeypatch.setattr(sys, "stderr", errors := Bare())
    assert predict.main(arguments) == 1
    assert bare.text.startswith(f"{tmp_path}/é\\udcff.png: ")
    assert errors.text == f"{tmp_path}/none.png: there is no such file\n"
    assert ascii_only.buffer.getvalue().startswith(os.fsencode(tmp_path) + b"/\\xe9\\udcff.png: ")


def test_a_reader_that_has_seen_enough_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream:
        predict.say("nobody reads this", stream)
        predict.say("nor this", stream)


def test_a_full_disk_ends_the_command_with_a_message():
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(SystemExit, match="cannot write: No space left on device"):
        predict.say("this does not fit", Full())


class Own(Reddish):
    """A network with classes, a size and a normalisation of its own; says "red" of red pictures, else "x0"."""

    classes = ("red", *(f"x{k}" for k in range(11)))
    size, mean, std = 48, (0.5, 0.25, 0.125), [0.5, 0.5, 0.25]

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # (N, 3, 48, 48) -> (N, 12)
        self.seen = images
        return torch.cat([super().forward(images), torch.zeros(len(images), 2)], 1)


def test_the_classes_the_size_and_the_normalisation_are_those_of_the_network(tmp_path):
    net = Own()
    answers = classify([picture(tmp_path / "$a$.png"), picture(tmp_path / "b.png", (0, 255, 0))], net)
    assert [next(iter(answer.probabilities)) for answer in answers] == ["red", "x0"]
    assert set(answers[0].probabilities) == set(net.classes)
    assert answers[0].picture.shape == (48, 48, 3)
    torch.testing.assert_close(net.seen[0, :, 0, 0], torch.tensor([1.0, -0.5, -0.5]))
    figure = plot_answers(answers, top=12)
    figure.canvas.draw()
    bars = [axes.patches for axes in figure.axes if axes.patches]
    assert [len(patches) for patches in bars] == [12, 12]
    colours = {tuple(patch.get_facecolor()) for patch in bars[0]}
    assert len(colours) == len(CLASS_COLOURS)


def test_a_network_without_names_is_answered_for_by_number_and_wrong_names_are_refused(tmp_path):
    file, net = picture(tmp_path / "a.png"), Net(num_classes=2)
    assert set(classify([file], net)[0].probabilities) == {"class 0", "class 1"}
    net.classes = ("a", "b", "c")
    with pytest.raises(ValueError, match="must name the 2 that it tells apart, got 3"):
        classify([file], net)


def test_a_network_with_other_things_of_these_names_is_taken_as_any(tmp_path):
    net = Reddish()
    net.register_buffer("mean", torch.ones(3))
    net.std, net.size = (1, 1, 1), lambda: 7  # type: ignore[assignment]
    assert classify([picture(tmp_path / "a.png")], net)[0].picture.shape == (32, 32, 3)
    assert predict.normalisation(net) == (MEAN, STD)


def test_the_command_names_the_classes_of_its_network(tmp_path, monkeypatch, capsys):
    net = Net(num_classes=2).eval()
    net.classes = ("cat", "dog")
    monkeypatch.setattr(Net, "from_pretrained", lambda file=None: net)
    file = str(picture(tmp_path / "a.png"))
    assert predict.main([file]) == 0
    named = capsys.readouterr().out
    assert (named.count("cat"), named.count("dog"), named.count("%")) == (1, 1, 2)
    assert predict.main([file, "--top", "1"]) == 0
    with pytest.raises(SystemExit):
        predict.main([file, "--top", "3"])
    assert "argument --top: expected 1 to 2" in capsys.readouterr().err


def test_the_classes_are_those_of_cifar10_if_the_network_says_nothing(tmp_path):
    net = Reddish()
    net.classes = None  # type: ignore[assignment]
    answer = classify([picture(tmp_path / "a.png")], net)[0]
    assert answer.classes == CLASSES


def test_pictures_are_normalised_as_in_training(tiny_root):
    dataset = CIFAR10(train=False)
    images = torch.stack([dataset[i][0] for i in range(20)])
    torch.testing.assert_close(predict.as_input(dataset.images[:20].numpy(), Net()), images, rtol=0, atol=1e-6)
