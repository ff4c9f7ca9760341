"""What `gpu.py` checks: that a GPU makes and computes what the CPU does, and repeats itself."""

import contextlib
import dataclasses
import functools
import itertools
import platform
import signal
import subprocess
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from common import result_of
from torch import nn

from dataset import denormalize, make_loader
from machinery.loading import DeviceLoader
from machinery.sampling import EpochSampler
from train import StoppedError

if TYPE_CHECKING:
    from gpu import Bench

Outcome = tuple[str, bool | None]  # what was found, and whether that is as it should be; None if it could not be tried
Flags = Callable[[], contextlib.AbstractContextManager]
NEEDS_GPU = "needs a GPU"
NOT_DETERMINISTIC = " does not have a deterministic implementation"  # as PyTorch warns


def checks(bench: "Bench") -> Iterator[dict[str, Any]]:
    """A line for each check, all on the first training images."""
    flags: dict[str, Flags] = {"by default": contextlib.nullcontext}
    if bench.on_gpu:  # on a CPU they make no difference
        flags["use_deterministic_algorithms"] = deterministic_algorithms
    todo: dict[str, Callable[[], Outcome]] = {
        "images made on the device, beside the host's": functools.partial(images_of_the_host, bench),
        "an epoch in fp32, beside the CPU": functools.partial(beside_the_cpu, bench),
        **{f"one seed twice, {name}": functools.partial(seed_twice, bench, how) for name, how in flags.items()},
        **{f"stop and resume, {name}": functools.partial(stop_and_resume, bench, how) for name, how in flags.items()},
        **{f"two epochs in {name}": functools.partial(in_precision, bench, name) for name in ("fp32", "bf16", "fp16")},
    }
    rows = []
    for name, check in todo.items():
        try:
            found, passed = check()
        except Exception as error:  # the other checks are worth having
            traceback.print_exc()
            found, passed = f"{type(error).__name__}: {error}".splitlines()[0], False
        rows.append((name, found, "" if passed is None else "yes" if passed else "no"))
        yield result_of(("check", "found", "as it should be"), rows, **machine(), images=bench.size.checked)


def images_of_the_host(bench: "Bench") -> Outcome:
    dataset, batch_size = bench.images(bench.config("images"), bench.size.checked), bench.size.batch_size
    host = make_loader(dataset, batch_size, train=True)
    device = DeviceLoader(dataset, batch_size, EpochSampler(len(dataset), dataset.seed), bench.runtime.device)
    different, largest = 0, 0.0
    for (made, _), (expected, _) in zip(device, host, strict=True):
        different += int((denormalize(made) != denormalize(expected)).any(axis=(1, 2, 3)).sum())
        largest = max(largest, float((made.cpu() - expected).abs().max()))
    return f"{different} differ; when normalised, by {largest:.1g} at most", not different and largest < 1e-5


def beside_the_cpu(bench: "Bench") -> Outcome:
    """In fp32 proper; but Muon orthogonalises in bf16, whose rounding decides how near the losses can be."""
    if not bench.on_gpu:
        return NEEDS_GPU, None
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        configs = (bench.config("fp32", precision="fp32", epochs=1, device=device) for device in ("cpu", "cuda"))
        cpu, gpu = (bench.fitted(config, bench.size.checked)[1]["train_loss"][0] for config in configs)
    return f"loss {cpu:.4f} on the CPU, {gpu:.4f} on the GPU", abs(cpu - gpu) < 0.01


@contextlib.contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """PyTorch's, where it has some; it warns of operations for which it has none."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def difference(net: nn.Module, other: nn.Module) -> Outcome:
    pairs = zip(net.state_dict().values(), other.state_dict().values(), strict=True)
    largest = max(float((a.double() - b.double()).abs().max()) for a, b in pairs)
    return (f"weights differ by {largest:.1g} at most", False) if largest else ("the same weights, bit for bit", True)


def seed_twice(bench: "Bench", flags: Flags) -> Outcome:
    with flags(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        nets = [bench.fitted(bench.config("twice", epochs=2), bench.size.checked)[0] for _ in range(2)]
    found, passed = difference(*nets)
    texts = [str(warning.message) for warning in caught]
    lacking = sorted({text.partition(NOT_DETERMINISTIC)[0] for text in texts if NOT_DETERMINISTIC in text})
    return "; no deterministic ".join([found, *lacking]), passed


def stop_and_resume(bench: "Bench", flags: Flags) -> Outcome:
    """Stopped after three steps, when nothing is captured yet, and between the epochs."""
    steps = itertools.count(1)

    def at_the_third_step(net: nn.Module, inputs: object) -> None:
        if net.training and next(steps) == 3:
            signal.raise_signal(signal.SIGINT)

    def stopped(*arguments: Any, **options: Any) -> None:
        with contextlib.suppress(StoppedError):
            bench.fitted(*arguments, **options)
            raise RuntimeError("training went on although it was asked to stop")

    config, count = bench.config("stopped", epochs=2), bench.size.checked
    resumed = dataclasses.replace(config, overwrite=False, resume=f"runs/{config.name}")
    with flags():
        undisturbed, _ = bench.fitted(bench.config("undisturbed", epochs=2), count)
        (net := bench.net(config.seed)).register_forward_pre_hook(at_the_third_step)
        stopped(config, count, net)
        stopped(resumed, count, on_epoch=lambda row: signal.raise_signal(signal.SIGINT))
        return difference(undisturbed, bench.fitted(resumed, count)[0])


def in_precision(bench: "Bench", precision: str) -> Outcome:
    _, history = bench.fitted(bench.config(precision, precision=precision, epochs=2), bench.size.checked)
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
