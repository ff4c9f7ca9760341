"""What happens to an image: each augmentation does what it says, on draws of its own, and refuses the rest."""

import io
import random

import albumentations as A
import numpy as np
import pytest
import torch
from conftest import TRAIN_COUNT
from PIL import Image

from dataset import AUGMENTATIONS, CIFAR10, MEAN, denormalize, eval_transform, make_loaders, train_transform
from machinery.data.augment import JPEG, Trivial
from machinery.data.sampler import DRAWN_FOR
from train import Config


def test_denormalize_gives_the_picture_back():
    dataset = CIFAR10(train=False)
    images = torch.stack([dataset[i][0] for i in range(10)])
    np.testing.assert_array_equal(denormalize(images), dataset.images[:10].numpy())


def test_each_augmentation_does_what_it_says():
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    given = {"images": np.stack([picture] * 60), "draws": rng.random((60, len(DRAWN_FOR)))}
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
    draws = np.random.default_rng(1).random((400, len(DRAWN_FOR)))
    changed = train_transform(["trivial"])(images=pictures, draws=draws)["images"]
    assert 0.4 < (changed != pictures).any((1, 2, 3)).mean() < 0.6
    ways = Trivial().transform.transforms
    assert len(ways) == 13
    outcomes = []
    for way in ways:
        way.set_random_state(np.random.default_rng(0), random.Random(0))
        outcomes.append(np.stack([way(image=picture)["image"].astype(float) for picture in pictures[:20]]))
    for i, outcome in enumerate(outcomes):
        assert all(np.abs(outcome - other).mean() > 1 for other in [*outcomes[:i], pictures[:20]]), ways[i]


@pytest.mark.parametrize("padding", [0, 2, 4])
def test_crops_are_drawn_from_corner_to_corner(padding):
    picture = np.arange(32 * 32 * 3, dtype=np.uint32).reshape(1, 32, 32, 3).astype(np.uint8)
    almost = 1 - 2**-53
    draws = np.array([[0.0] * len(DRAWN_FOR), [almost] * len(DRAWN_FOR)])
    first, last = train_transform(["crop"], padding)(images=np.repeat(picture, 2, 0), draws=draws)["images"]
    padded = np.pad(picture[0], ((padding, padding), (padding, padding), (0, 0)), mode="reflect")
    np.testing.assert_array_equal(first, padded[:32, :32])
    np.testing.assert_array_equal(last, padded[2 * padding :, 2 * padding :])


def test_the_data_and_its_parts_crop_as_the_settings_say():
    whole = make_loaders(Config(batch_size=50, augment="crop", padding=0))[0].dataset
    part = make_loaders(Config(batch_size=50, augment="crop", padding=0, holdout=50))[0].dataset
    for dataset in (whole, part):
        assert torch.equal(dataset[0][0], dataset.subset([0])[0][0])  # not moved
    moved = make_loaders(Config(batch_size=50, augment="crop", holdout=50))[0].dataset
    assert any(not torch.equal(moved[i][0], part[i][0]) for i in range(5))


def test_holes_are_drawn_from_corner_to_corner():
    draws = np.array([[0.0] * len(DRAWN_FOR), [1 - 2**-53] * len(DRAWN_FOR)])
    first, last = train_transform(["cutout"])(images=np.zeros((2, 32, 32, 3), np.uint8), draws=draws)["images"]
    assert [first[:8, :8].all(), first.astype(bool).sum()] == [True, 8 * 8 * 3]
    assert [last[24:, 24:].all(), last.astype(bool).sum()] == [True, 8 * 8 * 3]


@pytest.mark.parametrize("name", ["crop", "affine", "trivial"])
def test_what_one_augmentation_draws_does_not_depend_on_the_others(name):
    alone, with_cutout = CIFAR10(augment=[name]), CIFAR10(augment=[name, "cutout"])
    for index in range(20):
        differs = (alone[2, index][0] != with_cutout[2, index][0]).any(0)
        assert differs.sum() <= 64


@pytest.mark.parametrize("padding", [-1, 32])
def test_a_crop_out_of_range_is_refused(padding):
    with pytest.raises(ValueError, match=f"padding must be from 0 to 31, .*got {padding}"):
        CIFAR10(augment=["crop"], padding=padding)


def test_a_transform_refuses_single_images_and_too_few_draws():
    transform = train_transform()
    picture = np.zeros((32, 32, 3), np.uint8)
    with pytest.raises(ValueError, match=r"expected images=.*got.*image \(32, 32, 3\)"):
        transform(image=picture, draws=np.zeros((1, len(DRAWN_FOR))))
    with pytest.raises(ValueError, match=r"got images \(2, 32, 32, 3\), draws \(1, 8\)"):
        transform(images=np.stack([picture, picture]), draws=np.zeros((1, len(DRAWN_FOR))))


def test_corruptions_reach_a_third_of_the_images_and_stay_small():
    pictures = denormalize(torch.stack([CIFAR10()[i % TRAIN_COUNT][0] for i in range(300)]))
    draws = np.random.default_rng(0).random((300, len(DRAWN_FOR)))
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


def test_transforms_survive_albumentations_own_serialisation():
    transform, images = (
        train_transform(AUGMENTATIONS),
        np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8),
    )
    draws = np.random.default_rng(1).random((4, len(DRAWN_FOR)))
    again = A.from_dict(A.to_dict(transform))
    np.testing.assert_array_equal(
        again(images=images, draws=draws)["images"], transform(images=images, draws=draws)["images"]
    )


def test_flips_alternate_so_that_two_epochs_show_both_sides():
    dataset = CIFAR10(augment=["flip"], seed=3)
    plain = CIFAR10()
    mirrored = []
    for i in range(TRAIN_COUNT):
        sides = [torch.equal(dataset[epoch, i][0], plain[i][0]) for epoch in range(4)]
        assert sides in ([True, False] * 2, [False, True] * 2)
        mirrored.append(sides[1])
    assert 0.35 * TRAIN_COUNT < sum(mirrored) < 0.65 * TRAIN_COUNT


def test_transforms_refuse_data_that_albumentations_would_pass_by():
    images = np.zeros((2, 32, 32, 3), np.uint8)
    for transform, data in ((train_transform(), {"draws": np.zeros((2, len(DRAWN_FOR)))}), (eval_transform(), {})):
        assert len(transform(images=images, **data)["images"]) == 2
        with pytest.raises(ValueError, match="label"):
            transform(images=images, label=3, **data)


@pytest.mark.parametrize("augment", [["blur"], "crop"])
def test_unknown_augmentations_are_refused(augment):
    with pytest.raises(ValueError, match="crop, flip, affine, trivial, cutout, corrupt"):
        CIFAR10(augment=augment)


def test_a_transform_called_as_for_single_images_says_what_to_do():
    with pytest.raises(ValueError, match=r"need images=.* got image; for single images, give CIFAR10\(augment"):
        train_transform()(image=np.zeros((32, 32, 3), np.uint8))
