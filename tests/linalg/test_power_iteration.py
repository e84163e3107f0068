"""Power iteration stops, deflates and counts as a loop with PyHessian's rule does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitscope.linalg.power_iteration import power_iteration


def loop(values: np.ndarray, starts: list[np.ndarray], tol: float, most: int) -> tuple[list[float], int, list[bool]]:
    """Return eigenvalues, the number of products, and which stopped by the rule, of ``diag(values)``."""
    found, earlier, n_products, stopped = [], [], 0, []
    for start in starts:
        v, eigenvalue, is_stopped = start, None, False
        for _ in range(most):
            for u in earlier:
                v = v - (v @ u) * u
            v = v / np.linalg.norm(v)
            product, before = values * v, eigenvalue
            n_products += 1
            eigenvalue = float(product @ v)
            v = product / np.linalg.norm(product)
            if before is not None and abs(eigenvalue - before) / (abs(before) + 1e-6) < tol:
                is_stopped = True
                break
        found.append(eigenvalue)
        earlier.append(v)
        stopped.append(is_stopped)
    return found, n_products, stopped


@pytest.mark.parametrize("scale", [1.0, 1e-6])  # of small eigenvalues the rule's 1e-6 decides
@pytest.mark.parametrize(("tol", "most"), [(1e-3, 100), (1e-5, 100), (1e-6, 7)])
def test_the_iteration_is_the_loop_with_pyhessians_rule(scale: float, tol: float, most: int) -> None:
    values = scale * np.array([5.0, -4.4, 3.0, 2.0, 0.5, -0.1])
    generator = torch.Generator().manual_seed(3)
    starts = [torch.randn(6, generator=generator, dtype=torch.float32).double().numpy() for _ in range(3)]
    expected, n_products, stopped = loop(values, starts, tol, most)
    diagonal = torch.from_numpy(values)
    pairs = power_iteration(
        lambda v: diagonal * v, torch.empty(6, dtype=torch.float64), 3, tol=tol, max_iterations=most, seed=3
    )
    np.testing.assert_allclose(pairs.values, expected, rtol=1e-10)
    assert pairs.n_products == n_products
    assert pairs.converged.tolist() == stopped
    vectors = pairs.vectors.numpy()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(
        (vectors**2 * values).sum(1), pairs.values, rtol=1e-10
    )  # each value is of its own vector
    rest = vectors * values - pairs.values[:, None] * vectors
    np.testing.assert_allclose(pairs.residuals, np.linalg.norm(rest, axis=1), rtol=1e-8, atol=2 * pairs.resolution)
