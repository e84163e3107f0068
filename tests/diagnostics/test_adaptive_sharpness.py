"""Adaptive sharpness against brute force, closed forms, and rescalings under which it does not change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import vitscope as vs
from tests.fixtures.networks.landscapes import assert_untouched, batches, bowl, real, snapshot
from vitscope.diagnostics.landscape._adaptive_sharpness import _scales, normalized_logits
from vitscope.linalg.weights.directions import random_direction
from vitscope.linalg.weights.effective_weights import canonical_names

ALL = ("elementwise_l2", "elementwise_linf", "elementwise_average", "filter_l2", "filter_linf", "filter_average")
FAST = {"radii": (0.1,), "n_pairs": 2, "n_steps": 0}


class TwoWeights(nn.Module):
    """Logits (b relu(a x), 0) of a number x: a function of two weights that is not convex."""

    def __init__(self, a: float = 1.5, b: float = -0.8) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor([[w]], dtype=torch.float64)) for w in (a, b))

    def forward(self, x: Tensor) -> Tensor:
        s = self.b[0] * (self.a[0] * x[:, 0]).relu()
        return torch.stack([s, torch.zeros_like(s)], dim=1)


def two_weights() -> vs.Probe:
    x = torch.linspace(-1, 2, 8, dtype=torch.float64)[:, None]
    return vs.Probe(TwoWeights(), [(x, torch.tensor([0, 1] * 4))])


def brute_force(probe: vs.Probe, ball: str, radius: float, n: int = 801) -> float:
    """Return the largest rise over a grid of the ball, all losses written out."""
    ((x, y),) = list(probe.iter_batches())
    a, b = 1.5, -0.8
    side = torch.linspace(-radius, radius, n, dtype=torch.float64)
    u, v = torch.meshgrid(side, side, indexing="ij")
    if ball == "l2":  # polar: the boundary is on the grid
        u, v = u.abs() * torch.cos(np.pi * v / radius), u.abs() * torch.sin(np.pi * v / radius)
    s = (b + abs(b) * v)[..., None] * ((a + abs(a) * u)[..., None] * x[:, 0]).relu()
    losses = torch.where(y == 0, nn.functional.softplus(-s), nn.functional.softplus(s)).mean(dim=-1)
    s = b * (a * x[:, 0]).relu()
    return float(losses.max() - torch.where(y == 0, nn.functional.softplus(-s), nn.functional.softplus(s)).mean())


@pytest.mark.parametrize("ball", ["l2", "linf"])
def test_worst_rise_of_two_weights_is_that_of_brute_force(ball: str):
    probe = two_weights()
    before = snapshot(probe.model)
    measures = [f"elementwise_{ball}", f"filter_{ball}"]  # of single weights both are one
    r = vs.sharpness(probe, **FAST, adaptive=measures, m_images=8, l2_radii=(0.3, 1.0), linf_radii=(0.3, 1.0))
    for measure, radius, rise in zip(r.adaptive_measures, r.adaptive_radii, r.adaptive_rise):
        exact = brute_force(probe, ball, radius)
        assert measure in measures
        assert rise == pytest.approx(exact, rel=2e-3)  # twenty steps of ascent
        assert rise <= exact + 1e-4  # a lower bound, but for the grid of 1/400 of the radius
    assert (r.adaptive_late_share < 0.02).all()
    assert_untouched(probe.model, before)


def test_average_of_a_bowl_has_its_closed_form():
    """Of 1/2 |w x - y|^2 both signs cancel the slope: the rise of a normal point z is rho^2 / 2 |(c z) x|^2."""
    probe = bowl()
    r = vs.sharpness(
        probe, radii=(0.1,), n_pairs=3, n_steps=0, adaptive=["elementwise_average", "filter_average"],
        average_radii=(0.1,), m_images=12, seed=3,
    )  # fmt: skip
    w = probe.model[0].weight.detach()
    x = torch.cat([x for x, _ in batches()])
    names = canonical_names(probe.model)
    draws = [random_direction(probe.parameters(), 3, -1_000_000 - k, names)["0.weight"].detach() for k in range(3)]
    for rise, c in zip(r.adaptive_rise, (w.abs(), w.square().mean(dim=1, keepdim=True).sqrt())):
        exact = np.mean([0.5 * 0.01 * float((x @ (c * z).T).square().sum(dim=1).mean()) for z in draws])
        assert rise == pytest.approx(exact, rel=1e-9)  # differences of nearby losses keep about ten digits


def test_each_group_has_normal_points_of_its_own():
    probe = bowl()
    r = vs.sharpness(
        probe, radii=(0.1,), n_pairs=3, n_steps=0, adaptive=["elementwise_average"], average_radii=(0.1,), m_images=6, seed=3,
    )  # fmt: skip
    w, x, names = (
        probe.model[0].weight.detach().abs(),
        torch.cat([x for x, _ in batches()]),
        canonical_names(probe.model),
    )
    for group in (0, 1):
        numbers = range(3 * group, 3 * group + 3)
        draws = [random_direction(probe.parameters(), 3, -1_000_000 - k, names)["0.weight"].detach() for k in numbers]
        images = x[6 * group : 6 * group + 6]
        exact = np.mean([0.5 * 0.01 * float((images @ (w * z).T).square().sum(dim=1).mean()) for z in draws])
        assert r.adaptive_rise_by_group[0, group] == pytest.approx(exact, rel=1e-9)


def test_groups_of_m_images_are_measured_one_by_one():
    probe = real()
    x, y = (torch.cat(parts) for parts in zip(*batches(shape=(3, 6, 6))))
    options = {**FAST, "adaptive": ["elementwise_l2"], "l2_radii": (0.5,), "n_starts": 1}
    r = vs.sharpness(probe, **options, m_images=4)
    alone = [
        vs.sharpness(vs.Probe(probe.model, [(x[i : i + 4], y[i : i + 4])]), **options, m_images=4) for i in (0, 4, 8)
    ]
    np.testing.assert_allclose(r.adaptive_rise_by_group[0], [one.adaptive_rise[0] for one in alone], rtol=1e-6)
    assert r.adaptive_rise_low[0] < r.adaptive_rise[0] < r.adaptive_rise_high[0]
    assert np.isnan(alone[0].adaptive_rise_low).all()
    assert vs.sharpness(probe, **options, m_images=5).adaptive_rise_by_group.shape == (1, 2)  # two images are left out
    # the worst case of few images is worse: each group has its own worst point
    assert r.adaptive_rise[0] > vs.sharpness(probe, **options, m_images=12).adaptive_rise[0]
    assert r.scalars()["elementwise_l2_r0.5"] == r.adaptive_rise[0]


def adaptive(model: nn.Module, measures: tuple[str, ...] = ALL, **options: object) -> np.ndarray:
    probe = vs.Probe(model.eval(), batches(shape=(3, 6, 6)))
    radii = {"l2_radii": (0.5,), "linf_radii": (0.05,), "average_radii": (0.1,)}
    r = vs.sharpness(probe, **FAST, adaptive=measures, m_images=12, ascent_steps=6, n_starts=1, **radii, **options)
    assert r.adaptive_measures == measures
    return r.adaptive_rise_by_group


def relu_network() -> nn.Sequential:
    torch.manual_seed(7)
    layers = (nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, eps=1e-12), nn.ReLU(), nn.Conv2d(5, 6, 2), nn.ReLU(), nn.Flatten(),
              nn.Linear(54, 4))  # fmt: skip
    model = nn.Sequential(*layers).double()
    with torch.no_grad():
        model[1].weight.mul_(torch.rand(5) + 0.5)
        model[1].bias.normal_()
        model[1].running_mean.normal_()
    return model


def rescale_relu(model: nn.Sequential) -> None:
    """Scale a convolution, and undo it in the layer after the ReLU."""
    model[3].weight.mul_(4)
    model[3].bias.mul_(4)
    model[6].weight.div_(4)


def rescale_channels(model: nn.Sequential) -> None:
    """The same with a factor of its own for each channel, which the columns of the next layer's filters undo."""
    factors = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    model[3].weight.mul_(factors[:, None, None, None])
    model[3].bias.mul_(factors)
    model[6].weight.div_(factors.repeat_interleave(9))


def rescale_batch_norm(model: nn.Sequential) -> None:
    """Scale BatchNorm, and undo it in the convolution after the ReLU."""
    model[1].weight.mul_(8)
    model[1].bias.mul_(8)
    model[3].weight.div_(8)


def rescale_before_batch_norm(model: nn.Sequential) -> None:
    """Scale a convolution with the running statistics of what it makes."""
    model[0].weight.mul_(2)
    model[0].bias.mul_(2)
    model[1].running_mean.mul_(2)
    model[1].running_var.mul_(4)


FILTER, ELEMENTWISE = ALL[3:], ALL[:3]


@pytest.mark.parametrize(
    ("rescale", "invariant", "changing"),
    [
        (rescale_relu, ALL, ()),
        (rescale_batch_norm, ALL, ()),
        (rescale_before_batch_norm, ALL, ()),
        (rescale_channels, ELEMENTWISE, FILTER),
    ],
)
def test_rescalings_that_leave_the_function_leave_the_measures(rescale, invariant, changing):
    before = adaptive(relu_network())
    model = relu_network()
    with torch.no_grad():
        rescale(model)
    after = adaptive(model)
    for measure, a, b in zip(ALL, before, after):
        if measure in invariant:
            # powers of two are exact; BatchNorm's eps of 1e-12 is a relative change of 1e-12 that the ascent amplifies
            np.testing.assert_allclose(b, a, rtol=1e-7, err_msg=measure)
        if measure in changing:
            assert not np.allclose(b, a, rtol=1e-2), measure


def test_normalized_logits_do_not_feel_the_scale_of_the_last_layer():
    before = adaptive(relu_network(), logit_normalization=True)
    model = relu_network()
    with torch.no_grad():
        model[6].weight.mul_(16)
        model[6].bias.mul_(16)
    np.testing.assert_allclose(adaptive(model, logit_normalization=True), before, rtol=1e-7)
    assert not np.allclose(adaptive(model), adaptive(relu_network()), rtol=0.1)
    logits = torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]], dtype=torch.float64)
    expected = np.array([[-2, -1, 3], [0, 0, 0]]) / np.array([[14**0.5], [1]])
    np.testing.assert_allclose(normalized_logits(logits), expected, atol=1e-15)


def test_more_steps_and_starts_never_lower_the_bound_by_much_and_shares_say_how_far_it_is():
    short, long = (
        adaptive(relu_network(), ("elementwise_linf",)),
        vs.sharpness(vs.Probe(relu_network().eval(), batches(shape=(3, 6, 6))), **FAST, adaptive=["elementwise_linf"],
                     linf_radii=(0.05,), m_images=6, ascent_steps=60),
    )  # fmt: skip
    assert long.adaptive_rise[0] >= short.mean() * (1 - 1e-3)
    assert 0 <= long.adaptive_late_share[0] < 0.01


def test_bad_options_are_refused():
    probe = real()
    with pytest.raises(ValueError, match="Expected adaptive to hold some of elementwise_l2, .*, received 'l2'"):
        vs.sharpness(probe, **FAST, adaptive=["l2"])
    with pytest.raises(ValueError, match="Expected m_images to be at most the 12 images of the probe, received 128"):
        vs.sharpness(probe, **FAST, adaptive=["elementwise_l2"])
    with pytest.raises(ValueError, match=r"Expected linf_radii to be positive numbers, received \(\)"):
        vs.sharpness(probe, **FAST, adaptive=["filter_linf"], linf_radii=())


def test_pruned_weights_stay_and_rows_are_resumed():
    model = relu_network()
    nn.utils.prune.l1_unstructured(model[3], "weight", 0.5)
    rows: dict = {}
    probe = vs.Probe(model.eval(), batches(shape=(3, 6, 6)))
    options = {**FAST, "adaptive": ["filter_l2"], "l2_radii": (0.5,), "m_images": 6}
    first = vs.sharpness(probe, **options, partial=rows)
    again = vs.sharpness(probe, **options, partial=rows)
    np.testing.assert_array_equal(first.adaptive_rise, again.adaptive_rise)
    assert sum(name.startswith("filter_l2") for name in rows) == 2


def test_scales_of_pruned_filters_are_root_mean_squares_of_the_weights_that_are_left():
    layer = nn.Linear(4, 2).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 9.0, 4.0, 9.0], [1.0, -2.0, 2.0, 4.0]]))
        layer.bias.copy_(torch.tensor([-0.5, 0.25]))
    prune.custom_from_mask(layer, "weight", torch.tensor([[1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
    parameters = dict(layer.named_parameters())
    scales = _scales(layer, parameters, "filter")
    expected = [[12.5**0.5, 0.0, 12.5**0.5, 0.0], [2.5] * 4]
    np.testing.assert_allclose(scales["weight_orig"], expected, rtol=1e-14)
    assert scales["bias"].tolist() == [0.5, 0.25]  # no filter
    elementwise = _scales(layer, parameters, "elementwise")["weight_orig"]
    assert elementwise.tolist() == [[3.0, 0.0, 4.0, 0.0], [1.0, 2.0, 2.0, 4.0]]


def test_figure_has_a_panel_for_the_adaptive_measures():
    r = vs.sharpness(real(), radii=(0.05, 0.1), n_pairs=2, n_steps=1, adaptive=ALL, m_images=4, ascent_steps=3)
    figure = vs.plot({"net": r})
    assert [bool(axes.get_ylabel()) for axes in figure.axes] == [True] * 5 + [False]
    figure.draw_without_rendering()
