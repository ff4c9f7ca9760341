"""Batches made on the device are those of the workers; tried on CPU tensors."""

import itertools

import pytest
import torch

from dataset import CIFAR10, denormalize, make_loader
from machinery.loading import DeviceLoader
from machinery.sampling import EpochSampler


@pytest.mark.parametrize("augment", [(), ("crop",), ("flip", "cutout"), ("crop", "flip", "cutout")])
def test_batches_are_those_of_the_host_bit_for_bit(augment):
    dataset = CIFAR10(train=True, augment=augment, data="synthetic", seed=3, padding=3).subset(
        range(1, 900, 2), augment
    )
    host = make_loader(dataset, 128, train=True)
    sampler = EpochSampler(len(dataset), dataset.seed)
    device = DeviceLoader(dataset, 128, sampler, torch.device("cpu"))
    for loader in (host, device):
        loader.sampler.epoch = 2
    assert len(host) == len(device)
    for _ in range(2):  # epochs
        for (images, labels), (others, other_labels) in itertools.zip_longest(host, device):
            assert torch.equal(labels, other_labels)
            assert (denormalize(images) == denormalize(others)).all()
            torch.testing.assert_close(images, others, rtol=0, atol=1e-6)
            assert others.is_contiguous(memory_format=torch.channels_last)


def test_processes_share_each_batch():
    dataset = CIFAR10(train=True, data="synthetic").subset(range(100))
    parts = [DeviceLoader(dataset, 20, EpochSampler(100, 0, rank, 2), torch.device("cpu")) for rank in range(2)]
    whole = DeviceLoader(dataset, 20, EpochSampler(100), torch.device("cpu"))
    for (_, labels), (_, even), (_, odd) in zip(whole, *parts, strict=True):
        assert labels.tolist() == list(itertools.chain(*zip(even.tolist(), odd.tolist(), strict=True)))
