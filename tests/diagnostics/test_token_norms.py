"""Norms of tokens: explicit forward passes in float64, and maps with planted artefacts and massive activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import scipy.stats
import timm
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.fixtures.oracles.result_checks import check_result
from vitscope.core.undefined_values import NullWarning
from vitscope.diagnostics.tokens._artefacts import bimodality_coefficient, first_with_artefacts, robust_threshold

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fewer than 128 images"),
    pytest.mark.filterwarnings(r"ignore:token_norms. null for attention \(the network"),
]


class Sequences(nn.Module):
    """Takes maps (B, C, h, w) and passes tokens on: class and register tokens in front of the positions, scaled twice."""

    def __init__(self, n_registers: int = 0, scales: Sequence[float | Tensor] = (1.0, 2.0), channels: int = 4) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(3 * torch.ones(1, 1, channels, dtype=torch.float64))
        self.register_tokens = nn.Parameter(torch.ones(1, n_registers, channels, dtype=torch.float64))
        self.scales = scales
        self.places = nn.ModuleList(nn.Identity() for _ in scales)

    def forward(self, x: Tensor) -> Tensor:
        front = torch.cat((self.cls_token, self.register_tokens), 1).expand(len(x), -1, -1)
        tokens = torch.cat((front, x.flatten(2).transpose(1, 2)), 1)
        for scale, place in zip(self.scales, self.places):
            tokens = place(scale * tokens)
        return tokens[:, 0]

    def probe(self, *batches: Tensor) -> vs.Probe:
        grid = (batches[0].shape[2], batches[0].shape[3])
        n_prefix = 1 + self.register_tokens.shape[1]
        depths = np.linspace(0, 1, len(self.scales))
        taps = [
            vs.Tap(f"tap{i}", "mlp", 1, float(depth), place, layout="NLC", n_prefix=n_prefix, grid=grid)
            for i, (depth, place) in enumerate(zip(depths, self.places))
        ]
        return vs.Probe(self, [(x, torch.zeros(len(x), dtype=torch.long)) for x in batches], taps=taps)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit_tokens(n: int, channels: int = 4, h: int = 4, w: int = 5) -> Tensor:
    """Return maps whose tokens have norm 1 and point anywhere."""
    return nn.functional.normalize(noise(n, channels, h, w), dim=1)


def planted(n: int) -> Tensor:
    """Return maps of unit tokens, of which position (1, 2) is 30 times as long in every second image."""
    x = unit_tokens(n)
    x[::2, :, 1, 2] *= 30
    return x


def test_norms_are_those_of_an_explicit_forward_pass() -> None:
    torch.manual_seed(0)
    model = vs.models.vit(patch_size=8, depth=2, reg_tokens=2, image_size=(16, 24), num_classes=3).double().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    batches = [noise(3, 3, 16, 24), noise(2, 3, 16, 24, seed=1)]
    result = vs.token_norms(
        vs.Probe(model, [(x, torch.zeros(len(x), dtype=torch.long)) for x in batches]), positions=None
    )
    with torch.no_grad():
        x = torch.cat(batches)
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        states = [tokens]
        for block in model.blocks:
            states.append(states[-1] + block.ls1(block.attn(block.norm1(states[-1]))))
            states.append(states[-1] + block.ls2(block.mlp(block.norm2(states[-1]))))
    norms = torch.stack([state.norm(dim=2) for state in states]).numpy()  # (n_taps, n_images, 3 + 6)
    assert result.prefix_kinds == ("class", "register", "register")
    assert result.norms_patch.shape == (5, 5, 6)
    assert result.norms_patch.dtype == np.float32
    np.testing.assert_allclose(result.norms_prefix, norms[:, :, :3], rtol=1e-6)  # kept in float32
    np.testing.assert_allclose(result.norms_patch, norms[:, :, 3:], rtol=1e-6)
    np.testing.assert_allclose(result.norm, norms[:, :, 3:].mean((1, 2)), rtol=1e-12)
    np.testing.assert_allclose(result.prefix_norm, norms[:, :, :3].mean(1), rtol=1e-12)
    np.testing.assert_allclose(result.norm_quantiles[:, 2], np.median(norms[:, :, 3:], axis=(1, 2)), rtol=1e-6)
    for i, state in enumerate(states):
        magnitudes = state.abs()
        largest = magnitudes.amax((1, 2))
        median = magnitudes[:, 3:].flatten(1).median(1).values
        assert result.massive_ratio[i] == pytest.approx(float((largest / median).mean()), rel=1e-12)
        channels = magnitudes.amax(1).mean(0).sort(descending=True)
        assert result.massive_channels[i].tolist() == channels.indices[:5].tolist()
        np.testing.assert_allclose(result.massive_channel_magnitudes[i], channels.values[:5], rtol=1e-12)
        rms = state[:, 3:].square().mean(1).sqrt().mean(0)
        np.testing.assert_allclose(result.channel_norms[i], rms, rtol=1e-12)
    np.testing.assert_array_equal(result.map_sizes, [[2, 3]] * 5)
    assert result.attention_units == ("blocks.0.attn", "blocks.1.attn")
    for unit, state in enumerate((states[0], states[2])):
        weights = explicit_attention(model.blocks[unit], state)  # (n_images, heads, queries, keys)
        received = 9 * weights.mean((1, 2)).numpy()
        np.testing.assert_allclose(result.attention_received[unit], received[:, 3:], rtol=1e-6)
        np.testing.assert_allclose(result.attention_prefix[unit], received[:, :3].mean(0), rtol=1e-12)
        assert result.sink_ratio[unit] == pytest.approx(received.max(axis=1).mean(), rel=1e-12)
        assert result.sink_on_prefix[unit] == (received.argmax(axis=1) < 3).mean()


def explicit_attention(block: Any, x: Tensor) -> Tensor:
    """Return softmax(q k' / sqrt(d)) of a block of timm's ViT, (B, heads, tokens, tokens)."""
    heads = block.attn.num_heads
    with torch.no_grad():
        q, k, _ = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)


def test_planted_artefacts_are_found_where_they_are(tmp_path) -> None:
    network = Sequences(n_registers=2, scales=(1.0, 1.0, 0.5))
    probe = network.probe(planted(100), planted(60))
    result = check_result(vs.token_norms(probe), tmp_path)
    # tokens of norm 1 have no deviation: the threshold is twice the median
    np.testing.assert_allclose(result.artefact_threshold, [2.0, 2.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(result.artefact_share, 0.5 / 20, rtol=1e-12)
    assert (result.artefact_share_half_width > 0).all()
    for frequency in result.artefact_frequency:
        expected = np.zeros((4, 5))
        expected[1, 2] = 0.5
        np.testing.assert_array_equal(frequency, expected)
    assert result.first_artefact_tap == 0
    assert result.scalars()["artefact_share_max"] == pytest.approx(0.025)
    assert result.scalars()["first_artefact_depth"] == 0.0
    # two values; the corrections for the size of the sample are of the order of 1 / 3200
    np.testing.assert_allclose(result.bimodality, 1.0, rtol=1e-3)
    absolute = vs.token_norms(probe, threshold=20.0)
    np.testing.assert_array_equal(absolute.artefact_share > 0, [True, True, False])
    assert absolute.first_artefact_tap == 0


def test_artefacts_appear_at_the_tap_that_makes_them() -> None:
    gain = torch.ones(21, 1, dtype=torch.float64)
    gain[1 + 7] = 10.0  # the class token comes first
    result = vs.token_norms(Sequences(scales=(1.0, gain, 1.0)).probe(unit_tokens(3)))
    np.testing.assert_allclose(result.artefact_share, [0.0, 0.05, 0.05])
    assert result.first_artefact_tap == 1
    assert result.scalars()["first_artefact_depth"] == 0.5
    np.testing.assert_array_equal(np.argwhere(result.artefact_frequency[1]), [[1, 2]])
    assert np.isnan(result.artefact_share_half_width).all()


def test_the_tap_at_which_artefacts_appear_has_half_a_percent_of_them() -> None:
    assert first_with_artefacts(np.array([0.0, 0.02, 0.001, 0.006, np.nan, 0.01, 0.03, 0.02])) == 3
    assert first_with_artefacts(np.array([0.0, 0.004])) == -1
    assert first_with_artefacts(np.array([0.004, 0.005, 0.01])) == 1  # half a percent itself is enough
    assert first_with_artefacts(np.array([0.0, 0.005])) == 1
    assert first_with_artefacts(np.array([np.nan, np.nan])) == -1
    assert first_with_artefacts(np.array([0.01, 0.01])) == 0


def test_threshold_is_five_deviations_above_the_median_of_lognormal_norms() -> None:
    logs = np.random.default_rng(0).normal(2.0, 0.3, 200_000)
    # the deviation from the median has a standard error of 0.3 * 1.17 / sqrt(n); five of them 0.004
    assert np.log(robust_threshold(logs)) == pytest.approx(2.0 + 5 * 0.3, abs=0.015)
    assert np.log(robust_threshold(np.zeros(3))) == pytest.approx(np.log(2))


@pytest.mark.parametrize(("draw", "expected"), [("normal", 1 / 3), ("uniform", 5 / 9)])
def test_bimodality_of_known_distributions(draw: str, expected: float) -> None:
    values = getattr(np.random.default_rng(0), draw)(size=100_000)
    assert bimodality_coefficient(values) == pytest.approx(expected, abs=0.01)
    few = values[:50]
    skewness, kurtosis = (float(f(few, bias=False)) for f in (scipy.stats.skew, scipy.stats.kurtosis))
    own = (skewness**2 + 1) / (kurtosis + 3 * 49**2 / (48 * 47))
    assert bimodality_coefficient(few) == pytest.approx(own, rel=1e-10)


def test_bimodality_needs_four_values_that_differ() -> None:
    assert np.isnan(bimodality_coefficient(np.array([1.0, 2.0, 3.0])))
    assert np.isnan(bimodality_coefficient(np.ones(10)))
    rounded = np.float32(1.7) * (1 + np.finfo(np.float32).eps * np.tile([0, 1], 10)).astype(np.float32)
    assert np.ptp(rounded) > 0
    assert np.isnan(bimodality_coefficient(np.log(rounded.astype(np.float64))))


def test_massive_activations_are_counted_by_both_conditions() -> None:
    network = Sequences(scales=(1.0, 0.1), channels=8)
    with torch.no_grad():
        network.cls_token[0, 0, 5] = 2000.0
    x = torch.ones(4, 8, 4, 5, dtype=torch.float64)
    x[0] = 3.0  # 2000 is above 100, but not 1000 times the median of this image
    x[1] = 2.0  # here it is, and no more
    result = vs.token_norms(network.probe(x))
    np.testing.assert_array_equal(result.massive_share, [0.75, 0.75])
    np.testing.assert_allclose(result.massive_ratio, (2 * 2000 + 1000 + 2000 / 3) / 4, rtol=1e-12)
    np.testing.assert_array_equal(result.massive_on_prefix, [1.0, 1.0])
    np.testing.assert_array_equal(result.massive_channels[:, 0], [5, 5])
    np.testing.assert_allclose(result.largest_magnitude, [2000.0, 200.0])
    below = Sequences(scales=(0.05,), channels=8)
    with torch.no_grad():
        below.cls_token[0, 0, 5] = 2000.0
    result = vs.token_norms(below.probe(x))
    assert result.largest_magnitude[0] == 100.0  # which is not above 100
    assert result.massive_share[0] == 0


def test_norms_are_kept_for_the_first_images_alone() -> None:
    x = unit_tokens(9)
    full = vs.token_norms(Sequences().probe(x[:4], x[4:8], x[8:]))
    part = vs.token_norms(Sequences().probe(x[:4], x[4:8], x[8:]), norm_images=6)
    assert (full.n_norm_images, part.n_norm_images) == (9, 6)
    np.testing.assert_array_equal(part.norms_patch, full.norms_patch[:, :6])
    np.testing.assert_array_equal(part.norms_prefix, full.norms_prefix[:, :6])
    np.testing.assert_array_equal(part.norm, full.norm)
    assert vs.token_norms(Sequences().probe(x), norm_images=None).n_norm_images == 9


def test_positions_of_a_convnet_are_its_tokens_and_zeros_have_no_massive_ratio() -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=3).eval()
    probe = vs.Probe(model, [(noise(3, 3, 64, 64).float(), torch.zeros(3, dtype=torch.long))])
    with torch.no_grad():
        nn.init.constant_(model.layer4[1].bn2.bias, -50.0)  # no sum is positive
    with pytest.warns(NullWarning, match=r"attention \(the network has none\).*zero\); layer4.1 \(no norm is pos"):
        result = vs.token_norms(probe)
    with torch.no_grad():
        stem = model.maxpool(model.act1(model.bn1(model.conv1(probe.first_images()))))
    np.testing.assert_allclose(result.norms_patch[0].reshape(3, 16, 16), stem.norm(dim=1), rtol=1e-5)  # float32
    np.testing.assert_array_equal(result.map_sizes[[0, -1]], [[16, 16], [2, 2]])
    assert result.prefix_kinds == ()
    assert result.norms_prefix.shape == (9, 3, 0)
    assert np.isfinite(result.massive_ratio[0])
    assert np.isnan([result.massive_ratio[-1], result.artefact_share[-1], result.bimodality[-1]]).all()


def test_activations_that_are_not_finite_are_null() -> None:
    x = unit_tokens(3)
    x[1, 0, 0, 0] = torch.nan
    with pytest.warns(NullWarning, match=r"tap0, tap1 \(activations are not finite\)"):
        result = vs.token_norms(Sequences().probe(x))
    assert np.isnan([result.norm, result.artefact_share, result.massive_ratio, result.massive_share]).all()
    assert (result.massive_channels == -1).all()
    assert np.isnan(result.scalars()["artefact_share_max"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, "Expected threshold to be greater than 0 or None, received 0.0"),
        ({"norm_images": 0}, "Expected norm_images to be greater than 0"),
        ({"positions": -1}, "Expected positions to be greater than 0"),
        ({"level": 1.0}, "level"),
    ],
)
def test_options_outside_of_their_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vs.token_norms(Sequences().probe(unit_tokens(2)), **options)


def test_maps_of_several_shapes_are_refused() -> None:
    network = timm.create_model("resnet18", num_classes=3).eval()
    batches = [(torch.randn(1, 3, s, s), torch.zeros(1, dtype=torch.long)) for s in (64, 96)]
    with pytest.raises(ValueError, match=r"one shape at stem, received \(64, 16, 16\) and \(64, 24, 24\)"):
        vs.token_norms(vs.Probe(network, batches))


def test_a_shared_pass_gives_the_same_numbers() -> None:
    probe = Sequences(n_registers=1).probe(planted(6))
    both = vs.one_pass(probe, {"feature_map_variance": {}, "token_norms": {"threshold": 3.0}})
    assert both["token_norms"] == vs.token_norms(probe, threshold=3.0)
    assert both["feature_map_variance"] == vs.feature_map_variance(probe)


def test_figure_shows_curves_and_maps() -> None:
    result = vs.token_norms(Sequences(n_registers=2).probe(planted(8)))
    figure = vs.plot(result)
    norms, shares, massive, maps = figure.axes[:4]
    assert [ax.get_ylabel().replace("\n", " ") for ax in (norms, shares, massive)] == [
        "Token norm", "Artefacts (% of tokens)", "Largest / median magnitude",
    ]  # fmt: skip
    np.testing.assert_allclose(shares.get_lines()[0].get_ydata(), 100 * result.artefact_share)
    picture = np.asarray(maps.images[0].get_array().filled(np.nan))
    np.testing.assert_allclose(picture[:, :5], result.norms_patch[0][0].reshape(4, 5))
    assert picture.shape == (4, 5 * 5 + 4)
    squares = maps.get_lines()[0]
    np.testing.assert_array_equal(squares.get_xdata(), [2, 2 + 12, 2 + 24])  # every second image
    assert {"Class token", "Register tokens", "Patch tokens"} <= {text.get_text() for text in figure.legends[0].texts}
    two = vs.plot({"one": result, "two": result}, view="maps", tap="tap1", images=2)
    assert [ax.get_title() for ax in two.axes if ax.images] == ["one, tap1", "two, tap1"]
    assert len(vs.plot(result, view="massive").axes) == 1
    for options, message in (
        ({"view": "x"}, "view"),
        ({"tap": "x"}, "one of the taps"),
        ({"images": 0}, "at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            vs.plot(result, **options)
