"""Several machines find the way to one another, and do not begin unless they are alike."""

import hashlib
import importlib
import socket
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from machinery import distributed
from machinery.errors import MachineError, SettingError
from machinery.record import facts_of_machine as facts_of
from machinery.record import refuse_separate
from train import Config, choose_runtime

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def first_of_two_machines(monkeypatch):
    """As torchrun would have started this process, with one process on each machine."""
    for name, value in {"RANK": 0, "GROUP_RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "GROUP_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "launch")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that it is as before, afterwards
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")


def test_machines_choose_the_interface_that_leads_from_one_to_the_other(monkeypatch):
    def chosen() -> str | None:
        return distributed.os.environ.pop("GLOO_SOCKET_IFNAME", None)

    loopback = next(
        name for name, own in distributed.psutil.net_if_addrs().items() if "127.0.0.1" in [part.address for part in own]
    )
    store = dist.HashStore()
    monkeypatch.setenv("GROUP_RANK", "1")
    distributed.choose_interface(store)
    assert chosen() == loopback
    monkeypatch.setenv("GROUP_RANK", "0")
    distributed.choose_interface(store)
    assert chosen() == loopback
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "by the user")
    distributed.choose_interface(store)
    assert chosen() == "by the user"
    store.set("address of the first machine", "203.0.113.1")  # behind a router
    distributed.choose_interface(store)
    assert chosen() is None


def test_settings_arithmetic_versions_and_code_are_compared_but_not_what_a_machine_has_of_its_own(monkeypatch):
    runtime = choose_runtime("cpu", "fp32")
    facts = facts_of(Config(), runtime)
    assert facts == facts_of(Config(workers=3, data_dir="elsewhere"), runtime)
    assert facts != facts_of(Config(save_minutes=1), runtime)
    assert facts["torch"]
    assert facts["the arithmetic"] == "cpu, fp32, channels_last"
    for capabilities, precision in (({"avx512_bf16": True}, "bf16"), ({"avx2": True}, "fp32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert facts_of(Config(), runtime)["the optimizer's precision"] == precision
    for name in ("model.py", "machinery/distributed.py"):
        assert facts[name] == hashlib.sha256((REPOSITORY / name).read_bytes()).hexdigest()[:8]
    assert not [name for name in facts if "site-packages" in name]


def test_folders_that_are_not_shared_are_refused_and_left_as_they_were(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    Path("runs/old").mkdir(parents=True)
    refuse_separate(Path("runs"))
    there = "there (machine 1)", {"runs/": "another folder"}
    monkeypatch.setattr(distributed, "gather", lambda value: [value, there])
    with pytest.raises(SettingError, match=r"runs/ is shared on here .machine 0., another folder on there"):
        refuse_separate(Path("runs"))
    assert [path.name for path in Path("runs").iterdir()] == ["old"]


@pytest.mark.parametrize("leader", ["nobody.invalid", "127.0.1.1"])
def test_a_machine_that_does_not_know_the_first_one_says_what_to_do(leader, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", leader)
    monkeypatch.setenv("GROUP_RANK", "1")
    with pytest.raises(MachineError, match=f"does not know where {leader} is.*--local-addr=ADDRESS"):
        distributed.refuse_unknown_leader()


def test_several_machines_cannot_restart_with_one_store_for_all_starts(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(SettingError, match="TORCH_DISABLE_SHARE"), distributed.process_group("cpu", {}):
        pass


def test_the_benchmark_is_skipped_with_a_sentence_where_namespaces_cannot_be_made(monkeypatch, capsys):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    monkeypatch.setattr(sys, "argv", ["machines.py"])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("machines").main()
    assert ended.value.code is None
    assert capsys.readouterr().out.startswith("skipped: this needs Linux, iproute2, and the right to")
