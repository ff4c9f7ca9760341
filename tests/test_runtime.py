"""Device, precision and layout are chosen well, also for hardware that is not here."""

import pytest
import torch
from torch import nn

from machinery.device import describe_hardware, runtime_of, training_mode
from model import Net
from train import choose_runtime


@pytest.mark.parametrize(
    ("card", "native", "capability", "precision"),
    [
        ("H100", True, (9, 0), "bf16"),
        ("T4", False, (7, 5), "fp16"),
        ("GTX 1080", False, (6, 1), "fp32"),
        ("NVIDIA GeForce GTX 1650", False, (7, 5), "fp32"),
    ],
)
def test_a_gpu_gets_the_fastest_precision_that_it_has(monkeypatch, card, native, capability, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: card)
    assert str(choose_runtime()) == f"cuda, {precision}, channels_last"
    assert choose_runtime(precision="fp16").precision == "fp16"


def test_apple_gets_what_works_there_in_every_release(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert str(choose_runtime()) == "mps, fp32, contiguous"
    assert str(choose_runtime("mps", "bf16", "channels_last")) == "mps, bf16, channels_last"


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [({"amx_bf16": True}, "bf16"), ({"avx512_bf16": True}, "bf16"), ({"avx2": True}, "fp32"), (None, "fp32")],
)
def test_a_cpu_gets_bf16_if_it_has_it_and_fp32_if_an_older_pytorch_cannot_tell(monkeypatch, capabilities, precision):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    if capabilities is not None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert choose_runtime("cpu").precision == precision
    assert f"{torch.get_num_threads()} threads" in describe_hardware()


def test_the_layout_is_that_of_the_filters():
    assert runtime_of(Net()).channels_last
    assert not runtime_of(nn.Conv2d(3, 8, 3)).channels_last
    assert runtime_of(nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)).channels_last


def test_batchnorm_without_parameters_of_its_own_is_no_frozen_layer():
    net = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3).requires_grad_(False), nn.BatchNorm2d(3))
    training_mode(net)
    assert [layer.training for layer in net] == [True, False, True]
