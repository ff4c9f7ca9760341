"""Device, precision and layout are chosen well, also for hardware that is not here; graphs keep what they returned."""

import contextlib
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from machinery import device
from machinery.device import Captured, describe_hardware, runtime_of, training_mode
from model import Net
from train import choose_runtime


@pytest.mark.parametrize(
    ("card", "native", "capability", "precision"),
    [("H100", True, (9, 0), "bf16"), ("T4", False, (7, 5), "fp16"), ("GTX 1080", False, (6, 1), "fp32")],
)
def test_a_gpu_gets_the_fastest_precision_that_it_has(monkeypatch, card, native, capability, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
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


class FakeGraph:
    """Runs a function on what a graph holds, into the memory of what it returned before, as a CUDA graph does."""

    def __init__(self, function, static: tuple[Tensor, ...], results: tuple[Tensor, ...]) -> None:
        self.function, self.static, self.results = function, static, results

    def replay(self) -> None:
        for held, result in zip(self.results, self.function(*self.static), strict=True):
            held.copy_(result)


def test_what_a_replayed_step_returned_is_not_overwritten_by_the_next(monkeypatch):
    def step(images: Tensor) -> tuple[Tensor, Tensor]:
        return images.sum(), images * 2

    monkeypatch.setattr(device, "EAGER_STEPS", 0)
    captured, static = Captured(step), (torch.zeros(4),)
    results = step(*static)
    captured.graphs[((torch.Size([4]), torch.float32),)] = FakeGraph(step, static, results), static, results
    batches = [torch.full((4,), float(k)) for k in range(5)]
    for batch, (total, doubled) in zip(batches, [captured(batch) for batch in batches], strict=True):
        assert (total, doubled.tolist()) == (batch.sum(), (2 * batch).tolist())


def test_the_steps_before_a_graph_share_one_stream_so_that_each_finds_the_memory_of_the_last(monkeypatch):
    stream, streams = mock.Mock(), mock.MagicMock()
    monkeypatch.setattr(torch.cuda, "Stream", lambda: streams() and stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", mock.Mock())
    captured = Captured(lambda images: (2 * images,))
    assert [captured(torch.tensor(k))[0].item() for k in range(device.EAGER_STEPS)] == [0, 2, 4]
    assert (streams.call_count, stream.wait_stream.call_count) == (1, device.EAGER_STEPS)


def test_the_layout_is_that_of_the_filters():
    assert runtime_of(Net()).channels_last
    assert not runtime_of(nn.Conv2d(3, 8, 3)).channels_last
    assert runtime_of(nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)).channels_last


def test_batchnorm_without_parameters_of_its_own_is_no_frozen_layer():
    net = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3).requires_grad_(False), nn.BatchNorm2d(3))
    training_mode(net)
    assert [layer.training for layer in net] == [True, False, True]
