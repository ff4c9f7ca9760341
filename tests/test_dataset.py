"""The Dataset and its loaders: the right pictures, reproducible and different augmentation, clear refusals."""

import functools
import threading

import numpy as np
import pytest
import torch
from conftest import TEST_COUNT, TRAIN_COUNT
from torch.utils.data import ConcatDataset, Subset, TensorDataset
from torchvision import datasets

from dataset import AUGMENTATIONS, CIFAR10, CLASSES, MEAN, STD, Images
from machinery.data.augment import EpochSampler
from machinery.data.cifar10 import SYNTHETIC_COUNTS
from machinery.data.images import facts_of
from machinery.errors import SettingError


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


def test_is_a_sequence_with_an_end():
    dataset = CIFAR10(train=False)
    assert len(list(dataset)) == TEST_COUNT
    torch.testing.assert_close(dataset[-1][0], dataset[TEST_COUNT - 1][0])
    with pytest.raises(IndexError):
        dataset[TEST_COUNT]


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


def test_synthetic_images_have_the_shapes_of_cifar10_and_cannot_pass_for_it(monkeypatch):
    assert SYNTHETIC_COUNTS == {True: 2_000, False: 1_000}
    monkeypatch.setitem(SYNTHETIC_COUNTS, True, 2000)
    dataset = CIFAR10(data="synthetic")
    assert dataset.images.shape == (2000, 32, 32, 3)
    assert dataset.images.dtype == torch.uint8
    assert dataset.labels.bincount().tolist() == [200] * 10
    assert all("synthetic" in name for name in dataset.classes)
    assert len(CIFAR10(train=False, data="synthetic")) == 1_000


def test_a_subset_keeps_everything_unless_told_otherwise():
    whole = CIFAR10(augment=("crop", "cutout"), seed=5, padding=2)
    part = whole.subset([5, 3])
    assert (len(part), part.augment, part.seed, part.padding, part.source) == (2, whole.augment, 5, 2, "cifar10")
    assert torch.equal(part[1, 0][0], whole[1, 5][0])
    turned = CIFAR10(transform=lambda image: image[::-1]).subset([5, 3])
    assert torch.equal(turned[0][0], CIFAR10()[5][0].flip(1))
    for plain in (whole.subset([5], augment=()), turned.subset([0], augment=())):
        assert torch.equal(plain[0][0], CIFAR10()[5][0])
    assert whole.augment == ("crop", "cutout")


IMAGES = np.zeros((3, 32, 32, 3), np.uint8)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"images": IMAGES.astype(np.float32)}, "images must be uint8"),
        ({"images": IMAGES.transpose(0, 3, 1, 2)}, "images must be uint8"),
        ({"labels": [0, 1]}, "one for each of the 3 images"),
        ({"labels": [0.0, 1.0, 0.0]}, "labels must be integers"),
        ({"labels": [0, 1, 2]}, "got 2 for image 2"),
        ({"labels": [0, -1, 1]}, "got -1 for image 1"),
        ({"classes": "ab"}, "sequence of strings"),
        ({"mean": (125, 123, 114)}, "scale 0-1"),
        ({"augment": ["flip"], "transform": np.copy}, "augment and transform"),
        ({"transform": "flip"}, "transform must be callable"),
        ({"transform": functools.partial(np.copy, threading.Lock())}, "cannot be copied"),
    ],
)
def test_what_is_no_set_of_images_is_refused_in_a_sentence(change, sentence):
    given = {"images": IMAGES, "labels": [0, 1, 1], "classes": ("a", "b"), **change}
    with pytest.raises(SettingError, match=sentence):
        Images(given.pop("images"), given.pop("labels"), given.pop("classes"), **given)


def test_what_torchvision_names_is_read_only():
    dataset = CIFAR10()
    with pytest.raises(ValueError, match="read-only"):
        dataset.data[0] = 0
    with pytest.raises(TypeError, match="assignment"):
        dataset.targets[0] = 1
    with pytest.raises(AttributeError):
        dataset.data = dataset.data[::-1]


def test_facts_are_those_of_our_own_sets_through_subset_and_concat():
    whole = CIFAR10(augment=("flip",))
    facts = facts_of(whole)
    assert (facts["source"], facts["length"], facts["classes"], facts["size"]) == ("cifar10", TRAIN_COUNT, CLASSES, 32)
    assert (facts["mean"], facts["augment"], facts["items"]) == (list(MEAN), ("flip",), None)
    halves = ConcatDataset([Subset(whole, range(100)), Subset(whole, range(100, TRAIN_COUNT))])
    assert facts_of(halves) == facts
    assert facts_of(Subset(halves, range(TRAIN_COUNT)))["digest"] == facts["digest"]
    assert facts_of(Subset(halves, range(9, 0, -1)))["digest"] == facts_of(whole.subset(range(9, 0, -1)))["digest"]
    assert len({facts["digest"], *(facts_of(whole.subset(range(k, k + 9)))["digest"] for k in range(3))}) == 4
    differ = facts_of(ConcatDataset([whole, CIFAR10(train=False)]))
    assert (differ["augment"], differ["source"]) == (None, "cifar10")


def test_of_float_images_and_of_sets_of_others_no_more_is_known_than_can_be():
    facts = facts_of(CIFAR10(transform=lambda image: torch.zeros(3, 20, 20)))
    assert (facts["size"], facts["mean"], facts["std"]) == (20, None, None)
    assert facts["transform"] == facts_of(CIFAR10(transform=lambda image: torch.zeros(3, 20, 20)))["transform"]
    others = TensorDataset(torch.zeros(4, 3, 8, 8), torch.zeros(4).long())
    others.classes, others.source, others.targets = ["a", "b"], "cifar10", [7]
    facts = facts_of(Subset(others, range(2)))
    assert (facts["length"], facts["classes"], facts["source"], facts["digest"]) == (2, ("a", "b"), "your own", None)
    others.classes = 2
    assert facts_of(others)["classes"] is None


def test_processes_have_equal_shares_and_the_rest_is_drawn_anew_each_epoch():
    samplers = [EpochSampler(11, 3, rank, 4) for rank in range(4)]
    epochs = [[[index for _, index in sampler] for sampler in samplers] for _ in range(4)]
    for epoch, shares in enumerate(epochs):
        assert [len(share) for share in shares] == [2] * 4
        assert {index for share in shares for index in share} == set(samplers[0].order(epoch).tolist())
    assert samplers[0].count(0) == 8 == len(samplers[0].order(0))
    assert len({frozenset(range(11)) - {i for share in shares for i in share} for shares in epochs}) > 1
    samplers[0].note(0, torch.arange(8.0))
