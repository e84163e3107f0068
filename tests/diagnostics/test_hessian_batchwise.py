"""The batch-wise spectrum: several batches at once give the loop's numbers; a budget limits the batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import vitscope as vs
from tests.fixtures.networks.small_networks import model_of
from tests.fixtures.oracles.hessian_oracle import by_magnitude, dense_hessian, make
from vitscope.diagnostics.hessian import _budget
from vitscope.linalg.batched_lanczos import CannotBatch, SideBySide, eigenvalues_side_by_side
from vitscope.linalg.curvature.operator_factory import curvatures
from vitscope.runtime.errors import NumericalError


def probe_of(model, x, y, size=3, **objective):
    return vs.Probe(model, list(zip(x.split(size), y.split(size))), vs.Objective(**objective))


@pytest.mark.parametrize("name", ["small convnet", "small vit", "small alternet"])
def test_products_at_once_are_those_one_by_one(name: str):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64)
    probe = probe_of(model_of(name), x, torch.tensor([0, 1, 2, 0, 1, 2]), size=2, weight_decay=0.1)
    with curvatures(probe) as made:
        group = list(probe.local_batches())
        stacked = SideBySide(made, group)
        vectors = torch.randn(3, stacked.operators[0].size, generator=generator, dtype=torch.float64)
        found = [torch.cat(pieces) for pieces in stacked.products(vectors, range(3))]
        (last,) = stacked.products(vectors[2:], [2])
        for v, product, gradient, operator in zip(vectors, found, stacked.gradients(), stacked.operators):
            # float64 rounding, relative to the length
            expected = operator(v) - 0.1 * v
            assert float((product - expected).norm()) < 1e-11 * float(expected.norm())
            assert torch.allclose(gradient, operator.gradient(data_only=True), atol=1e-12)
        assert torch.allclose(torch.cat(last), found[2], atol=1e-11)


@pytest.mark.filterwarnings("ignore:l2='sum_norm':UserWarning")
@pytest.mark.parametrize(
    ("kind", "l2"),
    [
        ("conv", "half_sq"),
        pytest.param("conv", "sum_norm", marks=pytest.mark.slow),
        pytest.param("transformer", "half_sq", marks=pytest.mark.slow),
        ("transformer", "sum_norm"),
    ],
)
def test_spectrum_at_once_is_the_loops(kind: str, l2: str):
    model, x, y = make(kind, n=11, soft=kind == "conv")
    probe = probe_of(model, x, y, weight_decay=0.1, l2=l2)  # batches of 3, 3, 3 and 2 images
    # a finer tolerance than the default, at which Lanczos may pass over one of two eigenvalues 4 % apart
    options = {"n_top": 3, "n_ends": 1, "tol": 1e-6}
    loop = vs.hessian_max_eigenvalue_spectrum(probe, batches_at_once=1, **options)
    for n in (2, 8):
        partial: dict = {}
        found = vs.hessian_max_eigenvalue_spectrum(probe, batches_at_once=n, partial=partial, **options)
        for field in ("eigenvalues", "residuals", "l2_contribution", "smallest", "largest"):
            np.testing.assert_allclose(getattr(found, field), getattr(loop, field), rtol=1e-8, atol=1e-8)
        np.testing.assert_array_equal(found.n_products, loop.n_products)
        assert sorted(partial) == [f"batch-{i:04d}" for i in range(4)]
        assert found.card.solver["batches_at_once"] == n
    assert "batches_at_once" not in loop.card.solver
    dense = [np.linalg.eigvalsh(dense_hessian(model, *batch, probe.objective)) for batch in probe.batches]
    np.testing.assert_allclose(loop.eigenvalues, [by_magnitude(s, 3) for s in dense], rtol=1e-6)


def test_a_small_basis_restarts_side_by_side_too():
    model, x, y = make("conv", n=6)
    with curvatures(probe_of(model, x, y)) as made:
        group = list(made.probe.local_batches())
        memory = 2 * 12 * 8 * made.batch(*group[0]).size
        found = eigenvalues_side_by_side(made, group, k=3, tol=1e-9, max_memory=memory)
        for solution, batch in zip(found, made.probe.batches):
            spectrum = np.linalg.eigvalsh(dense_hessian(model, *batch, made.probe.objective))
            np.testing.assert_allclose(solution.pairs.values, by_magnitude(spectrum, 3), rtol=1e-8)
            assert solution.pairs.n_products > 12


class Drawn(nn.Linear):
    """A layer that asks a tensor for its value, which vmap refuses."""

    def forward(self, x):
        return super().forward(x.flatten(1)) * (2.0 if float(x.sum()) > -1e9 else 1.0)


def test_what_cannot_be_analyzed_at_once_is_refused():
    model, x, y = make("conv", n=6)
    probe = probe_of(model, x, y)
    for options, message in (
        ({"bn": "batch"}, "Expected bn='eval' to analyze several batches at once .* received 'batch'"),
        ({"operator": "ggn"}, "Expected operator=hessian .* received 'ggn'"),
        ({"product": "linearize"}, "Expected product=reverse .* received 'linearize'"),
        ({"micro_batch": 2}, "Expected micro_batch=None .* received 2"),
        ({"solver": "power"}, "Expected solver='lanczos' with several batches at once, received 'power'"),
    ):
        with pytest.raises(ValueError, match=message):
            vs.hessian_max_eigenvalue_spectrum(probe, batches_at_once=2, **options)
    with pytest.raises(ValueError, match="batches_at_once to be at least 1 or None, received 0"):
        vs.hessian_max_eigenvalue_spectrum(probe, batches_at_once=0)
    with pytest.raises(CannotBatch, match="a model that vmap can differentiate"):
        vs.hessian_max_eigenvalue_spectrum(probe_of(Drawn(25, 3).double(), x, y), batches_at_once=2)
    with pytest.raises(NumericalError, match="not finite on images 0 to 2"):
        vs.hessian_max_eigenvalue_spectrum(probe_of(model, x * float("inf"), y), batches_at_once=2)


def test_a_wrong_product_under_vmap_is_noticed(monkeypatch: pytest.MonkeyPatch):
    model, x, y = make("conv", n=6)
    right = SideBySide._product
    wrong = lambda self, *a: {name: 1.001 * part for name, part in right(self, *a).items()}  # noqa: E731  patched in one line
    monkeypatch.setattr(SideBySide, "_product", wrong)
    with pytest.raises(CannotBatch, match="differ by 1.0e-03 of their length: set batches_at_once=1"):
        vs.hessian_max_eigenvalue_spectrum(probe_of(model, x, y), batches_at_once=2)
    # where the number was not asked for, the loop does it
    monkeypatch.setattr("vitscope.diagnostics.hessian._batchwise_spectrum.at_once", lambda *_: 2)
    with pytest.warns(UserWarning, match="mini-batches are measured one after the other: .* differ by"):
        found = vs.hessian_max_eigenvalue_spectrum(probe_of(model, x, y), n_top=2)
    expected = vs.hessian_max_eigenvalue_spectrum(probe_of(model, x, y), n_top=2, batches_at_once=1)
    np.testing.assert_array_equal(found.eigenvalues, expected.eigenvalues)


class Clock:
    """Every look at it takes a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@pytest.mark.parametrize(("budget", "n_batches"), [(1e-9, 1), (1e9, 4)])
def test_a_budget_of_nothing_and_of_plenty(budget: float, n_batches: int):
    model, x, y = make("conv", n=12)
    probe = probe_of(model, x, y)
    found = vs.hessian_max_eigenvalue_spectrum(probe, n_top=2, budget_s=budget)
    whole = vs.hessian_max_eigenvalue_spectrum(probe, n_top=2)
    np.testing.assert_array_equal(found.eigenvalues, whole.eigenvalues[:n_batches])
    assert found.card.n_images == 3 * n_batches
    solver = found.card.solver
    assert (solver["budget_s"], solver["batches"]) == (budget, f"{n_batches} of 4")
    assert solver["seconds_per_product"] > 0
    assert "budget_s" not in whole.card.solver


@pytest.mark.usefixtures("command_messages")
def test_budget_by_the_clock(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    model, x, y = make("conv", n=12)
    monkeypatch.setattr(_budget, "clock", Clock())
    # a product takes a second, 11 of them are expected of a batch: two batches fit into 24 seconds
    found = vs.hessian_max_eigenvalue_spectrum(probe_of(model, x, y), n_top=2, budget_s=24)
    assert len(found.batches) == 2
    assert "1 s per product, about 11 products per batch" in (said := capsys.readouterr().err)
    assert "2 of 4 batches in about 22 s (budget_s=24)" in said
    solver = found.card.solver
    assert (solver["seconds_per_product"], solver["predicted_s"]) == (1.0, 22.0)
    # the basis of 11 + 2 vectors and the graph, which keeps at least images and logits
    size = sum(p.numel() for p in model.parameters())
    assert solver["predicted_bytes"] > 13 * 8 * size + x[:3].nbytes


def test_a_slow_batch_ends_the_work(monkeypatch: pytest.MonkeyPatch):
    model, x, y = make("conv", n=12)
    clock = Clock()
    monkeypatch.setattr(_budget, "clock", clock)
    partial: dict = {}

    class Slow(dict):
        def __setitem__(self, key, value):
            clock.now += 15
            super().__setitem__(key, value)

    partial = Slow()
    found = vs.hessian_max_eigenvalue_spectrum(probe_of(model, x, y), n_top=2, budget_s=44, partial=partial)
    # predicted: four batches in 44 s. After 15 s and a few looks at the clock a second one fits, a third does not
    assert list(found.batches) == [0, 1]
    # rows at hand cost nothing
    again = vs.hessian_max_eigenvalue_spectrum(probe_of(model, x, y), n_top=2, budget_s=44, partial=partial)
    assert len(again.batches) == 4


def test_a_budget_must_be_positive():
    model, x, y = make("conv", n=6)
    with pytest.raises(ValueError, match="budget_s to be positive or None, received 0"):
        vs.hessian_max_eigenvalue_spectrum(probe_of(model, x, y), budget_s=0)


def test_interactive_overlay():
    from vitscope.diagnostics.hessian.plot import plotly_hessian_max_eigenvalue_spectrum

    model, x, y = make("conv", n=6)
    found = vs.hessian_max_eigenvalue_spectrum(probe_of(model, x, y), n_top=2)
    figure = plotly_hessian_max_eigenvalue_spectrum({"one": found, "two": found})
    assert [trace.mode for trace in figure.data] == ["lines", "markers"] * 2
    negative, positive = 100 * found.negative_eigenvalue_proportion, found.average_positive_eigenvalue
    facts = f"{negative:.0f}% negative, mean of the positive {positive:.3g}"
    assert figure.data[2].name == f"two: 4 values: top 2 of 2 batches<br>{facts}"
    marks = figure.data[1]
    np.testing.assert_array_equal(marks.x, found.eigenvalues.reshape(-1))
    # batch, rank, residual of each mark
    np.testing.assert_array_equal(marks.customdata[:, :2], [[0, 1], [0, 2], [1, 1], [1, 2]])
    np.testing.assert_array_equal(marks.customdata[:, 2], found.residuals.reshape(-1))
    assert figure.data[0].x.min() >= found.eigenvalues.min()
