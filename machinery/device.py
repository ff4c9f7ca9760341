"""Where and how a network runs: device, precision, memory layout, eval mode, and CUDA graphs of training steps."""

import contextlib
import ctypes
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
MAX_GRAPHS = 4  # shapes of a batch; an epoch has two, and with CutMix twice as many


@dataclass(frozen=True)
class Runtime:
    """Device, precision and memory layout of a run, decided once by `choose_runtime`."""

    device: torch.device
    precision: str  # "bf16", "fp16" or "fp32"
    channels_last: bool

    def __str__(self) -> str:
        return f"{self.device}, {self.precision}, {'channels_last' if self.channels_last else 'contiguous'}"

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def place(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) on the device, in the chosen layout."""
        return self.move(images).contiguous(memory_format=self.layout)

    def move(self, tensor: Tensor) -> Tensor:
        """A tensor on the device, asynchronously on CUDA alone (on MPS that corrupts: pytorch issue 139550)."""
        return tensor.to(self.device, non_blocking=self.device.type == "cuda")

    def autocast(self) -> contextlib.AbstractContextManager:
        kind = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, kind, enabled=self.precision != "fp32")

    def scores(self, model: nn.Module, images: Tensor) -> Tensor:
        """The model's outputs for images on the device, float32 (N, classes); ValueError for anything else."""
        with self.autocast():
            scores = model(images)
        if not isinstance(scores, Tensor) or scores.ndim != 2:
            found = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
            raise ValueError(
                f"the network must return one tensor (N, classes), got {found}; wrap it in a Module that does so"
            )
        return scores.float()

    def scaler(self) -> torch.amp.GradScaler:
        """Keeps fp16 gradients in range; does nothing in other precisions."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")


def choose_runtime(device: str = "auto", precision: str = "auto", layout: str = "auto") -> Runtime:
    """The fastest runtime on this machine, where the arguments, as in `Config`, leave a choice.

    bf16 is 2x to 8x as fast on processors with avx512_bf16 or AMX and on CUDA from Ampere on; older GPUs with tensor
    cores (V100, T4, RTX 20) have fp16 instead. SettingError if the device is not available.
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
    """The fastest precision on devices of this kind; bf16 only where it is not emulated."""
    if device == "cpu":
        return "bf16" if _bf16_instructions() else "fp32"
    if device == "mps":
        return "fp32"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    # GTX 16 has the compute capability of the RTX 20, but no tensor cores.
    has_tensor_cores = torch.cuda.get_device_capability() >= (7, 0) and "GTX 16" not in torch.cuda.get_device_name()
    return "fp16" if has_tensor_cores else "fp32"


def _capabilities() -> Mapping[str, Any]:
    """What the processor has, such as {"amx_bf16": True}; empty where PyTorch, as 2.6, cannot tell."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def _bf16_instructions() -> list[str]:
    """The processor's instructions for bf16, the fastest first."""
    return [name for name in ("amx_bf16", "avx512_bf16") if _capabilities().get(name)]


def runtime_of(model: nn.Module) -> Runtime:
    """The fastest runtime on the model's device, in the layout of its filters."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    # of other shapes, both layouts are the same
    filters = [p for p in model.parameters() if p.ndim == 4 and min(p.shape[1], *p.shape[2:]) > 1]
    channels_last = any(p.is_contiguous(memory_format=torch.channels_last) for p in filters)
    return Runtime(device, fastest_precision(device.type), channels_last)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the `with`; afterwards each submodule is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def training_mode(model: nn.Module) -> None:
    """Train mode, except for BatchNorm with frozen parameters, whose statistics stay frozen, too."""
    model.train()
    for layer in model.modules():
        parameters = list(layer.parameters()) if isinstance(layer, _BatchNorm) else []
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            layer.eval()


def graphs_fit(wish: str, runtime: Runtime, by_recipe: bool, *, is_known: bool) -> bool:
    """Whether steps become CUDA graphs; with `wish` "auto" if nothing in them can change, with "on" or SettingError."""
    one_process = not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1
    possible = runtime.device.type == "cuda" and runtime.precision != "fp16" and by_recipe and one_process
    if wish == "on" and not possible:
        raise SettingError("graphs: they need a CUDA device, bf16 or fp32, one process, and the recipe's own optimizer")
    return possible and (wish == "on" or (wish == "auto" and is_known))


class Captured:
    """A function of CUDA tensors to a tuple of tensors, replayed as a CUDA graph for each of a few shapes.

    A graph starts the hundreds of short kernels of a step at once; Python's decisions are those of the capture.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self.function = function
        self.calls: Counter[tuple] = Counter()
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], tuple[Tensor, ...]]] = {}
        self.pool = torch.cuda.graph_pool_handle()  # of memory, shared by the graphs
        self.aside = torch.cuda.Stream()  # a single one, for it keeps the memory that it has freed to itself

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        key = tuple((argument.shape, argument.dtype) for argument in arguments)
        self.calls[key] += 1
        if key not in self.graphs:
            if self.calls[key] <= EAGER_STEPS or len(self.graphs) == MAX_GRAPHS:
                return self._eager(arguments)
            graph, static = torch.cuda.CUDAGraph(), tuple(argument.clone() for argument in arguments)
            # thread_local: threads that pin the memory of batches go on meanwhile
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                self.graphs[key] = graph, static, self.function(*static)
        graph, static, results = self.graphs[key]
        for held, argument in zip(static, arguments, strict=True):
            held.copy_(argument)
        graph.replay()
        return tuple(result.clone() for result in results)  # the next replay overwrites what the graph holds

    def _eager(self, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Runs the function on a stream of its own, as `torch.cuda.graph` does."""
        self.aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.aside):
            results = self.function(*arguments)
        torch.cuda.current_stream().wait_stream(self.aside)
        return results


class RandomStates:
    """torch's random states, as a part of a run."""

    def state_dict(self) -> dict[str, Any]:
        return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["cpu"])
        if torch.cuda.is_available() and state["cuda"] is not None:
            torch.cuda.set_rng_state(state["cuda"])


def keep_freed_memory() -> None:
    """Tells glibc, if present, to keep freed memory for the next step.

    Returning blocks to the system, which wipes them, takes a sixth of the training time on 2 cores.
    """
    if platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_max = -1, -4  # of malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def describe_hardware() -> str:
    """The processor, its fastest bf16 instructions, its threads, and any GPU."""
    processor = _capabilities().get("cpu_name") or platform.processor() or platform.machine()
    parts = [processor, *_bf16_instructions()[:1]]
    parts.append(f"{torch.get_num_threads()} threads")
    return ", ".join([*parts, torch.cuda.get_device_name()] if torch.cuda.is_available() else parts)
