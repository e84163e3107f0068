from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from scipy import stats
from torch import nn

import vitscope as vs
from vitscope.core.undefined_values import NullWarning
from vitscope.diagnostics.fourier._bootstrap import by_kind
from vitscope.models.structure.residual_structure import Read
from vitscope.models.structure.residual_units import Unit, known_units


class Filter(nn.Module):
    """Multiplies the map's transform by a given gain: an exact filter."""

    def __init__(self, gain: np.ndarray | None = None, stride: int = 1) -> None:
        super().__init__()
        self.gain, self.stride = gain, stride
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x):
        if self.gain is not None:
            x = torch.fft.ifft2(torch.fft.fft2(x) * torch.from_numpy(self.gain)).real
        return self.scale * x[..., :: self.stride, :: self.stride]


class Net(nn.Module):
    """Branches that are exact filters, each on the images themselves, so that transfers are known."""

    def __init__(self, *branches: Filter) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return torch.stack([branch(x).mean((-1, -2)) for branch in self.branches]).sum(0)

    def units(self, kinds: list[str]) -> list[Unit]:
        last = max(len(kinds) - 1, 1)
        return [
            Unit(f"unit{i}", kind, 1, i / last, branch, Read(branch, "input"), Read(branch))
            for i, (kind, branch) in enumerate(zip(kinds, self.branches))
        ]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def measure(net: Net, kinds: list[str], x: torch.Tensor, batches: int = 1, **options):
    probe = vs.Probe(net, [(part, torch.zeros(len(part), dtype=torch.long)) for part in x.chunk(batches)])
    return vs.branch_transfer(probe, units=net.units(kinds), **options)


def radial_gain(h: int, slope: float) -> np.ndarray:
    """exp(slope * ring), the same for each bin of a ring."""
    k = np.fft.fftfreq(h) * h
    return np.exp(slope * np.round(np.hypot(k[:, None], k)))


@pytest.mark.parametrize("path", ["radial", "diagonal"])
@pytest.mark.parametrize("h", [8, 9, 16])
def test_transfer_of_an_exact_filter_is_the_log_of_its_gain(path: str, h: int):
    gain = radial_gain(h, -0.2)
    result = measure(Net(Filter(gain), Filter(1 / gain)), ["msa", "mlp"], noise(128, 3, h, h), batches=2, path=path)
    along = np.round(np.sqrt(2) * np.arange((h + 1) // 2)) if path == "diagonal" else np.arange(h // 2 + 1)
    # eps = 1e-6 beside amplitudes of about h; the smallest of them decide
    np.testing.assert_allclose(result.transfer[0], -0.2 * along, atol=1e-4)
    np.testing.assert_allclose(result.transfer[1], 0.2 * along, atol=1e-4)
    third = (len(along) - 1) // 3
    expected = -0.2 * (along[-third:].mean() - along[1 : 1 + third].mean())
    np.testing.assert_allclose(result.contrast, [expected, -expected], atol=1e-4)
    assert result.kind_names == ("msa", "mlp")
    np.testing.assert_allclose(result.kind_contrast, result.contrast)
    np.testing.assert_allclose([result.kind_low, result.kind_high], [result.contrast] * 2, atol=1e-4)
    assert result.scalars()["contrast_msa"] == result.kind_contrast[0]


def test_identity_transfers_everything_exactly():
    result = measure(Net(Filter()), ["conv"], noise(128, 2, 8, 8))
    np.testing.assert_array_equal(result.transfer[0], np.zeros(5))
    assert result.contrast[0] == 0.0
    assert result.contrast_half_width[0] == 0.0


class Random(Filter):
    """An image-dependent filter: the gain of image i is exp(a_i ring) with a_i its mean, so contrasts vary."""

    def forward(self, x):
        h = x.shape[-1]
        ring = torch.from_numpy(np.log(radial_gain(h, 1.0)))
        gain = (x.mean((1, 2, 3))[:, None, None, None] * ring).exp()
        return torch.fft.ifft2(torch.fft.fft2(x) * gain).real


def test_bootstrap_interval_agrees_with_the_standard_error():
    # each image's contrast is its mean times a known factor: the bootstrap's spread is the standard error over images
    x = noise(200, 1, 8, 8)
    result = measure(Net(Random()), ["conv"], x, batches=4, n_resamples=2000)
    rings = np.arange(1, 5)
    per_image = x.mean((1, 2, 3)).numpy() * (rings[-1] - rings[0])
    assert result.contrast[0] == pytest.approx(per_image.mean(), abs=1e-4)
    error = per_image.std(ddof=1) / np.sqrt(200)
    assert result.contrast_half_width[0] == pytest.approx(1.972 * error, rel=1e-3)  # t quantile of 199
    # 2000 replicates: the spread is known to 1/sqrt(4000) = 1.6%, the ratio of Poisson weights adds order 1/200
    assert result.replicates.std() == pytest.approx(error, rel=0.08)
    assert result.kind_high[0] - result.kind_low[0] == pytest.approx(2 * 1.96 * error, rel=0.12)


def test_each_batch_is_resampled_for_itself():
    # equal batches: with equal draws for all of them the spread of replicates would be twice the standard error
    x = noise(50, 1, 8, 8).repeat(4, 1, 1, 1)
    result = measure(Net(Random()), ["conv"], x, batches=4, n_resamples=1000)
    error = (x.mean((1, 2, 3)) * 3).numpy().std() / np.sqrt(200)  # rings 1 and 4
    # 1000 replicates: the spread is known to 1 / sqrt(2000) = 2.2 %, the ratio of Poisson weights adds order 1 / 200
    assert result.replicates.std() == pytest.approx(error, rel=0.1)


def test_intervals_by_kind_are_those_over_units_and_over_images():
    rng = np.random.default_rng(0)
    contrast = np.array([0.3, 0.7, 0.2, np.nan, 5.0])
    replicates = rng.normal(size=(7, 5))
    replicates[2, 0] = np.nan  # a replicate without an image is left out
    found = by_kind(contrast, replicates, ["msa"] * 4 + ["mlp"], 0.9, n_images=130)
    quantile = stats.t.ppf(0.95, 129)
    over_units = stats.t.ppf(0.95, 2) * stats.sem([0.3, 0.7, 0.2])
    over_images = quantile * np.delete(replicates[:, :3].mean(axis=1), 2).std(ddof=1)
    halves = np.array([np.hypot(over_units, over_images), quantile * replicates[:, 4].std(ddof=1)])
    means = np.array([0.4, 5.0])
    np.testing.assert_allclose(found["kind_contrast"], means, rtol=1e-12)
    np.testing.assert_allclose(found["kind_low"], means - halves, rtol=1e-12)
    np.testing.assert_allclose(found["kind_high"], means + halves, rtol=1e-12)


def test_trained_minus_initial_is_paired_over_images():
    x = noise(130, 1, 8, 8)
    trained = measure(Net(Random()), ["conv"], x, n_resamples=50)
    steady = measure(Net(Filter(radial_gain(8, 0.3))), ["conv"], x, n_resamples=50)
    same = trained.minus(trained)
    np.testing.assert_array_equal(same.replicates, np.zeros((50, 1)))
    assert same.reference == "initial"
    assert same.contrast_half_width[0] == 0.0
    difference = trained.minus(steady)
    assert difference.contrast[0] == pytest.approx(trained.contrast[0] - 0.9, abs=1e-4)
    np.testing.assert_allclose(difference.replicates, trained.replicates - 0.9, atol=1e-4)
    assert difference.kind_low[0] == pytest.approx(trained.kind_low[0] - 0.9, abs=1e-4)


def test_initial_model_is_measured_on_the_same_images():
    torch.manual_seed(0)
    trained, initial = (vs.models.vit(size="tiny", patch_size=4, num_classes=3, image_size=32) for _ in range(2))
    probe = vs.Probe(trained, [(noise(3, 3, 32, 32, seed=1).float(), torch.zeros(3, dtype=torch.long))])
    result = vs.branch_transfer(probe, initial=initial, n_resamples=20)
    other = vs.branch_transfer(vs.Probe(initial, probe.batches), n_resamples=20)
    alone = vs.branch_transfer(probe, n_resamples=20)
    np.testing.assert_allclose(result.contrast, alone.contrast - other.contrast, rtol=1e-12)
    np.testing.assert_array_equal(result.contrast_own, alone.contrast)
    np.testing.assert_array_equal(result.contrast_initial, other.contrast)
    assert np.isnan(alone.contrast_initial).all()
    assert result.kinds.count("msa") == 12
    assert set(result.kind_names) == {"msa", "mlp"}


def test_units_that_change_the_map_have_no_contrast_and_no_share_in_their_kind():
    net = Net(Filter(stride=2), Filter(radial_gain(8, 0.1)))
    result = measure(net, ["conv", "conv"], noise(4, 1, 8, 8))
    assert np.isnan(result.contrast[0])
    assert result.transfer[0].size == 0
    assert result.kind_contrast[0] == pytest.approx(result.contrast[1])


def test_small_maps_and_nan_are_null_and_named():
    with pytest.warns(NullWarning, match=r"unit0 \(too small a map for two bands\)"):
        result = measure(Net(Filter()), ["msa"], noise(2, 1, 2, 2))
    assert result.kind_names == ()
    with pytest.warns(NullWarning, match=r"unit0 \(activations are not finite\)"):
        measure(Net(Filter(np.full((8, 8), np.nan))), ["msa"], noise(2, 1, 8, 8))
    with pytest.warns(NullWarning, match="the intervals"):
        measure(Net(Filter()), ["msa"], noise(1, 1, 8, 8))


def test_a_branch_that_adds_nothing_is_null_and_named():
    net = Net(Filter(), Filter())
    net.branches[1].scale.data.zero_()  # as branches that start at zero: only the eps would be left of their output
    with pytest.warns(NullWarning, match=r"branch_transfer: null for unit1 \(constant over all positions\)$"):
        result = measure(net, ["conv", "mlp"], noise(3, 2, 8, 8), n_resamples=10)
    assert np.isfinite(result.contrast).tolist() == [True, False]
    assert np.isnan(result.transfer[1]).all()
    assert np.isnan(result.replicates[:, 1]).all()
    assert result.kind_names == ("conv",)


def test_refusals():
    net, x = Net(Filter()), noise(2, 1, 8, 8)
    with pytest.raises(ValueError, match="n_resamples to be at least 1, received 0"):
        measure(net, ["msa"], x, n_resamples=0)
    with pytest.raises(ValueError, match="At unit unit0: Expected square maps"):
        measure(net, ["msa"], noise(2, 1, 6, 8), path="diagonal")
    with pytest.raises(ValueError, match="one architecture on the same images, received seed 0 and 1"):
        measure(net, ["msa"], x).minus(measure(net, ["msa"], x, seed=1))


def test_figure_draws_each_unit_and_each_kind():
    net = Net(Filter(radial_gain(8, -0.1)), Filter(radial_gain(8, 0.1)))
    result = measure(net, ["msa", "mlp"], noise(5, 2, 8, 8))
    figure = vs.plot({"a": result, "b": result.minus(result)})
    curves, contrasts, means = figure.axes[:3]
    np.testing.assert_array_equal(curves.get_lines()[0].get_ydata(), result.transfer[0][1:])
    assert contrasts.get_ylabel() == "High minus low third (nats)"
    assert [label.get_text() for label in means.get_xticklabels()] == ["MSA", "MLP"]
    assert figure.axes[3].get_title(loc="left") == "b, minus initialization"


def test_units_of_the_class_token_alone_are_null() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "cait_xxs24_224", pretrained=False, img_size=64, embed_dim=16, num_heads=2, depth=2, num_classes=3
    ).double()
    images = noise(3, 3, 64, 64)
    probe = vs.Probe(model, [(images, torch.arange(3))])
    with pytest.warns(NullWarning, match=r"blocks_token_only\.0\.mlp, .*\(adds to the class token alone\)"):
        result = vs.branch_transfer(probe)
    of_class_token = np.array([name.startswith("blocks_token_only") for name in result.units])
    assert of_class_token.sum() == 4
    np.testing.assert_array_equal(np.isnan(result.contrast), of_class_token)
    units = [unit for unit in known_units(model, images) if not unit.name.startswith("blocks_token_only")]
    np.testing.assert_array_equal(result.contrast[~of_class_token], vs.branch_transfer(probe, units=units).contrast)
