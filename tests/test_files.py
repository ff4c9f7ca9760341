"""What is damaged, foreign or made to mislead is refused; what is saved can be read again; one writer per folder."""

import errno
import multiprocessing
import os
import random
import signal
import time
from collections import Counter, OrderedDict
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from machinery import checkpoint
from machinery.weights import FileError, read_plain, read_weights
from train import CheckpointError


def damaged(content: bytes, dice: random.Random) -> bytes:
    """Cut off, with a bit flipped, with bytes put in or left out, or with some set to zero."""
    bad, place, count = bytearray(content), dice.randrange(len(content)), dice.randrange(1, 64)
    flipped = bytes([bad[place] ^ 1 << dice.randrange(8)])
    bad[place : place + dice.choice([0, 1, count])] = dice.choice([dice.randbytes(count), b"", bytes(count), flipped])
    return bytes(bad[: dice.choice([place, None, None])])


def test_a_damaged_file_is_refused_or_read_exactly(tmp_path):
    """Also where there is no checksum: in the table of contents, and in the gaps between the parts.

    Of a part that the table marks as a folder, by one bit, torch reads nothing, and gives what was in memory.
    """
    state = {"weight": torch.randn(3, 4), "steps": torch.tensor(7)}
    good, dice, path, refused = checkpoint.packed(state), random.Random(0), tmp_path / "last.pt", 0
    table = [good[:k] + bytes([good[k] ^ 0x10]) + good[k + 1 :] for k in range(len(good) - 200, len(good))]
    for bad in [damaged(good, dice) for _ in range(200)] + table:
        path.write_bytes(bad)
        try:
            found = read_weights(path)["model"]
        except FileError:
            refused += 1
        else:
            assert found.keys() == state.keys()
            assert all(torch.equal(found[name], state[name]) for name in state)
    assert refused > 200


def test_a_foreign_or_missing_checkpoint_is_refused_without_being_unpickled(monkeypatch, tmp_path):
    path = tmp_path / "last.pt"
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("unpickled a damaged checkpoint"))
    for content in (None, b"", b"<html>Not found</html>"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"cannot read the checkpoint: .*last\.pt"):
            checkpoint.load(path)


def test_a_checkpoint_that_would_run_code_is_refused_and_does_not(tmp_path):
    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"model": Evil()}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=r"last\.pt holds a whole model or other Python objects"):
        checkpoint.load(tmp_path / "last.pt")
    torch.save([1, 2], tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=r"last\.pt holds a list"):
        checkpoint.load(tmp_path / "last.pt")
    assert not (tmp_path / "executed").exists()


def test_numpy_s_numbers_are_saved_as_python_s(tmp_path):
    numbers = {"a": np.float64(0.1), "b": [np.int64(3), (np.bool_(True), np.float32(0.5))], "c": {np.int64(2): "x"}}
    weights = nn.BatchNorm2d(3).state_dict()
    state = {**numbers, "steps": Counter([np.int64(5), 5]), "weights": weights, "nothing": None}
    before = dict(state)
    (tmp_path / "last.pt").write_bytes(checkpoint.packed(state))
    assert state == before
    assert type(state["a"]) is np.float64
    for read in (checkpoint.load(tmp_path / "last.pt"), read_plain(tmp_path / "last.pt")):
        assert read["a"] == 0.1
        assert (type(read["a"]), type(read["b"][1][0])) == (float, bool)
        assert read["b"] == [3, (True, 0.5)]
        assert read["c"] == {2: "x"}
        assert read["steps"] == {5: 2}
        assert type(read["weights"]) is OrderedDict
        assert read["weights"]._metadata == weights._metadata


@pytest.mark.parametrize("odd", [np.zeros(3), Path("a"), lambda: 0, {1: object()}])
def test_what_could_not_be_read_again_is_refused_by_name_when_it_is_saved(odd):
    with pytest.raises(CheckpointError, match=r"^cannot save scheduler\.inner\.1[.1]*, a .*\.") as error:
        checkpoint.packed({"model": {"weight": torch.zeros(3)}, "scheduler": {"last": 1, "inner": [2, odd]}})
    assert str(error.value).isprintable()


def hold(folder: Path, pipe: Connection) -> None:
    """Locks the folder, forks a process such as a data-loading worker, and tells its id."""
    held = checkpoint.lock(folder)
    if not (worker := os.fork()):
        time.sleep(60)
        os._exit(0)
    pipe.send(worker)
    time.sleep(60)
    held.release()


def test_a_folder_has_one_writer_until_it_lets_go_or_dies(tmp_path):
    """Although a process that it forked outlives it."""
    processes = multiprocessing.get_context("fork")
    ours, theirs = processes.Pipe()
    other = processes.Process(target=hold, args=(tmp_path, theirs))
    other.start()
    worker = ours.recv()
    try:
        with pytest.raises(BlockingIOError, match="another process is writing to"):
            checkpoint.lock(tmp_path)
        other.kill()
        other.join()
        held = checkpoint.lock(tmp_path)
    finally:
        os.kill(worker, signal.SIGKILL)
    with pytest.raises(BlockingIOError):
        checkpoint.lock(tmp_path)
    held.release()
    checkpoint.lock(tmp_path).release()


def test_where_there_are_no_locks_nothing_is_refused(tmp_path, monkeypatch):
    def no_locks(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    first, second = checkpoint.lock(tmp_path), checkpoint.lock(tmp_path)
    first.release()
    second.release()
