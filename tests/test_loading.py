"""Batches made on the device are those of the workers; tried on CPU tensors."""

import itertools
import os

import pytest
import torch
from small_runs import few_images

from dataset import CIFAR10, denormalize, make_loader, make_loaders
from machinery.data.loader import DeviceLoader
from machinery.data.sampler import EpochSampler
from train import Config


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


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (4, 3), (64, 16)])
def test_what_a_gpu_cannot_draw_itself_comes_from_a_worker_for_each_core_but_one(monkeypatch, cores, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    sets = few_images()
    assert DeviceLoader.can_draw(sets["train_set"])
    sets["train_set"].augment = ("trivial",)
    assert not DeviceLoader.can_draw(sets["train_set"])
    train_loader, _ = make_loaders(Config(batch_size=4), torch.device("cuda"), **sets)
    assert (train_loader.num_workers, train_loader.pin_memory) == (workers, True)
    assert make_loaders(Config(batch_size=4), torch.device("cpu"), **sets)[0].num_workers == 1
