"""What happens to an image: each augmentation does what it says, on draws of its own, and refuses the rest."""

import io
import random

import albumentations as A
import numpy as np
import pytest
import torch
from conftest import TRAIN_COUNT
from PIL import Image

from dataset import AUGMENTATIONS, CIFAR10, MEAN, STD, denormalize, eval_transform, train_transform
from machinery.data.augment import NUMBERS, crop, normalize
from machinery.data.transforms import JPEG, ONE_BY_ONE


def test_denormalize_gives_the_picture_back():
    dataset = CIFAR10(train=False)
    images = torch.stack([dataset[i][0] for i in range(10)])
    np.testing.assert_array_equal(denormalize(images), dataset.images[:10].numpy())


def test_each_augmentation_does_what_it_says():
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    given = {"images": np.stack([picture] * 60), "draws": rng.random((60, NUMBERS))}
    drawn = {name: train_transform([name])(**given)["images"] for name in AUGMENTATIONS}
    np.testing.assert_array_equal(given["images"], np.stack([picture] * 60))
    padded = np.pad(picture, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    crops = {padded[y : y + 32, x : x + 32].tobytes() for y in range(9) for x in range(9)}
    assert {d.tobytes() for d in drawn["crop"]} <= crops
    assert {d.tobytes() for d in drawn["flip"]} == {picture.tobytes(), picture[:, ::-1].tobytes()}
    for holed in drawn["cutout"]:
        changed = (holed != picture).any(axis=2)
        assert changed.sum() >= 60  # of 64; a pixel may have had the mean colour
        assert np.abs(holed[changed].astype(float) - 255 * np.array(MEAN)).max() <= 1
    assert 5 < sum((d == picture).all() for d in drawn["affine"]) < 55
    for name in ("crop", "affine", "trivial", "cutout", "corrupt"):
        assert len({d.tobytes() for d in drawn[name]}) > 20, f"{name} repeats itself"


def test_the_policy_changes_half_of_the_images_in_thirteen_ways():
    pictures = np.random.default_rng(0).integers(60, 200, (400, 32, 32, 3), dtype=np.uint8)
    draws = np.random.default_rng(1).random((400, NUMBERS))
    changed = train_transform(["trivial"])(images=pictures, draws=draws)["images"]
    assert 0.4 < (changed != pictures).any((1, 2, 3)).mean() < 0.6
    ways = ONE_BY_ONE["trivial"].transforms
    assert len(ways) == 13
    outcomes = []
    for way in ways:
        way.set_random_state(np.random.default_rng(0), random.Random(0))
        outcomes.append(np.stack([way(image=picture)["image"].astype(float) for picture in pictures[:20]]))
    for i, outcome in enumerate(outcomes):
        assert all(np.abs(outcome - other).mean() > 1 for other in [*outcomes[:i], pictures[:20]]), ways[i]


@pytest.mark.parametrize("padding", [0, 2, 4])
def test_crops_and_holes_are_drawn_from_corner_to_corner(padding):
    picture = np.random.default_rng(0).integers(1, 256, (32, 32, 3), np.uint8)
    given = {"images": np.stack([picture] * 2), "draws": np.array([[0.0] * NUMBERS, [1 - 2**-53] * NUMBERS])}
    first, last = train_transform(["crop"], padding)(**given)["images"]
    padded = np.pad(picture, ((padding, padding), (padding, padding), (0, 0)), mode="reflect")
    np.testing.assert_array_equal(first, padded[:32, :32])
    np.testing.assert_array_equal(last, padded[2 * padding :, 2 * padding :])
    first, last = train_transform(["cutout"], mean=(0, 0, 0))(**given)["images"]
    assert [first[:8, :8].any(), np.sum(first == 0)] == [False, 8 * 8 * 3]
    assert [last[24:, 24:].any(), np.sum(last == 0)] == [False, 8 * 8 * 3]


@pytest.mark.parametrize("name", ["crop", "affine", "trivial"])
def test_what_one_augmentation_draws_does_not_depend_on_the_others(name):
    alone, with_cutout = CIFAR10(augment=[name]), CIFAR10(augment=[name, "cutout"])
    for index in range(20):
        differs = (alone[2, index][0] != with_cutout[2, index][0]).any(0)
        assert differs.sum() <= 64


def test_corruptions_reach_a_third_of_the_images_and_stay_small():
    pictures, draws = np.tile(CIFAR10().data, (2, 1, 1, 1)), np.random.default_rng(0).random((2 * TRAIN_COUNT, NUMBERS))
    spoilt = train_transform(["corrupt"])(images=pictures, draws=draws)["images"]
    difference = np.abs(spoilt.astype(float) - pictures).mean((1, 2, 3))
    assert 0.23 < (difference > 0).mean() < 0.43
    assert difference.max() < 40


def test_jpeg_takes_red_for_red():
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[:, 8:, 0] = picture[:, 20:, 2] = 255
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=30)
    ours, theirs = (one(quality_range=(30, 30), p=1)(image=picture)["image"] for one in (JPEG, A.ImageCompression))
    wrong, wrong_with_blue = (np.abs(spoilt - np.asarray(Image.open(file), float)).mean() for spoilt in (ours, theirs))
    assert wrong < 1 < wrong_with_blue


def test_flips_alternate_so_that_two_epochs_show_both_sides():
    dataset = CIFAR10(augment=["flip"], seed=3)
    plain = CIFAR10()
    mirrored = []
    for i in range(TRAIN_COUNT):
        sides = [torch.equal(dataset[epoch, i][0], plain[i][0]) for epoch in range(4)]
        assert sides in ([True, False] * 2, [False, True] * 2)
        mirrored.append(sides[1])
    assert 0.35 * TRAIN_COUNT < sum(mirrored) < 0.65 * TRAIN_COUNT


PICTURES, DRAWS = np.zeros((2, 32, 32, 3), np.uint8), np.zeros((2, NUMBERS))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: CIFAR10(augment=["blur"]), "crop, flip, affine, trivial, cutout, corrupt"),
        (lambda: CIFAR10(augment="crop"), "crop, flip, affine, trivial, cutout, corrupt"),
        (lambda: CIFAR10(padding=32), "padding must be from 0 to 31, got 32"),
        (lambda: train_transform()(images=PICTURES, draws=DRAWS, label=3), "label"),
        (lambda: eval_transform()(images=PICTURES, label=3), "label"),
        (lambda: train_transform()(images=PICTURES, draws=DRAWS[:1]), r"give CIFAR10\(augment"),
        (lambda: train_transform()(image=PICTURES[0], draws=DRAWS), r"give CIFAR10\(augment"),
    ],
)
def test_what_albumentations_would_pass_by_is_refused(call, sentence):
    assert len(train_transform()(images=PICTURES, draws=DRAWS)["images"]) == 2
    with pytest.raises(ValueError, match=sentence):
        call()


@pytest.mark.parametrize("side", [1, 5, 16])
def test_small_images_are_reflected_as_numpy_does(side):
    images = np.random.default_rng(0).integers(0, 256, (20, side, side, 3), np.uint8)
    draws = np.random.default_rng(1).random((20, 2))
    padded = np.pad(images, ((0, 0), (20, 20), (20, 20), (0, 0)), mode="reflect")
    corners = (draws * 41).astype(int)
    expected = [image[y : y + side, x : x + side] for image, (y, x) in zip(padded, corners, strict=True)]
    np.testing.assert_array_equal(crop(torch.tensor(images), torch.tensor(draws), 20).numpy(), np.stack(expected))


def test_normalisation_is_that_of_albumentations_bit_for_bit():
    images = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, 16, 16, 3)
    ours = normalize(torch.from_numpy(images), torch.tensor(MEAN), torch.tensor(STD))
    assert torch.equal(ours, eval_transform()(images=images)["images"])
