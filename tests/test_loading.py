"""Loaders: batches made here or by workers are the same; what Datasets give is checked, and refused by name."""

import copy
import itertools
import multiprocessing
import os
import random

import albumentations as A
import numpy as np
import pytest
import torch
from small_runs import few_images
from torch.utils.data import Dataset, Subset, TensorDataset

from dataset import CIFAR10, Images, make_loader, make_loaders
from machinery.data.augment import EpochSampler
from machinery.data.folder import LoadedFolder
from machinery.data.loader import DeviceLoader, ItemError, WorkerLoader, check_sets, end_workers
from machinery.errors import SettingError
from train import Config

CPU = torch.device("cpu")


class Own(Dataset):
    """Of the user, with one item unlike the others."""

    def __init__(self, odd=None, length=20) -> None:
        self.items = [(torch.randn(3, 32, 32), k % 2) for k in range(length)]
        if odd:
            self.items[11] = odd[0]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def images_of(loader) -> torch.Tensor:
    return torch.cat([images for images, _ in loader])


@pytest.mark.parametrize("augment", [(), ("flip", "cutout"), ("crop", "flip", "cutout")])
def test_batches_are_what_the_set_gives_item_by_item(augment):
    dataset = CIFAR10(augment=augment, seed=3, padding=3).subset(range(1, 200, 2))
    loader = make_loader(dataset, 32, train=True, workers=1)
    assert isinstance(loader, DeviceLoader)
    loader.sampler.epoch = 2
    images, labels = map(torch.cat, zip(*loader, strict=True))
    items = [dataset[2, index] for index in EpochSampler(len(dataset), 3).order(2)]
    assert torch.equal(images, torch.stack([image for image, _ in items]))
    assert labels.tolist() == [label for _, label in items]
    assert next(iter(loader))[0].is_contiguous(memory_format=torch.channels_last)
    loader.sampler.start = len(dataset)  # of a run that was stopped after the last batch of an epoch
    assert not list(loader)


def test_processes_share_each_batch():
    dataset = CIFAR10().subset(range(100))
    parts = [DeviceLoader(dataset, 10, EpochSampler(100, 0, rank, 2), CPU) for rank in range(2)]
    whole = DeviceLoader(dataset, 20, EpochSampler(100), CPU)
    for (_, labels), (_, even), (_, odd) in zip(whole, *parts, strict=True):
        assert labels.tolist() == list(itertools.chain(*zip(even.tolist(), odd.tolist(), strict=True)))


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (4, 3), (64, 16)])
@pytest.mark.parametrize("known", [True, False])
def test_what_a_gpu_cannot_draw_comes_from_a_worker_for_each_core_but_one(monkeypatch, cores, workers, known):
    if known:
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    else:  # as on macOS and Windows
        monkeypatch.delattr(os, "sched_getaffinity")
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))  # no room for the test images either
    sets = few_images()
    sets["train_set"].augment = ("trivial",)
    train_loader, test_loader = make_loaders(Config(batch_size=4), torch.device("cuda"), **sets)
    assert (train_loader.num_workers, train_loader.pin_memory) == (workers, True)
    assert isinstance(test_loader, WorkerLoader)
    here, _ = make_loaders(Config(batch_size=4), CPU, **sets)
    assert (here.num_workers, here.pin_memory) == (1, False)


def test_in_a_process_that_may_have_none_there_are_no_workers(monkeypatch):
    monkeypatch.setattr(type(multiprocessing.current_process()), "daemon", True)
    assert make_loader(CIFAR10(augment=["affine"]), 50, train=True, workers=2).num_workers == 0


def test_a_subclass_is_read_through_its_own_reading():
    class Dark(CIFAR10):
        def __getitem__(self, key):
            image, label = super().__getitem__(key)
            return image * 0 + torch.rand(()), label

    dataset = Dark(augment=("crop",))
    for loader in (make_loader(dataset, 50, train=True, seed=1), torch.utils.data.DataLoader(dataset, 50)):
        assert all(image.unique().numel() == 1 for image in next(iter(loader))[0])
    here, there = (images_of(make_loader(dataset, 50, train=True, workers=k, seed=1)) for k in (0, 1))
    assert torch.equal(here, there)


IMAGE = torch.zeros(3, 32, 32)
ODD = {
    "None": (None,),
    "label alone": (3,),
    "uint8": ((IMAGE.byte(), 0),),
    "array": ((IMAGE.numpy(), 0),),
    "grey": ((IMAGE[:1], 0),),
    "no label": ((IMAGE, None),),
    "float label": ((IMAGE, 1.0),),
    "row of labels": ((IMAGE, torch.tensor([0, 1])),),
    "label below": ((IMAGE, -1),),
    "label beyond": ((IMAGE, 7),),
}


@pytest.mark.parametrize(("odd", "workers"), [*((odd, 0) for odd in ODD), ("None", 1), ("label beyond", 1)])
def test_an_odd_item_is_refused_by_the_name_of_the_set_and_its_index(odd, workers):
    loader = make_loader(Own(ODD[odd]), 10, train=True, workers=workers, name="train_set")
    loader.set_outputs(2)
    with pytest.raises(ItemError, match=r"^train_set\[11\]: [^\n]*$"):
        list(loader)
    end_workers(loader)


def test_labels_are_what_the_items_say():
    dataset = Own()
    dataset.targets, dataset.labels = [9] * 20, torch.full((20,), 9)
    loader = make_loader(dataset, 10, train=False)
    loader.set_outputs(2)
    assert torch.cat([labels for _, labels in loader]).tolist() == [0, 1] * 10
    with pytest.raises(ItemError, match=r"train_set\[\d+\]: the label is 9, but the network has 9 outputs"):
        make_loader(CIFAR10(), 10, train=True, name="train_set").set_outputs(9)


PIPE = A.Compose([A.RandomBrightnessContrast(p=1), A.Normalize(), A.ToTensorV2()])


class Inside(Own):
    def __init__(self, mended=False) -> None:
        super().__init__()
        self.hidden = {"train": copy.deepcopy(PIPE)}
        self.picture, self.mended = CIFAR10().data[0], mended

    def __getitem__(self, index):
        if self.mended:
            self.hidden["train"].set_random_seed(int(torch.randint(2**31, ())))
        return self.hidden["train"](image=self.picture)["image"], 0


def test_draws_that_do_not_follow_the_seed_are_named_and_the_line_mends_them(capsys):
    make_loader(Inside(), 5, train=True)
    make_loader(CIFAR10(transform=lambda image: PIPE(image=image)["image"]), 5, train=True)
    assert capsys.readouterr().out.count("do not follow the seed") == 2
    here, there = (images_of(make_loader(Inside(True), 5, train=True, workers=k, seed=1)) for k in (0, 1))
    assert torch.equal(here, there)
    assert len({image.numpy().tobytes() for image in here}) == 20
    make_loader(CIFAR10(transform=PIPE), 5, train=True)
    assert not capsys.readouterr().out


def test_the_seed_of_the_run_reaches_own_sets_and_another_is_refused():
    def first(of_run, **options):
        sets = CIFAR10(augment=("crop",), **options), CIFAR10(train=False)
        loader, _ = make_loaders(Config(seed=of_run, batch_size=50), None, *sets)
        assert sets[0].seed == options.get("seed")
        return next(iter(loader))[0]

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
    assert torch.equal(first(1), next(iter(make_loaders(Config(seed=1, batch_size=50, augment=("crop",)))[0]))[0])
    assert torch.equal(first(1), first(1, seed=1))
    with pytest.raises(SettingError, match="seed=3"):
        first(1, seed=3)
    with pytest.raises(SettingError, match="seed=3"):
        make_loader(Subset(CIFAR10(seed=3), range(50)), 5, train=True, seed=1)


@pytest.mark.parametrize("given", [{"train_set": CIFAR10}, {"test_set": CIFAR10}])
def test_a_set_of_ones_own_needs_the_other(given):
    with pytest.raises(SettingError, match=r"full\.subset\(order\[n:\]\), full\.subset\(order\[:n\], augment=\(\)\)"):
        make_loaders(Config(batch_size=50, holdout=10), **{name: make() for name, make in given.items()})


@pytest.mark.parametrize(
    ("settings", "train_set"),
    [
        ({"holdout": 10}, {}),
        ({"size": 64}, {}),
        ({"size": 64}, None),
        ({"augment": ("flip",)}, {"augment": ("crop",)}),
        ({"padding": 2}, {"augment": ("crop",)}),
        ({"data": "synthetic"}, {}),
        ({"batch_size": 201}, {}),
    ],
)
def test_settings_that_contradict_the_sets_are_refused(settings, train_set):
    sets = () if train_set is None else (CIFAR10(**train_set), CIFAR10(train=False))
    with pytest.raises(SettingError, match=next(iter(settings))):
        make_loaders(Config(**{"batch_size": 50, **settings}), None, *sets)


def test_settings_that_are_defaults_contradict_nothing():
    sets = CIFAR10(augment=("flip",), padding=2), CIFAR10(train=False)
    make_loaders(Config(batch_size=50), None, *sets)
    make_loaders(Config(batch_size=50, augment=("flip",), padding=2), None, *sets)


@pytest.mark.parametrize("augment", [("flip",), ("affine",)])
def test_what_happens_to_images_cannot_be_set_once_a_loader_was_made(augment):
    dataset = CIFAR10().subset(range(40))
    dataset.augment = augment
    loader = make_loader(Subset(dataset, range(20)) if augment == ("affine",) else dataset, 20, train=True)
    for name, value in (("augment", ()), ("transform", np.copy)):
        with pytest.raises(SettingError, match="once a loader was made"):
            setattr(dataset, name, value)
    assert dataset.augment == augment
    assert len(list(loader)) == len(loader)
    dataset.subset(range(40)).augment = ()


def test_what_cannot_be_sent_to_spawned_workers_is_refused_with_what_to_do():
    loader = make_loader(CIFAR10(transform=lambda image: image[::-1]), 50, train=True, workers=1, name="train_set")
    loader.multiprocessing_context = "spawn"
    with pytest.raises(SettingError, match=r"train_set cannot be sent.* workers = 0"):
        list(loader)


def tensors(scale: float, shift: float, count: int = 30) -> TensorDataset:
    images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))
    return TensorDataset(images * scale + shift, torch.zeros(count).long())


@pytest.mark.parametrize(
    ("train", "test", "alike"),
    [
        ((4, -2), (4.5, -2), True),
        ((1, 0), (255, 0), False),
        ((1, 0), (4, -2), False),
        ((2, -1), (1, 0), True),
        ((1, 0), (1, 3), False),
    ],
)
def test_sets_that_are_not_normalised_alike_are_refused(train, test, alike):
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    if alike:
        check_sets(tensors(*train), tensors(*test, count=3))
    else:
        with pytest.raises(SettingError, match="not normalised alike"):
            check_sets(tensors(*train), tensors(*test, count=3))
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_a_transform_that_does_nothing_is_named():
    lines = []
    check_sets(CIFAR10(transform=np.copy), CIFAR10(train=False, transform=A.HorizontalFlip(p=0.5)), lines.append)
    assert [line.partition(":")[0] for line in lines] == ["train_set"]


def test_a_folder_gives_sets_with_the_split_as_it_was_used(monkeypatch):
    def read(folder, size, share, seed, warn):
        asked.append((share, seed))
        images, labels = np.random.default_rng(0).integers(0, 256, (20, size, size, 3), np.uint8), np.arange(20) % 2
        return LoadedFolder(images[:15], labels[:15], images[15:], labels[15:], ("a", "b"), True)

    asked = []
    monkeypatch.setattr("machinery.data.folder.load_image_folder", read)
    config = Config(data=".", batch_size=5, size=20, seed=4)
    train_loader, test_loader = make_loaders(config)
    assert test_loader.dataset.split == (0.2, 4)
    assert (train_loader.dataset.source, train_loader.dataset.split) == (config.data, None)
    assert isinstance(train_loader.dataset, Images)
    assert make_loaders(config, known={"split": (0.3, 1)})[1].dataset.split == (0.3, 1)
    assert asked == [(0.2, 4), (0.3, 1)]
