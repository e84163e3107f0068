"""Agreement with curvature packages that others wrote, where they are installed (``pip install .[bench]``), in float64.

curvlinops 3.0.1 forms its Hessian by ``jvp`` of ``torch.func.jacrev``, which on torch 2.14 is wrong through a LayerNorm with a
trainable weight (5 % off the dense matrix here, and not symmetric), so its Hessian is compared on the ConvNet alone.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import vitscope as vs
from tests.fixtures.oracles.hessian_oracle import by_magnitude, make
from vitscope.linalg.curvature.operator_factory import curvatures

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def batches_of(kind: str) -> tuple[nn.Module, list]:
    """Return a model and two batches of unequal size, over which a mean of means would be wrong."""
    model, x, y = make(kind, n=12)
    return model, [(x[:8], y[:8]), (x[8:], y[8:])]


@pytest.mark.parametrize(
    ("operator", "peer", "kind"),
    [
        ("hessian", "HessianLinearOperator", "conv"),
        ("ggn", "GGNLinearOperator", "conv"),
        ("ggn", "GGNLinearOperator", "attention"),
        ("fisher_empirical", "EFLinearOperator", "conv"),
        ("fisher_empirical", "EFLinearOperator", "attention"),
    ],
)
def test_products_are_curvlinops(operator: str, peer: str, kind: str):
    curvlinops = pytest.importorskip("curvlinops")
    model, batches = batches_of(kind)
    with sdpa_kernel(SDPBackend.MATH):
        theirs = getattr(curvlinops, peer)(
            model, nn.CrossEntropyLoss(), list(model.parameters()), batches, check_deterministic=False
        )
        with curvatures(vs.Probe(model, batches), operator=operator) as made:
            ours = made.mean()
            for v in torch.randn(3, ours.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)):
                # float64: some hundred terms in another order
                torch.testing.assert_close(ours(v), theirs @ v, rtol=1e-10, atol=1e-12)


def test_eigenvalues_are_those_of_eigsh_on_curvlinops():
    curvlinops = pytest.importorskip("curvlinops")
    from scipy.sparse.linalg import eigsh

    model, batches = batches_of("conv")
    found = vs.hessian_eigenvalues(vs.Probe(model, batches), k=4, tol=1e-6)
    with sdpa_kernel(SDPBackend.MATH):
        operator = curvlinops.HessianLinearOperator(
            model, nn.CrossEntropyLoss(), list(model.parameters()), batches, check_deterministic=False
        )
        theirs = eigsh(operator.to_scipy(), k=4, which="LM", tol=1e-10, return_eigenvectors=False)
    # ours are within 1e-6 of their magnitude by their own estimate, or exact
    np.testing.assert_allclose(found.eigenvalues, by_magnitude(theirs, 4), rtol=2e-6)


@pytest.mark.parametrize("kind", ["conv", "attention"])
def test_eigenvalues_are_those_of_hessian_eigenthings(kind: str):
    eigenthings = pytest.importorskip("hessian_eigenthings")
    model, batches = batches_of(kind)
    whole = [tuple(torch.cat(parts) for parts in zip(*batches))]  # it averages batches by their number
    found = vs.hessian_eigenvalues(vs.Probe(model, batches), k=3, tol=1e-6)
    with sdpa_kernel(SDPBackend.MATH):
        loss = eigenthings.supervised_loss(nn.CrossEntropyLoss())
        operator = eigenthings.HessianOperator(model, whole, loss)
        theirs = eigenthings.lanczos(operator, k=3, max_iter=60, tol=1e-10, seed=0, reorthogonalize=True).eigenvalues
    np.testing.assert_allclose(found.eigenvalues, by_magnitude(theirs.tolist(), 3), rtol=2e-6)
