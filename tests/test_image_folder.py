"""A folder of pictures of one's own becomes arrays to train and to test on, or is refused with what was expected."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from machinery.data.cifar10 import draw_synthetic
from machinery.data.folder import load_image_folder
from machinery.data.pictures import load_picture
from train import DataError

COUNTS = {"cat": 8, "dog": 12, "emu": 20}


def draw(folder: Path, counts: dict[str, int], *, seed: int = 0) -> Path:
    """Pictures of several sizes, modes and formats, a sub-folder for each class."""
    rng = np.random.default_rng(seed)
    pictures, _ = draw_synthetic(train=True, count=max(counts.values()) * 10)
    for label, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for k in range(count):
            suffix, mode = (("png", "RGBA"), ("jpg", "RGB"), ("png", "L"), ("gif", "P"))[k % 4]
            picture = Image.fromarray(pictures[10 * k + label]).resize(rng.integers(20, 90, 2).tolist())
            picture.convert(mode).save(folder / name / f"{k:02}.{suffix}")
    return folder


def silent(line: str) -> None:
    raise AssertionError(f"nothing was to be said, but: {line}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return draw(tmp_path / "mine", COUNTS)


def snapshot(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    files = sorted(folder.rglob("*"))
    return {str(f): (f.lstat().st_mtime_ns, f.read_bytes() if f.is_file() else None) for f in files}


def test_one_level_gives_every_picture_as_predict_reads_it(folder):
    before = snapshot(folder)
    images, labels, test_images, test_labels, classes = load_image_folder(folder, warn=lambda line: None)
    assert snapshot(folder) == before
    assert classes == ("cat", "dog", "emu")
    assert (images.shape, images.dtype) == ((40, 32, 32, 3), np.uint8)
    assert (labels.dtype, np.bincount(labels).tolist()) == (np.int64, [8, 12, 20])
    assert (test_images.shape, test_labels.shape) == ((0, 32, 32, 3), (0,))
    files = [file for name in classes for file in sorted((folder / name).iterdir())]
    np.testing.assert_array_equal(images, [load_picture(file) for file in files])


@pytest.mark.parametrize("size", [64, 96])
def test_pictures_may_be_larger(folder, size):
    images, _, test_images, *_ = load_image_folder(folder, size, holdout=0.25, warn=lambda line: None)
    assert images.shape == (30, size, size, 3)
    assert test_images.shape == (10, size, size, 3)
    assert images.std() > 10


def test_what_is_held_out_is_the_same_share_of_each_class_and_follows_from_the_seed(folder):
    def load(seed: int) -> list[np.ndarray]:
        return list(load_image_folder(folder, holdout=0.25, seed=seed, warn=lambda line: None)[:4])

    images, labels, test_images, test_labels = load(0)
    assert np.bincount(labels).tolist() == [6, 9, 15]
    assert np.bincount(test_labels).tolist() == [2, 3, 5]
    everything, all_labels, *_ = load_image_folder(folder, warn=lambda line: None)

    def rows(some: np.ndarray, labels: np.ndarray) -> list[bytes]:
        return sorted(bytes([label]) + image.tobytes() for image, label in zip(some, labels, strict=True))

    assert sorted(rows(images, labels) + rows(test_images, test_labels)) == rows(everything, all_labels)
    assert np.array_equal(load(0)[2], test_images)
    assert not np.array_equal(load(1)[2], test_images)


def test_a_small_share_holds_out_one_and_a_large_one_leaves_one(tmp_path):
    folder = draw(tmp_path / "mine", {"a": 2, "b": 3})
    for share in (0.01, 0.99):
        _, labels, _, test_labels, _ = load_image_folder(folder, holdout=share, warn=silent)
        assert set(labels) == set(test_labels) == {0, 1}
    with pytest.raises(DataError, match="one: one picture is too few to hold some of the class out"):
        load_image_folder(draw(tmp_path / "few", {"a": 2, "one": 1}), holdout=0.5, warn=silent)


@pytest.mark.parametrize("share", [-0.1, 1, float("nan")])
def test_a_share_out_of_range_is_refused(folder, share):
    with pytest.raises(ValueError, match="holdout"):
        load_image_folder(folder, holdout=share)


@pytest.mark.parametrize("name", ["test", "val", "Test"])
def test_a_part_to_test_on_is_taken_whole_and_labelled_as_the_training_part(tmp_path, name):
    draw(tmp_path / "train", {"ant": 4, "cat": 4, "dog": 4})
    draw(tmp_path / name, {"cat": 3, "dog": 2}, seed=1)
    images, _, test_images, test_labels, classes = load_image_folder(tmp_path, warn=silent)
    assert (len(images), len(test_images), classes) == (12, 5, ("ant", "cat", "dog"))
    assert test_labels.tolist() == [1, 1, 1, 2, 2]
    said: list[str] = []
    assert len(load_image_folder(tmp_path, holdout=0.5, warn=said.append)[0]) == 12
    assert "nothing of" in said[0]


def test_of_test_and_val_it_is_test_and_what_is_left_out_is_said(tmp_path):
    for part, count in (("train", 4), ("test", 2), ("val", 3)):
        draw(tmp_path / part, {"a": count, "b": count})
    (tmp_path / "train/README.txt").write_text("pictures of mine")
    said: list[str] = []
    assert len(load_image_folder(tmp_path, warn=said.append)[3]) == 4
    assert said == [
        f"{tmp_path}: left out val/",
        f"{tmp_path}/train: left out what is in no class's folder, files: 1",
    ]


def test_train_alone_is_split_and_a_class_of_trains_is_a_class(tmp_path):
    draw(tmp_path / "mine/train", {"a": 4, "b": 4})
    images, _, test_images, *_ = load_image_folder(tmp_path / "mine", holdout=0.5, warn=silent)
    assert (len(images), len(test_images)) == (4, 4)
    vehicles = draw(tmp_path / "vehicles", {"bus": 2, "test": 2, "train": 2})
    assert load_image_folder(vehicles, warn=silent)[4] == ("bus", "test", "train")


def test_folders_in_a_class_belong_to_it_links_are_followed_and_hidden_files_are_not_seen(tmp_path):
    folder = draw(tmp_path / "mine", {"a": 3, "b": 3})
    draw(folder / "a", {"more": 2})
    draw(tmp_path, {"elsewhere": 4})
    (folder / "b/linked").symlink_to(tmp_path / "elsewhere")
    (folder / "b/others").symlink_to(folder / "a")  # pictures of another class
    (folder / "a/up").symlink_to(folder)
    (folder / "c").symlink_to(draw(tmp_path / "c", {"deep": 2}))
    for hidden in (".hidden.png", "._00.png", "Thumbs.db", "desktop.ini", ".cache/x.png"):
        (folder / "a" / hidden).parent.mkdir(exist_ok=True)
        (folder / "a" / hidden).write_text("no picture")
    (folder / "__MACOSX/a").mkdir(parents=True)
    (folder / ".git").mkdir()
    said: list[str] = []
    _, labels, _, _, classes = load_image_folder(folder, warn=said.append)
    assert classes == ("a", "b", "c")
    assert np.bincount(labels).tolist() == [5, 7, 2]
    assert said == [f"{folder}: the classes are unbalanced, in pictures: a 5, b 7, c 2"]


def test_what_is_no_picture_is_named_and_left_out_up_to_a_tenth_of_a_class(folder):
    (folder / "emu/notes.txt").write_text("not a picture")
    (folder / "emu/broken\nname.png").write_text("not a picture either")
    said: list[str] = []
    _, labels, *_ = load_image_folder(folder, warn=said.append)
    assert np.bincount(labels).tolist() == [8, 12, 20]
    assert said[0] == f"left out: {folder}/emu/notes.txt: not of a kind that is read"
    assert said[1].startswith(f"left out: {folder}/emu/broken\\nname.png: not a picture that can be read (cannot")
    assert "unbalanced" in said[2]
    assert len(said) == 3
    (folder / "emu/gone.png").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"emu: more than a tenth of the 23 files .* cannot be read"):
        load_image_folder(folder, warn=said.append)


@pytest.mark.parametrize("name", ["00.heic", "00.png"])
def test_a_class_that_lost_more_than_a_tenth_is_refused_with_what_it_lost(tmp_path, name):
    folder = draw(tmp_path / "mine", {"a": 9, "b": 8})
    (folder / "b" / name).write_text("no picture")
    with pytest.raises(DataError, match=f"b: more than a tenth of .*/b/{name}: not .* save them as JPEG or PNG"):
        load_image_folder(folder, warn=lambda line: None)


def test_unbalanced_classes_are_shown(tmp_path):
    said: list[str] = []
    load_image_folder(draw(tmp_path / "mine", {"rare": 2, "frequent": 5}), warn=said.append)
    assert said == [f"{tmp_path}/mine: the classes are unbalanced, in pictures: frequent 5, rare 2"]


def spoil(folder: Path, how: str) -> Path:
    """What a user may get wrong, made of a folder that is right."""
    if how == "missing":
        return folder / "nowhere"
    if how == "a file":
        return folder / "cat/00.png"
    if how == "no folders":
        return folder / "cat"
    if how == "one class":
        for name in ("cat", "dog"):
            folder.joinpath(name).rename(folder / f".{name}")
    if how == "an empty class":
        (folder / "fox").mkdir()
    if how == "a class of another kind":
        (folder / "fox").mkdir()
        for k in range(3):
            (folder / f"fox/{k}.HEIC").write_text("a picture that Pillow cannot read")
    if how == "a broken link":
        (folder / "fox").symlink_to("nowhere")
    if how == "one folder twice":
        (folder / "fox").symlink_to("cat")
    if how == "only to test":
        draw(folder.parent / "parts/train", {"cat": 2, "dog": 2})
        draw(folder.parent / "parts/test", {"cat": 2, "fox": 2})
        return folder.parent / "parts"
    if how == "without train":
        draw(folder.parent / "parts/test", {"cat": 2, "dog": 2})
        return folder.parent / "parts"
    if how == "no classes in train":
        (folder.parent / "parts/test").mkdir(parents=True)
        folder.joinpath("cat").rename(folder.parent / "parts/train")
        return folder.parent / "parts"
    if how == "tested on itself":
        (folder.parent / "parts").mkdir()
        for part in ("train", "test"):
            (folder.parent / "parts" / part).symlink_to(folder)
        return folder.parent / "parts"
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "nowhere: there is no such folder; expected a folder with a sub-folder of pictures for each"),
        ("a file", "00.png: this is a file; expected a folder with a sub-folder"),
        ("no folders", "cat: there are no folders in it; expected a folder with a sub-folder"),
        ("one class", "there is only one class, emu; expected .* two or more classes"),
        ("an empty class", "fox: there is no picture in this folder; each class needs some"),
        ("a class of another kind", "fox: there is no picture .* only 3 .heic; save pictures as JPEG or PNG"),
        ("a broken link", "fox: a link to nothing; expected"),
        ("one folder twice", "cat: two of the classes or parts are this one folder"),
        ("only to test", "parts/test: there are classes that .*parts/train lacks: fox"),
        ("without train", "there is no train/ beside test/; expected"),
        ("no classes in train", "parts/train: there are no folders in it; expected"),
        ("tested on itself", "two of the classes or parts are this one folder"),
    ],
)
def test_other_folders_are_refused_with_what_was_expected(folder, how, message):
    given = spoil(folder, how)
    before = snapshot(folder.parent)
    with pytest.raises(DataError, match=message) as refusal:
        load_image_folder(given, warn=silent)
    assert "\n" not in str(refusal.value)
    assert snapshot(folder.parent) == before


def test_a_folder_that_may_not_be_read_is_named(folder, monkeypatch):
    def refuse(path: str | Path) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(DataError, match="mine: Permission denied; expected"):
        load_image_folder(folder, warn=silent)
