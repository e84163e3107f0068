from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import vitscope as vs
from vitscope.core.undefined_values import NullWarning
from vitscope.diagnostics.variance.feature_map_variance import spatial_variance


class Chain(nn.Module):
    """Applies functions one after another, each map readable."""

    def __init__(self, *functions) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))  # its dtype becomes the images'
        self.functions = functions
        self.places = nn.ModuleList(nn.Identity() for _ in functions)

    def forward(self, x):
        for function, place in zip(self.functions, self.places):
            x = place(function(x))
        return x.flatten(1)[:, :1].repeat(1, 2)

    def probe(self, *batches: torch.Tensor, kinds: list[str] | None = None) -> vs.Probe:
        kinds = kinds or ["conv"] * len(self.places)
        depths = np.linspace(0, 1, len(kinds))
        taps = [
            vs.Tap(f"tap{i}", kind, 1, float(depth), place)
            for i, (kind, depth, place) in enumerate(zip(kinds, depths, self.places))
        ]
        return vs.Probe(self, [(x, torch.zeros(len(x), dtype=torch.long)) for x in batches], taps=taps)


def same(x: torch.Tensor) -> torch.Tensor:
    return x


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (5, 12)])
def test_sinusoid_has_half_its_squared_amplitude(size: tuple[int, int]):
    h, w = size
    m = torch.arange(h, dtype=torch.float64)[:, None].expand(h, w)
    wave = 3.0 + 2.0 * torch.cos(2 * torch.pi * m / h)
    result = vs.feature_map_variance(Chain(same).probe(wave.expand(2, 4, h, w)))
    # mean square of the cosine is 1/2, times 2^2, unbiased over h w positions; rounding of float64 only
    assert result.variance[0] == pytest.approx(2.0 * h * w / (h * w - 1), rel=1e-12)


def test_white_noise_has_unit_variance_and_parseval_holds():
    x = noise(130, 6, 16, 16)
    result = vs.feature_map_variance(Chain(same).probe(x[:100], x[100:]))
    # 780 maps of 256 values: the variance's standard error is sqrt(2 / (780 * 255)) = 0.0032
    assert result.variance[0] == pytest.approx(1.0, abs=0.011)
    power = np.abs(np.fft.fft2(x.numpy())) ** 2
    ac = power.sum((-2, -1)) - power[..., 0, 0]
    assert result.variance[0] == pytest.approx((ac / (256 * 255)).mean(), rel=1e-12)
    per_image = x.numpy().var((-2, -1), ddof=1).mean(1)
    low, high = stats.t.interval(0.95, 129, per_image.mean(), stats.sem(per_image))
    assert 2 * result.variance_half_width[0] == pytest.approx(high - low, rel=1e-9)
    assert result.n_images == 130


@pytest.mark.parametrize("layout", ["channels first", "channels last"])
@pytest.mark.parametrize("mean", [0.0, 5.0, 300.0])
def test_single_precision_keeps_its_accuracy_beside_a_large_mean(mean: float, layout: str):
    x = (mean + noise(3, 5, 14, 14)).float()
    if layout == "channels last":
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    expected = x.double().var((-2, -1)).mean(1)
    # sums of 196 float32 terms: error about 1e-6 of the mean square, which is at most 100 variances before the second look
    torch.testing.assert_close(spatial_variance(x), expected, rtol=1e-4, atol=0)


def test_log_ratio_of_known_gains_by_kind():
    net = Chain(same, lambda x: 0.5 * x, lambda x: 3 * x + 1, lambda x: 2 * x[..., ::2, ::2], lambda x: 4 * x)
    probe = net.probe(noise(100, 2, 8, 8), noise(30, 2, 8, 8, seed=1), kinds=["stem", "msa", "mlp", "conv", "mlp"])
    result = vs.feature_map_variance(probe)
    np.testing.assert_allclose(result.log_variance_ratio[[1, 2, 4]], 2 * np.log([0.5, 3, 4]), rtol=1e-12)
    assert np.isnan(result.log_variance_ratio[[0, 3]]).all()  # nothing before; another size
    np.testing.assert_allclose(result.log_variance_ratio_half_width[[1, 2, 4]], 0, atol=1e-7)  # sums of squares cancel
    scalars = result.scalars()
    assert scalars["log_variance_ratio_msa"] == pytest.approx(-2 * np.log(2))
    assert scalars["log_variance_ratio_mlp"] == pytest.approx(np.log(3) + np.log(4))
    assert "log_variance_ratio_conv" not in scalars
    np.testing.assert_array_equal(result.map_sizes, [[8, 8]] * 3 + [[4, 4]] * 2)


def test_the_log_ratio_is_the_mean_of_the_images_own():
    """Gains that differ between images: the logarithm of a mean ratio, or of mean variances, would be larger."""
    shift = noise(150, 1, 1, 1, seed=1)
    per_image = 2 * shift.flatten().numpy()  # log of the squared gain exp(shift)^2
    x = noise(150, 2, 8, 8)
    # each image carries its gain as its mean, which the variance leaves out
    x = x - x.mean((1, 2, 3), keepdim=True) + shift
    net = Chain(same, lambda x: x * x.mean((1, 2, 3), keepdim=True).exp())
    result = vs.feature_map_variance(net.probe(x[:90], x[90:]))
    low, high = stats.t.interval(0.95, 149, per_image.mean(), stats.sem(per_image))
    assert result.log_variance_ratio[1] == pytest.approx(per_image.mean(), rel=1e-10)
    assert 2 * result.log_variance_ratio_half_width[1] == pytest.approx(high - low, rel=1e-9)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: x.mean((-1, -2), keepdim=True), "1x1 map"),
        (lambda x: torch.full_like(x, 0.1), "constant over all positions"),
        (lambda x: x * float("nan"), "activations are not finite"),
    ],
)
def test_what_has_no_variance_is_null_with_a_warning_that_names_the_tap(function, why: str):
    net = Chain(same, lambda x: 2 * x, function)
    with pytest.warns(NullWarning, match=rf"feature_map_variance: null for tap2 \({why}\)$"):
        result = vs.feature_map_variance(net.probe(noise(3, 2, 8, 8)))
    assert np.isnan(result.variance[2])
    assert np.isnan(result.log_variance_ratio[2])
    assert np.isfinite(result.variance[:2]).all()


def test_an_image_without_variance_makes_a_ratio_null_and_named():
    x = noise(3, 2, 8, 8)
    x[1] = 0.0
    with pytest.warns(NullWarning, match=r"null for the ratio at tap1, the ratio at tap2 \(an image without variance"):
        result = vs.feature_map_variance(Chain(same, lambda x: 2 * x, lambda x: x + noise(2, 8, 8)).probe(x))
    assert np.isnan(result.log_variance_ratio).all()  # of one image 0 / 0, then infinite
    assert np.isfinite(result.variance).all()


@pytest.mark.parametrize("n", [1, 127])
def test_few_images_have_no_interval(n: int):
    with pytest.warns(NullWarning, match=r"the intervals \(fewer than 128 images\)"):
        result = vs.feature_map_variance(Chain(same).probe(noise(n, 2, 8, 8)))
    assert np.isfinite(result.variance[0])
    assert np.isnan(result.variance_half_width[0])


def test_refusals():
    with pytest.raises(ValueError, match=r"one shape at tap0, received \(2, 8, 8\) and \(2, 6, 6\)"):
        vs.feature_map_variance(Chain(same).probe(noise(1, 2, 8, 8), noise(1, 2, 6, 6)))
    with pytest.raises(ValueError, match="level"):
        vs.feature_map_variance(Chain(same).probe(noise(2, 2, 8, 8)), level=0.0)
    with pytest.raises(ValueError, match="at least one tap"):
        vs.feature_map_variance(Chain().probe(noise(2, 2, 8, 8)))


@pytest.mark.parametrize("view", ["both", "variance", "ratio"])
def test_figure_shows_variance_and_ratio(view: str):
    net = Chain(same, lambda x: 9 * x, lambda x: x[..., ::2, ::2])
    result = vs.feature_map_variance(net.probe(noise(3, 2, 8, 8), kinds=["stem", "msa", "conv"]))
    figure = vs.plot({"a": result, "b": result} if view == "variance" else result, view=view)
    labels = [ax.get_ylabel() for ax in figure.axes]
    assert (
        labels
        == {
            "both": ["Feature map variance", "ln(variance after / before unit)"],
            "variance": ["Feature map variance"],
            "ratio": ["ln(variance after / before unit)"],
        }[view]
    )
    if view == "both":
        np.testing.assert_array_equal(figure.axes[0].get_lines()[0].get_ydata(), result.variance)
        assert figure.axes[0].get_yscale() == "log"


def test_figure_refuses_an_unknown_view():
    result = vs.feature_map_variance(Chain(same).probe(noise(2, 2, 8, 8)))
    with pytest.raises(ValueError, match="both, variance, ratio, received 'all'"):
        vs.plot(result, view="all")
