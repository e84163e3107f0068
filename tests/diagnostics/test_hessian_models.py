"""Curvature of the package's own models, of timm's ResNet-18 and of ViT-Ti in float64, by other ways of differentiating.

The models have up to 11 million parameters, so these are products with a few directions: of some hundred parameters of
several kinds, and over all parameters, where they are compared with the forward derivative of the gradient.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import vitscope as vs
from tests.fixtures.networks.small_networks import (
    CLASSES,
    DECAY,
    EITHER,
    SUBSETS,
    N,
    Part,
    assert_close,
    data_of,
    directions,
    model_of,
    outer,
    rows,
)
from vitscope.linalg.curvature.operator_factory import curvatures


@pytest.mark.filterwarnings("ignore:l2='sum_norm':UserWarning")
@pytest.mark.parametrize("name", EITHER)
def test_hessian_of_some_parameters(name: str):
    part = Part(name)
    v = directions(len(part.flat))
    plain = part.hessian_products(vs.Objective(), v)
    scale = {key: 0.5 + p.abs() for key, p in part.named.items()}
    assert_close(rows(name, v), plain)
    for l2 in ("half_sq", "sum_norm", "adamw"):
        objective = vs.Objective(weight_decay=DECAY, l2=l2, decay_scale=scale if l2 == "adamw" else None)
        assert_close(rows(name, v, objective=objective), plain + part.l2_products(objective, v))


@pytest.mark.parametrize("name", EITHER)
def test_hessian_with_soft_labels(name: str):
    part = Part(name, soft=True)
    v = directions(len(part.flat))
    assert_close(rows(name, v, soft=True), part.hessian_products(vs.Objective(), v))
    # the cross entropy is linear in its targets: smoothing class indices is their mixture with uniform ones
    data = [(x, 0.8 * nn.functional.one_hot(y, CLASSES).double() + 0.2 / CLASSES) for x, y in data_of(name)]
    with curvatures(vs.Probe(part.model, data), parameters=SUBSETS.get(name)) as made:
        operator = made.mean()
        mixed = torch.stack([operator(u) for u in v]).numpy()
    assert_close(rows(name, v, objective=vs.Objective(label_smoothing=0.2)), mixed)


@pytest.mark.parametrize("name", EITHER)
def test_gauss_newton_and_fisher_of_some_parameters(name: str):
    part = Part(name)
    v = directions(len(part.flat)).numpy()
    jacobian = torch.autograd.functional.jacobian(part.logits, part.flat).numpy()  # (N, C, size)
    p = part.logits(part.flat).softmax(1).detach().numpy()
    drawn = [int((np.cumsum(row) <= np.random.default_rng((0, i)).random()).sum()) for i, row in enumerate(p)]
    inner = {
        "ggn": np.einsum("bc,cd->bcd", p, np.eye(CLASSES)) - np.einsum("bc,bd->bcd", p, p),
        "fisher_empirical": outer(p - np.eye(CLASSES)[part.y]),
        "fisher_mc": outer(p - np.eye(CLASSES)[drawn]),
    }
    for kind, middle in inner.items():
        dense = np.einsum("bci,bcd,bdj->ij", jacobian, middle, jacobian) / N
        assert_close(rows(name, torch.from_numpy(v), operator=kind), v @ dense)


@pytest.mark.parametrize(
    "name", ["vit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("convnet", "alternet"))]
)
def test_products_over_all_parameters_are_the_forward_derivative_of_the_gradient(name: str):
    model, data = model_of(name), data_of(name)
    x, y = (torch.cat(parts) for parts in zip(*data))
    point = {key: p.detach() for key, p in model.named_parameters()}
    objective = vs.Objective(weight_decay=DECAY)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return objective.data_loss(functional_call(model, parameters, (x,)), y) + objective.l2_term(parameters)

    with curvatures(vs.Probe(model, data, objective)) as made:
        operator = made.mean()
        v, other = directions(operator.size, 2)
        tangent = dict(zip(point, operator.split(v)))
        _, expected = torch.func.jvp(torch.func.grad(loss), (point,), (tangent,))
        found = operator(v)
        assert_close(found.numpy(), torch.cat([expected[key].reshape(-1) for key in point]).numpy())
        # symmetric: <u, H v> = <v, H u>, relative to the lengths
        assert abs(float(other @ found - v @ operator(other))) < 1e-11 * float(other.norm() * found.norm())


@pytest.mark.parametrize("name", [pytest.param("resnet18", marks=pytest.mark.slow), "vit_tiny"])
def test_top_eigenvalue_of_timm_models(name: str):
    model = model_of(name)
    x, y = data_of(name, n=4)[0]
    result = vs.hessian_eigenvalues(vs.Probe(model, [(x, y)]), k=1, eigenvectors=True)
    assert result.converged.all()
    parameters = list(model.parameters())
    sizes = [p.numel() for p in parameters]
    with sdpa_kernel(SDPBackend.MATH):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        gradient = torch.autograd.grad(loss, parameters, create_graph=True)

    def product(v: Tensor) -> Tensor:
        along = sum((g * part.view_as(g)).sum() for g, part in zip(gradient, v.split(sizes)))
        return torch.cat([h.reshape(-1) for h in torch.autograd.grad(along, parameters, retain_graph=True)])

    v = torch.from_numpy(result.eigenvectors[0])
    value, residual = float(v @ product(v)), float((product(v) - result.eigenvalues[0] * v).norm())
    assert result.eigenvalues[0] == pytest.approx(value, rel=1e-11)  # a Rayleigh quotient, float64
    assert result.residuals[0] == pytest.approx(residual, rel=1e-6)
    # power iteration by the other product from there: the value may not move by more than the tolerance
    for _ in range(20):
        v = product(v)
        v /= v.norm()
    assert result.eigenvalues[0] == pytest.approx(float(v @ product(v)), rel=1e-3)
