"""CUDA graphs, tried without a GPU: what a step reads on the host, and what a replay repeats.

FakeTensorMode raises wherever a value of a "cuda" tensor is read on the host, which a capture forbids. And a graph is
emulated by a recording of ATen calls, whose replay reads tensors anew and repeats Python values, as a CUDA graph does.
"""

import contextlib
from unittest import mock

import pytest
import torch
from small_runs import few_images, plain, small_network, weights
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from machinery import device, optim
from machinery.device import Runtime, graphs_fit
from model import Net
from train import SettingError, fit, recipe_optimizer, train_one_epoch, training_step

CUDA = Runtime(torch.device("cuda"), "bf16", channels_last=True)


class EmulatedGraph:
    def __init__(self) -> None:
        self.calls: list[tuple] = []

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, results in self.calls:
            again = function(*args, **kwargs)
            for held, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(held, Tensor) and held.data_ptr() != new.data_ptr():
                    held.copy_(new)


class Recording(TorchDispatchMode):
    """Notes every call; what it changed in place is put back at the end, for a capture changes nothing."""

    def __init__(self, graph: EmulatedGraph) -> None:
        super().__init__()
        self.calls, self.met = graph.calls, list[tuple[Tensor, Tensor]]()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.met += [(tensor, tensor.clone()) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor, before in reversed(self.met):
            if not torch.equal(tensor, before):
                tensor.detach().copy_(before)


@pytest.fixture
def graphs(monkeypatch) -> list[EmulatedGraph]:
    """Those that were made, on the CPU, which `fit` takes for a CUDA device where it decides about graphs."""
    made: list[EmulatedGraph] = []

    def capture(graph: EmulatedGraph, pool: object, capture_error_mode: str) -> Recording:
        assert capture_error_mode == "thread_local"
        made.append(graph)
        return Recording(graph)

    for name, fake in {
        "CUDAGraph": EmulatedGraph,
        "graph": capture,
        "graph_pool_handle": mock.Mock(),
        "device": lambda place: contextlib.nullcontext(),
        "Stream": mock.Mock(return_value=mock.Mock()),
        "stream": contextlib.nullcontext,
        "current_stream": mock.Mock(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(device, "EAGER_STEPS", 1)
    decide, adam = device.graphs_fit, optim.adam
    monkeypatch.setattr(device, "graphs_fit", lambda wish, _, *known, **more: decide(wish, CUDA, *known, **more))
    # the kind of CUDA devices, of which the others would read rates and step counts on the host
    monkeypatch.setattr(optim, "adam", lambda *given, **more: adam(*given, **more | {"foreach": False, "fused": True}))
    return made


def test_a_step_of_the_recipe_reads_nothing_on_the_host(monkeypatch):
    monkeypatch.setattr(optim, "fastest_precision", lambda kind: "bf16")
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, **layout: module)  # of which fake tensors know nothing
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        net = Net()
        optimizer = recipe_optimizer(net)
        for group in optimizer.param_groups:
            group["lr"] = torch.empty(())
        # Autograd's engine would ask for a driver, and this kernel knows no fake tensors; neither reads on the host.
        monkeypatch.setattr(torch, "_fused_adam_", lambda *given, **more: None)
        monkeypatch.setattr(
            Tensor, "backward", lambda loss: [setattr(p, "grad", torch.empty_like(p)) for p in net.parameters()]
        )
        step = training_step(net, optimizer, CUDA, label_smoothing=0.2)
        for labels in (torch.zeros(8, dtype=torch.int64), torch.empty(8, 10)):
            sums, losses = step(torch.empty(8, 3, 32, 32), labels)
        assert (sums.device.type, losses.shape) == ("cuda", (8,))
        with pytest.raises(Exception, match="_local_scalar_dense"):
            sums.sum().item()


class SmallNet(nn.Sequential):
    """As large as the recipe needs it to have filters, biases and gains."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 5), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(*layers, nn.Linear(8, 10))


def test_replayed_steps_are_those_of_eager_training(graphs, monkeypatch):
    """Over a whole schedule, with a smaller last batch, CutMix and label smoothing."""
    monkeypatch.setattr(train, "Net", SmallNet)  # the type that is known
    settings = {"epochs": 6, "batch_size": 12, "cutmix": 0.5}
    eager, replayed = SmallNet(), SmallNet()
    history = fit(plain(name="eager", graphs="off", **settings), eager, **few_images())
    assert not graphs
    again = fit(plain(name="replayed", **settings), replayed, **few_images())
    assert len(graphs) == 4  # 12 and 4 images, with labels and with shares of labels
    torch.testing.assert_close(weights(replayed), weights(eager), rtol=1e-4, atol=1e-5)
    assert again["lr"] == pytest.approx(history["lr"])
    assert again["train_loss"] == pytest.approx(history["train_loss"], rel=1e-4)


@pytest.mark.usefixtures("graphs")
def test_the_next_replay_does_not_overwrite_what_a_step_returned():
    captured, batches = device.Captured(lambda images: (images.sum(), images * 2)), torch.randn(5, 4)
    results = [captured(batch) for batch in batches]
    for batch, (total, doubled) in zip(batches, results, strict=True):
        torch.testing.assert_close((total, doubled), (batch.sum(), batch * 2))
    assert torch.cuda.Stream.call_count == 1  # for each keeps the memory that it has freed


OPTIMIZERS = ("SGD", "Adam", "AdamW", "RMSprop", "NAdam", "RAdam", "Adagrad", "Adadelta", "Adamax", "ASGD")
SCHEDULERS = (
    lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 4),
    lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=4, cycle_momentum=False),
    lambda optimizer: lr_scheduler.StepLR(optimizer, 2),
    lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 4),
)


@pytest.mark.parametrize("place", range(len(OPTIMIZERS)))
def test_an_optimizer_of_ones_own_steps_eagerly_at_the_rates_of_its_scheduler(graphs, monkeypatch, place):
    monkeypatch.setattr(train, "Net", SmallNet)
    make, schedule = getattr(torch.optim, OPTIMIZERS[place]), SCHEDULERS[place % len(SCHEDULERS)]
    model, twin = SmallNet(), SmallNet()
    own, other = (make(net.parameters(), lr=0.01) for net in (model, twin))
    scheduler, same = schedule(own), schedule(other)
    sets = few_images(8)
    history = fit(plain(epochs=4, batch_size=8), model, optimizer=own, scheduler=scheduler, **sets)
    rates = []
    for _ in range(4):
        rates.append(other.param_groups[0]["lr"])
        other.step()
        same.step()
    assert history["lr"] == rates
    assert all(isinstance(group["lr"], float) for group in own.param_groups)
    assert not graphs


def test_only_known_steps_are_captured(graphs, monkeypatch):
    monkeypatch.setattr(train, "Net", SmallNet)
    sets, settings = few_images(), {"epochs": 3, "batch_size": 8}
    fit(plain(name="other network", **settings), small_network(), **sets)
    fit(plain(name="callback", **settings), SmallNet(), on_epoch=lambda row: None, **sets)
    model = small_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    train_one_epoch(model, [(torch.randn(4, 3, 32, 32), torch.arange(4))] * 5, optimizer)
    assert not graphs
    with pytest.raises(SettingError, match="graphs: they need a CUDA device"):
        fit(plain(name="on", graphs="on", **settings), model, optimizer=optimizer, **sets)
    fit(plain(name="on", graphs="on", **settings), small_network(), **sets)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    "runtime", [CUDA, Runtime(torch.device("cuda"), "fp16", True), Runtime(torch.device("cpu"), "bf16", True)]
)
def test_graphs_need_cuda_and_no_scale_that_is_read(runtime):
    assert graphs_fit("auto", runtime, True, is_known=True) == (runtime is CUDA)
