"""What is damaged, foreign or made to mislead is refused before anything in it is believed."""

import random
from pathlib import Path

import pytest
import torch

from machinery import checkpoint
from train import CheckpointError


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "swap", "foreign", "html"])
def test_damaged_checkpoints_are_refused_without_being_unpickled(damage, monkeypatch):
    path, dice = Path("last.pt"), random.Random(damage)
    good = checkpoint.packed({"weights": torch.randn(1000), "epoch": 3})
    path.write_bytes(good)
    assert torch.equal(checkpoint.load(path)["weights"], torch.load(path, weights_only=True)["weights"])
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("unpickled a damaged checkpoint"))
    for _ in range(50):
        bad = bytearray(good)
        if damage == "flip":
            bad[dice.randrange(len(bad))] ^= 1 << dice.randrange(8)
        elif damage == "truncate":
            del bad[dice.randrange(len(bad)) :]
        elif damage == "swap":
            i, j = sorted(dice.sample(range(0, len(bad) - 64), 2))
            bad[i : i + 32], bad[j : j + 32] = bad[j : j + 32], bad[i : i + 32]
        elif damage == "foreign":
            bad = bytearray(dice.randbytes(500))
        else:
            bad = bytearray(b"" if damage == "empty" else b"<html>Not found</html>")
        if bad == good:
            continue
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"last\.pt is truncated, altered or not a checkpoint"):
            checkpoint.load(path)


def test_a_checkpoint_that_would_run_code_is_refused_and_does_not(tmp_path):
    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "executed",))

    (tmp_path / "last.pt").write_bytes(checkpoint.packed({"model": Evil()}))
    with pytest.raises(CheckpointError, match="something other than tensors"):
        checkpoint.load(tmp_path / "last.pt")
    assert not (tmp_path / "executed").exists()
