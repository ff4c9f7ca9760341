"""How near the training step comes to the machine's limit, and where the rest of the time goes.

`python benchmarks/step.py` times, taking turns, one large bf16 convolution (the limit) and a whole training step of
`Net`, then each layer alone, forward and backward, on the input that it has in the network. Operations are those of
the network's multiply-adds alone, counted twice (multiply, add) and three times (forward, and backward to the input and
to the weights; the first layer has no input to go back to). The layers of airbench94_muon are timed beside it.

`--save-as step_zen5` keeps the table of another machine beside step.json.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from baselines import airbench94_muon_network
from common import alternate, largest_convolution, median_and_half_iqr, random_batch, report, training_step
from torch import Tensor, nn

from model import Net
from train import Config, choose_runtime, recipe_optimizer

ROUNDS = 15
BATCH_SIZE = Config().batch_size
COLUMNS = "layers", "ms", "± ms", "of the step", "GFLOP/s", "of the limit"


def operations(layer: nn.Module, output: Tensor) -> int:
    """Of a convolution or linear layer, forward and backward, for the whole batch; 0 for all else."""
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        return 0
    multiply_adds = layer.weight[0].numel() * output.numel()
    return 2 * multiply_adds * (2 if layer.weight.shape[1] == 3 else 3)


def layers_alone(model: nn.Module) -> dict[str, tuple[Callable[[], None], int]]:
    """Name of each layer -> what runs it forward and backward alone, and its operations."""
    seen: dict[str, tuple[Callable[[], None], int]] = {}
    runtime = choose_runtime("cpu")

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            given = inputs[0].detach().requires_grad_(inputs[0].requires_grad)
            gradient = torch.randn_like(output)

            def run() -> None:
                with runtime.autocast():
                    result = layer(given)
                result.backward(gradient)

            seen[name] = run, operations(layer, output)

        return hook

    handles = [
        layer.register_forward_hook(record(name)) for name, layer in model.named_modules() if not list(layer.children())
    ]
    with runtime.autocast():
        model(random_batch(BATCH_SIZE)[0])
    for handle in handles:
        handle.remove()
    return seen


def table(
    model: nn.Module,
    alone: dict[str, list[float]],
    counts: dict[str, int],
    whole: dict[str, list[float]],
    limit: float,
) -> list[tuple]:
    """A line for each of `COLUMNS`: convolutions and linear layers one by one, other layers by kind, then `whole`.

    Args:
        model: Whose layers.
        alone: Seconds of each layer, by its name, in each round.
        counts: Operations of each layer, by its name.
        whole: Seconds of what is no layer, in each round; the last is the whole step.
        limit: Operations a second of one large convolution.
    """
    parts: dict[str, list[float]] = {}
    operations_of: dict[str, int] = {}
    for name, times in alone.items():
        layer = model.get_submodule(name)
        part = f"{name} {tuple(layer.get_parameter('weight').shape)}" if counts[name] else type(layer).__name__
        parts[part] = [a + b for a, b in zip(parts.get(part, [0.0] * len(times)), times, strict=True)]
        operations_of[part] = operations_of.get(part, 0) + counts[name]
    step = list(whole)[-1]
    operations_of[step] = sum(counts.values())
    total, rows = statistics.median(whole[step]), []
    for part, times in (parts | whole).items():
        (median, spread), count = median_and_half_iqr(times), operations_of.get(part, 0)
        rate = f"{count / median / 1e9:.0f}" if count else ""
        of_limit = f"{100 * count / median / limit:.0f} %" if count else ""
        rows.append((part, 1000 * median, 1000 * spread, f"{100 * median / total:.1f} %", rate, of_limit))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save-as", metavar="NAME", default="step", help="of the JSON file (default: step)")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = Net()
    optimizer = recipe_optimizer(model)
    convolution, limit_operations = largest_convolution(BATCH_SIZE)
    step = training_step(model, optimizer, BATCH_SIZE)
    peer_step = training_step(peer := airbench94_muon_network(), recipe_optimizer(peer), BATCH_SIZE)
    candidates = {"limit": convolution, "step": step, "optimizer": optimizer.step, "peer": peer_step}
    seconds = alternate(candidates, ROUNDS)
    limit = limit_operations / statistics.median(seconds["limit"])
    layers = layers_alone(model)
    alone = alternate({name: run for name, (run, _) in layers.items()}, ROUNDS)
    counts = {name: count for name, (_, count) in layers.items()}
    rows = table(model, alone, counts, {"optimizer": seconds["optimizer"], "the whole step": seconds["step"]}, limit)
    report(
        options.save_as,
        COLUMNS,
        rows,
        batch_size=BATCH_SIZE,
        gflops_of_one_large_convolution=round(limit / 1e9),
        images_per_second=round(BATCH_SIZE / statistics.median(seconds["step"])),
        images_per_second_of_airbench94_muon=round(BATCH_SIZE / statistics.median(seconds["peer"])),
    )


if __name__ == "__main__":
    main()
