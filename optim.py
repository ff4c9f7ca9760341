"""The optimizer: orthogonalised momentum for dense convolution filters, Nesterov momentum for everything else."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Muon for the groups with `orthogonal=True`, plain SGD with Nesterov momentum for the others.

    Muon (K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024) takes the momentum of a
    filter bank as a matrix (out, in * height * width) and steps along the nearest orthogonal one, so that every
    direction learns at the same pace. With `rescale`, filters are brought to norm sqrt(out) before each step; the
    BatchNorm behind them undoes their scale anyway, and the rate then says how far a step turns them.
    (`torch.optim.Muon` takes neither convolutions nor rescaling.)

    Args:
        params: Parameters or groups, as for every torch optimizer.
        lr: Step length: relative to the filters' norm for Muon, per unit of gradient for SGD.
        momentum: Share of the past gradients that is kept, 0 to 1.
        orthogonal: Whether to orthogonalise; takes parameters of two dimensions or more.
        rescale: Whether to bring the filters to norm sqrt(out); for layers with BatchNorm behind them.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float = 0.16,
        momentum: float = 0.6,
        orthogonal: bool = True,
        rescale: bool = True,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "orthogonal": orthogonal, "rescale": rescale})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                momentum = state["momentum_buffer"].mul_(group["momentum"]).add_(parameter.grad)
                update = parameter.grad.add(momentum, alpha=group["momentum"])  # Nesterov
                if group["orthogonal"]:
                    if group["rescale"]:
                        parameter.mul_(len(parameter) ** 0.5 / parameter.norm().clamp(min=1e-7))
                    update = orthogonalize(update.flatten(1)).view(parameter.shape)
                parameter.add_(update, alpha=-group["lr"])
        return loss


def orthogonalize(matrix: Tensor) -> Tensor:
    """About the orthogonal matrix nearest to `matrix` (M, N): the same singular vectors, singular values near 1.

    Five Newton-Schulz steps in bf16, with the coefficients of K. Jordan's Muon, chosen for the steepest rise from 0.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16()
    x = x / (x.norm() + 1e-7)
    if tall := len(x) > x.shape[1]:
        x = x.T
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


def recipe_optimizer(model: nn.Module, lr: float = 0.16) -> Muon:
    """The recipe's optimizer for any network, not only `Net`.

    Dense filters of at least 32 weights go to Muon at `lr`. Smaller and depthwise ones, BatchNorm and biases go to SGD
    at 0.05, and the last linear layer at 0.67 (airbench94's rates), both times lr / 0.16.
    Filters are rescaled where the network has BatchNorm at all, taken to stand behind every dense convolution.
    """
    last_linear = next((m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)), None)
    head = list(last_linear.parameters()) if last_linear else []
    in_head = {id(p) for p in head}
    filters, rest = [], []
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in in_head:
            dense = parameter.ndim == 4 and parameter.shape[1] > 1 and parameter[0].numel() >= 32
            (filters if dense else rest).append(parameter)
    groups = [
        {
            "params": filters,
            "lr": lr,
            "rescale": any(isinstance(m, nn.BatchNorm2d) for m in model.modules()),
        },
        {"params": rest, "lr": 0.05 / 0.16 * lr, "momentum": 0.85, "orthogonal": False},
        {"params": [p for p in head if p.requires_grad], "lr": 0.67 / 0.16 * lr, "momentum": 0.85, "orthogonal": False},
    ]
    return Muon([group for group in groups if group["params"]])
