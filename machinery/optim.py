"""The optimizer: orthogonalised momentum for dense convolutions, Adam for the rest."""

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
    """Muon for the groups with `orthogonal=True`, Adam (Kingma & Ba, 2015) for the others.

    Muon (K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024) takes the momentum of a
    filter bank as a matrix (out, in * height * width) and steps along the nearest orthogonal one, so that every
    direction learns at the same pace. (`torch.optim.Muon` takes neither convolutions nor rescaling.)

    Args:
        params: Parameters or groups; ValueError if one to be orthogonalised has fewer than two dimensions.
        lr: Step length: for Muon, of each direction; for Adam, in units of the parameter.
        momentum: Muon's decay, 0 to 1.
        betas, eps: Adam's.
        rescale: Whether to bring filters to norm sqrt(out) before each step, for layers followed by BatchNorm, which
            undoes their scale; the rate is then the angle of a step.
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
        loss = torch.enable_grad()(closure)() if closure else None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in parameters]
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
        kind = parameters[0].device.type
        adam(
            parameters,
            gradients,
            [self._state(p, "mean") for p in parameters],
            [self._state(p, "square") for p in parameters],
            [],
            [self._state(p, "steps") for p in parameters],
            foreach=kind == "cpu",
            fused=kind != "cpu",  # on MPS, what is not fused reads each step count on the host
            capturable=kind == "cuda",
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
        if name not in state:
            state[name] = torch.zeros((), device=parameter.device) if name == "steps" else torch.zeros_like(parameter)
        return state[name]


def orthogonalize(matrices: Tensor) -> Tensor:
    """Nearly the orthogonal matrix nearest to each of `matrices` (..., M, N), by three of Muon's Newton-Schulz steps.

    Singular values become 0.7 to 1.2, except those below a fiftieth of the norm, which are noise.
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
    """The recipe's optimizer, for any network.

    Dense filters of at least 32 weights go to Muon at `lr`, biases to Adam at lr / 6, the rest (smaller and depthwise
    filters, BatchNorm's gains, linear layers) to Adam at lr / 12. Filters are rescaled if the network has BatchNorm;
    without it, pretrained filters would lose their scale.
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


def linear_schedule(optimizer: Optimizer, steps: list[int]) -> LambdaLR:
    """The rates fall linearly to 0 over all epochs."""
    ends = [0, *itertools.accumulate(steps)]  # the steps at which epochs end
    return LambdaLR(optimizer, lambda step: 1 - float(np.interp(step, ends, range(len(ends)))) / len(steps))


def refuse_unfit(model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | None, steps: int) -> None:
    """Raises SettingError if optimizer or scheduler do not fit the model, each other, or so many steps."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if unknown := own - set(map(id, model.parameters())):
        raise SettingError(f"optimizer: {len(unknown)} of its parameters are not of this model")
    if scheduler is not None and scheduler.optimizer is not optimizer:
        raise SettingError("scheduler: it is of another optimizer than the one given")
    if isinstance(scheduler, ReduceLROnPlateau):
        raise SettingError("scheduler: it is stepped after every batch, which ReduceLROnPlateau cannot be")
    total = getattr(scheduler, "total_steps", None)  # of OneCycleLR
    if isinstance(total, int) and total < steps:
        raise SettingError(f"scheduler: its total_steps are {total}, and the run has {steps} steps; make it with these")


def set_rates(optimizer: Optimizer, scheduler: Any, device: torch.device | None = None) -> None:
    """Sets the rates of a `linear_schedule` at its step; on a `device` as tensors, for CUDA graphs."""
    for group, base, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        rate = float(base) * factor(scheduler.last_epoch)
        group["lr"] = rate if device is None else torch.tensor(rate, device=device)


def has_stepped(optimizer: Optimizer, scheduler: LRScheduler) -> bool:
    """Whether the optimizer has stepped since the scheduler began; fp16 may skip the first steps."""
    if getattr(scheduler, "_step_count", 1) > 1:  # before an interruption, maybe; it counts its own beginning
        return True
    return getattr(optimizer, "_opt_called", not hasattr(optimizer.step, "_wrapped_by_lr_sched"))  # noted by torch
