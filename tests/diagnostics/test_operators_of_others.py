"""The Hessian as SciPy's operator, and the solvers on operators of others, against dense matrices in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from scipy.sparse.linalg import LinearOperator, aslinearoperator, eigsh
from torch import Tensor

import vitscope as vs
from tests.fixtures.oracles.hessian_oracle import by_magnitude, dense_hessian, make
from vitscope.runtime.errors import NumericalError


@pytest.fixture(scope="module")
def probe() -> vs.Probe:
    model, x, y = make("conv")
    return vs.Probe(model, [(x[:5], y[:5]), (x[5:], y[5:])], vs.Objective(weight_decay=0.1))


@pytest.fixture(scope="module")
def dense(probe: vs.Probe) -> np.ndarray:
    model, x, y = make("conv")
    return dense_hessian(model, x, y, vs.Objective(weight_decay=0.1))


def matrix_with(eigenvalues: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return a symmetric matrix with these eigenvalues and random eigenvectors."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(eigenvalues),) * 2))
    return (q * eigenvalues) @ q.T


class OperatorOfTensors:
    """The interface of curvlinops' operators."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.shape, self.dtype, self.device = matrix, matrix.shape, matrix.dtype, matrix.device

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.matrix @ v


def test_products_are_those_of_the_dense_hessian(probe: vs.Probe, dense: np.ndarray) -> None:
    before = {name: value.clone() for name, value in probe.model.state_dict().items()}
    flags = [p.requires_grad for p in probe.model.parameters()]
    operator = vs.hessian_operator(probe)
    assert isinstance(operator, LinearOperator)
    assert (operator.shape, operator.dtype) == (dense.shape, np.float64)
    assert operator.parameter_names == tuple(name for name, _ in probe.model.named_parameters())
    vectors = np.random.default_rng(1).standard_normal((len(dense), 3))
    # sums over some hundred terms in float64
    np.testing.assert_allclose(operator @ vectors, dense @ vectors, atol=1e-12)
    np.testing.assert_allclose(operator.T @ vectors[:, 0], dense @ vectors[:, 0], atol=1e-12)
    np.testing.assert_allclose(operator @ vectors[:, :1].astype(np.float32), dense @ vectors[:, :1], atol=1e-5)
    with operator as entered:
        np.testing.assert_allclose(entered @ vectors[:, 0], dense @ vectors[:, 0], atol=1e-12)
        with pytest.raises(RuntimeError, match="entered already"), operator:
            pass
    assert operator.n_products == 6
    np.testing.assert_allclose(operator @ vectors[:, 0], dense @ vectors[:, 0], atol=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in probe.model.state_dict().items())
    assert [p.requires_grad for p in probe.model.parameters()] == flags


def test_an_error_inside_gives_the_model_back(probe: vs.Probe) -> None:
    operator = vs.hessian_operator(probe)
    probe.model.train()
    with pytest.raises(KeyError), operator:
        assert not probe.model.training
        raise KeyError
    assert probe.model.training
    probe.model.eval()


def test_solvers_agree(probe: vs.Probe, dense: np.ndarray, tmp_path: Path) -> None:
    values = by_magnitude(np.linalg.eigvalsh(dense), 5)
    with vs.hessian_operator(probe) as operator:
        np.testing.assert_allclose(by_magnitude(eigsh(operator, k=5, return_eigenvectors=False), 5), values, rtol=1e-9)
    result = vs.eigenvalues_of(vs.hessian_operator(probe), k=5, tol=1e-8)
    np.testing.assert_allclose(result.eigenvalues, values, rtol=1e-7)
    assert result.converged.all()
    assert np.isnan(result.l2_contribution).all()
    assert (result.parameter_names, result.card) == ((), None)
    result.save(tmp_path / "result.npz")
    assert vs.load_result(tmp_path / "result.npz") == result
    np.testing.assert_allclose(result.eigenvalues, vs.hessian_eigenvalues(probe, k=5, tol=1e-8).eigenvalues, rtol=1e-7)


def test_a_density_is_that_of_the_probe(probe: vs.Probe) -> None:
    ours = vs.spectral_density(probe, n_vectors=3, n_steps=8, seed=2)
    theirs = vs.spectral_density_of(vs.hessian_operator(probe), n_vectors=3, n_steps=8, seed=2)
    # the L2 term is a shift there and a part of the product here
    np.testing.assert_allclose(theirs.nodes, ours.nodes, atol=1e-10)
    np.testing.assert_allclose(theirs.weights, ours.weights, atol=1e-8)
    assert theirs.card is None
    assert (theirs.size, theirs.n_products) == (ours.size, 24)
    assert vs.plot(theirs).axes


@pytest.mark.parametrize(
    "form",
    [
        lambda m: m,
        aslinearoperator,
        scipy.sparse.csr_matrix,
        lambda m: LinearOperator(m.shape, matvec=lambda v: m @ v),
        torch.from_numpy,
        lambda m: torch.from_numpy(m).requires_grad_(),
        lambda m: OperatorOfTensors(torch.from_numpy(m)),
    ],
    ids=["array", "operator", "sparse", "function", "tensor", "tensor with gradient", "as curvlinops"],
)
@pytest.mark.parametrize(
    ("which", "expected"),
    [("LM", [-9.0, 7.0]), ("LA", [7.0, 4.0]), ("SA", [-9.0, -1.0]), ("both", [7.0, 4.0, -9.0, -1.0])],
)
def test_every_form_has_the_eigenvalues_of_its_matrix(form: Any, which: str, expected: list[float]) -> None:
    matrix = matrix_with(np.array([-9.0, -1.0, *np.linspace(-0.5, 0.5, 20), 4.0, 7.0]))
    result = vs.eigenvalues_of(form(matrix), k=2, which=which, tol=1e-9, eigenvectors=True)
    np.testing.assert_allclose(result.eigenvalues, expected, rtol=1e-9)
    vectors = result.eigenvectors
    assert np.abs(matrix @ vectors.T - vectors.T * result.eigenvalues).max() < 1e-5


def test_float32_operators_stay_in_float32() -> None:
    matrix = matrix_with(np.linspace(-3, 5, 30)).astype(np.float32)
    matrix = (matrix + matrix.T) / 2
    result = vs.eigenvalues_of(OperatorOfTensors(torch.from_numpy(matrix)), k=1)
    assert result.eigenvalues[0] == pytest.approx(5.0, rel=1e-3)
    assert result.eigenvectors.size == 0


@pytest.mark.parametrize("tol", [1e-2, 1e-3])
def test_the_largest_eigenvalue_is_not_passed_over(tol: float) -> None:
    """With the three confirming products of searches that start at a gradient, 4 and 2 of these 60 end at the second one."""
    values = np.linspace(-3, 5, 30)
    for seed in range(60):
        found = vs.eigenvalues_of(matrix_with(values, seed), k=1, tol=tol, seed=seed)
        assert found.eigenvalues[0] == pytest.approx(5.0, rel=tol)


def test_a_whole_spectrum_is_its_own_quadrature() -> None:
    values = np.array([-2.0, 0.5, 1.0, 3.0])
    result = vs.spectral_density_of(matrix_with(values), n_vectors=1, n_steps=10)
    np.testing.assert_allclose(result.nodes[0], values, atol=1e-12)
    assert result.n_products == 4


@pytest.mark.parametrize(
    ("operator", "error"),
    [
        (np.triu(np.ones((4, 4))), "symmetric operator, received one for which"),
        (np.ones((4, 3)), r"square operator of shape \(size, size\), received shape \(4, 3\)"),
        (1j * np.eye(3), "float32 or float64 numbers, received complex128"),
        (torch.eye(3, dtype=torch.bfloat16), "float32 or float64 numbers, received torch.bfloat16"),
        ("matrix", "received shape none"),
    ],
)
def test_what_is_no_symmetric_operator_is_refused(operator: Any, error: str) -> None:
    for solve in (vs.eigenvalues_of, vs.spectral_density_of):
        with pytest.raises(ValueError, match=error):
            solve(operator)


def test_unusable_options_and_products_are_refused() -> None:
    with pytest.raises(ValueError, match="Expected k between 1 and the operator's 4 rows, received 5"):
        vs.eigenvalues_of(np.eye(4), k=5)
    with pytest.raises(ValueError, match="Expected n_steps to be at least 1"):
        vs.spectral_density_of(np.eye(4), n_steps=0)
    with pytest.raises(NumericalError, match="a product is not finite"):
        vs.eigenvalues_of(np.full((3, 3), np.nan), k=1)


def test_operators_of_curvlinops() -> None:
    curvlinops = pytest.importorskip("curvlinops")
    model, x, y = make("conv")
    params = [p for p in model.parameters() if p.requires_grad]
    operator = curvlinops.GGNLinearOperator(model, torch.nn.CrossEntropyLoss(), params, [(x, y)])
    found = vs.eigenvalues_of(operator, k=3, tol=1e-8).eigenvalues
    ours = vs.hessian_eigenvalues(vs.Probe(model, [(x, y)]), k=3, tol=1e-8, operator="ggn").eigenvalues
    np.testing.assert_allclose(found, ours, rtol=1e-6)
