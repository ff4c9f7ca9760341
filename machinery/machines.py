"""Several machines train one network: how they reach one another, and what has to be the same on all of them."""

import contextlib
import hashlib
import json
import os
import socket
import struct
import sys
import uuid
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from machinery import distributed
from machinery.errors import MachineError, SettingError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

REPOSITORY = Path(__file__).parents[1]


def several() -> bool:
    """Whether torchrun started processes on more than one machine."""
    return bool(distributed.launch_id()) and int(os.environ["GROUP_WORLD_SIZE"]) > 1


def refuse_unknown_leader() -> None:
    """Raises MachineError if this machine cannot find the first one by the name which that has for itself."""
    if not several():
        return
    leader = os.environ["MASTER_ADDR"]
    try:
        address = socket.getaddrinfo(leader, None)[0][4][0]
    except OSError:
        address = ""
    if not address or (str(address).startswith("127.") and os.environ["GROUP_RANK"] != "0"):
        raise MachineError(
            f"{socket.gethostname()} does not know where {leader} is, the first machine of this run: write its address "
            "into /etc/hosts, or give torchrun --local-addr=ADDRESS on each machine, with its own address"
        )


def meet(store: dist.Store, facts: dict[str, str]) -> None:
    """What the processes do before they join: they find the way to one another, and refuse machines that differ.

    Args:
        store: Which all of them read and write.
        facts: What has to be the same on all machines.

    Raises:
        SettingError: It is not.
    """
    if not several():
        return
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _choose_interface(store, rank, count)
    store.set(f"facts of {rank}", json.dumps([_name(), facts]))
    told = [json.loads(store.get(f"facts of {other}")) for other in range(count)]
    store.set(f"{rank} knows", "")
    if rank == 0:  # which may keep the store, and then has to end last
        store.wait([f"{other} knows" for other in range(count)])
    _refuse_differences(told)


def refuse_other_data(*datasets: Any) -> None:
    """Raises SettingError if the machines do not have the same images and labels in the same order."""
    if several():
        digests = {f"dataset {number}": _digest(dataset) for number, dataset in enumerate(datasets, 1)}
        _refuse_differences(distributed.gather((_name(), digests)))


def refuse_separate(folder: Path) -> None:
    """Raises SettingError if the machines do not share this folder, so that only one of them could go on with a run."""
    if not several():
        return

    def mark() -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f".shared-{uuid.uuid4().hex}"  # a new name, which no network file system remembers as absent
        path.touch()
        return path

    try:
        path = distributed.broadcast_from_rank_0(mark)
    except OSError as error:
        raise SettingError(f"name: cannot write to {folder}: {error}") from error
    seen = distributed.gather((_name(), path.exists()))
    if distributed.rank() == 0:
        path.unlink()
        with contextlib.suppress(OSError):  # if it is empty
            folder.rmdir()
    if apart := sorted({name for name, found in seen if not found}):
        raise SettingError(
            f"{folder}/ of {seen[0][0]} is not that of {', '.join(apart)}: share this folder (NFS, sshfs), for a run "
            "goes on from what any of the machines may have saved there"
        )


def code() -> dict[str, str]:
    """The beginning of the sha256 of every module of this repository that is loaded, by its path."""
    paths = {Path(getattr(module, "__file__", None) or "") for module in list(sys.modules.values())}
    own = {path.relative_to(REPOSITORY): path for path in paths if path.is_relative_to(REPOSITORY)}
    return {
        name.as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        for name, path in sorted(own.items())
        if name.suffix == ".py" and "site-packages" not in name.parts
    }


def _name() -> str:
    return f"{socket.gethostname()} (machine {os.environ['GROUP_RANK']})"


def _refuse_differences(told: list[tuple[str, dict[str, str]]]) -> None:
    """`told` has a pair for each process: the name of its machine, and what has to be the same."""
    machines = dict(told)
    names = dict.fromkeys(name for facts in machines.values() for name in facts)
    differences = []
    for name in names:
        values = {machine: facts.get(name, "missing") for machine, facts in machines.items()}
        if len(set(values.values())) > 1:
            differences.append(f"{name} is {', '.join(f'{value} on {machine}' for machine, value in values.items())}")
    if differences:
        more = f"; and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise SettingError(
            f"the machines differ, so they would not train one network: {'; '.join(differences[:4])}{more}. Make them "
            "the same on all machines, and start again."
        )


def _digest(dataset: Any) -> str:
    """Of all images and labels where they are tensors in memory, else of the number of items and the first two."""
    values: list[Any] = [getattr(dataset, name, None) for name in ("images", "labels")]
    if not all(isinstance(value, torch.Tensor) for value in values):
        with torch.random.fork_rng():
            values = [torch.as_tensor(part) for index in range(min(2, len(dataset))) for part in dataset[index]]
    digest = hashlib.sha256(str(len(dataset)).encode())
    for value in values:
        digest.update(value.cpu().contiguous().numpy().data)
    return digest.hexdigest()[:8]


def _choose_interface(store: dist.Store, rank: int, count: int) -> None:
    """Tells gloo by which interface the other machines are reached, unless the user has.

    It would take the address that the machine's own name has, on Debian 127.0.1.1, where nobody else reaches it.
    """
    last = f"address of {count - 1}"  # which is on another machine than the first
    leads = os.environ["GROUP_RANK"] == "0"
    if rank == count - 1:
        store.set(last, _address_towards(os.environ["MASTER_ADDR"]))
    address = _address_towards(store.get(last).decode() if leads else os.environ["MASTER_ADDR"])
    if interface := _interface_of(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def _address_towards(host: str) -> str:
    """The IPv4 address of this machine on the way to another, empty if there is none; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect((host, 1))
        return probe.getsockname()[0]
    return ""


def _interface_of(address: str) -> str | None:
    """The name of the interface that has this IPv4 address; None if that cannot be told."""
    if not fcntl or sys.platform != "linux":
        return None
    get_address = 0x8915  # SIOCGIFADDR of linux/sockios.h
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # one without an address
                answer = fcntl.ioctl(probe, get_address, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None
