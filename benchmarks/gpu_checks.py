"""What `gpu.py` checks: that a GPU makes and computes what the CPU does, and repeats itself."""

import contextlib
import dataclasses
import functools
import itertools
import math
import platform
import signal
import subprocess
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from common import result_of
from time_to_accuracy import SHORT_SETTINGS
from torch import nn

from dataset import denormalize, make_loader
from machinery.data.loader import DeviceLoader
from machinery.data.sampler import EpochSampler
from train import StoppedError

if TYPE_CHECKING:
    from gpu import Bench

Outcome = tuple[str, bool | None]  # what was found, and whether that is as it should be; None if it could not be tried
Flags = Callable[[], contextlib.AbstractContextManager]
NEEDS_GPU = "needs a GPU"
NOT_DETERMINISTIC = " does not have a deterministic implementation"  # as PyTorch warns


def checks(bench: "Bench") -> Iterator[dict[str, Any]]:
    """A line for each check, all on the first training images."""
    ways: dict[str, tuple[Flags, bool]] = {"by default": (contextlib.nullcontext, not bench.on_gpu)}
    if bench.on_gpu:  # where only these promise that a run repeats itself
        ways["use_deterministic_algorithms"] = deterministic_algorithms, True
    todo: dict[str, Callable[[], Outcome]] = {
        "images made on the device, beside the host's": functools.partial(images_of_the_host, bench),
        **{f"two epochs in {name}": functools.partial(in_precision, bench, name) for name in ("fp32", "bf16", "fp16")},
        **{f"one seed twice, {name}": functools.partial(seed_twice, bench, *way) for name, way in ways.items()},
        **{f"stop and resume, {name}": functools.partial(stop_and_resume, bench, *way) for name, way in ways.items()},
        "steps as graphs, beside kernel by kernel": functools.partial(graphs_beside_kernels, bench),
        "an epoch in fp32, beside the CPU": functools.partial(beside_the_cpu, bench),
    }
    rows = []
    for name, check in todo.items():
        try:
            found, passed = check()
        except StoppedError:
            raise
        except Exception as error:  # the other checks are worth having
            traceback.print_exc()
            found, passed = f"{type(error).__name__}: {error}".splitlines()[0], False
        rows.append((name, found, "" if passed is None else "yes" if passed else "no"))
        print(f"{bench.now():.0f} s: {name}: {found}", flush=True)
        yield result_of(("check", "found", "as it should be"), rows, **machine(), images=bench.size.checked)


def images_of_the_host(bench: "Bench") -> Outcome:
    dataset, batch_size = bench.images(bench.config(), bench.size.checked), bench.size.batch_size
    host = make_loader(dataset, batch_size, train=True)
    device = DeviceLoader(dataset, batch_size, EpochSampler(len(dataset), dataset.seed), bench.runtime.device)
    different, largest = 0, 0.0
    for (made, labels), (expected, expected_labels) in zip(device, host, strict=True):
        different += int((denormalize(made) != denormalize(expected)).any(axis=(1, 2, 3)).sum())
        different += int((labels.cpu() != expected_labels).sum())
        largest = max(largest, float((made.cpu() - expected).abs().max()))
    return f"{different} differ; when normalised, by {largest:.1g} at most", not different and largest < 1e-5


@contextlib.contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """PyTorch's, where it has some; it warns of operations for which it has none."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def difference(net: nn.Module, other: nn.Module) -> tuple[str, bool]:
    pairs = zip(net.state_dict().values(), other.state_dict().values(), strict=True)
    largest = max(float((a.double() - b.double()).abs().max()) for a, b in pairs)
    return (f"weights differ by {largest:.1g} at most", False) if largest else ("the same weights, bit for bit", True)


def seed_twice(bench: "Bench", flags: Flags, promised: bool) -> Outcome:
    with flags(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        nets = [bench.fitted(bench.config(epochs=2), bench.size.checked)[0] for _ in range(2)]
    found, same = difference(*nets)
    texts = [str(warning.message) for warning in caught]
    lacking = sorted({text.partition(NOT_DETERMINISTIC)[0] for text in texts if NOT_DETERMINISTIC in text})
    return "; no deterministic ".join([found, *lacking]), same if promised else None


def stop_and_resume(bench: "Bench", flags: Flags, promised: bool) -> Outcome:
    """Stopped after three steps, when nothing is captured yet, and between the epochs."""
    steps = itertools.count(1)

    def at_the_third_step(net: nn.Module, inputs: object) -> None:
        if net.training and next(steps) == 3:
            signal.raise_signal(signal.SIGINT)

    def stopped(*arguments: Any, **options: Any) -> None:
        with contextlib.suppress(StoppedError):
            bench.fitted(*arguments, **options)
            raise RuntimeError("training went on although it was asked to stop")

    config, count = bench.config(epochs=2), bench.size.checked
    resumed = dataclasses.replace(config, overwrite=False, resume=f"runs/{config.name}")
    with flags():
        undisturbed, _ = bench.fitted(config, count)
        (net := bench.net(config.seed)).register_forward_pre_hook(at_the_third_step)
        stopped(config, count, net)
        stopped(resumed, count, on_epoch=lambda row: signal.raise_signal(signal.SIGINT))
        found, same = difference(undisturbed, bench.fitted(resumed, count)[0])
    return found, same if promised else None


def graphs_beside_kernels(bench: "Bench") -> Outcome:
    """With the settings of the short run, whose later epochs go by the loss of each image."""
    if not bench.on_gpu:
        return NEEDS_GPU, None
    config, count = bench.config(epochs=3, **SHORT_SETTINGS), bench.size.checked
    with deterministic_algorithms():
        graphs, _ = bench.fitted(config, count)
        with mock.patch("machinery.device.EAGER_STEPS", math.inf):
            return difference(graphs, bench.fitted(config, count)[0])


def beside_the_cpu(bench: "Bench") -> Outcome:
    """In fp32 proper, not TF32; Muon orthogonalises in bf16. On a CPU, one thread and two end 0.0006 apart."""
    if not bench.on_gpu:
        return NEEDS_GPU, None
    torch.backends.cudnn.allow_tf32 = False
    try:
        configs = (bench.config(precision="fp32", epochs=1, device=device) for device in ("cpu", "cuda"))
        cpu, gpu = (bench.fitted(config, bench.size.checked)[1]["train_loss"][0] for config in configs)
    finally:
        torch.backends.cudnn.allow_tf32 = True
    return f"loss {cpu:.4f} on the CPU, {gpu:.4f} on the GPU", abs(cpu - gpu) < 0.005


def in_precision(bench: "Bench", precision: str) -> Outcome:
    if precision == "fp16" and not bench.on_gpu:  # on many CPUs a hundred times as slow
        return NEEDS_GPU, None
    _, history = bench.fitted(bench.config(precision=precision, epochs=2), bench.size.checked)
    first, last = history["train_loss"]
    return f"loss {last:.3f}, test accuracy {history['test_accuracy'][-1]:.2f} %", last < first


def machine() -> dict[str, Any]:
    """What `describe_hardware` leaves out."""
    if not torch.cuda.is_available():
        return {"python": platform.python_version()}
    query = ["nvidia-smi", "--query-gpu=driver_version,memory.total,power.limit", "--format=csv,noheader"]
    try:
        card = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    except OSError as error:
        card = f"unknown: {error}"
    versions = {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return {"driver_memory_and_power_limit": card, **versions, "python": platform.python_version()}
