"""The Dataset and its loaders: the right pictures, reproducible and different augmentation, clear refusals."""

import numpy as np
import pytest
import torch
from conftest import TEST_COUNT, TRAIN_COUNT
from torch.utils.data import DataLoader
from torchvision import datasets

from dataset import AUGMENTATIONS, CIFAR10, CLASSES, MEAN, STD, make_loader
from machinery.data.cifar10 import SYNTHETIC_COUNTS
from machinery.data.sampler import EpochSampler


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


def test_items_and_batches_are_the_same():
    dataset = CIFAR10(augment=AUGMENTATIONS)
    keys = [(3, 5), (1, 7), (0, 7), (4, 199)]
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
    first = dataset[0, 0][0]
    np.random.seed(5)
    torch.testing.assert_close(dataset[0, 0][0], first, rtol=0, atol=0)
    assert torch.equal(state, torch.get_rng_state())


def test_unknown_data_is_refused():
    with pytest.raises(ValueError, match="'synthetic'"):
        CIFAR10(data="imagenet")


def test_synthetic_images_have_the_shapes_of_cifar10_and_cannot_pass_for_it(monkeypatch):
    assert SYNTHETIC_COUNTS == {True: 6_000, False: 1_000}
    monkeypatch.setitem(SYNTHETIC_COUNTS, True, 2000)
    dataset = CIFAR10(data="synthetic")
    assert dataset.images.shape == (2000, 32, 32, 3)
    assert dataset.images.dtype == torch.uint8
    assert dataset.labels.bincount().tolist() == [200] * 10
    assert all("synthetic" in name for name in dataset.classes)
    assert len(CIFAR10(train=False, data="synthetic")) == 1_000


def test_a_subset_has_its_own_images_and_augmentation():
    whole = CIFAR10(augment=AUGMENTATIONS)
    part = whole.subset([5, 3])
    assert len(part) == 2
    assert torch.equal(part.images, whole.images[[5, 3]])
    assert part.augment == ()
    assert whole.augment == AUGMENTATIONS
    part = whole.subset([5, 3], AUGMENTATIONS)
    assert torch.equal(part[1, 0][0], whole[1, 5][0])
