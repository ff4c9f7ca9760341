"""How a network is run: on which device, in which precision and layout, in which mode, and its steps as graphs."""

import contextlib
import ctypes
import dataclasses
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from machinery.errors import SettingError

EAGER_STEPS = 3  # before a step is captured, so that whatever is allocated or tuned at first is outside of the graph


@dataclass(frozen=True)
class Runtime:
    """Where and how the arithmetic is done; decided once per run by `choose_runtime`."""

    device: torch.device
    precision: str  # "bf16", "fp16" or "fp32"
    channels_last: bool

    def __str__(self) -> str:
        return f"{self.device}, {self.precision}, {'channels_last' if self.channels_last else 'contiguous'}"

    def place(self, batch: Tensor) -> Tensor:
        """Images (N, 3, H, W) on the device, in the chosen layout."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return batch.to(self.device, memory_format=layout, non_blocking=True)

    def autocast(self) -> contextlib.AbstractContextManager:
        kind = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, kind, enabled=self.precision != "fp32")

    def scores(self, model: nn.Module, images: Tensor) -> Tensor:
        """What the model answers to images on the device, float32 (N, classes).

        Raises:
            ValueError: The answer is something else, in one sentence.
        """
        with self.autocast():
            scores = model(images)
        if not isinstance(scores, Tensor) or scores.ndim != 2:
            found = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
            raise ValueError(
                f"the network must answer with one tensor (N, classes), got {found}; wrap it in a Module that returns "
                "the scores alone"
            )
        return scores.float()

    def scaler(self) -> torch.amp.GradScaler:
        """Keeps the gradients of fp16 within its range; with other precisions, does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")


def choose_runtime(device: str = "auto", precision: str = "auto", layout: str = "auto") -> Runtime:
    """The fastest of what this machine can do, except where told otherwise; arguments as in `Config`.

    bf16 pays 2x to 8x on processors with avx512_bf16 or AMX and on CUDA from Ampere on, and costs elsewhere. Older GPUs
    with tensor cores (V100, T4, RTX 20) have fp16 instead.

    Raises:
        SettingError: The device is not available.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if available[name])
    if not available[device]:
        raise SettingError(
            f"device {device} is not available here; these are: {', '.join(n for n in available if available[n])}"
        )
    return Runtime(
        torch.device(device),
        precision=fastest_precision(device) if precision == "auto" else precision,
        channels_last=device != "mps" if layout == "auto" else layout == "channels_last",
    )


def fastest_precision(device: str) -> str:
    """What `choose_runtime` takes on the devices of this kind; bf16 only where it is not emulated."""
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16"
        return "fp16" if torch.cuda.get_device_capability() >= (7, 0) else "fp32"
    capabilities = _capabilities() if device == "cpu" else {}
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


def _capabilities() -> Mapping[str, Any]:
    """What the processor has, such as {"amx_bf16": True}; empty where PyTorch, as 2.6, cannot tell."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def runtime_of(model: nn.Module) -> Runtime:
    """What `choose_runtime` finds best on the device where the model is, in the layout of its filters."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    filters = [p for p in model.parameters() if p.ndim == 4 and min(p.shape[1], *p.shape[2:]) > 1]
    laid_out = any(p.is_contiguous(memory_format=torch.channels_last) for p in filters)
    return dataclasses.replace(choose_runtime(device.type), device=device, channels_last=laid_out)


@contextlib.contextmanager
def answering(model: nn.Module) -> Iterator[None]:
    """Puts a model into eval mode inside the `with`, then back into the mode in which it came."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def training_mode(model: nn.Module) -> None:
    """Puts a model into train mode, but for BatchNorm whose parameters are frozen: its statistics are, too."""
    model.train()
    for layer in model.modules():
        parameters = list(layer.parameters()) if isinstance(layer, _BatchNorm) else []
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            layer.eval()


class Captured:
    """A function of tensors on a CUDA device to a tuple of tensors, replayed as one CUDA graph for each shape.

    A step of a small network is some hundreds of short kernels, and starting them takes longer than running them; a
    graph starts them all at once.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self.function = function
        self.calls: Counter[tuple] = Counter()
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], tuple[Tensor, ...]]] = {}
        self.aside: torch.cuda.Stream | None = None  # one, for a stream keeps the memory that it has freed to itself

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        key = tuple((argument.shape, argument.dtype) for argument in arguments)
        self.calls[key] += 1
        if self.calls[key] <= EAGER_STEPS:
            self.aside = self.aside or torch.cuda.Stream()  # as torch.cuda.graph captures on
            self.aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.aside):
                results = self.function(*arguments)
            torch.cuda.current_stream().wait_stream(self.aside)
            return results
        if key not in self.graphs:
            graph, static = torch.cuda.CUDAGraph(), tuple(argument.clone() for argument in arguments)
            with torch.cuda.graph(graph):
                results = self.function(*static)
            self.graphs[key] = graph, static, results
        graph, static, results = self.graphs[key]
        for held, argument in zip(static, arguments, strict=True):
            held.copy_(argument)
        graph.replay()
        return tuple(result.clone() for result in results)  # the next replay overwrites what the graph holds


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory for the next step, which takes as much again; elsewhere does nothing.

    By default it gives blocks of 32 MB and more back to the system at once, and the system hands them out again page by
    page, each wiped first: on 2 cores a sixth of the training time. What is kept is at most what was in use at once.
    """
    if platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_max = -1, -4  # of malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def describe_hardware() -> str:
    """The processor, its fastest instructions for bf16, its cores in use, and the GPU, as far as there are such."""
    capabilities = _capabilities()
    parts = [capabilities.get("cpu_name") or platform.processor() or platform.machine()]
    parts += [name for name in ("amx_bf16", "avx512_bf16") if capabilities.get(name)][:1]
    parts += [f"{torch.get_num_threads()} threads"]
    parts += [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return ", ".join(parts)
