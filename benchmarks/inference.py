"""How fast `Net` answers: `python benchmarks/inference.py` times batches of 1, 64 and 512 images, taking turns.

In fp32 and bf16, as it is and compiled by torch.compile for each size of batch, and in fp32 by ONNX Runtime with the
file that `export.py` writes; all on the CPU, with as many threads as torch takes. Images are at random, and so are the
weights, for the time does not depend on them.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from common import alternate, random_batch, rate, report
from torch import Tensor, nn

from export import export
from model import Net
from train import choose_runtime

BATCHES = 1, 64, 512
ROUNDS, CALLS = 9, {1: 50, 64: 5, 512: 1}  # calls in a round, so that each takes long enough to be timed


def candidates(model: nn.Module, folder: Path) -> dict[str, Callable[[Tensor], Any]]:
    """The ways to run `model`, each from images (N, 3, 32, 32) to its answers."""
    model = model.eval().to(memory_format=torch.channels_last)
    export(model, folder / "net.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / "net.onnx", options, providers=["CPUExecutionProvider"])
    compiled = torch.compile(model, dynamic=False)

    def autocast(network: Callable[[Tensor], Tensor], precision: str) -> Callable[[Tensor], Tensor]:
        runtime = choose_runtime("cpu", precision)

        def answer(images: Tensor) -> Tensor:
            with torch.inference_mode(), runtime.autocast():
                return network(images)

        return answer

    return {
        "PyTorch, fp32": autocast(model, "fp32"),
        "PyTorch, bf16": autocast(model, "bf16"),
        "PyTorch, fp32, compiled": autocast(compiled, "fp32"),
        "PyTorch, bf16, compiled": autocast(compiled, "bf16"),
        "ONNX Runtime, fp32": lambda images: session.run(None, {"images": images.contiguous().numpy()}),
    }


def calls(answer: Callable[[Tensor], Any], images: Tensor) -> None:
    for _ in range(CALLS[len(images)]):
        answer(images)


def main() -> None:
    torch.manual_seed(0)
    speeds: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        ways = candidates(Net(), Path(folder))
        for size in BATCHES:
            images, _ = random_batch(size)
            seconds = alternate({name: partial(calls, answer, images) for name, answer in ways.items()}, ROUNDS)
            for name, times in seconds.items():
                speeds.setdefault(name, []).extend(rate(size * CALLS[size], times))
    columns = ("images/s", *[f"{part}{size}" for size in BATCHES for part in ("batch of ", "± of ")])
    report(
        "inference", columns, [(name, *values) for name, values in speeds.items()], onnxruntime=onnxruntime.__version__
    )


if __name__ == "__main__":
    main()
