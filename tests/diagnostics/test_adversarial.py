from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from tests.fixtures.images.adversarial_images import MEAN, STD, images, network, normalized, probe_of
from vitscope.diagnostics.adversarial._attacks import Ball
from vitscope.diagnostics.adversarial.adversarial import adversarial
from vitscope.diagnostics.adversarial.plot import adversarial as draw


class Linear(nn.Module):
    """Two logits, 0 and w . x: the loss of class 0 rises in the direction w / std of pixels."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        score = (x * self.weight).sum((1, 2, 3))
        return torch.stack([torch.zeros_like(score), score], dim=1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_on_a_linear_model_the_attack_is_the_dual_norm(norm: str, attack: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(3, 6, 6, generator=generator, dtype=torch.float64)
    pixels, zero = images(margin=0.2), torch.zeros(24, dtype=torch.long)
    result = adversarial(
        probe_of(Linear(weight), pixels, labels=zero), attacks=(attack,), epsilons=(2, 10), norm=norm, steps=40
    )
    in_pixels = weight / torch.tensor(STD, dtype=torch.float64)[:, None, None]
    gain = in_pixels.abs().sum() if norm == "linf" else in_pixels.norm()
    for i, epsilon in enumerate((2, 10)):
        score = (normalized(pixels) * weight).sum((1, 2, 3)) + epsilon / 255 * gain
        # PGD's steps sum to 2.5 radii: its end is the corner (linf), or still closing in along the sphere (l2)
        tolerance = 5e-3 if (attack, norm) == ("pgd", "l2") else 1e-9
        assert result.nll[0, i] == pytest.approx(nn.functional.softplus(score).mean().item(), rel=tolerance)
        assert result.accuracy[0, i] == pytest.approx((score < 0).double().mean().item(), abs=tolerance)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_image_ever_leaves_its_ball_or_the_pixel_range(norm: str) -> None:
    model, pixels, seen = network(), images(margin=0.0), []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    radius = 20 if norm == "linf" else 300
    result = adversarial(probe_of(model, pixels, 24), epsilons=(radius,), norm=norm, steps=5, restarts=2)
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (MEAN, STD))
    # the first batch twice and two images for what the parameters do, twice with its gradient; clean, FGSM, PGD with the image
    # itself
    seen = [x for x in seen if len(x) == len(pixels)]
    assert len(seen) == 2 + 2 + 1 + 2 + 1 + 2 * 6
    largest = []
    for x in seen:
        attacked = x * std + mean
        assert attacked.min() >= -1e-12
        assert attacked.max() <= 1 + 1e-12
        largest.append(255 * Ball(norm, 0.0).length(attacked - pixels).max().item())
    assert max(largest) <= radius * (1 + 1e-12)  # float64, a few roundings
    assert max(largest) > 0.5 * radius
    assert result.largest_change.max() <= radius * (1 + 1e-12)


@pytest.mark.filterwarnings("ignore:the first batch does not look normalized:UserWarning")  # as it is meant
def test_a_pixel_outside_the_range_stays_within_the_ball() -> None:
    pixels = images() + 0.7
    result = adversarial(probe_of(network(), pixels), epsilons=(4,), steps=3)
    assert result.largest_change.max() <= 4 * (1 + 1e-12)
    assert result.largest_change.min() > 3


def test_zero_radius_is_clean_and_larger_radii_are_worse() -> None:
    probe = probe_of(network(), images())
    result = adversarial(probe, epsilons=(0, 4, 16, 64), steps=10)
    np.testing.assert_allclose(result.nll[:, 0], result.clean_nll, rtol=1e-12)
    np.testing.assert_allclose(result.accuracy[:, 0], result.clean_accuracy)
    assert all(b > a for row in result.nll for a, b in pairwise(row))
    assert (result.nll[1, 1:] >= result.nll[0, 1:] - 1e-9).all()  # PGD finds at least what FGSM does here
    with torch.no_grad():
        plain = network().eval()(normalized(images()))
    loss = nn.functional.cross_entropy(plain, torch.arange(24) % 3)
    assert result.clean_nll == pytest.approx(loss.item(), rel=1e-12)


def test_more_starts_and_steps_are_never_weaker() -> None:
    probe = probe_of(network(), images())
    options = {"attacks": ("pgd",), "epsilons": (16,)}
    one = adversarial(probe, steps=4, **options)
    starts = adversarial(probe, steps=4, restarts=3, **options)
    assert starts.accuracy[0, 0] <= one.accuracy[0, 0]
    assert starts.nll[0, 0] >= one.nll[0, 0]


def test_batch_size_does_not_matter_and_the_model_is_restored() -> None:
    model = network().train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    a, b = (adversarial(probe_of(model, images(), size), steps=3) for size in (24, 7))
    np.testing.assert_allclose(a.nll, b.nll, rtol=1e-9)
    np.testing.assert_array_equal(a.accuracy, b.accuracy)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_finished_attacks_are_not_computed_again() -> None:
    model, partial, calls = network(), {}, []
    options = {"epsilons": (4,), "steps": 2, "partial": partial}
    first = adversarial(probe_of(model, images()), **options)
    assert set(partial) == {"fgsm 4", "pgd 4"}
    del partial["fgsm 4"]
    model.register_forward_hook(lambda *_: calls.append(1))
    second = adversarial(probe_of(model, images()), **options)
    # the first batch four times to see that the model repeats itself, two images for what its parameters do, one and two for
    # whether they influence each other; clean and FGSM's two passes, three batches each
    assert len(calls) == 4 + 1 + 2 + 3 + 2 * 3
    np.testing.assert_array_equal(first.nll, second.nll)


def test_refusals() -> None:
    probe = probe_of(network(), images())
    for options, message in (
        ({"attacks": ("cw",)}, "attacks among fgsm, pgd, apgd_ce, .*, received 'cw'"),
        ({"attacks": "pgd"}, "attacks among .*, received 'pgd'"),
        ({"attacks": ("pgd", "pgd")}, "each attack once"),
        ({"loss": "mse"}, "loss to be one of ce, dlr, cw, received 'mse'"),
        ({"queries": 0}, "queries of at least 1, received 0"),
        ({"norm": "l1"}, "norm to be one of linf, l2, received 'l1'"),
        ({"epsilons": (-1,)}, r"epsilons of at least 0, received \[-1\]"),
        ({"steps": 0}, "steps of at least 1, received 0"),
    ):
        with pytest.raises(ValueError, match=message):
            adversarial(probe, **options)


def test_plot() -> None:
    probe = probe_of(network(), images())
    result = adversarial(probe, steps=2)
    figure = draw({"a": result, "b": result})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a FGSM", "a PGD", "b FGSM", "b PGD"]
    with pytest.raises(ValueError, match="results of one norm, received l2 and linf"):
        draw({"a": result, "b": adversarial(probe, steps=2, norm="l2")})
