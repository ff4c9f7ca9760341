"""What `gpu.py` times: a training step on a GPU, its layers alone, and the loader."""

import functools
import statistics
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from baselines import airbench94_muon_network
from common import alternate, random_batch, result_of
from step import COLUMNS, operations, table
from torch import Tensor, nn

from machinery.data.loader import DeviceLoader
from machinery.data.sampler import EpochSampler
from machinery.device import Captured
from train import Config, recipe_optimizer, train_one_epoch, training_step

if TYPE_CHECKING:
    from gpu import Bench


def step(bench: "Bench") -> Iterator[dict[str, Any]]:
    """The whole step in several ways, then its layers; each replayed as a graph, but for the step that says so."""
    size, batch_size = bench.size, bench.size.batch_size
    whole, batch, optimizer = step_of(bench, net := bench.net(), batch_size)
    eager, *_ = step_of(bench, bench.net(), batch_size)
    once, _, its_optimizer = step_of(bench, bench.net(), batch_size)
    once(*batch)  # for gradients that stay where a graph finds them
    wide = nn.Sequential(nn.Conv2d(3, 256, 1), nn.Conv2d(256, 256, 3, padding=1, bias=False))
    limit, limit_operations = alone(bench, wide, random_batch(batch_size)[0][:, :, :16, :16])["1"]
    layers = alone(bench, bench.net(), random_batch(batch_size)[0])
    counts = {name: count for name, (_, count) in layers.items()}

    def optimize() -> tuple[()]:
        its_optimizer.step()
        return ()

    candidates: dict[str, Callable[[], Any]] = {
        "limit": limit,
        "the whole step": functools.partial(whole, *batch),
        "without graphs": functools.partial(getattr(eager, "function", eager), *batch),
        "optimizer": Captured(optimize) if bench.on_gpu else optimize,
    }
    peers = {f"airbench94_muon_in_batches_of_{k * batch_size}": k * batch_size for k in (1, 4)}
    for peer, count in peers.items():
        its_step, its_batch, _ = step_of(bench, airbench94_muon_network(), count)
        candidates[peer] = functools.partial(its_step, *its_batch)
    seconds = timed(bench, candidates)
    reached = limit_operations / statistics.median(seconds["limit"])

    def lines(alone: dict[str, list[float]]) -> list[tuple]:
        return table(net, alone, counts, {name: seconds[name] for name in ("optimizer", "the whole step")}, reached)

    notes: dict[str, Any] = {
        "batch_size": batch_size,
        "gflops_of_one_large_convolution": round(reached / 1e9),
        "images_per_second": rate(batch_size, seconds["the whole step"]),
        "images_per_second_without_graphs": rate(batch_size, seconds["without graphs"]),
        **{f"images_per_second_of_{peer}": rate(count, seconds[peer]) for peer, count in peers.items()},
    }
    yield result_of(COLUMNS, lines({}), **notes)
    rows = lines(timed(bench, {name: run for name, (run, _) in layers.items()}))
    yield result_of(COLUMNS, rows, **notes)

    images = bench.images(bench.config(), size.train_set)
    loader = DeviceLoader(images, batch_size, EpochSampler(size.train_set), bench.runtime.device)
    options: dict[str, Any] = {"runtime": bench.runtime, "progress": False, "step": whole}

    def load() -> None:
        for _ in loader:
            pass
        bench.now()

    epochs = alternate({"with": lambda: train_one_epoch(net, loader, optimizer, **options), "alone": load}, 5)
    notes["images_per_second_with_the_loader"] = rate(size.train_set, epochs["with"])
    notes["images_per_second_of_the_loader_alone"] = rate(size.train_set, epochs["alone"])
    yield result_of(COLUMNS, rows, **notes)

    tuned, *_ = step_of(bench, bench.net(), batch_size)
    torch.backends.cudnn.benchmark = True
    try:
        (times,) = timed(bench, {"tuned": functools.partial(tuned, *batch)}).values()
    finally:
        torch.backends.cudnn.benchmark = False
    yield result_of(COLUMNS, rows, **notes, images_per_second_with_cudnn_benchmark=rate(batch_size, times))


def rate(count: int, seconds: list[float]) -> int:
    """How many a second if `count` take so long, at the median."""
    return round(count / statistics.median(seconds))


def step_of(bench: "Bench", net: nn.Module, batch_size: int) -> tuple[Callable[..., Any], tuple[Tensor, Tensor], Any]:
    """A training step, which a GPU replays as a graph; a batch for it; and its optimizer."""
    net.to(bench.runtime.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    images, labels = random_batch(batch_size)
    optimizer = recipe_optimizer(net)
    step = training_step(net, optimizer, bench.runtime, Config().label_smoothing)
    return step, (bench.runtime.place(images), labels.to(bench.runtime.device)), optimizer


def alone(bench: "Bench", net: nn.Module, images: Tensor) -> dict[str, tuple[Callable[[], Any], int]]:
    """Name of each layer -> what runs it forward and backward alone, on the input that it has here; its operations.

    Gradients are made anew, as in the network; where they are added to those of the call before, as `step.py` does, a
    GPU takes a third longer for an activation.
    """
    seen: dict[str, tuple[Callable[[], Any], int]] = {}

    def record(name: str, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        given = inputs[0].detach().requires_grad_(inputs[0].requires_grad)
        leaves = [tensor for tensor in (given, *layer.parameters()) if tensor.requires_grad]
        gradient = torch.randn_like(output)

        def run() -> tuple[()]:
            with bench.runtime.autocast():
                result = layer(given)
            torch.autograd.grad(result, leaves, gradient)
            return ()

        seen[name] = Captured(run) if bench.on_gpu else run, operations(layer, output)

    layers = [(name, layer) for name, layer in net.named_modules() if not list(layer.children())]
    handles = [layer.register_forward_hook(functools.partial(record, name)) for name, layer in layers]
    net.to(bench.runtime.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    with bench.runtime.autocast():
        net(bench.runtime.place(images))
    for handle in handles:
        handle.remove()
    return seen


def timed(bench: "Bench", candidates: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds of each in each round; they take turns."""

    def repeated(run: Callable[[], Any]) -> None:
        for _ in range(bench.size.repeats):
            run()
        bench.now()

    seconds = alternate({name: functools.partial(repeated, run) for name, run in candidates.items()}, bench.size.rounds)
    return {name: [each / bench.size.repeats for each in times] for name, times in seconds.items()}
