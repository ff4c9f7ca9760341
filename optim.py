"""The optimizer: orthogonalised momentum for dense convolution filters, Adam for everything else."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Muon for the groups with `orthogonal=True`, Adam for the others.

    Muon (K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024) takes the momentum of a
    filter bank as a matrix (out, in * height * width) and steps along the nearest orthogonal one, so that every
    direction learns at the same pace. With `rescale`, filters are brought to norm sqrt(out) before each step; the
    BatchNorm behind them undoes their scale anyway, and the rate then says how far a step turns them.
    (`torch.optim.Muon` takes neither convolutions nor rescaling.) Adam (Kingma & Ba, 2015) does the same for single
    numbers: how far a step goes depends on the rate alone, not on the scale of the gradients.

    Args:
        params: Parameters or groups, as for every torch optimizer.
        lr: Step length: for Muon, of each direction, which says how far filters turn if they are rescaled; for Adam, in
            units of the parameter.
        momentum: Share of the past gradients that Muon keeps, 0 to 1.
        betas: Shares of the past gradients and of their squares that Adam keeps, 0 to 1.
        eps: Keeps Adam from dividing by zero.
        orthogonal: Whether to orthogonalise; takes parameters of two dimensions or more.
        rescale: Whether to bring the filters to norm sqrt(out); for layers with BatchNorm behind them.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float = 0.12,
        momentum: float = 0.6,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        orthogonal: bool = True,
        rescale: bool = True,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps}
        super().__init__(params, {**defaults, "orthogonal": orthogonal, "rescale": rescale})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = _muon_step if group["orthogonal"] else _adam_step
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update(parameter, parameter.grad, self.state[parameter], group)
        return loss


def _muon_step(parameter: Tensor, gradient: Tensor, state: dict, group: dict) -> None:
    if not state:
        state["momentum_buffer"] = torch.zeros_like(parameter)
    momentum = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
    direction = gradient.add(momentum, alpha=group["momentum"])  # Nesterov
    if group["rescale"]:
        parameter.mul_(len(parameter) ** 0.5 / parameter.norm().clamp(min=1e-7))
    parameter.add_(orthogonalize(direction.flatten(1)).view(parameter.shape), alpha=-group["lr"])


def _adam_step(parameter: Tensor, gradient: Tensor, state: dict, group: dict) -> None:
    if not state:
        state |= {"step": 0, "mean": torch.zeros_like(parameter), "square": torch.zeros_like(parameter)}
    state["step"] += 1
    beta1, beta2 = group["betas"]
    mean = state["mean"].lerp_(gradient, 1 - beta1) / (1 - beta1 ** state["step"])
    square = state["square"].lerp_(gradient.square(), 1 - beta2) / (1 - beta2 ** state["step"])
    parameter.sub_(mean / (square.sqrt() + group["eps"]), alpha=group["lr"])


def orthogonalize(matrix: Tensor) -> Tensor:
    """Nearly the orthogonal matrix nearest to `matrix` (M, N): the same singular vectors, singular values about 1.

    Three Newton-Schulz steps in bf16, with the coefficients of K. Jordan's Muon, chosen for the steepest rise from 0.
    They bring singular values to 0.7 to 1.2, but for those below a fiftieth of the norm, which stay short: in the
    gradient of a small batch they are noise.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16()
    x = x / (x.norm() + 1e-7)
    if tall := len(x) > x.shape[1]:
        x = x.T
    for _ in range(3):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


def recipe_optimizer(model: nn.Module, lr: float = 0.12) -> Muon:
    """The recipe's optimizer for any network, not only `Net`.

    Dense filters of at least 32 weights go to Muon at `lr`. Everything else goes to Adam, biases at lr / 6 and the rest
    (smaller and depthwise filters, BatchNorm's gains, linear layers) at lr / 12; its betas and eps are those that K.
    Jordan pairs with Muon. Filters are rescaled where the network has BatchNorm at all, taken to stand behind every
    dense convolution; where it does not, pretrained filters would lose their scale.
    """
    filters: list[Tensor] = []
    biases: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            dense = parameter.ndim == 4 and parameter.shape[1] > 1 and parameter[0].numel() >= 32
            (filters if dense else biases if name.endswith("bias") else rest).append(parameter)
    rescale = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    groups = [
        {"params": filters, "lr": lr, "rescale": rescale},
        {"params": biases, "lr": lr / 6, "orthogonal": False},
        {"params": rest, "lr": lr / 12, "orthogonal": False},
    ]
    return Muon([group for group in groups if group["params"]])
