"""GGN and Fisher products of every loss against dense matrices from explicit Jacobians in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import vitscope as vs
from vitscope.linalg.curvature.operator_factory import curvatures

N, K = 5, 3


def network(dense: bool) -> nn.Module:
    torch.manual_seed(0)
    if dense:
        return nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Conv2d(2, K, 1)).double()
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, K)).double()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


X = torch.randn(N, 1, 3, 3, generator=generator(1), dtype=torch.float64)
INDICES = torch.tensor([0, 2, -100, 1, 1])
PIXELS = torch.randint(0, K, (N, 2, 2), generator=generator(2))
PIXELS[0, 0] = PIXELS[3, 1, 1] = -100
PIXELS[4] = -100  # an image without a labeled pixel
VALUES = torch.randn(N, K, generator=generator(3), dtype=torch.float64)
SEVERAL = torch.rand(N, K, generator=generator(4), dtype=torch.float64).round()


def one_hot() -> Tensor:
    return F.one_hot(INDICES.clamp(min=0), K).double()


#: loss and targets -> (each image's loss, the image's number of examples)
def image_mse(z: Tensor, y: Tensor) -> Tensor:
    return (z - y).square().mean()


def image_bce(z: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, y)


def image_dense(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z[None], y[None], reduction="sum") / (y != -100).sum().clamp(min=1)


CASES: dict[str, tuple[str, Tensor, Tensor, Callable[[Tensor, Tensor], Tensor], Tensor]] = {
    "mse": ("mse", VALUES, VALUES, image_mse, torch.ones(N, dtype=torch.float64)),
    "mse of classes": ("mse", INDICES, one_hot(), image_mse, (INDICES >= 0).double()),
    "bce": ("bce", SEVERAL, SEVERAL, image_bce, torch.ones(N, dtype=torch.float64)),
    "bce of integers": ("bce", SEVERAL.long(), SEVERAL, image_bce, torch.ones(N, dtype=torch.float64)),
    "bce of classes": ("bce", INDICES, one_hot(), image_bce, (INDICES >= 0).double()),
    "dense": ("dense_cross_entropy", PIXELS, PIXELS, image_dense, (PIXELS >= 0).flatten(1).sum(1).double()),
}


def oracle(kind: str, case: str) -> np.ndarray:
    """Return the matrix of an operator by definition: the weighted mean over images of J^T (d^2 l/dz^2) J, or of g g^T."""
    loss, _, targets, image_loss, weights = CASES[case]
    model = network(loss == "dense_cross_entropy")
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    total: Tensor | float = 0.0
    for x, y, weight in zip(X, targets, weights / weights.sum()):
        jacobians = torch.func.jacrev(lambda p, x=x: functional_call(model, p, (x[None],))[0])(parameters)
        z = model(x[None])[0].detach()
        jacobian = torch.cat([j.reshape(z.numel(), -1) for j in jacobians.values()], 1)
        if kind == "ggn":
            inner = torch.func.hessian(lambda z, y=y: image_loss(z, y))(z).reshape(z.numel(), z.numel())
        else:
            r = torch.func.grad(lambda z, y=y: image_loss(z, y))(z).reshape(-1)
            inner = torch.outer(r, r)
        total = total + weight * jacobian.T @ inner @ jacobian
    return torch.as_tensor(total).numpy()


def matrix(
    loss: str | Callable[..., Tensor],
    y: Tensor,
    kind: str,
    size: int | list[int] = 4,
    micro_batch: int | None = 3,
    n_samples: int = 1,
) -> np.ndarray:
    objective = vs.Objective(loss=loss)
    probe = vs.Probe(network(loss == "dense_cross_entropy"), list(zip(X.split(size), y.split(size))), objective)
    with curvatures(probe, operator=kind, micro_batch=micro_batch, n_samples=n_samples) as operators:
        operator = operators.mean()
        columns = [operator(column) for column in torch.eye(operator.size, dtype=torch.float64)]
    return torch.stack(columns).numpy()


@pytest.mark.parametrize("kind", ["ggn", "fisher_empirical"])
@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_explicit_jacobians(case: str, kind: str) -> None:
    loss, y, *_ = CASES[case]
    expected = oracle(kind, case)
    # float64: products of some hundred terms of order 1
    np.testing.assert_allclose(matrix(loss, y, kind), expected, rtol=0, atol=1e-13)
    assert np.linalg.eigvalsh(expected).min() > -1e-13


@pytest.mark.parametrize("case", CASES)
def test_the_mean_over_draws_of_the_fisher_is_the_ggn(case: str) -> None:
    loss, y, *_ = CASES[case]
    expected, n_samples = matrix(loss, y, "ggn", size=5, micro_batch=None), 20000
    difference = matrix(loss, y, "fisher_mc", size=5, micro_batch=None, n_samples=n_samples) - expected
    # each entry is a mean over draws with a relative deviation of about 1
    assert np.abs(difference).max() < 6 / n_samples**0.5 * np.abs(expected).max()


@pytest.mark.parametrize("case", ["mse", "bce", "dense"])
def test_draws_do_not_depend_on_the_split_into_batches(case: str) -> None:
    loss, y, *_ = CASES[case]
    whole = matrix(loss, y, "fisher_mc", size=5, micro_batch=None)
    for size, micro_batch in ((5, 2), ([1, 3, N - 4], None)):
        split = matrix(loss, y, "fisher_mc", size=size, micro_batch=micro_batch)
        np.testing.assert_allclose(split, whole, rtol=0, atol=1e-14)


def test_the_empirical_fisher_of_an_own_loss_is_that_of_the_named_one() -> None:
    def own(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean(1)

    expected = oracle("fisher_empirical", "mse")
    np.testing.assert_allclose(matrix(own, VALUES, "fisher_empirical"), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", ["ggn", "fisher_mc"])
def test_an_own_loss_has_no_ggn(kind: str) -> None:
    probe = vs.Probe(network(False), [(X, VALUES)], vs.Objective(loss=lambda z, y: (z - y).abs().mean(1)))
    with pytest.raises(ValueError, match=rf"Expected operator='hessian' \(or 'fisher_empirical'.*received '{kind}'"):
        vs.hessian_eigenvalues(probe, operator=kind)


def test_a_mean_has_no_empirical_fisher() -> None:
    probe = vs.Probe(network(False), [(X, VALUES)], vs.Objective(loss=nn.MSELoss()))
    with pytest.raises(
        ValueError, match=r"one value per image \(B,\), as operator='fisher_empirical'.*pass reduction='none'"
    ):
        vs.hessian_eigenvalues(probe, operator="fisher_empirical")
