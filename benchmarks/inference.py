"""Images per second that `Net` classifies on a CPU, by PyTorch, torch.compile and ONNX Runtime; table in docs/speed.md.

`python benchmarks/inference.py` takes random images and weights, which do not change the time.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from common import alternate, median_and_half_iqr, random_batch, report
from torch import Tensor, nn

from dataset import MEAN, STD
from export import export
from model import Net
from train import choose_runtime

ROUNDS = 15
CALLS = {1: 50, 64: 5, 512: 1}  # batch size of inference -> calls in a round, which has to be long enough to be timed


def main() -> None:
    torch.manual_seed(0)
    speeds: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        ways = ways_to_predict(Net(), Path(folder))
    for size, calls in CALLS.items():
        images, _ = random_batch(size)

        def repeated(way: Callable[[Tensor], Any], images: Tensor = images, calls: int = calls) -> None:
            for _ in range(calls):
                way(images)

        for name, times in alternate({name: partial(repeated, way) for name, way in ways.items()}, ROUNDS).items():
            median, spread = median_and_half_iqr(times)
            per_second = size * calls / median
            speeds.setdefault(name, []).extend((round(per_second), round(per_second * spread / median)))
    columns = ("images/s", *[f"{part}{size}" for size in CALLS for part in ("batch of ", "± of ")])
    report("inference", columns, [(name, *r) for name, r in speeds.items()], onnxruntime=onnxruntime.__version__)


def ways_to_predict(model: nn.Module, folder: Path) -> dict[str, Callable[[Tensor], Any]]:
    """Name -> a function from images (N, 3, 32, 32) to log-probabilities."""
    model = model.eval().to(memory_format=torch.channels_last)
    export(model, folder / "net.onnx", mean=MEAN, std=STD)
    session = onnxruntime.InferenceSession(folder / "net.onnx", providers=["CPUExecutionProvider"])

    @torch.inference_mode()
    def outputs(network: Callable[[Tensor], Tensor], precision: str, images: Tensor) -> Tensor:
        with choose_runtime("cpu", precision).autocast():
            return network(images)

    networks: dict[str, Any] = {"": model, ", compiled": torch.compile(model, dynamic=False)}
    return {
        **{
            f"PyTorch, {precision}{kind}": partial(outputs, network, precision)
            for kind, network in networks.items()
            for precision in ("fp32", "bf16")
        },
        "ONNX Runtime, fp32": lambda images: session.run(None, {"images": images.contiguous().numpy()}),
    }


if __name__ == "__main__":
    main()
