"""Second derivatives of weight-normalized networks, against dense Hessians of networks with weights written out by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vitscope as vs
from vitscope.core.guard.weight_norm import DifferentiableWeightNorm, weight_norm
from vitscope.linalg.batched_lanczos import eigenvalues_side_by_side
from vitscope.linalg.curvature.operator_factory import curvatures

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*weight_norm.*:FutureWarning", "ignore:Attempted to insert:UserWarning"
)

#: how torch normalizes a layer's weight, for weights of n axes, and the axis of g
NORMALIZED: dict[str, tuple[Callable[[nn.Module], nn.Module], Callable[[int], int | None]]] = {
    "parametrization": (nn.utils.parametrizations.weight_norm, lambda n: 0),
    "hook": (nn.utils.weight_norm, lambda n: 0),
    "hook, last axis": (lambda m: nn.utils.weight_norm(m, dim=m.weight.ndim - 1), lambda n: n - 1),
    "whole tensor": (lambda m: nn.utils.parametrizations.weight_norm(m, dim=None), lambda n: None),
}


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    normalized = NORMALIZED[kind][0]
    conv, linear = normalized(nn.Conv2d(3, 3, 2)), normalized(nn.Linear(12, 4))
    return nn.Sequential(conv, nn.Tanh(), nn.Flatten(), linear, nn.Tanh(), nn.Linear(4, 3)).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, 3, 3, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 1, 0])


def dense_hessian(model: nn.Module, kind: str) -> Tensor:
    """Return the Hessian (size, size) of the network with v g / |v| in the place of its layers' weights."""
    named, (x, y) = dict(model.named_parameters()), batch()

    def weight(point: dict[str, Tensor], layer: str) -> Tensor:
        g, v = (next(p for key, p in point.items() if key.startswith(layer) and key.endswith(ends))
                for ends in (("original0", "_g"), ("original1", "_v")))  # fmt: skip
        axes = [axis for axis in range(v.ndim) if axis != NORMALIZED[kind][1](v.ndim)]
        return g * v / v.square().sum(axes, keepdim=True).sqrt()

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in named.values()])
        point = {key: part.view_as(p) for (key, p), part in zip(named.items(), parts)}
        z = F.conv2d(x, weight(point, "0."), point["0.bias"]).tanh().flatten(1)
        z = F.linear(z, weight(point, "3."), point["3.bias"]).tanh()
        return F.cross_entropy(F.linear(z, point["5.weight"], point["5.bias"]), y)

    flat = torch.cat([p.detach().reshape(-1) for p in named.values()])
    return torch.autograd.functional.hessian(loss, flat)


#: tracing a network takes seconds: one kind in CI, the others are marked slow
CASES = [
    pytest.param(kind, product, marks=pytest.mark.slow if product == "linearize" and kind != "parametrization" else ())
    for kind in NORMALIZED
    for product in ("reverse", "linearize")
]


@pytest.mark.parametrize(("kind", "product"), CASES)
def test_products_and_eigenvalues_are_those_of_the_dense_hessian(kind: str, product: str) -> None:
    model = network(kind)
    expected = dense_hessian(model, kind)
    v = torch.randn(len(expected), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with curvatures(vs.Probe(model, [batch()]), product=product) as made:
        torch.testing.assert_close(made.mean()(v), expected @ v, rtol=1e-10, atol=1e-12)
    found = vs.hessian_eigenvalues(vs.Probe(model, [batch()]), k=2, tol=1e-6, product=product)
    top = sorted(np.linalg.eigvalsh(expected.numpy()), key=abs)[:-3:-1]
    np.testing.assert_allclose(found.eigenvalues, top, rtol=1e-6)
    assert found.converged.all()


def test_several_batches_at_once_have_the_same_eigenvalues() -> None:
    model = network("parametrization")
    x, y = batch()
    with curvatures(vs.Probe(model, [(x, y), (x, y)])) as made:
        solutions = eigenvalues_side_by_side(made, [(0, (x, y)), (1, (x, y))], k=1, tol=1e-6)
    top = np.abs(np.linalg.eigvalsh(dense_hessian(model, "parametrization").numpy())).max()
    np.testing.assert_allclose([abs(solution.pairs.values[0]) for solution in solutions], top, rtol=1e-6)


def test_all_rows_are_those_of_the_dense_hessian() -> None:
    model = network("hook")
    expected = dense_hessian(model, "hook")
    with curvatures(vs.Probe(model, [batch()])) as made:
        operator = made.mean()
        rows = torch.stack([operator(row) for row in torch.eye(len(expected), dtype=torch.float64)])
    torch.testing.assert_close(rows, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "dim"), [((5, 4), 0), ((5, 4), 1), ((3, 2, 4), 1), ((3, 2, 4), -2), ((5, 4), -1), ((6,), 0)]
)
def test_values_are_torch_s_and_second_derivatives_right(shape: tuple[int, ...], dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    g = torch.norm_except_dim(v.detach(), 2, dim).add_(0.5).requires_grad_()
    torch.testing.assert_close(weight_norm(v, g, dim), torch._weight_norm(v, g, dim), rtol=1e-14, atol=0)
    with DifferentiableWeightNorm():
        assert torch.autograd.gradgradcheck(lambda v, g: torch._weight_norm(v, g, dim), (v, g))


def test_torch_s_own_function_is_back_after_the_guard() -> None:
    model = network("parametrization")
    with vs.Probe(model, [batch()]).guard(second_order=True):
        pass
    v = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    weight = torch._weight_norm(v, torch.ones(3, 1, dtype=torch.float64), 0)
    assert "WeightNorm" in type(weight.grad_fn).__name__
