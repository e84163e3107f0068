"""Attacks against networks whose robust accuracy is known, and the published losses and schedules."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from tests.fixtures.images.adversarial_images import MEAN, STD, images, network, normalized, probe_of
from vitscope.diagnostics.adversarial._apgd import checkpoints
from vitscope.diagnostics.adversarial._attacks import Ball
from vitscope.diagnostics.adversarial._losses import LOSSES, log_odds, targeted_ratio
from vitscope.diagnostics.adversarial._square import share
from vitscope.diagnostics.adversarial._suite import ATTACKS, SUITE
from vitscope.diagnostics.adversarial.adversarial import adversarial
from vitscope.diagnostics.adversarial.plot import adversarial as draw


class Scaled(nn.Module):
    """A model whose margins are so large that its cross entropy has no gradient in floating point."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * self.model(x)


class Rounded(nn.Module):
    """A model of quantized inputs: its derivative is zero or does not exist."""

    def __init__(self, model: nn.Module, detached: bool) -> None:
        super().__init__()
        self.model, self.detached = model, detached

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.model((64 * x).round() / 64)
        return logits.detach() if self.detached else logits


def linear(classes: int = 5, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Return a linear classifier, its images and the labels that it gives them."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, classes)).to(dtype)
    pixels = images(48, margin=0.2)
    with torch.no_grad():
        labels = model(normalized(pixels).to(dtype)).argmax(1)
    return model, pixels, labels


def robust(model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor, epsilon: float, norm: str) -> torch.Tensor:
    """Return which images of a linear model no change inside the ball can bring to another class (no pixel is clipped)."""
    weight = model[1].weight.detach().double()
    with torch.no_grad():
        logits = model(normalized(pixels).to(model[1].weight.dtype)).double()
    scale = 1 / torch.tensor(STD, dtype=torch.float64).repeat_interleave(36)
    gap = (weight[:, None] - weight[None]) * scale  # (k, y, D) in pixels
    gain = epsilon / 255 * (gap.abs().sum(2) if norm == "linf" else gap.norm(dim=2))  # dual norm
    worst = logits - logits.gather(1, labels[:, None]) + gain[:, labels].T
    return (worst.scatter(1, labels[:, None], -torch.inf) < 0).all(1)


LINEAR = ("pgd", "apgd_ce", "apgd_dlr", "apgd_cw", "apgd_t", "suite")


# the suite in l2 makes each of its attacks
@pytest.mark.parametrize(
    ("attack", "norm"),
    [
        pytest.param(attack, norm, marks=() if norm == "linf" or attack in ("pgd", "suite") else pytest.mark.slow)
        for attack in LINEAR
        for norm in ("linf", "l2")
    ],
)
def test_the_robust_accuracy_of_a_linear_model_is_found_exactly(attack: str, norm: str) -> None:
    model, pixels, labels = linear()
    epsilons = (2, 6) if norm == "linf" else (16, 48)
    result = adversarial(
        probe_of(model, pixels, 24, labels),
        attacks=(attack,),
        epsilons=epsilons,
        norm=norm,
        iterations=25,
        queries=4,
        steps=40,
    )
    for i, epsilon in enumerate(epsilons):
        truth = robust(model, pixels, labels, epsilon, norm).double().mean().item()
        assert 0 < truth < 1
        # untargeted ascent may follow the wrong class; on these images only the suite and APGD-T try every one
        assert result.accuracy[0, i] >= truth - 1e-12
        if attack in ("apgd_t", "suite"):
            assert result.accuracy[0, i] == pytest.approx(truth, abs=1e-12)


@pytest.mark.parametrize("attack", ["fgsm", "pgd", "apgd_ce", "suite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_margins_do_not_hide_the_gradient(attack: str, dtype: torch.dtype) -> None:
    model, pixels, labels = linear(dtype=dtype)
    masked = Scaled(model, 1e4)
    with torch.no_grad():
        logits = masked(normalized(pixels).to(dtype))
    logits.requires_grad_()
    nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    assert (logits.grad.abs().amax(1) == 0).double().mean() > 0.5  # the cross entropy's own gradient is lost
    options = {"attacks": (attack,), "epsilons": (8,), "iterations": 20, "queries": 50}
    plain, hidden = (adversarial(probe_of(m, pixels.to(dtype), 24, labels), **options) for m in (model, masked))
    truth = robust(model, pixels.to(dtype), labels, 8, "linf").double().mean().item()
    for result in (plain, hidden):
        assert result.clean_accuracy == 1
        assert truth <= result.accuracy[0, 0] < 0.1
    assert hidden.zero_gradient[0, 0] == 0
    assert np.isfinite(hidden.nll).all()


def test_a_flat_model_is_not_called_robust_in_silence() -> None:
    model, pixels, labels = linear()
    flat = probe_of(Rounded(model, detached=False), pixels, 24, labels)
    with pytest.warns(RuntimeWarning, match="every gradient that pgd took was exactly zero at 100% of the images"):
        blind = adversarial(flat, attacks=("pgd",), epsilons=(8,), steps=3)
    assert blind.zero_gradient[0, 0] == 1
    with pytest.warns(RuntimeWarning, match="suite"):
        suite = adversarial(flat, attacks=("suite",), epsilons=(8,), iterations=5, queries=500)
    assert suite.accuracy[0, 0] < 0.2 < blind.accuracy[0, 0]
    assert suite.suite_accuracy[-1, 0] < suite.suite_accuracy[1, 0]  # Square found what the others could not


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 8), ("l2", 100)])
def test_square_attacks_a_model_that_cannot_be_differentiated(norm: str, epsilon: float) -> None:
    model, pixels, labels = linear()
    opaque = probe_of(Rounded(model, detached=True), pixels, 48, labels)
    with pytest.raises(ValueError, match=r"without gradients: use attacks=\('square',\)"):
        adversarial(opaque, attacks=("pgd",), epsilons=(epsilon,))
    result = adversarial(opaque, attacks=("square",), epsilons=(epsilon,), norm=norm, queries=300)
    truth = robust(model, pixels, labels, epsilon, norm).double().mean().item()
    assert (
        truth - 0.1 <= result.accuracy[0, 0] < 0.5 * result.clean_accuracy
    )  # rounded inputs shift the border a little
    assert np.isnan(result.zero_gradient).all()
    assert result.largest_change[0, 0] <= epsilon * (1 + 1e-12)
    few = adversarial(opaque, attacks=("square",), epsilons=(epsilon,), norm=norm, queries=300, restarts=2)
    assert few.accuracy[0, 0] <= result.accuracy[0, 0]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_every_attack_stays_inside_the_ball_and_the_pixel_range(norm: str) -> None:
    model, pixels, seen = network(), images(12, margin=0.0), []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    radius = 20 if norm == "linf" else 200
    options = {"epsilons": (radius,), "norm": norm, "steps": 3, "iterations": 6, "queries": 20, "n_targets": 2}
    result = adversarial(probe_of(model, pixels, 12), attacks=ATTACKS, **options)
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (MEAN, STD))
    for x in seen:
        attacked = x * std + mean
        assert attacked.min() >= -1e-12
        assert attacked.max() <= 1 + 1e-12
        if len(x) == len(pixels):
            assert 255 * Ball(norm, 0.0).length(attacked - pixels).max() <= radius * (
                1 + 1e-12
            )  # a few roundings in float64
    assert (result.largest_change <= radius * (1 + 1e-12)).all()


def test_more_attack_never_raises_the_accuracy_and_a_seed_decides_it() -> None:
    pixels = images(24)
    with torch.no_grad():
        labels = network().eval()(normalized(pixels)).argmax(1)  # all right at first: everything is to be found
    options = {"attacks": ATTACKS, "epsilons": (6,), "steps": 3, "iterations": 6, "queries": 20}
    one, again = (adversarial(probe_of(network(), pixels, size, labels), **options) for size in (24, 7))
    np.testing.assert_array_equal(one.accuracy, again.accuracy)
    np.testing.assert_allclose(one.nll, again.nll, rtol=1e-9)
    more = adversarial(probe_of(network(), pixels, 24, labels), restarts=3, **options)
    assert (more.accuracy <= one.accuracy).all()
    for result in (one, more):
        left = result.suite_accuracy[:, 0]
        assert result.suite_attacks == SUITE
        assert all(b <= a for a, b in pairwise([result.clean_accuracy, *left]))
        assert left[-1] == result.accuracy[ATTACKS.index("suite"), 0]
        assert left[0] == result.accuracy[ATTACKS.index("apgd_ce"), 0]
        assert (result.accuracy_low <= result.accuracy).all()
        assert (result.accuracy <= result.accuracy_high).all()
        assert (result.accuracy_high > result.accuracy_low).all()  # also where no image or every image is right


def test_the_result_and_the_card_state_what_ran() -> None:
    result = adversarial(
        probe_of(network(), images(8)),
        attacks=("fgsm", "suite"),
        epsilons=(1, 2),
        iterations=3,
        queries=4,
        loss="dlr",
        n_targets=2,
    )
    assert result.settings == {
        "fgsm": {"loss": "dlr"},
        "apgd_ce": {"loss": "ce", "restarts": 1, "iterations": 3},
        "apgd_t": {"loss": "targeted dlr", "restarts": 1, "iterations": 3, "n_targets": 2},
        "square": {"loss": "cw", "restarts": 1, "queries": 4},
    }
    assert result.card is not None
    assert result.card.solver["attacks"] == result.settings
    assert result.card.solver["suite"] == ["apgd_ce", "apgd_t", "square"]
    assert result.suite_accuracy.shape == (3, 2)
    assert "suite_after_apgd_t_2_accuracy" in result.scalars()
    figure = draw({"": result})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["FGSM", "APGD-CE + APGD-T + Square"]


def test_losses_are_the_published_ones() -> None:
    z = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(50) % 6
    ordered = z.sort(dim=1, descending=True).values
    own, other = z.gather(1, y[:, None])[:, 0], z.scatter(1, y[:, None], -torch.inf).amax(1)
    torch.testing.assert_close(LOSSES["cw"](z, y), other - own)
    torch.testing.assert_close(LOSSES["dlr"](z, y), -(own - other) / (ordered[:, 0] - ordered[:, 2]))
    target = (y + 1) % 6
    expected = -(own - z.gather(1, target[:, None])[:, 0]) / (ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2)
    torch.testing.assert_close(targeted_ratio(z, y, target), expected)
    torch.testing.assert_close(
        nn.functional.softplus(log_odds(z, y)), nn.functional.cross_entropy(z, y, reduction="none")
    )
    for factor in (1.0, 1e6):  # the ratio does not depend on the scale of the logits
        torch.testing.assert_close(LOSSES["dlr"](factor * z, y), LOSSES["dlr"](z, y))
    for classes in (2, 3):
        assert all(torch.isfinite(loss(z[:, :classes], y % classes)).all() for loss in LOSSES.values())
        assert torch.isfinite(targeted_ratio(z[:, :classes], y % classes, (y + 1) % classes)).all()


def test_schedules_are_the_published_ones() -> None:
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    halvings = {0: 0, 10: 0, 11: 1, 50: 1, 51: 2, 201: 3, 501: 4, 1001: 5, 2001: 6, 4001: 7, 6001: 8, 8001: 9}
    assert {query: share(query, 10000) for query in halvings} == {q: 0.8 / 2**n for q, n in halvings.items()}
    assert share(51, 100) == share(5100, 10000)
