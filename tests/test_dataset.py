"""The Dataset and its loaders: the right pictures, reproducible and different augmentation, clear refusals."""

import random

import albumentations as A
import numpy as np
import pytest
import torch
from conftest import TEST_COUNT, TRAIN_COUNT
from torch.utils.data import DataLoader
from torchvision import datasets

from config import Config
from dataset import CIFAR10, CLASSES, EpochSampler, make_loader
from storage import SYNTHETIC_COUNTS
from train import make_loaders
from transforms import AUGMENTATIONS, DRAWN_FOR, MEAN, STD, Trivial, denormalize, eval_transform, train_transform


def epoch_of(loader: DataLoader) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(loader)
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def training_loader(workers: int, seed: int = 0, **options) -> DataLoader:
    dataset = CIFAR10(train=True, augment=AUGMENTATIONS, seed=seed)
    return make_loader(dataset, batch_size=64, train=True, workers=workers, **options)


def test_holds_what_torchvision_reads(tiny_root):
    reference = datasets.CIFAR10(tiny_root, train=False)
    dataset = CIFAR10(train=False)
    assert len(dataset) == len(reference) == TEST_COUNT
    np.testing.assert_array_equal(dataset.images.numpy(), reference.data)
    assert dataset.labels.tolist() == reference.targets
    assert dataset.classes == CLASSES
    assert " ".join(CLASSES) == "plane car bird cat deer dog frog horse ship truck"


def test_without_augmentation_an_item_is_the_normalised_picture():
    dataset = CIFAR10(train=False)
    image, label = dataset[7]
    expected = (dataset.images[7] / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(image, expected.permute(2, 0, 1))
    assert (image.dtype, image.shape, label) == (torch.float32, (3, 32, 32), int(dataset.labels[7]))


def test_denormalize_gives_the_picture_back():
    dataset = CIFAR10(train=False)
    images = torch.stack([dataset[i][0] for i in range(10)])
    np.testing.assert_array_equal(denormalize(images), dataset.images[:10].numpy())


def test_items_and_batches_are_the_same():
    dataset = CIFAR10(augment=AUGMENTATIONS)
    keys = [(3, 5), 7, (0, 7), (4, 199)]
    for (image, label), key in zip(dataset.__getitems__(keys), keys, strict=True):
        torch.testing.assert_close(image, dataset[key][0], rtol=0, atol=0)
        assert label == dataset[key][1]


def test_is_a_sequence_with_an_end():
    dataset = CIFAR10(train=False)
    assert len(list(dataset)) == TEST_COUNT
    torch.testing.assert_close(dataset[-1][0], dataset[TEST_COUNT - 1][0])
    with pytest.raises(IndexError):
        dataset[TEST_COUNT]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4:UserWarning")
@pytest.mark.parametrize("workers", [2, 4])
def test_augmentation_does_not_depend_on_the_number_of_workers(workers):
    here, there = training_loader(0), training_loader(workers)
    for _ in range(2):
        for a, b in zip(epoch_of(here), epoch_of(there), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_both_kinds_give_the_same(context):
    loader = training_loader(1)
    loader.multiprocessing_context = context
    assert torch.equal(epoch_of(loader)[0], epoch_of(training_loader(0))[0])


def test_epochs_images_and_seeds_do_not_repeat_each_other():
    dataset = CIFAR10(augment=AUGMENTATIONS)
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    dataset.images[:] = torch.from_numpy(noise)  # the same picture everywhere: only the draws differ
    draws = [dataset[epoch, index][0] for epoch in range(5) for index in range(20)]
    dataset.seed = 1
    draws += [dataset[0, index][0] for index in range(20)]
    different = {draw.numpy().tobytes() for draw in draws}
    assert len(different) >= len(draws) - 3  # two may meet by chance


def test_every_epoch_has_every_image_once_in_another_order():
    sampler = EpochSampler(TRAIN_COUNT)
    first, second = list(sampler), list(sampler)
    assert {epoch for epoch, _ in first} == {0}
    assert {epoch for epoch, _ in second} == {1}
    for epoch in (first, second):
        assert sorted(index for _, index in epoch) == list(range(TRAIN_COUNT))
    assert [i for _, i in first] != [i for _, i in second] != list(range(TRAIN_COUNT))
    sampler.epoch = 0
    assert list(sampler) == first


def test_skipping_leaves_out_easy_images_between_the_first_epoch_and_the_last():
    def indices(epoch: int) -> list[int]:
        sampler.epoch = epoch
        length = len(sampler)
        images = [index for _, index in sampler]
        assert length == len(images) == sampler.count(epoch)
        return images

    sampler = EpochSampler(TRAIN_COUNT, skip=0.4, epochs=4)
    losses = torch.rand(TRAIN_COUNT, generator=torch.Generator().manual_seed(0))
    sampler.note(0, losses[sampler.order(0)])
    assert torch.equal(sampler.losses, losses)
    hard = set(losses.argsort()[2 * TRAIN_COUNT // 3 :].tolist())
    first, second, third, last = map(indices, range(4))
    assert sorted(first) == sorted(last) == list(range(TRAIN_COUNT))
    for epoch in (second, third):
        assert len(epoch) == len(set(epoch)) == 0.6 * TRAIN_COUNT
        assert set(epoch) > hard
    assert set(second) != set(third)  # other easy ones each time
    assert indices(1) == second
    sampler.note(1, -losses[second])  # now the images of this epoch are known, the hard ones best
    third = set(indices(2))
    assert len(third - set(second)) > len(set(second) & third)
    assert not third > hard
    plain = EpochSampler(TRAIN_COUNT)
    plain.epoch = 1
    assert second == [index for _, index in plain if index in set(second)]  # the same order, but for the gaps


@pytest.mark.parametrize("options", [{"skip": 0.7, "epochs": 3}, {"skip": -0.1, "epochs": 3}, {"skip": 0.5}])
def test_skipping_out_of_range_or_without_epochs_is_refused(options):
    with pytest.raises(ValueError, match="skip must be from 0"):
        EpochSampler(TRAIN_COUNT, **options)


def test_the_loader_leaves_no_image_out_and_keeps_the_order_of_the_test_set():
    loader = make_loader(CIFAR10(train=False), batch_size=64, train=False)
    images, labels = epoch_of(loader)
    assert [len(labels) for _, labels in loader] == [64, 36]
    assert torch.equal(labels, loader.dataset.labels)
    assert len(images) == TEST_COUNT


def test_global_random_states_are_neither_used_nor_moved():
    dataset = CIFAR10(augment=AUGMENTATIONS)
    state = torch.get_rng_state()
    first = dataset[0][0]
    np.random.seed(5)
    torch.testing.assert_close(dataset[0][0], first, rtol=0, atol=0)
    assert torch.equal(state, torch.get_rng_state())


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
    for name in ("crop", "affine", "trivial", "cutout"):
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
    with pytest.raises(ValueError, match=r"got images \(2, 32, 32, 3\), draws \(1, 7\)"):
        transform(images=np.stack([picture, picture]), draws=np.zeros((1, len(DRAWN_FOR))))


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
    with pytest.raises(ValueError, match="crop, flip, affine, trivial, cutout"):
        CIFAR10(augment=augment)


def test_unknown_data_is_refused():
    with pytest.raises(ValueError, match="'synthetic'"):
        CIFAR10(data="imagenet")


def test_the_stand_in_has_the_shapes_of_cifar10_and_cannot_pass_for_it(monkeypatch):
    assert SYNTHETIC_COUNTS == {True: 50_000, False: 10_000}
    monkeypatch.setitem(SYNTHETIC_COUNTS, True, 2000)
    dataset = CIFAR10(data="synthetic")
    assert dataset.images.shape == (2000, 32, 32, 3)
    assert dataset.images.dtype == torch.uint8
    assert dataset.labels.bincount().tolist() == [200] * 10
    assert all("synthetic" in name for name in dataset.classes)
    assert len(CIFAR10(train=False, data="synthetic")) == 10_000


def test_a_subset_has_its_own_images_and_augmentation():
    whole = CIFAR10(augment=AUGMENTATIONS)
    part = whole.subset([5, 3])
    assert len(part) == 2
    assert torch.equal(part.images, whole.images[[5, 3]])
    assert part.augment is None
    assert whole.augment is not None
    part = whole.subset([5, 3], AUGMENTATIONS)
    assert torch.equal(part[1, 0][0], whole[1, 5][0])
