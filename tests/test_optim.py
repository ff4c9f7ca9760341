"""The optimizer: which parameters go where, and how they step."""

import pytest
import torch
from small_runs import plain
from torch import nn

from machinery.optim import Muon, orthogonalize
from model import Net
from train import fit, recipe_optimizer


def test_orthogonalize_keeps_the_directions_and_evens_out_their_lengths():
    matrix = torch.randn(8, 40) * torch.logspace(0, 1, 8)[:, None]
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalize(matrix)
    assert torch.linalg.svdvals(result).min() > 0.5
    assert torch.linalg.svdvals(result).max() < 1.4
    assert (u.T @ result @ v.T).diagonal().min() > 0.5
    torch.testing.assert_close(orthogonalize(matrix.T), result.T, rtol=0.1, atol=0.05)


def test_every_parameter_has_one_place_in_the_optimizer():
    net = Net()
    optimizer = recipe_optimizer(net)
    placed = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, placed)) == sorted(map(id, net.parameters()))
    orthogonal = {id(p) for group in optimizer.param_groups if group["orthogonal"] for p in group["params"]}
    assert id(net.c3[0][0].conv.weight) in orthogonal
    assert id(net.c4[1].depthwise.conv.weight) not in orthogonal


def test_the_other_groups_step_as_torch_adam_does():
    start = torch.tensor([1.0, -2.0, 3.0])
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    muon = Muon([ours], lr=0.1, betas=(0.8, 0.9), eps=1e-8, orthogonal=False)
    adam = torch.optim.Adam([theirs], lr=0.1, betas=(0.8, 0.9), eps=1e-8)
    for _ in range(5):
        for parameter, optimizer in ((ours, muon), (theirs, adam)):
            optimizer.zero_grad()
            (parameter**4).sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_muon_for_all_parameters_names_the_optimizer_that_can():
    with pytest.raises(ValueError, match=r"\(32,\).*recipe_optimizer\(model\).*orthogonal=False"):
        Muon(Net().parameters())
    Muon(Net().parameters(), orthogonal=False)
    Muon(p for p in Net().parameters() if p.ndim == 4)


def test_depthwise_and_zero_filters_of_other_networks_train():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 5), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 7, groups=8), nn.AdaptiveAvgPool2d(1)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 10))
    nn.init.zeros_(model[0].weight)
    orthogonal = [p for group in recipe_optimizer(model).param_groups if group["orthogonal"] for p in group["params"]]
    assert len(orthogonal) == 1
    assert orthogonal[0] is model[0].weight
    fit(plain(epochs=1), model)
    assert all(p.isfinite().all() for p in model.parameters())


def test_directions_without_bf16_are_those_with_it(monkeypatch):
    matrices, directions = torch.randn(3, 40, 90), {}
    for precision in ("bf16", "fp16", "fp32"):
        monkeypatch.setattr("machinery.optim.fastest_precision", lambda device, precision=precision: precision)
        directions[precision] = orthogonalize(matrices)
    assert torch.equal(directions["fp16"], directions["fp32"]), "fp16 has too small a range"
    in_bf16, in_fp32 = directions["bf16"], directions["fp32"]
    assert not torch.equal(in_bf16, in_fp32)
    cosine = (in_bf16 * in_fp32).sum((1, 2)) / (in_bf16.norm(dim=(1, 2)) * in_fp32.norm(dim=(1, 2)))
    assert (1 - cosine).max() < 1e-2
