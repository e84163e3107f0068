"""The normalized Hessian against dense matrices in float64, and its invariance to a rescaling of units."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import vitscope as vs
from tests.fixtures.oracles.hessian_oracle import by_magnitude, dense_hessian, make


def probe_of(model, x, y, size=4, **objective):
    return vs.Probe(
        model, [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)], vs.Objective(**objective)
    )


class Convolutions(nn.Module):
    """Two convolutions, the first with a BatchNorm where asked for, and a linear layer, with ReLUs."""

    def __init__(self, norm=False):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4, eps=1e-12) if norm else nn.Identity()
        self.second, self.head = nn.Conv2d(4, 3, 2, bias=False), nn.Linear(12, 3, bias=False)

    def forward(self, x):
        z = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.second(z)).flatten(1))


def scaled_hessian(model, x, y, normalization):
    """Return the eigenvalues by magnitude of D H D of the parameters of two or more dimensions, dense in float64."""
    moves = torch.cat([torch.full((p.numel(),), p.ndim > 1) for p in model.parameters()]).numpy()
    if normalization == "weight":
        d = torch.cat([p.detach().abs().reshape(-1) for p in model.parameters()]).numpy()
    else:
        rows = [p.detach().flatten(1).norm(dim=1, keepdim=True).expand(len(p), p[0].numel()) if p.ndim > 1 else p.detach()
                for p in model.parameters()]  # fmt: skip
        d = torch.cat([row.reshape(-1) for row in rows]).numpy()
    d = d * moves
    values = np.linalg.eigvalsh(d[:, None] * dense_hessian(model, x, y, vs.Objective()) * d)
    return by_magnitude(values, 3)


def linear_layers():
    return nn.Sequential(nn.Flatten(), nn.Linear(25, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False))


@pytest.mark.parametrize("kind", ["linear", "convolution", "norm"])
def test_normalized_hessian_ignores_a_rescaling_of_single_units(kind):
    torch.manual_seed(0)
    model = (linear_layers() if kind == "linear" else Convolutions(kind == "norm")).double().eval()
    _, x, y = make()
    first = vs.normalized_hessian(probe_of(model, x, y), k=3, tol=1e-9).eigenvalues
    filters = vs.normalized_hessian(probe_of(model, x, y), k=3, tol=1e-9, normalization="filter").eigenvalues
    np.testing.assert_allclose(first, scaled_hessian(model, x, y, "weight"), rtol=1e-6)
    np.testing.assert_allclose(filters, scaled_hessian(model, x, y, "filter"), rtol=1e-6)
    plain, before = vs.hessian_eigenvalues(probe_of(model, x, y), k=3).eigenvalues, model(x).detach()
    with torch.no_grad():  # the same function: ReLU is positively homogeneous
        if kind == "linear":
            model[1].weight[2].mul_(5)
            model[3].weight[:, 2].mul_(1 / 5)
        else:
            model.second.weight[1].mul_(5)
            model.head.weight[:, 4:8].mul_(1 / 5)
            if kind == "norm":  # the unit before the layer, with its running statistics
                model.first.weight[0].mul_(3)
                model.norm.running_mean[0].mul_(3)
                model.norm.running_var[0].mul_(9)
            else:
                model.first.weight[0].mul_(3)
                model.second.weight[:, 0].mul_(1 / 3)
    np.testing.assert_allclose(model(x).detach(), before, rtol=1e-9)
    second = vs.normalized_hessian(probe_of(model, x, y), k=3, tol=1e-9).eigenvalues
    np.testing.assert_allclose(second, first, rtol=1e-7)
    assert not np.allclose(vs.hessian_eigenvalues(probe_of(model, x, y), k=3).eigenvalues, plain, rtol=0.1)
    again = vs.normalized_hessian(probe_of(model, x, y), k=3, tol=1e-9, normalization="filter").eigenvalues
    assert not np.allclose(again, filters, rtol=1e-2)  # as its description says


def test_normalized_hessian_ignores_a_filter_before_its_own_batch_statistics():
    torch.manual_seed(0)
    model = Convolutions(norm=True).double()
    _, x, y = make()
    found = []
    for _ in range(2):
        found.append([
            vs.normalized_hessian(probe_of(model, x, y), k=2, tol=1e-9, bn="batch", normalization=n).eigenvalues
            for n in ("weight", "filter")
        ])  # fmt: skip
        with torch.no_grad():
            model.first.weight[0].mul_(3)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6)


def test_filter_norms_ignore_a_rescaling_of_whole_layers():
    torch.manual_seed(0)
    model = linear_layers().double()
    _, x, y = make()
    options = {"k": 3, "tol": 1e-8, "normalization": "filter"}
    first = vs.normalized_hessian(probe_of(model, x, y), **options)
    with torch.no_grad():
        model[1].weight.mul_(4)
        model[3].weight.mul_(0.25)
    second = vs.normalized_hessian(probe_of(model, x, y), **options)
    np.testing.assert_allclose(second.eigenvalues, first.eigenvalues, rtol=1e-7)
    with pytest.raises(ValueError, match="normalization to be weight or filter, received 'layer'"):
        vs.normalized_hessian(probe_of(model, x, y), normalization="layer")
