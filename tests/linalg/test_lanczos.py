"""Lanczos against matrices whose spectrum is set: both signs, clusters, null spaces, restarts, both precisions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vitscope.linalg.basis_memory import BasisBuffer, free_memory
from vitscope.linalg.eigensolver import extreme_eigenvalues
from vitscope.linalg.krylov_basis import Basis, dot, norm
from vitscope.linalg.lanczos import Lanczos

SPECTRA = {
    "both signs": np.linspace(-50, 100, 120),
    "geometric": np.concatenate([100 * 0.8 ** np.arange(50), -30 * 0.7 ** np.arange(50)]),
    "rank three": np.array([5.0, -3.0, 2.0] + [0.0] * 60),
    "clustered": np.concatenate([[10, 9.97, 9.94, 5.0], np.linspace(-1, 1, 60), [-4, -4.03, -4.06, -8]]),
    "repeated": np.array([7.0, 7.0, 7.0, -4.0, -4.0, 1.0] + [0.0] * 40),
}


def matrix(spectrum, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    n = len(spectrum)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return ((q * torch.from_numpy(spectrum)) @ q.T).to(dtype)


def product_of(a):
    return lambda v: a @ v


def start_for(a, seed=1):
    return torch.randn(len(a), generator=torch.Generator().manual_seed(seed)).to(a)


def expected(spectrum, k, which):
    ascending = np.sort(spectrum)
    if which == "LM":
        return np.array(sorted(spectrum, key=lambda v: -abs(v))[:k])
    ends = {"LA": ascending[::-1][:k], "SA": ascending[:k]}
    return ends[which] if which != "both" else np.concatenate([ends["LA"], ends["SA"]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("which", ["LM", "LA", "SA", "both"])
@pytest.mark.parametrize("name", SPECTRA)
def test_known_spectrum(name, which, dtype):
    a = matrix(SPECTRA[name], dtype)
    pairs = extreme_eigenvalues(product_of(a), start_for(a), 4, which=which, tol=1e-4, max_products=400)
    # the tolerance asked for, in units of the largest eigenvalue (zero eigenvalues have no relative error)
    allowed = 2e-4 * np.abs(SPECTRA[name]).max()
    np.testing.assert_allclose(np.sort(pairs.values), np.sort(expected(SPECTRA[name], 4, which)), rtol=0, atol=allowed)
    assert pairs.converged.all()


@pytest.mark.parametrize("which", ["LM", "LA", "SA", "both"])
def test_thick_restart_keeps_to_the_memory(which):
    spectrum = SPECTRA["both signs"]
    a = matrix(spectrum)
    rows = 24
    pairs = extreme_eigenvalues(
        product_of(a), start_for(a), 3, which=which, tol=1e-6, max_memory=rows * a.shape[0] * 8, vectors=True
    )
    assert pairs.converged.all()
    np.testing.assert_allclose(pairs.values, expected(spectrum, 3, which), atol=1e-4)
    assert pairs.n_products > rows


def test_residuals_and_vectors_are_true():
    a = matrix(SPECTRA["geometric"])
    pairs = extreme_eigenvalues(product_of(a), start_for(a), 5, which="both", tol=1e-3, vectors=True)
    v = pairs.vectors
    true = torch.linalg.norm(a @ v.T - v.T * torch.from_numpy(pairs.values), dim=0).numpy()
    # the residual comes from the projection alone; in float64 both agree to rounding times the norm
    np.testing.assert_allclose(pairs.residuals, true, atol=1e-11)
    np.testing.assert_allclose((v @ v.T).numpy(), np.eye(10), atol=1e-12)


def test_errors_bound_the_distance_to_the_spectrum():
    spectrum = SPECTRA["geometric"]
    a = matrix(spectrum)
    for seed in range(5):
        pairs = extreme_eigenvalues(product_of(a), start_for(a, seed), 5, tol=1e-2)
        distance = np.abs(pairs.values[:, None] - spectrum).min(1)
        assert (distance <= pairs.residuals + 1e-12).all()
        assert (distance <= 1e-2 * np.abs(pairs.values)).all()


@pytest.mark.parametrize("steps", [38, 120])
@pytest.mark.parametrize("name", ["geometric", "graded"])
def test_basis_stays_orthonormal_in_float32(name, steps):
    # outliers over a tiny bulk: each step takes nine tenths of a product away and would multiply what was lost before
    spectra = {**SPECTRA, "graded": np.concatenate([np.linspace(5, 50, 10), 0.01 * np.linspace(-1, 1, 290)])}
    a = matrix(spectra[name], torch.float32)
    process = Lanczos(product_of(a), start_for(a), capacity=steps + 2)
    for _ in range(min(steps, len(a))):
        process.step()
    count = process.basis.count
    q = process.basis.rows[:count].double() * torch.from_numpy(process.basis.scales[:count, None])
    # long after the first values converged: plain Lanczos would have lost orthogonality altogether. Below the root of
    # the precision (3.5e-4) T is as accurate as with an exactly orthonormal basis (Simon, Math. Comp. 1984)
    assert (q @ q.T - torch.eye(len(q))).abs().max() < 1e-4


def test_zero_operator_and_zero_start():
    zero = torch.zeros(20, 20, dtype=torch.float64)
    pairs = extreme_eigenvalues(product_of(zero), torch.zeros(20, dtype=torch.float64), 3)
    np.testing.assert_array_equal(pairs.values, np.zeros(3))
    assert pairs.converged.all()


def test_whole_spectrum_of_a_small_matrix():
    spectrum = np.array([3.0, -2.0, 1.0])
    a = matrix(spectrum)
    pairs = extreme_eigenvalues(product_of(a), start_for(a), 3)
    np.testing.assert_allclose(pairs.values, spectrum, atol=1e-12)


def test_unconverged_values_say_so():
    a = matrix(SPECTRA["both signs"])
    pairs = extreme_eigenvalues(product_of(a), start_for(a), 4, tol=1e-6, max_products=8)
    assert pairs.n_products == 8
    assert not pairs.converged.all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 21}, "between 1 and 20 eigenvalues .* received k=21"),
        ({"k": 0}, "received k=0"),
        ({"k": 2, "which": "XX"}, "which to be one of LM, LA, SA, both, received 'XX'"),
        ({"k": 2, "tol": 0.0}, "tol between 0 and 1, received 0.0"),
        ({"k": 2, "max_products": 0}, "max_products to be at least 1, received 0"),
        ({"k": 2, "max_memory": 3 * 20 * 8}, "max_memory for at least 8 vectors"),
    ],
)
def test_refusals(options, message):
    a = matrix(np.arange(20.0))
    with pytest.raises(ValueError, match=message):
        extreme_eigenvalues(product_of(a), start_for(a), **options)


def test_start_vector_must_be_finite():
    a = matrix(np.arange(20.0))
    with pytest.raises(ValueError, match="finite start vector"):
        extreme_eigenvalues(product_of(a), start_for(a) * float("nan"), 2)


def test_little_free_memory_is_used_as_far_as_lanczos_needs_it(monkeypatch):
    a = matrix(SPECTRA["both signs"])
    row = a.shape[0] * 8
    monkeypatch.setattr(
        "vitscope.linalg.basis_memory.free_bytes", lambda *_: 24.0 * row
    )  # a quarter is 6 rows, 10 are needed
    pairs = extreme_eigenvalues(product_of(a), start_for(a), 3, tol=1e-6, max_products=2000)
    assert pairs.converged.all()
    monkeypatch.setattr("vitscope.linalg.basis_memory.free_bytes", lambda *_: 18.0 * row)
    with pytest.raises(ValueError, match="at least 10 vectors .* received 0 MiB: .* or use a micro_batch"):
        extreme_eigenvalues(product_of(a), start_for(a), 3)


def test_free_memory_counts_what_the_file_cache_gives_back():
    available = next(l for l in Path("/proc/meminfo").read_text().splitlines() if l.startswith("MemAvailable"))
    assert free_memory(torch.device("cpu")) == pytest.approx(1024 * int(available.split()[1]), rel=0.5)


def test_inner_products_of_long_float32_vectors_are_exact_to_rounding():
    """Heavy-tailed as gradients are: BLAS' sums of 65,536 at once were off by 1e-5."""
    generator = torch.Generator().manual_seed(0)
    n = 2_000_003
    rows = torch.randn(3, n, generator=generator) * torch.exp(2 * torch.randn(3, n, generator=generator))
    basis = Basis(4, rows[0])
    for row in rows:
        basis.accept(basis.write([row], 1.0, np.zeros(basis.count)))
    exact = rows.double() @ rows[0].double()
    pieces = [rows[0, :7], rows[0, 7:70_000].reshape(3, -1), rows[0, 70_000:]]
    lengths = rows.double().norm(dim=1)
    found = basis.coefficients(pieces) * lengths.numpy()
    np.testing.assert_allclose(found, exact.numpy(), rtol=0, atol=3e-7 * float(exact[0]))
    assert 1 / basis.scales[0] == pytest.approx(float(lengths[0]), rel=2e-7)
    assert norm(rows[1]) == pytest.approx(float(lengths[1]), rel=2e-7)
    assert dot(rows[0], rows[1]) == pytest.approx(float(exact[1]), abs=3e-7 * float(lengths[0] * lengths[1]))
    np.testing.assert_allclose(
        basis.gram()[0], (exact / lengths / lengths[0]).numpy(), atol=2e-6
    )  # summed less carefully


def test_memory_is_used_again_and_changes_no_number():
    a, b = (matrix(SPECTRA[name], torch.float32) for name in ("both signs", "clustered"))
    memory = BasisBuffer()
    for m in (a, b, a):
        own = extreme_eigenvalues(product_of(m), start_for(m), 3, vectors=True)
        shared = extreme_eigenvalues(product_of(m), start_for(m), 3, vectors=True, memory=memory)
        np.testing.assert_array_equal(own.values, shared.values)
        assert own.vectors is not None
        assert shared.vectors is not None
        kept = shared.vectors.clone()
        extreme_eigenvalues(product_of(m), start_for(m, 2), 3, memory=memory)
        assert torch.equal(shared.vectors, kept)
        assert torch.equal(own.vectors, kept)


def test_memory_grows_and_follows_size_and_dtype():
    memory, like = BasisBuffer(), torch.zeros(10)
    first = memory.rows(4, like)
    assert memory.rows(3, like).data_ptr() == first.data_ptr()
    assert memory.rows(3, like).shape == (3, 10)
    assert memory.rows(6, like).shape == (6, 10)
    assert memory.rows(2, like.double()).dtype == torch.float64
    assert memory.rows(2, torch.zeros(7)).shape == (2, 7)
