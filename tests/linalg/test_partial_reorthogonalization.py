"""Lanczos with reorthogonalization by need: T against that of full reorthogonalization in float64, the basis' inner products."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitscope.linalg.lanczos import Lanczos
from vitscope.linalg.partial_reorthogonalization import PESSIMISM, SemiorthogonalLanczos
from vitscope.runtime.errors import NumericalError

LARGE = 400
SPECTRA = {
    # a bulk at zero and outliers of both signs that converge early: what ruins plain Lanczos, and what networks have
    "outliers": np.concatenate([100 * 0.6 ** np.arange(12), [-40.0, -15.0], np.linspace(-0.5, 0.5, LARGE - 14)]),
    "geometric": np.concatenate([100 * 0.8 ** np.arange(50), -30 * 0.7 ** np.arange(50)]),
    "spread": np.linspace(-50, 100, 120),
    "rank three": np.array([5.0, -3.0, 2.0] + [0.0] * 60),
    "repeated": np.array([7.0, 7.0, 7.0, -4.0, -4.0, 1.0] + [0.0] * 40),
    "zero": np.zeros(40),
}
STEPS = 35


def matrix(spectrum, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=generator, dtype=torch.float64))
    return ((q * torch.from_numpy(spectrum)) @ q.T).to(dtype)


def signs(a, seed):
    return torch.randint(0, 2, (len(a),), generator=torch.Generator().manual_seed(seed)).to(a).mul_(2).sub_(1)


def walked(kind, product, start, steps=STEPS):
    process = kind(product, start, steps + 1)
    for _ in range(min(steps, len(start))):
        process.step()
    return process


def worst_inner_product(process):
    rows = process.basis.rows[: len(process.projection)].double()
    rows = rows / rows.norm(dim=1, keepdim=True)
    return float((rows @ rows.T - torch.eye(len(rows), dtype=torch.float64)).abs().max())


def moments(process):
    ritz = process.ritz()
    return np.array([(ritz.vectors[0] ** 2 * ritz.values**p).sum() for p in range(1, 9)])


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SPECTRA)
def test_nodes_and_moments_are_those_of_full_reorthogonalization(name, dtype, seed):
    a = matrix(SPECTRA[name], dtype)
    process = walked(SemiorthogonalLanczos, lambda v: a @ v, signs(a, seed))
    eps = torch.finfo(dtype).eps
    assert worst_inner_product(process) < 10 * eps**0.5
    exact = a.double()  # the matrix as it was rounded
    vector = signs(exact, seed) / len(a) ** 0.5
    powers, expected = vector, []
    for _ in range(8):
        powers = exact @ powers
        expected.append(float(vector @ powers))
    # a few hundred roundings of a product, in units of the largest eigenvalue's power
    scale = np.abs(SPECTRA[name]).max() ** np.arange(1, 9)
    np.testing.assert_allclose(moments(process) / np.maximum(scale, 1e-300), np.array(expected) / np.maximum(scale, 1e-300),
                               rtol=0, atol=500 * eps)  # fmt: skip


@pytest.mark.parametrize("name", ["outliers", "geometric"])
def test_no_ghost_copies(name):
    """Each eigenvalue above the bulk appears once among the nodes, where plain Lanczos makes copies."""
    a = matrix(SPECTRA[name], torch.float32)
    values = walked(SemiorthogonalLanczos, lambda v: a @ v, signs(a, 0)).ritz().values
    full = walked(Lanczos, lambda v: a.double() @ v, signs(a.double(), 0)).ritz().values
    large = np.abs(full) > 0.05 * np.abs(full).max()
    np.testing.assert_allclose(values[-large[full > 0].sum() :], full[-large[full > 0].sum() :], rtol=2e-4)
    plain = plain_lanczos(a, signs(a, 0))
    copies = (np.abs(plain - full.max()) < 1e-2 * full.max()).sum()
    assert copies > 1, "the case does not need reorthogonalization"
    assert (np.abs(values - full.max()) < 1e-2 * full.max()).sum() == 1


def plain_lanczos(a, start, steps=STEPS):
    row, before, coupling, diagonal, off = start / start.norm(), torch.zeros_like(start), 0.0, [], []
    for _ in range(steps):
        w = a @ row - coupling * before
        diagonal.append(float(w @ row))
        w = w - diagonal[-1] * row
        coupling = float(w.norm())
        off.append(coupling)
        before, row = row, w / coupling
    return np.linalg.eigvalsh(np.diag(diagonal) + np.diag(off[:-1], 1) + np.diag(off[:-1], -1))


def test_most_steps_read_two_rows():
    a = matrix(SPECTRA["outliers"])
    process = walked(SemiorthogonalLanczos, lambda v: a @ v, signs(a, 0))
    assert 0 < process.cleaned < STEPS * 0.6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["outliers", "geometric"])
def test_what_it_learns_of_rounding_loses_no_orthogonality(name, dtype):
    """Products that round less than assumed are cleaned less often, over many cleanings, and still in time."""
    a = matrix(SPECTRA[name], dtype)
    process = walked(SemiorthogonalLanczos, lambda v: a @ v, signs(a, 0), steps=90)
    eps = torch.finfo(dtype).eps
    if name == "outliers":  # the other one's rounding is larger, and is noticed
        assert process.noise < PESSIMISM * eps
    assert worst_inner_product(process) < 10 * eps**0.5
    full = walked(Lanczos, lambda v: a.double() @ v, signs(a.double(), 0), steps=90).ritz().values
    assert process.ritz().values[-1] == pytest.approx(full[-1], rel=100 * eps)
    assert process.ritz().values[0] == pytest.approx(full[0], rel=100 * eps)


@pytest.mark.parametrize("noise", [1e-6, 1e-5, 1e-4])
def test_a_product_less_exact_than_its_precision_is_noticed(noise):
    a = matrix(SPECTRA["outliers"], torch.float32)
    generator = torch.Generator().manual_seed(0)

    def product(v):
        found = a @ v
        return found + noise * 100 * float(v.norm()) * torch.randn(len(v), generator=generator) / len(v) ** 0.5

    process = walked(SemiorthogonalLanczos, product, signs(a, 0))
    # what is lost before it is noticed stays below a hundredth: T then errs by its square
    assert worst_inner_product(process) < 1e-2
    full = walked(Lanczos, lambda v: a.double() @ v, signs(a.double(), 0)).ritz().values
    assert process.ritz().values[-1] == pytest.approx(full[-1], rel=10 * noise)


def test_the_shift_moves_every_node():
    a = matrix(SPECTRA["spread"])
    process = SemiorthogonalLanczos(lambda v: a @ v, signs(a, 0), 21, shift=3.0)
    plain = SemiorthogonalLanczos(lambda v: a @ v, signs(a, 0), 21)
    for _ in range(20):
        process.step()
        plain.step()
    np.testing.assert_allclose(process.ritz().values, plain.ritz().values + 3.0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["outliers", "geometric"])
def test_a_restart_makes_the_basis_orthonormal(name, dtype):
    a = matrix(SPECTRA[name], dtype)
    process = walked(SemiorthogonalLanczos, lambda v: a @ v, signs(a, 0))
    largest = process.ritz().values[-1]
    eps = torch.finfo(dtype).eps
    assert worst_inner_product(process) > 20 * eps, "the case needs no mending"
    process.restart(np.arange(len(process.projection) - 8, len(process.projection)))
    assert worst_inner_product(process) < 10 * eps
    assert process.ritz().values[-1] == pytest.approx(largest, rel=10 * eps)
    for _ in range(20):
        process.step()
    # each step may lose some more, until Lanczos' own bound asks for another pass
    assert worst_inner_product(process) < 1000 * eps
    top = np.linalg.eigvalsh(a.double().numpy())[-1]
    assert process.ritz().values[-1] == pytest.approx(top, rel=50 * eps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_vectors_are_orthonormal_though_the_basis_is_not(dtype):
    a = matrix(SPECTRA["outliers"], dtype)
    process = walked(SemiorthogonalLanczos, lambda v: a @ v, signs(a, 0))
    eps = torch.finfo(dtype).eps
    assert worst_inner_product(process) > 20 * eps, "the case needs no mending"
    ritz = process.ritz()
    v = process.vectors(ritz, np.argsort(-np.abs(ritz.values))[:8]).double()
    assert float((v @ v.T - torch.eye(8, dtype=torch.float64)).abs().max()) < 10 * eps
    values = np.sort(ritz.values)[::-1]
    residual = (v[0] @ a.double() - values[0] * v[0]).norm() / values[0]
    assert float(residual) < 50 * eps


def test_rows_that_depend_on_each_other_are_one_clear_line(monkeypatch):
    a = matrix(SPECTRA["outliers"])
    process = walked(SemiorthogonalLanczos, lambda v: a @ v, signs(a, 0), steps=12)
    monkeypatch.setattr(process.basis, "gram", lambda: np.ones((13, 13)))
    with pytest.raises(NumericalError, match="lost their independence; use float64"):
        process.vectors(process.ritz(), np.arange(3))
