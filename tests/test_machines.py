"""Several machines find the way to one another, and do not begin unless they are alike."""

import hashlib
import importlib
import json
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from machinery import distributed, machines
from machinery.errors import MachineError, SettingError
from machinery.folder import facts_of
from train import Config, choose_runtime

REPOSITORY = Path(__file__).parents[1]
ALIKE = {"torch": "2.14.1", "model.py": "0a1b2c3d"}


@pytest.fixture(autouse=True)
def first_of_two_machines(monkeypatch):
    """As torchrun would have started this process, with one process on each machine."""
    monkeypatch.setattr(machines.socket, "gethostname", lambda: "here")
    for name, value in {"RANK": 0, "GROUP_RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "GROUP_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "launch")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that it is as before, afterwards
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")


def store_with(facts: dict[str, str]) -> dist.Store:
    """Where the process on the other machine has said what it has to."""
    store = dist.HashStore()
    store.set("address of 1", "127.0.0.1")
    store.set("facts of 1", json.dumps(["there (machine 1)", facts]))
    store.set("1 knows", "")
    return store


@pytest.mark.skipif(sys.platform != "linux", reason="the name of the interface is asked of Linux")
def test_the_first_machine_finds_the_interface_that_leads_to_the_last(monkeypatch):
    machines.meet(store_with(ALIKE), ALIKE)
    assert machines.os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "chosen")
    machines.meet(store_with(ALIKE), ALIKE)
    assert machines.os.environ["GLOO_SOCKET_IFNAME"] == "chosen"
    assert machines._interface_of("203.0.113.1") is None


def test_machines_that_differ_are_named_with_what_differs():
    with pytest.raises(SettingError) as caught:
        machines.meet(store_with({"torch": "2.13.0"}), ALIKE)
    assert "torch is 2.14.1 on here (machine 0), 2.13.0 on there (machine 1);" in str(caught.value)
    assert "model.py is 0a1b2c3d on here (machine 0), missing on there (machine 1)." in str(caught.value)
    many = {str(number): "a" for number in range(9)}
    with pytest.raises(SettingError, match=r"3 is a on here .machine 0., b on there .machine 1.; and 5 more"):
        machines.meet(store_with(dict.fromkeys(many, "b")), many)


def test_on_one_machine_nothing_is_asked(monkeypatch):
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "nobody.invalid")
    machines.refuse_unknown_leader()
    machines.meet(dist.HashStore(), ALIKE)
    machines.refuse_separate(Path("runs"))
    machines.refuse_other_data([])
    assert "GLOO_SOCKET_IFNAME" not in machines.os.environ
    assert not Path("runs").exists()


def test_all_settings_but_those_of_a_machine_have_to_be_the_same_and_so_has_the_code(monkeypatch):
    runtime = choose_runtime("cpu", "fp32")
    facts = facts_of(Config(), runtime)
    assert facts == facts_of(Config(workers=3, data_dir="elsewhere"), runtime)
    assert facts != facts_of(Config(save_minutes=1), runtime)
    assert facts["torch"]
    assert facts["the arithmetic"] == "cpu, fp32, channels_last"
    for capabilities, precision in (({"avx512_bf16": True}, "bf16"), ({"avx2": True}, "fp32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert facts_of(Config(), runtime)["the optimizer's precision"] == precision
    for name in ("model.py", "machinery/machines.py"):
        assert facts[name] == hashlib.sha256((REPOSITORY / name).read_bytes()).hexdigest()[:8]
    assert not [name for name in facts if "site-packages" in name]


@pytest.mark.parametrize("change", ["image", "label", "length"])
def test_other_data_is_refused(change, monkeypatch):
    class Images(list):
        images, labels = torch.zeros(3, 4, 4, 3, dtype=torch.uint8), torch.arange(3)

    mine = Images("abc")
    machines.refuse_other_data(mine)
    other = Images("ab" if change == "length" else "abc")
    if change == "image":
        other.images = mine.images.clone().index_fill_(0, torch.tensor([2]), 1)
    if change == "label":
        other.labels = mine.labels.flip(0)
    there = "there (machine 1)", {"dataset 1": machines._digest(other)}
    monkeypatch.setattr(distributed, "gather", lambda value: [value, there])
    with pytest.raises(SettingError, match=r"dataset 1 is .* on here .machine 0., .* on there .machine 1."):
        machines.refuse_other_data(mine)


def test_data_that_is_not_in_memory_is_told_by_its_first_items():
    items = [(torch.full((3, 2, 2), float(k)), k) for k in range(4)]
    state = torch.get_rng_state()
    assert machines._digest(items) == machines._digest(items[:])
    assert machines._digest(items) != machines._digest(items[:3])
    assert machines._digest(items) != machines._digest(items[::-1])
    assert torch.equal(torch.get_rng_state(), state)


def test_folders_that_are_not_shared_are_refused_and_left_as_they_were(monkeypatch):
    Path("runs/old").mkdir(parents=True)
    machines.refuse_separate(Path("runs"))
    machines.refuse_separate(Path("new"))
    monkeypatch.setattr(distributed, "gather", lambda value: [value, ("there (machine 1)", False)])
    with pytest.raises(SettingError, match=r"runs/ of here .machine 0. is not that of there .machine 1.: share this"):
        machines.refuse_separate(Path("runs"))
    assert [path.name for path in Path("runs").iterdir()] == ["old"]
    assert not Path("new").exists()


@pytest.mark.parametrize(("leader", "machine"), [("nobody.invalid", 0), ("nobody.invalid", 1), ("127.0.1.1", 1)])
def test_a_machine_that_does_not_know_the_first_one_says_what_to_do(leader, machine, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", leader)
    monkeypatch.setenv("GROUP_RANK", str(machine))
    with pytest.raises(MachineError, match=f"does not know where {leader} is.*--local-addr=ADDRESS"):
        machines.refuse_unknown_leader()


def test_the_first_machine_may_know_itself_by_a_loopback_address(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.1.1")
    machines.refuse_unknown_leader()


def test_while_one_downloads_the_processes_meet_again_and_again(monkeypatch):
    met, enough = [], threading.Event()

    def download():
        assert enough.wait(5)
        raise MachineError("broke off")

    def meet(busy):
        met.append(busy)
        if len(met) == 3:
            enough.set()
        return busy

    monkeypatch.setattr(distributed, "PULSE", 0.01)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "max_over_ranks", meet)
    monkeypatch.setattr(distributed, "gather", lambda value: [None, value])
    with pytest.raises(MachineError, match="broke off"):
        distributed.once_per_machine(download)
    assert met == [True] * (len(met) - 1) + [False]
    assert len(met) > 3


def test_what_ends_a_run_of_several_processes_is_named(monkeypatch):
    lost = {
        "Timed out waiting 300000ms for recv operation to complete": "did not answer for 300 s",
        "wait timeout after 300000ms, keys: /start/facts of 1": "did not answer for 300 s",
        "Gloo connectFullMesh failed with timed out connecting": "set GLOO_SOCKET_IFNAME",
        "Connection closed by peer [10.0.0.2]:4711": "another process of this run died",
    }
    for text, told in lost.items():
        assert told in str(distributed.failure_of_the_machine(RuntimeError(text)))
    assert "died" in str(distributed.failure_of_the_machine(dist.DistNetworkError("failed to recv, got 0 bytes")))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert not [text for text in lost if distributed.failure_of_the_machine(RuntimeError(text))]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return importlib.import_module("machines")


def test_the_benchmark_is_skipped_with_a_sentence_where_namespaces_cannot_be_made(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["machines.py"])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert ended.value.code is None
    assert capsys.readouterr().out.startswith("skipped: this needs Linux, iproute2, and the right to")


def test_what_was_done_to_two_machines_ended_as_promised(benchmark):
    saved = json.loads((REPOSITORY / "benchmarks/machines.json").read_text())
    assert [row["what was done"] for row in saved["rows"][:-1]] == [trial[0] for trial in benchmark.TRIALS]
    assert all(row["times"] == row["as promised"] for row in saved["rows"])
    assert saved["rows"][-1]["times"] == len(saved["runs"]) >= 20
