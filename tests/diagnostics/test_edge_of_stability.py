"""The series of eigenvalues and limits along training: dense oracles, the onset of divergence, and a run's resume."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import nn

import vitscope as vs
from vitscope.training.optimizers.muon import MuonAdamW
from vitscope.training.sam import SAM

DECAY = 0.02


def classifier(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(23, 5, dtype=torch.float64)
    return model, x, (x[:, :3].argmax(1) + (torch.arange(23) % 7 == 0).long()) % 3


def dense_hessian(model, x, y):
    """Hessian of the mean cross entropy by `torch.autograd.functional`, an implementation apart from the products."""
    names, values = zip(*model.named_parameters())
    sizes = [v.numel() for v in values]

    def loss(flat):
        parts = {n: p.view_as(v) for n, v, p in zip(names, values, flat.split(sizes))}
        return nn.functional.cross_entropy(torch.func.functional_call(model, parts, (x,)), y)

    flat = torch.cat([v.detach().reshape(-1) for v in values])
    return torch.autograd.functional.hessian(loss, flat).numpy()


def train(model, optimizer, x, y, steps):
    for _ in range(steps):

        def closure():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)


def batches(x, y):
    return [(x[:9], y[:9]), (x[9:18], y[9:18]), (x[18:], y[18:])]  # the last is smaller


@pytest.mark.parametrize("micro_batch", [pytest.param(None, marks=pytest.mark.slow), 4])
def test_sgd_over_all_training_images_in_pieces(micro_batch):
    """Eigenvalues are those of the mean over all images, the optimizer's own decay included; k vectors give the overlap."""
    model, x, y = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.8, dampening=0.1, weight_decay=DECAY)
    probe = vs.Probe(model, batches(x, y), vs.Objective(weight_decay=0.3))  # the optimizer's decay counts, not this
    series, spaces = None, []
    for step in (0, 7, 14):
        series = vs.edge_of_stability(
            probe, k=2, optimizer=optimizer, step=step, previous=series, tol=1e-9, micro_batch=micro_batch
        )
        values, vectors = np.linalg.eigh(dense_hessian(model, x, y))
        np.testing.assert_allclose(series.eigenvalues[-1], values[::-1][:2] + DECAY, rtol=1e-8)
        spaces.append(vectors[:, ::-1][:, :2])
        train(model, optimizer, x, y, 7)
    assert series.steps.tolist() == [0, 7, 14]
    assert series.converged.all()
    np.testing.assert_allclose(series.sharpness, series.eigenvalues[:, 0])
    np.testing.assert_allclose(series.limit, 2 * 1.8 / (0.9 * 0.5))
    expected = [np.sum((a.T @ b) ** 2) / 2 for a, b in zip(spaces, spaces[1:])]
    assert np.isnan(series.overlap[0])
    np.testing.assert_allclose(series.overlap[1:], expected, atol=1e-4)  # vectors to the root of the values' tolerance
    assert (series.preconditioner, series.optimizer) == ("identity", "SGD")
    assert series.card.weight_decay == DECAY
    assert set(series.scalars()) == {
        "eigenvalue_max", "sharpness", "limit", "ratio", "overlap", "lr", "converged", "n_products"
    }  # fmt: skip


def test_adam_has_the_preconditioned_hessian_and_the_bias_correction_of_its_next_step():
    model, x, y = classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02, betas=(0.9, 0.99), eps=1e-3)
    probe = vs.Probe(model, batches(x, y))
    series = vs.edge_of_stability(probe, optimizer=optimizer, step=0, tol=1e-9)
    assert np.isnan(series.limit[0])
    assert "has made no step" in series.formula
    assert series.card.l2 == "the optimizer's own"  # as at later steps, so that they have one card
    train(model, optimizer, x, y, 6)
    series = vs.edge_of_stability(probe, optimizer=optimizer, step=6, previous=series, tol=1e-9)
    states = [optimizer.state[p] for p in model.parameters()]
    p = torch.cat([((s["exp_avg_sq"] / (1 - 0.99**6)).sqrt() + 1e-3).reshape(-1) for s in states]).numpy()
    hessian = dense_hessian(model, x, y)
    expected = np.linalg.eigvalsh(hessian / np.sqrt(p)[:, None] / np.sqrt(p)[None])[-1]
    assert series.sharpness[-1] == pytest.approx(expected, rel=1e-8)
    assert series.eigenvalues[-1, 0] == pytest.approx(np.linalg.eigvalsh(hessian)[-1], rel=1e-8)
    assert series.limit[-1] == pytest.approx(38 / 0.02 * (1 - 0.9**7))
    assert series.preconditioner == "adamw"


# --- the printed limit is the measured onset of divergence --------------------------------------------------------------


class Quadratic(nn.Module):
    """Outputs sqrt(h) w, so that half of their mean square is a quadratic with the curvatures h."""

    def __init__(self, curvatures):
        super().__init__()
        self.root = torch.as_tensor(curvatures, dtype=torch.float64).sqrt()
        self.w = nn.Parameter(torch.full((len(self.root),), 1e-6, dtype=torch.float64))

    def forward(self, x):
        return x[:, :1] * (self.root * self.w)


def half_square(outputs, targets):
    return outputs.square().sum(1) / 2


def tilted(outputs, targets):
    """Adds a slope in the last weight, whose own curvature is nearly 0: the gradient's norm is then 1 throughout."""
    return outputs.square().sum(1) / 2 + outputs[:, -1] / 1e-4


X, Y = torch.ones(4, 1, dtype=torch.float64), torch.zeros(4, dtype=torch.long)


def quadratic_steps(make, curvatures, loss, steps):
    """Return the largest weight but the last, and the printed limit at the start, of real steps on a quadratic."""
    model = Quadratic(curvatures)
    optimizer = make(model.parameters())
    probe = vs.Probe(model, [(X, Y)], vs.Objective(loss=loss))
    if not isinstance(optimizer, SAM | torch.optim.SGD):
        closure = functools.partial(step_of, model, optimizer, loss)
        optimizer.step(closure)
        freeze_second_moments(optimizer)
        with torch.no_grad():  # Adam's first step has the length of its rate
            model.w.fill_(1e-6)
    printed = vs.edge_of_stability(probe, k=1, optimizer=optimizer, step=1, tol=1e-9)
    lengths = []
    for _ in range(steps):
        optimizer.step(functools.partial(step_of, model, optimizer, loss))
        lengths.append(float(model.w.detach()[:1].abs().max()))
        if lengths[-1] > 1e-3:
            break
    return printed, lengths


def step_of(model, optimizer, loss):
    optimizer.zero_grad()
    value = loss(model(X), Y).mean()
    value.backward()
    return value


def freeze_second_moments(optimizer):
    """Put constants that one step leaves as they are (beta2 is nearly 1, no bias is left) in the place of the moments."""
    for state in optimizer.state.values():
        state["exp_avg_sq"] = torch.full_like(state["exp_avg_sq"], 0.04)
        state["exp_avg"].zero_()
        state["step"] = torch.tensor(1e15, dtype=torch.float64)


def measured_onset(make, loss=half_square, tail=(), low=0.2, high=40.0, steps=400):
    """Return the printed sharpness over its limit at the curvature where real steps begin to grow, by bisection."""
    for _ in range(10):  # to 0.4 %
        middle = (low * high) ** 0.5
        printed, lengths = quadratic_steps(make, [middle, *tail], loss, steps)
        third = len(lengths) // 3
        grows = lengths[-1] > 1e-3 or max(lengths[-third:]) > max(lengths[third : 2 * third])
        low, high = (low, middle) if grows else (middle, high)
    printed, _ = quadratic_steps(make, [(low * high) ** 0.5, *tail], loss, 1)
    return float(printed.ratio[-1]), printed


B2 = 1 - 1e-12
ONSETS = {
    "gradient descent": lambda p: torch.optim.SGD(p, lr=0.3),
    "heavy ball": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9),
    "dampening": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.5, dampening=0.4),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, nesterov=True),
    "coupled decay": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.5, weight_decay=0.7),
    "adam": lambda p: torch.optim.Adam(p, lr=0.4, betas=(0.9, B2)),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.4, betas=(0.9, B2), weight_decay=0.1),
}
#: tests/linalg/test_optimizer_stability.py measures their onset on the derived limit itself
ALSO_IN_LINALG = ("dampening", "coupled decay", "adam")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in ALSO_IN_LINALG else name for name in ONSETS]
)
def test_divergence_sets_in_at_the_printed_limit(name):
    ratio, printed = measured_onset(ONSETS[name])
    assert ratio == pytest.approx(1.0, rel=0.02)
    assert "lr" in printed.formula


@pytest.mark.parametrize(
    "base",
    [
        functools.partial(torch.optim.SGD, momentum=0.0),
        functools.partial(torch.optim.SGD, momentum=0.8),
        pytest.param(functools.partial(torch.optim.SGD, momentum=0.5, nesterov=True), marks=pytest.mark.slow),
    ],
)
def test_sam_diverges_at_the_printed_limit_while_the_gradient_has_its_length(base):
    """Along the sharp weight; the slope of the other one holds |g| at 1, which the limit takes from the probe."""
    ratio, printed = measured_onset(lambda p: SAM(p, base=base, rho=0.2, lr=0.3), loss=tilted, tail=[1e-8], steps=200)
    assert ratio == pytest.approx(1.0, rel=0.02)
    assert printed.optimizer == "SAM around SGD"
    if not base.keywords["momentum"]:  # the formula of Long and Bartlett (2023)
        assert printed.limit[-1] == pytest.approx(1 / (2 * 0.2) * ((1 + 8 * 0.2 / 0.3) ** 0.5 - 1), rel=1e-6)


def test_what_has_no_limit_says_why():
    model, x, y = classifier()
    model.insert(2, nn.Linear(6, 6).double())  # a matrix for Muon
    probe = vs.Probe(model, batches(x, y))
    for optimizer, words in (
        (MuonAdamW(model.parameters(), network=model, lr=0.02), "Muon's step has one length"),
        (SAM(model.parameters(), lr=0.1), "SAM's limit is derived around SGD"),
        (torch.optim.RAdam(model.parameters()), "no limit is known of RAdam"),
        (None, "no optimizer was given"),
    ):
        if optimizer is None:
            result = vs.edge_of_stability(probe, step=1)
        else:
            train(model, optimizer, x, y, 1)
            with pytest.warns(UserWarning, match=words):
                result = vs.edge_of_stability(probe, optimizer=optimizer, step=1)
        assert words in result.formula
        assert np.isnan(result.limit[-1])
        assert "limit" not in result.scalars()


# --- series ---------------------------------------------------------------------------------------------------------------


def _stepped(optimizer, model, x, y):
    """Return the optimizer after one step of its own parameters, which are then put back."""
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, x, y, 1)
    with torch.no_grad():
        for p, value in zip(model.parameters(), before):
            p.copy_(value)
    return optimizer


def test_a_series_refuses_what_does_not_continue_it():
    model, x, y = classifier()
    probe = vs.Probe(model, batches(x, y))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    series = vs.edge_of_stability(probe, optimizer=optimizer, step=20)
    assert vs.edge_of_stability(probe, optimizer=optimizer, step=20, previous=series) == series
    with pytest.raises(ValueError, match="at least 20.*received 10"):
        vs.edge_of_stability(probe, optimizer=optimizer, step=10, previous=series)
    with pytest.raises(ValueError, match="k=3.*received 2"):
        vs.edge_of_stability(probe, optimizer=optimizer, step=30, k=3, previous=series)
    with pytest.raises(ValueError, match="result of edge_of_stability"):
        vs.edge_of_stability(probe, optimizer=optimizer, step=30, previous=series.eigenvectors)
    for other in (torch.optim.SGD(model[2].parameters(), lr=0.1), torch.optim.AdamW(model[2].parameters(), lr=0.1)):
        for measure in (vs.edge_of_stability, vs.preconditioned_sharpness):
            with pytest.raises(ValueError, match=r"does not train '0\.weight': choose its parameters with parameters="):
                measure(probe, optimizer=_stepped(other, model, x, y))
    with pytest.raises(ValueError, match="whole number"):
        vs.edge_of_stability(probe, optimizer=optimizer, step=-1)


def test_a_warm_series_has_the_values_of_a_cold_one():
    values = []
    for warm in (True, False):
        model, x, y = classifier()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        series = None
        for step in range(0, 30, 10):
            series = vs.edge_of_stability(
                vs.Probe(model, [(x, y)]), optimizer=optimizer, step=step, previous=series, warm_start=warm, tol=1e-6
            )
            train(model, optimizer, x, y, 10)
        values.append(series)
    warm, cold = values
    np.testing.assert_allclose(warm.eigenvalues, cold.eigenvalues, rtol=2e-6)
    np.testing.assert_allclose(warm.sharpness, cold.sharpness, rtol=2e-6)
    assert warm.card.differences(cold.card) == ["options.warm_start"]


def test_a_budget_that_is_too_small_is_marked():
    model, x, y = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = vs.edge_of_stability(vs.Probe(model, [(x, y)]), optimizer=optimizer, step=0, k=2, max_products=3)
    assert not result.converged.all()
    assert result.scalars()["converged"] < 1


def test_the_figure_shows_limits_and_steps():
    model, x, y = classifier()
    results = {}
    for name, make in {"a": ONSETS["heavy ball"], "b": ONSETS["adam"]}.items():
        optimizer, series = make(model.parameters()), None
        for step in range(0, 40, 10):
            series = vs.edge_of_stability(vs.Probe(model, [(x, y)]), optimizer=optimizer, step=step, previous=series)
            train(model, optimizer, x, y, 10)
        results[name] = series
    figure = vs.plot(results)
    eigenvalues, ratio, _, rate = figure.axes
    lines = {tuple(line.get_xdata()): line for line in eigenvalues.lines if line.get_linestyle() == "--"}
    (limit,) = lines.values()  # of the heavy ball alone: Adam's is no eigenvalue of H
    np.testing.assert_allclose(limit.get_ydata(), 3.8 / 0.3)
    assert rate.get_xlabel() == "Optimizer step"
    np.testing.assert_allclose(ratio.lines[0].get_ydata(), results["a"].ratio)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["a, SGD", "b, Adam", "Limit of stability", "Further eigenvalues"]
