"""The derived limits of stability against the measured onset of divergence of torch's own optimizers on quadratics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import nn

import vitscope as vs
from vitscope.config import factories
from vitscope.core.optimizer_state import of_checkpoint, of_optimizer
from vitscope.linalg.optimizer_stability import sam_limit, stability_limit
from vitscope.training.sam import SAM

STEPS = 600
#: moments that an update overwrites; they are put back before every step, so that they are frozen
FROZEN = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "grad_avg", "sum")


def model_of(size=1):
    model = nn.Module()
    model.w = nn.Parameter(torch.ones(size, dtype=torch.float64))
    return model


def primed(make, parameters, step=10.0**15):
    """Return an optimizer that has made a step, with second moments to be frozen and, but for Adagrad, no bias left."""
    optimizer = make(parameters)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.full_like(p, 1e-3)
    optimizer.step()
    for number, (p, state) in enumerate(optimizer.state.items()):
        for key in FROZEN:
            if isinstance(state.get(key), torch.Tensor):
                state[key] = torch.linspace(0.04, 0.09, p.numel(), dtype=p.dtype).mul_(1 + number)
        if "grad_avg" in state and state["grad_avg"] is not None:
            state["grad_avg"] = torch.full_like(p, 0.1)
        if "step" in state:
            state["step"] = torch.tensor(step, dtype=torch.float64)
        for key in ("exp_avg", "momentum_buffer"):
            if state.get(key) is not None:
                state[key].zero_()
        if "mu_product" in state:
            state["mu_product"] = torch.tensor(0.0, dtype=torch.float64)
    return optimizer


def diverges(make, hessian, step=10.0**15):
    """Return whether full-batch steps on w^T H w / 2 with frozen second moments grow without bound."""
    pieces = [nn.Parameter(torch.full((len(part),), 1e-6, dtype=torch.float64)) for part in make.split(hessian)]
    optimizer = primed(make, pieces, step)
    with torch.no_grad():
        start = torch.randn(len(hessian), generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-6
        for p, part in zip(pieces, start.split([p.numel() for p in pieces])):
            p.copy_(part)
    kept = {
        p: {k: v.clone() for k, v in s.items() if k in FROZEN and v is not None} for p, s in optimizer.state.items()
    }
    clock = {p: s["step"].clone() for p, s in optimizer.state.items() if isinstance(s.get("step"), torch.Tensor)}
    lengths = []
    for _ in range(STEPS):
        w = torch.cat([p.detach() for p in pieces])
        for p, part in zip(pieces, (hessian @ w).split([p.numel() for p in pieces])):
            p.grad = part.clone()
            for key, value in kept.get(p, {}).items():
                optimizer.state[p][key].copy_(value)
            if p in clock:
                optimizer.state[p]["step"].copy_(clock[p])
        optimizer.step()
        lengths.append(float(w.norm()))
        if not lengths[-1] < 1e-2:  # 1e4 times the start; gradients stay far below the frozen moments
            return True
    half = STEPS // 2  # the slope of the last half: transients of the momentum are over
    return max(lengths[half + half // 2 :]) > max(lengths[half : half + half // 2])


class Make:
    def __init__(self, kind, sizes=None, groups=None, **options):
        self.kind, self.sizes, self.groups, self.options = kind, sizes, groups, options

    def split(self, hessian):
        return hessian.split(self.sizes or [len(hessian)])

    def __call__(self, parameters):
        groups = [{"params": [p], **extra} for p, extra in zip(parameters, self.groups or [{}] * len(parameters))]
        return self.kind(groups, **self.options)


def assert_onset(make, shape, factor):
    """Assert that divergence sets in within 1e-3 of ``factor * shape``."""
    assert [diverges(make, shape * (factor * share)) for share in (0.999, 1.001)] == [False, True]


# beta2 so near to 1 that one step leaves a second moment as it is; Adagrad's sum and RMSprop's moments are put back
B2 = 1 - 1e-12
CASES = {
    "sgd": (Make(torch.optim.SGD, lr=0.01), 200.0),
    "momentum": (Make(torch.optim.SGD, lr=0.01, momentum=0.9), 380.0),
    "dampening": (Make(torch.optim.SGD, lr=0.01, momentum=0.9, dampening=0.5), 760.0),
    "dampening without momentum": (Make(torch.optim.SGD, lr=0.01, dampening=0.5), 200.0),
    "nesterov": (Make(torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True), 380 / 2.8),
    "coupled decay": (Make(torch.optim.SGD, lr=0.01, momentum=0.5, weight_decay=30.0), 300.0 - 30.0),
    "adam": (Make(torch.optim.Adam, lr=0.01, betas=(0.9, B2), eps=0.1), None),
    "adam, decay": (Make(torch.optim.Adam, lr=0.01, betas=(0.9, B2), weight_decay=100.0), None),
    "amsgrad": (Make(torch.optim.Adam, lr=0.01, betas=(0.8, B2), amsgrad=True), None),
    "adamw": (Make(torch.optim.AdamW, lr=0.1, betas=(0.9, B2), weight_decay=3.0), None),
    "nadam": (Make(torch.optim.NAdam, lr=0.01, betas=(0.9, B2)), None),
    "nadam, decoupled": (
        Make(torch.optim.NAdam, lr=0.1, betas=(0.7, B2), weight_decay=2.0, decoupled_weight_decay=True), None),
    "rmsprop": (Make(torch.optim.RMSprop, lr=0.01, alpha=B2), None),
    "rmsprop, momentum": (Make(torch.optim.RMSprop, lr=0.01, alpha=B2, momentum=0.9, weight_decay=1.0), None),
    "rmsprop, centered": (Make(torch.optim.RMSprop, lr=0.01, alpha=B2, centered=True), None),
    "adagrad": (Make(torch.optim.Adagrad, lr=0.01, lr_decay=1e-15), None),
}  # fmt: skip


def limit_of(make, sizes, shape, step=10.0**15):
    """Return the factor of ``shape`` at which the derived limit is met, by dense eigenvalues."""
    model = nn.Module()
    for i, size in enumerate(sizes):
        model.register_parameter(f"w{i}", nn.Parameter(torch.ones(size, dtype=torch.float64)))
    limit = stability_limit(of_optimizer(primed(make, list(model.parameters()), step), model))
    critical = torch.cat([limit.critical[f"w{i}"].expand(size) for i, size in enumerate(sizes)]).numpy()
    decay = np.concatenate([np.full(size, limit.decay[f"w{i}"]) for i, size in enumerate(sizes)])
    root = 1 / np.sqrt(critical)
    low, high = 1e-6, 1e8  # the largest eigenvalue of L^-1/2 (factor * shape + decay) L^-1/2 grows with the factor
    for _ in range(80):
        middle = math.sqrt(low * high)
        matrix = root[:, None] * (middle * shape.numpy() + np.diag(decay)) * root
        low, high = (low, middle) if np.linalg.eigvalsh(matrix)[-1] > 1 else (middle, high)
    return low


@pytest.mark.parametrize("name", CASES)
def test_limit_is_the_measured_onset_of_divergence(name):
    make, expected = CASES[name]
    one = torch.ones(1, 1, dtype=torch.float64)
    derived = limit_of(make, [1], one)
    if expected is not None:
        assert derived == pytest.approx(expected, rel=1e-9)
    assert_onset(make, one, derived)


@pytest.mark.parametrize(
    "make",
    [
        Make(torch.optim.SGD, [2, 3], [{"lr": 0.01}, {"lr": 0.05, "momentum": 0.5}], lr=0.1, momentum=0.9),
        Make(torch.optim.SGD, [2, 3], [{"lr": 0.01}, {"lr": 0.05}], lr=0.1, momentum=0.9, nesterov=True),
        Make(torch.optim.AdamW, [2, 3], [{"lr": 0.3, "weight_decay": 2.0}, {"weight_decay": 0.0, "betas": (0.5, B2)}],
             lr=0.1, betas=(0.9, B2)),
    ],
    ids=["sgd", "nesterov", "adamw"],
)  # fmt: skip
def test_limit_of_several_groups_and_a_full_matrix(make):
    q = torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shape = q @ q.T / 5 + 0.1 * torch.eye(5, dtype=torch.float64)
    assert_onset(make, shape, limit_of(make, [2, 3], shape))


def run_state(make, model, data):
    """Return a checkpoint's content after three steps."""
    optimizer = make([p for p in model.parameters() if p.requires_grad])

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(data[0]), data[1])
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    return optimizer, {"optimizer_states": [optimizer.state_dict()]}


def classifier():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return model, (torch.randn(8, 1, 2, 3, dtype=torch.float64), torch.randint(3, (8,)))


def hessian(model, x, y):
    named = dict(model.named_parameters())

    def loss(flat):
        parts = flat.split([p.numel() for p in named.values()])
        point = {n: part.view_as(p) for (n, p), part in zip(named.items(), parts)}
        return nn.functional.cross_entropy(torch.func.functional_call(model, point, (x,)), y)

    return torch.autograd.functional.hessian(loss, torch.cat([p.detach().reshape(-1) for p in named.values()])).numpy()


def probe_of(model, data, content, target, **objective):
    cfg = {"optimizer": target}
    return vs.Probe(
        model,
        [data],
        vs.Objective(**objective),
        optimizer=lambda: factories.optimizer_state(model, content, cfg),
    )


@pytest.mark.parametrize("l2", ["half_sq", "none"])
def test_adamw_of_a_checkpoint_is_used_whatever_the_objective(l2):
    model, data = classifier()
    optimizer, content = run_state(lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.05), model, data)
    scale = torch.cat([
        ((optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**3)).sqrt() + 1e-8).reshape(-1) for p in model.parameters()
    ]).numpy()  # fmt: skip
    probe = probe_of(model, data, content, {"_target_": "torch.optim.AdamW"}, weight_decay=0.05, l2=l2)
    found = vs.preconditioned_sharpness(probe, tol=1e-6)
    expected = np.linalg.eigvals(hessian(model, *data) / scale[:, None]).real.max()
    assert found.preconditioner == "adamw"
    assert found.optimizer == "AdamW"
    assert found.threshold == pytest.approx(38 / 1e-2)
    # decoupled decay: P times 1 - lr wd / 2
    assert found.eigenvalues[0] == pytest.approx(expected / (1 - 1e-2 * 0.05 / 2), rel=1e-6)
    assert found.ratio == pytest.approx(found.eigenvalues[0] * 1e-2 / 38)
    assert np.isfinite(vs.critical_point(probe, n_points=3).gradient_norm_adamw)
    live = vs.preconditioned_sharpness(vs.Probe(model, [data]), optimizer=optimizer, tol=1e-6)
    assert live.eigenvalues[0] == pytest.approx(found.eigenvalues[0], rel=1e-9)


def test_sgd_of_a_checkpoint_has_its_own_limit_and_decay():
    model, data = classifier()
    _, content = run_state(lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.3), model, data)
    probe = probe_of(model, data, content, {"_target_": "torch.optim.SGD"}, weight_decay=0.05)
    found = vs.preconditioned_sharpness(probe, tol=1e-6)
    assert found.threshold == pytest.approx(380)
    assert found.preconditioner == "identity"
    assert found.eigenvalues[0] == pytest.approx(np.linalg.eigvalsh(hessian(model, *data))[-1] + 0.3, rel=1e-6)
    stated = vs.preconditioned_sharpness(vs.Probe(model, [data]), lr=1e-2, beta1=0.9)
    assert stated.threshold == pytest.approx(380)
    assert np.isnan(vs.preconditioned_sharpness(vs.Probe(model, [data]), lr=1e-2).threshold)


@pytest.mark.parametrize(
    ("make", "target", "why"),
    [
        (torch.optim.RAdam, {"_target_": "torch.optim.RAdam"}, "no limit is known of RAdam"),
        (torch.optim.SGD, {"_target_": "mylab.SGD"}, "no limit is known of SGD"),
        (torch.optim.SGD, {"_target_": "torch.optim.AdamW"}, "no limit is known of AdamW"),
        (lambda p: SAM(p), {"_target_": "vitscope.training.sam.SAM", "rho": 0.05, "base": {"_target_": "torch.optim.AdamW"}},
         "SAM takes the gradient"),
        (lambda p: torch.optim.SGD([{"params": p[:2]}, {"params": p[2:]}], lr=0.1), {"_target_": "torch.optim.SGD"},
         "2 groups of parameters without names"),
        (lambda p: torch.optim.SGD(p, lr=0.1, maximize=True), {"_target_": "torch.optim.SGD"}, "it maximizes"),
    ],
    ids=["radam", "foreign", "other class", "sam", "groups", "maximize"],
)  # fmt: skip
def test_an_unknown_limit_says_so(make, target, why):
    model, data = classifier()
    _, content = run_state(make, model, data)
    probe = probe_of(model, data, content, target)
    with pytest.warns(UserWarning, match=f"limit of stability is unknown: {why}"):
        found = vs.preconditioned_sharpness(probe)
    assert np.isnan(found.threshold)
    assert found.limit.startswith("unknown: ")
    assert "threshold" not in found.scalars()


def test_names_in_the_groups_map_states_to_parameters():
    model, _ = classifier()
    named = list(model.named_parameters())
    optimizer = torch.optim.SGD([{"params": named[2:], "lr": 0.5}, {"params": named[:2]}], lr=0.1)
    state = of_checkpoint(optimizer.state_dict(), model, {"_target_": "torch.optim.SGD"})
    assert {name: p.group["lr"] for name, p in state.parameters.items()} == {
        "1.weight": 0.1, "1.bias": 0.1, "3.weight": 0.5, "3.bias": 0.5,
    }  # fmt: skip


def test_the_rate_and_the_momentum_of_a_few_steps_are_those_of_the_next_step():
    """What torch takes in its next step, read off that step: Adagrad's rate, and NAdam's mu as a factor of its product."""
    model = model_of(2)

    def step(optimizer):
        before = model.w.detach().clone()
        model.w.grad = torch.tensor([0.3, -0.2], dtype=torch.float64)
        optimizer.step()
        return model.w.detach() - before

    adagrad = torch.optim.Adagrad(model.parameters(), lr=0.1, lr_decay=0.5)
    for _ in range(3):
        step(adagrad)
    limit = stability_limit(of_optimizer(adagrad, model))
    moved = step(adagrad)
    state = adagrad.state[model.w]
    rate = float((moved.abs() * (state["sum"].sqrt() + 1e-10) / model.w.grad.abs())[0])
    assert rate == pytest.approx(0.1 / 2.5, rel=1e-12)
    assert limit.threshold == pytest.approx(2 / rate, rel=1e-12)
    nadam = torch.optim.NAdam(model.parameters(), lr=0.1, betas=(0.8, 0.99), momentum_decay=3.0)
    for _ in range(3):
        step(nadam)
    limit, product = stability_limit(of_optimizer(nadam, model)), float(nadam.state[model.w]["mu_product"])
    step(nadam)
    mu = float(nadam.state[model.w]["mu_product"]) / product
    assert limit.threshold == pytest.approx(2 * 1.8 / ((1.8 - 2 * mu * 0.8) * 0.1), rel=1e-6)  # mu_product is float32


@pytest.mark.parametrize("decay", [0.0, 30.0])
def test_the_limit_of_sam_solves_its_quadratic_with_the_decay(decay):
    """``h + rho h^2 / |g| + wd`` is the base optimizer's limit; what is compared with it contains the decay too."""
    model, radius, length = model_of(), 0.05, 0.7
    base = stability_limit(of_optimizer(torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=decay), model))
    critical = brentq(lambda h: h + radius / length * h**2 + decay - 200, 0, 200, xtol=1e-12)
    assert sam_limit(base, radius, length) == pytest.approx(critical + decay, rel=1e-12)
    assert sam_limit(base, radius, 0.0) == 200  # no ascent


def test_a_rate_of_zero_has_no_limit():
    model, data = classifier()
    _, content = run_state(lambda p: torch.optim.AdamW(p, lr=0.0), model, data)
    found = vs.preconditioned_sharpness(probe_of(model, data, content, None))
    assert found.threshold == float("inf")
    assert found.ratio == 0.0
    assert found.eigenvalues[0] > 0
    assert vs.preconditioned_sharpness(probe_of(model, data, content, None), lr=0.1).threshold == pytest.approx(380)


def test_a_parameter_without_gradients_does_not_shift_the_others():
    model, data = classifier()
    model.extra = nn.Parameter(torch.ones(5, dtype=torch.float64))  # never used: no state
    optimizer, content = run_state(lambda p: torch.optim.AdamW(p, lr=0.0), model, data)
    scales = factories.adamw_scale(model, content)
    assert scales is not None
    for name, p in model.named_parameters():
        expected = (optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**3)).sqrt() + 1e-8 if name != "extra" else None
        torch.testing.assert_close(scales[name], torch.full_like(p, 1e-8) if expected is None else expected.detach())
