"""A folder of pictures of one's own becomes arrays to train and to test on, or is refused with what was expected."""

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from machinery.data.cifar10 import draw_synthetic
from machinery.data.folder import LoadedFolder, load_image_folder, load_picture
from train import DataError

PICTURES, _ = draw_synthetic(train=True, count=300)


def draw(folder: Path, counts: dict[str, int], first: int = 0) -> Path:
    """Pictures of several sizes, modes and formats, a sub-folder for each class."""
    rng = np.random.default_rng(first)
    for label, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for k in range(first, first + count):
            suffix, mode = (("png", "RGBA"), ("jpg", "RGB"), ("png", "L"), ("gif", "P"))[k % 4]
            picture = Image.fromarray(PICTURES[10 * k + label]).resize(rng.integers(20, 90, 2).tolist())
            picture.convert(mode).save(folder / name / f"{k:02}.{suffix}")
    return folder


def few(folder: Path, names: str) -> Path:
    return draw(folder, dict.fromkeys(names.split(), 2))


def silent(line: str) -> None:
    raise AssertionError(f"nothing was to be said, but: {line}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return draw(tmp_path / "mine", {"cat": 8, "dog": 12, "emu": 20})


def counts(loaded: LoadedFolder) -> list[int]:
    return (np.bincount(loaded.labels) + np.bincount(loaded.test_labels)).tolist()


def test_every_picture_is_read_as_predict_does_in_order_and_some_are_for_validation(folder):
    loaded = load_image_folder(folder, 40, warn=silent)
    assert (loaded.classes, loaded.is_validation, counts(loaded)) == (("cat", "dog", "emu"), True, [8, 12, 20])
    assert loaded.images.shape[1:] == loaded.test_images.shape[1:] == (40, 40, 3)
    assert (loaded.images.dtype, loaded.labels.dtype) == (np.uint8, np.int64)
    files = [file for name in loaded.classes for file in sorted((folder / name).iterdir())]
    expected = np.stack([load_picture(file, 40) for file in files])
    aside = {image.tobytes() for image in loaded.test_images}
    is_aside = np.array([image.tobytes() in aside for image in expected])
    np.testing.assert_array_equal(loaded.images, expected[~is_aside])
    np.testing.assert_array_equal(loaded.test_images, expected[is_aside])


def test_a_folder_that_grows_or_moves_keeps_its_split_which_the_seed_and_the_share_decide(folder, tmp_path):
    def split(folder: Path, share: float = 0.3, seed: int = 0) -> tuple[set[bytes], set[bytes]]:
        loaded = load_image_folder(folder, share=share, seed=seed)
        return {image.tobytes() for image in loaded.images}, {image.tobytes() for image in loaded.test_images}

    train, test = split(folder)
    assert train & test == set()
    assert split(folder, seed=1)[1] != test
    assert split(folder, share=0.6)[1] > test
    (tmp_path / "parent").mkdir()
    grown = draw(folder.rename(tmp_path / "parent/train"), {"cat": 4, "dog": 4, "emu": 4}, first=20)
    more_train, more_test = split(grown)
    assert (more_train > train, more_test >= test) == (True, True)
    assert split(tmp_path / "parent") == (more_train, more_test)


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_each_class_has_pictures_on_both_sides(tmp_path, share):
    loaded = load_image_folder(draw(tmp_path / "mine", {"a": 2, "b": 3}), share=share, warn=silent)
    assert set(loaded.labels) == set(loaded.test_labels) == {0, 1}
    with pytest.raises(DataError, match="one: one picture is too few"):
        load_image_folder(draw(tmp_path / "few", {"a": 2, "one": 1}), share=share, warn=silent)
    for out_of_range in (-share, 1, float("nan")):
        with pytest.raises(ValueError, match="share"):
            load_image_folder(tmp_path, share=out_of_range)


@pytest.mark.parametrize(
    "names", ["train valid", "Training Testing", "seg_train test-set", "2024.train my.dev", "TRAIN eval"]
)
def test_splits_are_known_by_the_words_in_their_names(tmp_path, names):
    train, test = names.split()
    few(tmp_path / train, "ant cat dog")
    draw(tmp_path / test, {"cat": 3, "dog": 2}, first=9)
    loaded = load_image_folder(tmp_path, warn=silent)
    assert (len(loaded.images), loaded.classes, loaded.is_validation) == (6, ("ant", "cat", "dog"), False)
    assert loaded.test_labels.tolist() == [1, 1, 1, 2, 2]
    said: list[str] = []
    few(tmp_path / "extra", "cat")
    load_image_folder(tmp_path, warn=said.append)
    assert [line.split(", left out ")[1] for line in said] == ["extra"]


@pytest.mark.parametrize("names", ["bus test train", "devon_rex siamese testudo", "cat dev_rex val"])
def test_other_folders_are_classes_that_of_trains_too(tmp_path, names):
    assert load_image_folder(few(tmp_path, names), warn=silent).classes == tuple(names.split())


def test_names_that_differ_in_their_unicode_form_are_one_class_and_keep_the_split(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    for part, name in (("a/train", composed), ("a/test", decomposed), ("b", composed), ("c", decomposed)):
        draw(tmp_path / part, {name: 6, "bar": 6})
    loaded = load_image_folder(tmp_path / "a", warn=silent)
    assert (loaded.classes, np.bincount(loaded.test_labels).tolist()) == (("bar", composed), [6, 6])
    one, other = (load_image_folder(tmp_path / name, share=0.5, warn=silent) for name in "bc")
    np.testing.assert_array_equal(one.test_images, other.test_images)


def test_folders_in_a_class_belong_to_it_links_are_followed_and_hidden_files_are_not_seen(tmp_path):
    folder = few(tmp_path / "mine", "a a/more b")
    (folder / "b/linked").symlink_to(few(tmp_path, "elsewhere") / "elsewhere")
    (folder / "c").symlink_to(few(tmp_path / "c", "deep"))
    for hidden in ("a/.hidden.png", "a/._00.png", "a/Thumbs.db", "a/@eaDir/0.png", "__MACOSX/a/0.png", ".git/a/0.png"):
        (folder / hidden).parent.mkdir(parents=True, exist_ok=True)
        (folder / hidden).write_text("no picture")
    loaded = load_image_folder(folder, warn=silent)
    assert (loaded.classes, counts(loaded)) == (("a", "b", "c"), [4, 4, 2])


@pytest.mark.parametrize("fault", ["broken\nname.png", "00.heic", "pipe.png", "gone.png", "up", "other"])
def test_what_is_no_picture_is_named_and_left_out_up_to_a_tenth_of_a_class(tmp_path, fault):
    folder = draw(tmp_path / "mine", {"a": 9, "b": 8})
    path = folder / "b" / fault
    if fault == "pipe.png":
        os.mkfifo(path)
    elif fault in ("gone.png", "up", "other"):  # a folder that would be read without end, or in two classes
        path.symlink_to({"gone.png": "nowhere", "up": folder, "other": folder / "a"}[fault])
    else:
        path.write_text("no picture")
    said: list[str] = []
    with pytest.raises(DataError, match="b: of this class 8 files can be read as pictures and 1 cannot"):
        load_image_folder(folder, warn=said.append)
    draw(folder, {"c": 0, "b": 1}, first=20)
    assert len(load_image_folder(few(folder, "c"), warn=said.append).classes) == 3
    assert said[0] == said[1]
    assert said[0].startswith(f"left out: {folder}/b/{fault}: ".replace("\n", "\\n"))


@pytest.mark.parametrize(
    ("folders", "links", "message"),
    [
        ("", {}, "there are 0 classes to train on, and 0 to test on; expected"),
        ("emu", {}, "there are 1 classes to train on, .* two or more classes"),
        ("cat dog fox=", {}, "fox: of this class 0 files can be read"),
        ("cat dog", {"fox": "cat"}, "fox: of this class 0 files can be read"),
        ("train/cat train/dog test/cat test/fox", {}, "test: there are classes that .*train lacks: fox"),
        ("test/cat test/dog", {}, "one folder to train on and one to test on are needed, not test; expected"),
        ("train/cat test/cat training/cat", {}, "one to test on are needed, not train and training and test; expected"),
        ("train test/cat test/dog", {}, "there are 0 classes to train on, and 2 to test on; expected"),
        ("fold1/cat fold2/cat", {}, "all folders in it hold folders of the same names"),
        ("train/cat train/dog", {"test": "train"}, "test/cat: of this class 0 files can be read"),
    ],
)
def test_other_folders_are_refused_with_what_was_expected(tmp_path, folders, links, message):
    for name in folders.split():
        few(tmp_path, name) if name[-1] != "=" else (tmp_path / name[:-1]).mkdir()
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    with pytest.raises(DataError, match=message) as refusal:
        load_image_folder(tmp_path, warn=lambda line: None)
    assert "\n" not in str(refusal.value)


def test_what_is_no_folder_or_may_not_be_read_is_named(folder, monkeypatch):
    for path, reason in ((folder / "nowhere", "No such file"), (folder / "cat/00.png", "Not a directory")):
        with pytest.raises(DataError, match=f"{path.name}: {reason}.*; expected"):
            load_image_folder(path, warn=silent)

    def refuse(path: str | Path) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(DataError, match="mine: Permission denied; expected"):
        load_image_folder(folder, warn=silent)
