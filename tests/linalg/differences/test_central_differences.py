"""Products by differences: against dense Hessians in float64 within their own estimate, refusals, and the model as it was."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

import vitscope as vs
from tests.fixtures.networks.small_networks import data_of, model_of
from tests.fixtures.oracles.hessian_oracle import by_magnitude, dense_hessian, make
from tests.fixtures.programs.processes import results_of_ranks
from vitscope.linalg.curvature.operator_factory import curvatures
from vitscope.linalg.differences.central_differences import CentralDifferences
from vitscope.runtime.errors import NumericalError

#: of the estimate of an error, which the error must not exceed: the module's docstring derives about 1, and says that 2 is safe
SAFE = 2.0
OBJECTIVE = vs.Objective(weight_decay=0.1)


def probe_of(kind: str, **options: Any) -> vs.Probe:
    model, x, y = make(kind)
    return vs.Probe(model, list(zip(x.split([7, 5]), y.split([7, 5]))), OBJECTIVE, **options)


def hessian_of(kind: str) -> np.ndarray:
    model, x, y = make(kind)
    return dense_hessian(model, x, y, OBJECTIVE)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", ["conv", "vit"])
def test_the_error_of_each_product_is_within_twice_its_estimate(kind: str, dtype: str) -> None:
    hessian = hessian_of(kind)
    values, vectors = np.linalg.eigh(hessian)
    tried = [vectors[:, -1], vectors[:, 0], vectors[:, len(values) // 2], vectors.sum(1), np.ones(len(values))]
    norm = np.abs(values).max()
    for vector in tried:
        v = torch.from_numpy(vector / np.linalg.norm(vector))
        with curvatures(probe_of(kind), product="difference", dtype=dtype) as operators:
            operator = operators.mean()
            product = operator(v.to(operator.dtype)).double().numpy()
            estimate = operator.product_error
        error = np.linalg.norm(product - hessian @ v.numpy())
        assert error <= SAFE * estimate
        # eps^(2/3) of the balance, times the size of third derivatives and of the network's rounding over eps
        assert estimate <= 30 * float(torch.finfo(getattr(torch, dtype)).eps) ** (2 / 3) * norm


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", ["conv", "vit"])
def test_eigenvalues_are_within_their_stated_errors(kind: str, dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    expected = by_magnitude(np.linalg.eigvalsh(hessian_of(kind)), 3)
    with caplog.at_level(logging.INFO):
        result = vs.hessian_eigenvalues(probe_of(kind), k=3, product="difference", dtype=dtype)
    assert (np.abs(result.eigenvalues - expected) <= SAFE * result.errors).all()
    assert result.converged.all()
    assert result.card is not None
    error = result.card.solver["difference_error"]
    assert 0 < error < 1e-3
    assert result.errors.min() >= 0.9 * error * np.abs(result.eigenvalues).max() / 2  # products are at most that long
    assert f"products within {error:.2g} of the largest one (tol=0.001)" in caplog.text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the two halves of a block")  # few vectors are enough to compare
def test_other_measures_agree_with_the_exact_product() -> None:
    def measured(product: str) -> dict[str, Any]:
        probe = probe_of("conv")
        parts = {"product": product}
        return {
            "nodes": vs.spectral_density(probe, n_vectors=1, n_steps=6, **parts).nodes,
            "trace": vs.hessian_trace(probe, n_vectors=3, **parts).trace,
            "hutch++": vs.hessian_trace(probe, n_vectors=3, method="hutch++", **parts).trace,
            "diagonal": vs.hessian_diagonal(probe, n_vectors=3, **parts).diagonal,
            "blocks": vs.hessian_block_densities(
                probe, blocks=["conv.*", "head.*"], n_vectors=2, n_steps=4, sigma=2.0, **parts
            ).nodes,
            "spectrum": vs.hessian_max_eigenvalue_spectrum(probe, n_top=2, **parts).eigenvalues,
            "batch statistics": vs.hessian_eigenvalues(probe, k=1, bn="batch", **parts).eigenvalues,
            "micro-batches": vs.hessian_eigenvalues(probe, k=1, micro_batch=3, **parts).eigenvalues,
            "power": vs.hessian_eigenvalues(probe, k=1, solver="power", **parts).eigenvalues,
        }

    exact, differences = measured("reverse"), measured("difference")
    for name, values in exact.items():
        # products agree to about 1e-10 of the norm (test above); nodes of six steps pass this on by at most a hundredfold
        np.testing.assert_allclose(differences[name], values, rtol=0, atol=1e-8 * np.abs(values).max(), err_msg=name)


@pytest.mark.slow
def test_kinds_and_rows_of_parameters() -> None:
    probe = vs.Probe(model_of("small vit"), data_of("small vit")[:1])
    options: dict[str, Any] = {"n_top": 1, "by": "part", "tol": 1e-2}
    exact, differences = (vs.hessian_by_kind(probe, product=p, **options) for p in ("reverse", "difference"))
    np.testing.assert_allclose(differences.eigenvalues, exact.eigenvalues, rtol=0, atol=1e-8 * exact.eigenvalues.max())
    assert differences.card is not None
    assert exact.card is not None
    assert 0 < differences.card.solver["difference_error"] < 1e-7
    assert differences.card.differences(exact.card) == ["solver.product"]


def test_operator_for_other_solvers() -> None:
    operator = vs.hessian_operator(probe_of("conv"), product="difference")
    hessian, v = hessian_of("conv"), np.random.default_rng(0).standard_normal(operator.shape[0])
    np.testing.assert_allclose(operator @ v, hessian @ v, atol=1e-8 * np.abs(hessian @ v).max())
    with operator:
        (value,) = scipy.sparse.linalg.eigsh(operator, k=1, return_eigenvectors=False)
    assert value == pytest.approx(by_magnitude(np.linalg.eigvalsh(hessian), 1)[0], rel=1e-8)
    assert 0 < operator.difference_error < 1e-8
    assert vs.hessian_operator(probe_of("conv")).difference_error == 0.0


def test_card_tells_differences_from_exact_products() -> None:
    cards = {
        product: vs.hessian_trace(probe_of("conv"), n_vectors=1, product=product).card
        for product in ("reverse", "difference")
    }
    assert cards["reverse"].differences(cards["difference"]) == ["solver.product"]
    fixed = vs.hessian_trace(probe_of("conv"), n_vectors=1, product="difference", difference_step=1e-5).card
    assert fixed is not None
    assert fixed.differences(cards["difference"]) == []
    assert fixed.solver["difference_steps"] == [1e-5, 1e-5]


def test_a_step_that_is_too_long_is_refused_with_what_helps() -> None:
    with pytest.raises(NumericalError) as caught:
        vs.hessian_eigenvalues(probe_of("conv"), k=1, product="difference", difference_step=0.3, dtype="float32")
    text = str(caught.value)
    assert text.startswith("product=difference: products are off by ")
    assert "more than tol=0.001; set dtype=float64, or another difference_step, or product=reverse" in text
    with pytest.raises(NumericalError, match="more than tol=0.001; set another difference_step"):
        vs.hessian_trace(probe_of("conv"), n_vectors=1, product="difference", difference_step=0.3)
    loose = vs.hessian_eigenvalues(probe_of("conv"), k=1, product="difference", difference_step=0.03, tol=0.3)
    exact = by_magnitude(np.linalg.eigvalsh(hessian_of("conv")), 1)
    assert (np.abs(loose.eigenvalues - exact) <= SAFE * loose.errors).all()


def test_refusal_comes_during_a_long_computation() -> None:
    class Rough:
        dtype = torch.float32
        n_calls = 0

        def differences(self, direction: Tensor, steps: Any) -> list[Tensor]:
            self.n_calls += 1
            return [direction + step for step in steps]

        def weight_norm(self) -> float:
            return 1.0

    gradients = Rough()
    products = CentralDifferences(gradients, tol=1e-3, step=0.5)
    with pytest.raises(NumericalError, match="product=difference: products are off by"):
        for _ in range(100):
            products.product(torch.ones(4))
    assert gradients.n_calls == 10


def test_zero_curvature_and_zero_vectors() -> None:
    class Flat:
        dtype = torch.float64

        def differences(self, direction: Tensor, steps: Any) -> list[Tensor]:
            return [torch.zeros_like(direction) for _ in steps]

        def weight_norm(self) -> float:
            return 1.0

    products = CentralDifferences(Flat(), tol=1e-3)
    for v in (torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)):
        assert torch.equal(products.product(v), torch.zeros_like(v))
    products.check()
    assert products.record.relative_error == 0.0


def test_rows_of_an_earlier_process_keep_their_error() -> None:
    rows: dict[str, Mapping[str, Any]] = {}
    options: dict[str, Any] = {"n_steps": 4, "product": "difference", "partial": rows}
    vs.spectral_density(probe_of("conv"), n_vectors=1, **options)
    assert rows["vector-0000"]["difference_error"] > 0
    rows["vector-0000"] = {**rows["vector-0000"], "difference_error": 5e-4}
    card = vs.spectral_density(probe_of("conv"), n_vectors=2, **options).card
    assert card is not None
    assert card.solver["difference_error"] == pytest.approx(5e-4)


@pytest.mark.parametrize("step", [None, 100.0])
def test_the_model_is_given_back_bit_for_bit(step: float | None) -> None:
    probe = probe_of("conv")
    probe.model.train()
    before = {name: t.clone() for name, t in probe.model.state_dict().items()}
    state = torch.random.get_rng_state()
    try:
        vs.hessian_eigenvalues(probe, k=1, product="difference", difference_step=step, dtype="float32")
        assert step is None
    except NumericalError:
        assert step is not None
    assert probe.model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in probe.model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in probe.model.parameters())


def measured_on_ranks() -> dict[str, Any]:
    model, x, y = make("conv")
    probe = vs.Probe(model, list(zip(x.split([5, 5, 2]), y.split([5, 5, 2]))), OBJECTIVE)
    top = vs.hessian_eigenvalues(probe, k=2, product="difference", tol=1e-8)
    rows = vs.hessian_max_eigenvalue_spectrum(probe, n_top=1, product="difference")
    assert top.card is not None
    assert rows.card is not None
    return {
        "mean": top.eigenvalues,
        "batches": rows.eigenvalues,
        "error": top.card.solver["difference_error"],
        "error of batches": rows.card.solver["difference_error"],
        "steps": top.card.solver["difference_steps"],
    }


def test_ranks_agree_with_one_process(tmp_path: Any) -> None:
    torch.set_num_threads(1)
    expected, (first, second) = measured_on_ranks(), results_of_ranks(measured_on_ranks, tmp_path)
    for name in expected:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    for name in ("mean", "batches"):
        # products by differences round by 1e-10 of the norm, in another order on two ranks
        np.testing.assert_allclose(first[name], expected[name], rtol=0, atol=1e-8 * np.abs(expected[name]).max())
    assert first["error of batches"] == pytest.approx(expected["error of batches"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [("vit_tiny", "float32"), ("vit_tiny", "float64"), ("resnet18", "float64")])
def test_timm_networks(name: str, dtype: str) -> None:
    probe = vs.Probe(model_of(name), data_of(name))
    exact = vs.hessian_eigenvalues(probe, k=2, dtype="float64", tol=1e-4)
    differences = vs.hessian_eigenvalues(probe, k=2, product="difference", dtype=dtype, tol=1e-2)
    assert (np.abs(differences.eigenvalues - exact.eigenvalues) <= SAFE * (differences.errors + exact.errors)).all()
    assert differences.converged.all()
