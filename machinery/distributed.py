"""Several processes train one network: `torchrun --nproc-per-node=N train.py ...`. Started alone, all of this is idle.

Each process, or rank, takes its share of every batch. Gradients are averaged by `DistributedDataParallel`; BatchNorm's
statistics and the metrics are summed over all ranks, so that the run is that of one process with the same batch size.
"""

import contextlib
import os
import threading
import types
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn  # early: first imported inside a process group, it keeps that, and Python may abort at exit
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from machinery.errors import MachineError, SettingError

T = TypeVar("T")

# How long a process waits for the others, in a step or at the start. In health that is the time of the slowest step, or
# of a save: seconds, on a slow disk or processor a minute. A dead process is noticed at once, as its connections are
# closed; this is for machines that vanish. A link that is back within half of it costs nothing but the time, for TCP
# sends again after pauses that double.
PATIENCE = timedelta(minutes=5)
PULSE = 1  # seconds between two meetings while one of them works alone


def rank() -> int:
    """Which of the processes this one is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def launch_id() -> str:
    """What names this start of torchrun, the same after it has started dead processes anew; empty without torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "")


def can_restart() -> bool:
    """Whether torchrun starts all processes anew when one dies (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def _store_prefix() -> str:
    """A name for this start of the processes, so that they do not find the addresses of those that died before.

    torchrun keeps one store for all starts (github.com/pytorch/pytorch/issues/135712). It counts the starts, but on
    each machine for itself, so several machines need a store for every start.
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if can_restart() and shared and int(os.environ["GROUP_WORLD_SIZE"]) > 1:
        raise SettingError(
            "--max-restarts on several machines: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun on all of them"
        )
    return f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}" if shared else "start"


@contextlib.contextmanager
def process_group(device_type: str, meet: Callable[[dist.Store], None] = lambda store: None) -> Iterator[None]:
    """Joins the other processes that torchrun started, by NCCL on GPUs and gloo elsewhere, until the `with` ends.

    Args:
        device_type: "cpu" or "cuda".
        meet: Called before, with the store that all of them read and write.

    Raises:
        SettingError: The device cannot be shared so, or torchrun was called in a way that cannot work.
        MachineError: Another process died, did not come, or does not answer.
    """
    if not launch_id() or dist.is_initialized():
        yield
        return
    if device_type not in ("cpu", "cuda"):
        raise SettingError(f"device {device_type} cannot train in several processes; choose cpu or cuda")
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    prefix = _store_prefix()
    try:
        store, number, count = next(dist.rendezvous("env://", timeout=PATIENCE))
        store = dist.PrefixStore(prefix, store)
        meet(store)
        backend = "nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=PATIENCE)
        try:
            yield
        finally:
            dist.destroy_process_group()
    except RuntimeError as error:
        if not isinstance(error, MachineError) and (cause := failure_of_the_machine(error)):
            raise MachineError(cause) from error
        raise


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of the tensors of all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def interleave_over_ranks(part: Tensor, count: int) -> Tensor:
    """Puts together `count` numbers, of which rank r holds those at r, r + world_size(), ...; exact."""
    if world_size() == 1:
        return part
    whole = part.new_zeros(count)
    whole[rank() :: world_size()] = part
    return sum_over_ranks(whole)


def max_over_ranks(number: int) -> int:
    """The largest of the numbers of all ranks."""
    if world_size() == 1:
        return number
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor([number], device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def broadcast_from_rank_0(make: Callable[[], T]) -> T:
    """What `make()` returns on rank 0, given to all; what it raises there is raised by all."""
    if world_size() == 1:
        return make()
    box: list[Any] = _outcome(make) if rank() == 0 else [None, None]
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


def gather(value: T) -> list[T]:
    """The values of all processes, in their order."""
    values: list[Any] = [value]
    if world_size() > 1:
        values *= world_size()
        dist.all_gather_object(values, value)
    return values


def once_per_machine(make: Callable[[], object]) -> None:
    """Lets one process of each machine do what the others then find done; what it raises is raised by all.

    It may take hours, as a download does: until then the processes meet once a second, so that each knows that the
    others live. A process alone does it later, where it needs it.
    """
    if world_size() == 1:
        return
    error, done = None, threading.Event()
    if int(os.environ["LOCAL_RANK"]) == 0:
        pulse = threading.Thread(target=_meet_until, args=(done,))
        pulse.start()
        try:
            error = _outcome(make)[1]
        finally:
            done.set()
            pulse.join()
    else:
        done.set()
        _meet_until(done)
    for first in filter(None, gather(error)):
        raise first


def _meet_until(done: threading.Event) -> None:
    """Meets the other processes again and again, until this one and all others are done."""
    with contextlib.suppress(RuntimeError):  # of one that died, which the next meeting tells
        while max_over_ranks(not done.wait(PULSE)):
            pass


def _outcome(make: Callable[[], object]) -> list:
    """What `make()` returns, and what it raises; one of them is None."""
    try:
        return [make(), None]
    except Exception as error:
        return [None, error]


def failure_of_the_machine(error: BaseException) -> str | None:
    """What happened and what may help, if the machine failed; None if the error is of another kind."""
    text = str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "an't allocate memory" in text:
        return "memory ran out: end other programs, or begin a new run with a smaller batch_size"
    if "shared memory" in text or "Cannot allocate memory" in text or "Too many open files" in text:
        return f"the processes that prepare images lack room ({error}): try workers = 0, which gives the same"
    if isinstance(error, ConnectionError | EOFError) or "DataLoader worker (pid" in text:
        return "a process that prepares images died, often for want of memory: try workers = 0, which gives the same"
    if launch_id() and isinstance(error, RuntimeError):  # of gloo, NCCL, or the store in which they meet
        if "connectFullMesh" in text:
            return f"set GLOO_SOCKET_IFNAME to the network interface that leads to the other machines: {text}"
        if "timed out" in text.lower() or "timeout" in text:
            return (
                f"another process of this run did not answer for {PATIENCE.total_seconds():g} s: it hangs, "
                "or its machine or the link to it is down"
            )
        if "by peer" in text or "Broken pipe" in text or isinstance(error, dist.DistNetworkError):
            return "another process of this run died, or the link to it was cut"
    return None


def mean_over_ranks(loss: Tensor, count: int, images: Tensor) -> Tensor:
    """The mean loss over `count` images, made the share of this process in that over the `images` of all of them.

    `DistributedDataParallel` averages the gradients over the processes, of which some may have fewer images.
    """
    return loss if world_size() == 1 else loss * count * world_size() / images


@contextlib.contextmanager
def parallel(model: nn.Module) -> Iterator[nn.Module]:
    """The model as all ranks train it together; itself if there is but one. Inside, its BatchNorm sees whole batches.

    (`torch.nn.SyncBatchNorm` does that on GPUs only.)
    """
    if world_size() == 1:
        yield model
        return
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for layer in layers:
        layer.forward = types.MethodType(_whole_batch_norm, layer)  # type: ignore[method-assign]
    try:
        network = DistributedDataParallel(model)  # gives all ranks the first one's buffers
        network.broadcast_buffers = (
            False  # not before each step, too; as an argument, its name is of some versions only
        )
        yield network
    finally:
        for layer in layers:
            del layer.forward


class _SumOverRanks(torch.autograd.Function):
    """The sum over all ranks; every rank's loss depends on it, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(context: object, tensor: Tensor) -> Tensor:
        return sum_over_ranks(tensor.clone())

    @staticmethod
    def backward(context: object, gradient: Tensor) -> Tensor:
        return sum_over_ranks(gradient.clone())


def _whole_batch_norm(layer: _BatchNorm, x: Tensor) -> Tensor:
    """What `layer` does, (N, C, ...) -> the same, but with the statistics of all ranks' images in training."""
    if not layer.training:
        return type(layer).forward(layer, x)
    dims, channels = [0, *range(2, x.ndim)], x.shape[1]
    shape = [1, channels, *[1] * (x.ndim - 2)]
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    origin = values.new_zeros(1) if layer.running_mean is None else layer.running_mean.clone()
    near = values - origin.view(-1, *shape[2:])  # so that the difference of squares below loses no digits
    count = values.new_tensor([values.numel() / channels])
    sums = _SumOverRanks.apply(torch.cat([near.sum(dims), near.square().sum(dims), count]))
    total = sums[-1].detach()
    mean = sums[:channels] / total
    variance = (sums[channels:-1] / total - mean.square()).clamp(min=0)
    mean = mean + origin
    if layer.num_batches_tracked is not None and layer.running_mean is not None and layer.running_var is not None:
        layer.num_batches_tracked.add_(1)
        momentum = 1 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
        with torch.no_grad():
            layer.running_mean.lerp_(mean, momentum)
            layer.running_var.lerp_(variance * total / (total - 1), momentum)
    scale = (variance + layer.eps).rsqrt() * (1 if layer.weight is None else layer.weight)
    shift = (0 if layer.bias is None else layer.bias) - mean * scale
    return (values * scale.view(shape) + shift.view(shape)).to(x.dtype)
