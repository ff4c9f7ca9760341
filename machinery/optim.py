"""The optimizer: orthogonalised momentum for dense convolution filters, Adam for everything else."""

import itertools
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adam import adam
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from machinery.device import fastest_precision
from machinery.errors import SettingError


class Muon(Optimizer):
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

    Raises:
        ValueError: A group is to be orthogonalised that has parameters of fewer than two dimensions.
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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["orthogonal"] and (flat := [tuple(p.shape) for p in group["params"] if p.ndim < 2]):
            raise ValueError(
                f"Muon orthogonalises matrices, and a parameter has the shape {flat[0]}: use recipe_optimizer(model), "
                "which leaves such parameters to Adam, or give them in a group with orthogonal=False"
            )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in parameters if p.grad is not None]
            if parameters:
                (self._muon_step if group["orthogonal"] else self._adam_step)(parameters, gradients, group)
        return loss

    def _muon_step(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        momenta = [self._state(p, "momentum_buffer") for p in parameters]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, gradients)
        directions = torch._foreach_add(gradients, momenta, alpha=group["momentum"])  # Nesterov
        if group["rescale"]:
            norms = torch._foreach_norm(parameters)
            torch._foreach_clamp_min_(norms, 1e-7)
            torch._foreach_reciprocal_(norms)
            torch._foreach_mul_(norms, [len(p) ** 0.5 for p in parameters])
            torch._foreach_mul_(parameters, norms)
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)  # matrices of one shape are multiplied together
        for i, direction in enumerate(directions):
            alike[direction.flatten(1).shape].append(i)
        for places in alike.values():
            steps = orthogonalize(torch.stack([directions[i].flatten(1) for i in places]))
            for i, step in zip(places, steps, strict=True):
                parameters[i].sub_(step.view_as(directions[i]) * group["lr"])

    def _adam_step(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        on_cuda = parameters[0].is_cuda
        adam(
            parameters,
            gradients,
            [self._state(p, "mean") for p in parameters],
            [self._state(p, "square") for p in parameters],
            [],
            [self._state(p, "steps") for p in parameters],
            foreach=not on_cuda,
            fused=on_cuda,
            capturable=on_cuda,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )

    def _state(self, parameter: Tensor, name: str) -> Tensor:
        state = self.state[parameter]
        if name not in state and name == "steps":  # in checkpoints from before, "step", an integer
            state[name] = torch.full((), float(state.pop("step", 0)), device=parameter.device)
        elif name not in state:
            state[name] = torch.zeros_like(parameter)
        return state[name]


def orthogonalize(matrices: Tensor) -> Tensor:
    """Nearly the orthogonal matrix nearest to each of `matrices` (..., M, N): singular values of about 1.

    Three Newton-Schulz steps, with the coefficients of K. Jordan's Muon, chosen for the steepest rise from 0. They
    bring singular values to 0.7 to 1.2, but for those below a fiftieth of the norm, which stay short: in the gradient
    of a small batch they are noise. In bf16, but in fp32 on processors and GPUs that only emulate it, and on MPS: with
    AVX2 alone, bf16 takes 24 times as long.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16() if fastest_precision(matrices.device.type) == "bf16" else matrices.float()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    for _ in range(3):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


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


def optimizer_and_scheduler(
    model: nn.Module, optimizer: Optimizer | None, scheduler: LRScheduler | None, lr: float, lengths: list[int]
) -> tuple[Optimizer, LRScheduler | None]:
    """Those given, if they fit each other and the model; else those of the recipe.

    Args:
        model: What they train.
        optimizer: Of its parameters, or None for that of the recipe, with a learning rate that falls linearly to 0
            over all epochs.
        scheduler: Of that optimizer, if one is given.
        lr: Of the recipe.
        lengths: How many steps each epoch has.

    Raises:
        SettingError: They do not fit.
    """
    if optimizer is None:
        if scheduler is not None:
            raise SettingError("scheduler: it needs the optimizer that it is of; give fit both")
        ends = [0, *itertools.accumulate(lengths)]  # the steps at which epochs end
        optimizer = recipe_optimizer(model, lr)
        return optimizer, LambdaLR(
            optimizer, lambda step: 1 - float(np.interp(step, ends, range(len(ends)))) / len(lengths)
        )
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if unknown := own - set(map(id, model.parameters())):
        raise SettingError(f"optimizer: {len(unknown)} of its parameters are not of this model")
    if scheduler is not None and scheduler.optimizer is not optimizer:
        raise SettingError("scheduler: it is of another optimizer than the one given")
    if isinstance(scheduler, ReduceLROnPlateau):
        raise SettingError("scheduler: it is stepped after every batch, which ReduceLROnPlateau cannot be")
    return optimizer, scheduler
