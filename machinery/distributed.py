"""Several processes train one network: `torchrun --nproc-per-node=N train.py ...`, on one or more machines.

Each takes an equal share of every batch; gradients are averaged, BatchNorm and metrics cover the whole batch.
"""

import contextlib
import itertools
import os
import socket
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
import torch.distributed.nn  # early: first imported inside a process group, it keeps that, and Python may abort at exit
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from machinery.errors import PATIENCE, MachineError, SettingError, failure_of_the_machine, print_line

T = TypeVar("T")
_starts = itertools.count()  # of groups in this process; each time, their store may still have the last addresses
_joined = _alone = False  # whether `process_group` has joined the others, and `alone` does without them


def rank() -> int:
    """The rank of this process; 0 outside of `process_group`."""
    return dist.get_rank() if _joined and not _alone else 0


def world_size() -> int:
    """The number of processes; 1 outside of `process_group`."""
    return dist.get_world_size() if _joined and not _alone else 1


def launch_id() -> str:
    """The id of this start of torchrun, kept when it restarts processes; empty without torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "")


def can_restart() -> bool:
    """Whether torchrun restarts all processes when one dies (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def several_machines() -> bool:
    """Whether torchrun started processes on more than one machine."""
    return bool(launch_id()) and int(os.environ["GROUP_WORLD_SIZE"]) > 1


@contextlib.contextmanager
def process_group(device_type: str, facts: dict[str, str]) -> Iterator[None]:
    """Joins the processes of torchrun or an existing group; refuses those with other `facts`."""
    global _joined
    ours, lost = not dist.is_initialized(), None
    if _alone or (ours and not launch_id()):
        yield
        return
    try:
        if ours:
            _join(device_type)
        _joined = True
        refuse_differences(facts)
        yield
    except RuntimeError as error:
        if lost := failure_of_the_machine(error):
            raise MachineError(lost) from error
        raise
    finally:
        _joined = False
        if ours and dist.is_initialized() and not (lost and device_type == "cuda"):  # NCCL would wait for the dead
            dist.destroy_process_group()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, `world_size()` is 1: for what rank 0 does alone, such as a user's callback."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def _join(device_type: str) -> None:
    """Makes the process group: NCCL for GPUs, gloo for the CPU."""
    if device_type not in ("cpu", "cuda"):
        raise SettingError(f"device {device_type} cannot train in several processes; choose cpu or cuda")
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # torchrun may keep one store for all starts (github.com/pytorch/pytorch/issues/135712), with the addresses of those
    # that died. It counts the starts, but on each machine for itself.
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if can_restart() and shared and several_machines():
        raise SettingError("--max-restarts on several machines needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on all")
    refuse_unknown_leader()
    store, number, count = next(dist.rendezvous("env://", timeout=PATIENCE))
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0) if shared else ""
    store = dist.PrefixStore(f"restart {restart}, group {next(_starts)}", store)
    if several_machines():
        choose_interface(store)
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=PATIENCE)


def refuse_unknown_leader() -> None:
    """Raises MachineError if this machine cannot resolve the first one's name."""
    leader, address = os.environ["MASTER_ADDR"], "127."
    with contextlib.suppress(OSError):
        address = str(socket.getaddrinfo(leader, None)[0][4][0])
    if several_machines() and address.startswith("127.") and os.environ["GROUP_RANK"] != "0":
        cure = "write its address into /etc/hosts, or give torchrun --local-addr=ADDRESS on each machine"
        raise MachineError(f"{socket.gethostname()} does not know where {leader} is, the first machine: {cure}")


def choose_interface(store: dist.Store) -> None:
    """Gives gloo, which on Debian would take 127.0.1.1, the interface to the other machines."""
    key = "address of the first machine"
    if os.environ["GROUP_RANK"] == "0":
        own = store.get(key).decode()
    else:
        leader = socket.getaddrinfo(os.environ["MASTER_ADDR"], 1, type=socket.SOCK_DGRAM)[0]
        store.set(key, str(leader[4][0]))
        with socket.socket(*leader[:2]) as probe:
            probe.connect(leader[4])  # sends nothing
            own = probe.getsockname()[0]
    for interface, addresses in psutil.net_if_addrs().items():
        if own in [entry.address for entry in addresses]:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sums the tensors of all ranks in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def interleave_over_ranks(part: Tensor) -> Tensor:
    """Equal parts (N,) of all ranks as one tensor: rank r has the places r, r + world_size(), ..."""
    whole = part.new_zeros(len(part) * world_size())
    whole[rank() :: world_size()] = part
    return sum_over_ranks(whole)


def max_over_ranks(number: int) -> int:
    """The largest number of all ranks, without waiting for a GPU."""
    return max(gather(number))


def gather(value: T, group: Any = None) -> list[T]:
    """The values of all processes, by rank."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value, group)
    return values


def _outcome(make: Callable[[], object]) -> object:
    """What `make()` returns or raises."""
    try:
        return make()
    except Exception as error:
        return error


def broadcast_from_rank_0(make: Callable[[], T]) -> T:
    """What `make()` returns on rank 0, or raises there, on all ranks."""
    box: list[Any] = [_outcome(make) if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(box)
    if isinstance(box[0], Exception):
        raise box[0]
    return box[0]


def once_per_machine(make: Callable[[], object]) -> None:
    """Calls it in one process of each machine, while the others wait; all raise what it raises."""
    if world_size() > 1:
        group: Any = dist.new_group(backend="gloo", timeout=timedelta(days=1))  # tells at once if one dies
        outcomes = gather(_outcome(make) if os.environ.get("LOCAL_RANK", "0") == "0" else None, group)
        dist.destroy_process_group(group)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome


def refuse_differences(facts: dict[str, str]) -> None:
    """Raises SettingError on all processes, with what differs and where, unless their facts agree."""
    everybody = gather((f"{socket.gethostname()} (machine {os.environ.get('GROUP_RANK', 0)})", facts))
    differences = []
    for name in dict.fromkeys(name for _, theirs in everybody for name in theirs):
        values = dict.fromkeys((theirs.get(name, "missing"), machine) for machine, theirs in everybody)
        if len({value for value, _ in values}) > 1:
            differences.append(f"{name} is {', '.join(f'{value} on {machine}' for value, machine in values)}")
    if differences:
        raise SettingError(
            f"the machines differ, so they would not train one network: {'; '.join(differences[:4])}. Make them the "
            "same, and start again."
        )


def print_rank0(text: str) -> None:
    """Prints a line on rank 0; failing to write it does not end the run."""
    if rank() == 0:
        with contextlib.suppress(OSError):
            print_line(text, sys.stdout)


@contextlib.contextmanager
def parallel(model: nn.Module) -> Iterator[nn.Module]:
    """The model as all ranks train it, with BatchNorm over whole batches, by SyncBatchNorm on GPUs."""
    if world_size() == 1:
        yield model
        return
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for layer in layers:
        layer.forward = lambda x, layer=layer: _whole_batch_norm(layer, x)  # type: ignore[method-assign, misc]
    try:
        network = DistributedDataParallel(model)  # gives all ranks the first one's buffers
        network.broadcast_buffers = False  # not before each step; as an argument, its name is of some versions only
        yield network
    except RuntimeError as error:
        if "finished reduction in the prior iteration" not in str(error):
            raise
        unused = ", ".join(name for name, p in model.named_parameters() if p.requires_grad and p.grad is None)
        raise SettingError(
            f"model: {unused} got no gradient, for which several processes would wait; call requires_grad_(False) on it"
        ) from error
    finally:
        for layer in layers:
            del layer.forward


def _whole_batch_norm(layer: _BatchNorm, x: Tensor) -> Tensor:
    """Applies `layer` to (N, C, ...), in training with the statistics of all ranks' images."""
    if not layer.training:
        return type(layer).forward(layer, x)
    values = x.movedim(1, -1).to(torch.promote_types(x.dtype, torch.float32))  # (N, ..., C)
    dims, count = tuple(range(x.ndim - 1)), world_size() * x[:, 0].numel()
    values = values - (0 if layer.running_mean is None else layer.running_mean)  # so that squares lose no digits below
    sums = torch.stack([values.sum(dims), values.square().sum(dims)])
    sum_over_ranks(sums.detach())
    if sums.requires_grad:  # every rank's loss depends on them, so their gradient is the sum of the ranks'
        sums.register_hook(lambda gradient: sum_over_ranks(gradient.clone()))
    mean, square = sums / count
    variance = (square - mean.square()).clamp(min=0)
    if layer.num_batches_tracked is not None and layer.running_mean is not None and layer.running_var is not None:
        layer.num_batches_tracked.add_(1)
        momentum = 1 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
        layer.running_mean.add_(mean.detach(), alpha=momentum)  # of which the running mean is taken away
        layer.running_var.lerp_(variance.detach() * count / (count - 1), momentum)
    scale = (variance + layer.eps).rsqrt() * (1 if layer.weight is None else layer.weight)
    shift = (0 if layer.bias is None else layer.bias) - mean * scale
    return (values * scale + shift).movedim(-1, 1).to(x.dtype)
