from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import vitscope as vs
from vitscope.core.undefined_values import NullWarning
from vitscope.diagnostics.fourier._spectrum import diagonal, frequencies, spectrum


class Taps(nn.Module):
    """Hands its images through ``n`` places where they can be read."""

    def __init__(self, n: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))  # its dtype becomes the images'
        self.places = nn.ModuleList(nn.Identity() for _ in range(n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for place in self.places:
            x = place(x)
        return x.flatten(1)[:, :1].repeat(1, 2)

    def probe(self, *batches: torch.Tensor) -> vs.Probe:
        depths = np.linspace(0, 1, len(self.places))
        places = enumerate(zip(depths, self.places))
        taps = [vs.Tap(name=f"tap{i}", kind="conv", stage=1, depth=float(d), module=m) for i, (d, m) in places]
        return vs.Probe(self.double(), [(x, torch.zeros(len(x), dtype=torch.long)) for x in batches], taps=taps)


def measure(x: torch.Tensor, **options):
    return vs.relative_log_amplitude(Taps().probe(x), **options)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def notebook(x: np.ndarray) -> np.ndarray:
    """The recipe of the official notebook, step by step: transform, logarithm, center, means, diagonal, first."""
    logs = np.log(np.abs(np.fft.fft2(x)) + 1e-6)
    h = x.shape[-1]
    centered = np.roll(np.roll(logs, h // 2, axis=-1), h // 2, axis=-2).mean(axis=(0, 1))
    curve = np.diag(centered)[h // 2 :]
    return curve - curve[0]


@pytest.mark.parametrize("layout", ["channels first", "channels last"])
@pytest.mark.parametrize("h", [1, 2, 3, 7, 8, 14, 15, 33, 64])
def test_half_diagonal_is_that_of_the_fourier_transform(h: int, layout: str):
    x = noise(2, 3, h, h)
    if layout == "channels last":
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    k = torch.arange((h + 1) // 2)
    expected = torch.fft.fft2(x)[..., k, k].abs().square()
    torch.testing.assert_close(diagonal(x), expected, rtol=1e-9, atol=1e-9)  # float64 sums of h^2 terms


@pytest.mark.parametrize("h", [5, 8, 16, 21])
def test_curve_is_the_official_notebooks(h: int):
    x = noise(3, 4, h, h) + 0.7
    result = measure(x)
    np.testing.assert_allclose(result.log_amplitude[0], notebook(x.numpy()), atol=1e-9)  # rounding of float64 only
    np.testing.assert_array_equal(result.paper_frequency[0], np.linspace(0, 1, (h + 1) // 2))
    assert result.high_frequency[0] == result.log_amplitude[0][-1]


@pytest.mark.parametrize(("h", "last"), [(8, 1 - 2 / 8), (7, 1 - 1 / 7), (32, 1 - 2 / 32), (15, 1 - 1 / 15)])
def test_last_bin_has_its_true_frequency(h: int, last: float):
    assert frequencies((h, h))[-1] == pytest.approx(last, abs=1e-15)
    assert measure(noise(2, 1, h, h)).normalized_frequency[0][-1] == pytest.approx(last, abs=1e-15)


@pytest.mark.parametrize(("h", "k"), [(8, 1), (8, 2), (8, 3), (9, 4), (16, 4), (16, 5), (31, 15)])
def test_sinusoid_along_the_diagonal_has_its_amplitude_in_one_bin(h: int, k: int):
    place = torch.arange(h, dtype=torch.float64)
    wave = 1.0 + torch.cos(2 * torch.pi * k * (place[:, None] + place) / h)
    power = diagonal(wave.expand(1, 1, h, h))[0, 0]
    expected = torch.zeros_like(power)
    expected[0], expected[k] = h**4, h**4 / 4  # |F| = h^2 times the mean, and h^2 / 2 for a cosine of amplitude 1
    torch.testing.assert_close(power, expected, rtol=1e-12, atol=1e-16 * h**4 * h**2)
    result = measure(wave.expand(2, 1, h, h))
    assert result.log_amplitude[0][k] == pytest.approx(-np.log(2), abs=1e-6)  # eps = 1e-6 beside amplitudes above 1
    assert result.ac_high_share[0] == pytest.approx(float(2 * k / h > 0.5), abs=1e-9)


@pytest.mark.parametrize(("h", "expected"), [(112, -5.01), (56, -4.31), (28, -3.62), (14, -2.93), (7, -2.23)])
def test_unit_mean_white_noise_falls_with_the_size_and_the_correction_removes_it(h: int, expected: float):
    # E log|F| of complex normal bins is ln(h) - gamma / 2, the constant part is 2 ln(h): -ln(h) - 0.2886 in the limit.
    # 96 maps at the last bin: standard deviation of log|F| is pi / sqrt(24) = 0.64, so its error is 0.065 (0.2: 3 sigma).
    result = measure(1.0 + noise(12, 8, h, h, seed=h))
    assert result.high_frequency[0] == pytest.approx(expected, abs=0.2)
    ac = result.log_amplitude_size_corrected[0][1:]
    bound = 4 * 0.642 / np.sqrt(96 * len(ac)) + 0.06  # and log of the constant part's own spread, largest at h = 7
    assert ac.mean() == pytest.approx(-np.euler_gamma / 2, abs=bound)
    assert result.log_amplitude_first_ac[0][1] == 0.0
    assert np.isnan(result.log_amplitude_first_ac[0][0])


@pytest.mark.parametrize("size", [(8, 8), (9, 9), (7, 12), (12, 9), (16, 5)])
def test_rings_hold_all_power_of_a_map_without_corner_frequencies(size: tuple[int, int]):
    h, w = size
    m, n = torch.meshgrid(torch.arange(h).double(), torch.arange(w).double(), indexing="ij")
    x = 0.5 + torch.cos(2 * torch.pi * (m / h)) + 0.3 * torch.sin(2 * torch.pi * (n / w + 0.1)) * 2
    x = x + 0.2 * torch.cos(2 * torch.pi * (m / h - n / w))
    power = spectrum(x[None, None], "radial").power[0]
    assert float(power.sum()) == pytest.approx(h * w * float(x.square().sum()), rel=1e-12)  # Parseval


@pytest.mark.parametrize("size", [(8, 8), (15, 15), (6, 14), (14, 6), (4, 8)])
def test_rings_average_the_whole_transform(size: tuple[int, int]):
    h, w = size
    x = noise(2, 3, h, w)
    radius = np.hypot(2 * np.fft.fftfreq(h)[:, None], 2 * np.fft.fftfreq(w))
    ring = np.round(radius * min(h, w) / 2).astype(int)
    ring[(ring == 0) & (radius > 0)] = 1  # (6, 14), (14, 6) and (4, 8): the lowest frequency is no part of the constant
    logs = np.log(np.abs(np.fft.fft2(x.numpy())) + 1e-6).mean(axis=(0, 1))
    n = min(h, w) // 2 + 1
    expected = np.array([logs[ring == r].mean() for r in range(n)])
    result = measure(x, path="radial")
    np.testing.assert_allclose(result.log_amplitude[0], expected - expected[0], atol=1e-9)
    np.testing.assert_allclose(result.normalized_frequency[0], [radius[ring == r].mean() for r in range(n)], atol=1e-12)
    assert result.normalized_frequency[0][0] == 0


@pytest.mark.parametrize("path", ["diagonal", "radial"])
def test_shifting_the_maps_changes_nothing(path: str):
    x = noise(2, 3, 12, 12)
    shifted = measure(x.roll((5, 2), dims=(-2, -1)), path=path)
    plain = measure(x, path=path)
    np.testing.assert_allclose(shifted.log_amplitude[0], plain.log_amplitude[0], atol=1e-9)
    assert shifted.ac_high_share[0] == pytest.approx(plain.ac_high_share[0], abs=1e-12)


def test_intervals_are_students_over_images_and_batches_do_not_matter():
    x = noise(130, 3, 10, 10) + 0.4
    result = vs.relative_log_amplitude(Taps().probe(x[:100], x[100:120], x[120:]), level=0.9)
    curves = np.stack([notebook(image[None].numpy()) for image in x])
    low, high = stats.t.interval(0.9, 129, curves.mean(0), np.maximum(stats.sem(curves), 1e-300))
    np.testing.assert_allclose(result.log_amplitude[0], curves.mean(0), atol=1e-9)
    np.testing.assert_allclose(2 * result.log_amplitude_half_width[0], high - low, atol=1e-7)  # sums of squares cancel
    assert result.n_images == 130


def test_change_across_a_unit_is_paired_and_only_between_equal_sizes():
    class Three(Taps):
        def forward(self, x):
            x = self.places[1](2 * self.places[0](x) + noise(*x.shape, seed=5)[: len(x)])
            self.places[2](x[..., ::2, ::2])
            return x.flatten(1)[:, :2]

    x = noise(128, 2, 12, 12) + 1
    result = vs.relative_log_amplitude(Three(3).probe(x))
    change = result.high_frequency_change
    assert np.isnan(change[[0, 2]]).all()
    assert change[1] == pytest.approx(result.high_frequency[1] - result.high_frequency[0], abs=1e-12)
    assert result.high_frequency_change_half_width[1] > 0
    assert result.scalars()["high_frequency_change_conv"] == change[1]


@pytest.mark.parametrize(
    ("x", "why"),
    [
        (noise(2, 3, 1, 1), "1x1 map"),
        (noise(2, 3, 2, 2), "2x2 map"),
        (torch.full((2, 3, 8, 8), 0.3, dtype=torch.float64), "constant"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.float64), "constant"),
        (noise(2, 3, 8, 8).index_fill(0, torch.tensor([1]), float("nan")), "activations are not finite"),
    ],
)
def test_what_has_no_spectrum_is_null_with_a_warning_that_names_the_tap(x: torch.Tensor, why: str):
    with pytest.warns(NullWarning, match=rf"null for tap0 \({why}"):
        result = measure(x)
    assert np.isnan(result.high_frequency[0])
    assert np.isnan(result.ac_high_share[0])


def test_one_bad_tap_leaves_the_others():
    class Spoiled(Taps):
        def forward(self, x):
            self.places[1](torch.full_like(self.places[0](x), float("nan")))
            return self.places[2](x).flatten(1)[:, :2]

    x = noise(3, 2, 8, 8) + 1
    with pytest.warns(NullWarning, match=r"null for tap1 \(activations are not finite\)$"):
        result = vs.relative_log_amplitude(Spoiled(3).probe(x))
    assert np.isfinite(result.high_frequency[[0, 2]]).all()
    assert np.isnan(result.high_frequency_change).all()  # both neighbors of the spoiled tap


def test_last_is_the_last_map_that_has_frequencies():
    class Shrinking(Taps):
        def forward(self, x):
            x = self.places[1](self.places[0](x) + 1)
            return self.places[2](x[..., ::4, ::4]).flatten(1)[:, :2]

    with pytest.warns(NullWarning, match=r"null for tap2 \(2x2 map"):
        result = vs.relative_log_amplitude(Shrinking(3).probe(noise(3, 2, 8, 8) + 1))
    assert np.isnan(result.high_frequency[2])
    assert result.scalars()["high_frequency_last"] == result.high_frequency[1]
    assert result.scalars()["ac_high_share_last"] == result.ac_high_share[1]


def test_a_single_image_has_a_curve_but_no_interval():
    with pytest.warns(NullWarning, match="the intervals"):
        result = measure(noise(1, 3, 8, 8))
    assert np.isfinite(result.log_amplitude[0]).all()
    assert np.isnan(result.log_amplitude_half_width[0]).all()


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 1, 6, 8), {}, "At tap tap0: Expected square maps on the diagonal, received 6x8"),
        ((2, 1, 8, 8), {"path": "spiral"}, "diagonal, radial, received 'spiral'"),
        ((2, 1, 8, 8), {"level": 1.0}, r"level in \(0, 1\), received 1.0"),
    ],
)
def test_refusals(shape: tuple[int, ...], options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        measure(noise(*shape), **options)


def test_maps_that_change_size_between_batches_are_refused():
    with pytest.raises(ValueError, match=r"one size at tap0, received \(8, 8\) and \(6, 6\)"):
        vs.relative_log_amplitude(Taps().probe(noise(2, 1, 8, 8), noise(2, 1, 6, 6)))


@pytest.mark.parametrize("view", ["both", "frequency", "depth"])
@pytest.mark.parametrize("curve", ["paper", "size_corrected", "first_ac"])
def test_figure_shows_each_tap(view: str, curve: str):
    result = vs.relative_log_amplitude(Taps(4).probe(noise(3, 2, 8, 8)))
    figure = vs.plot({"one": result, "two": result}, view=view, curve=curve)
    axes = {ax.get_xlabel(): ax for ax in figure.axes}
    if view != "depth":
        lines = axes[r"Frequency ($\times\pi$ rad/pixel)"].get_lines()
        assert len(lines) == 4
        field = {"paper": "", "size_corrected": "_size_corrected", "first_ac": "_first_ac"}[curve]
        np.testing.assert_array_equal(lines[2].get_ydata(), getattr(result, f"log_amplitude{field}")[2])
    assert ("Normalized depth" in axes) == (view != "frequency")


@pytest.mark.parametrize(("curve", "has_interval"), [("paper", True), ("size_corrected", True), ("first_ac", False)])
def test_intervals_are_drawn_at_the_curves_that_they_belong_to(curve: str, has_interval: bool):
    """That of a difference from frequency 0 is not that of one from the first bin above it, where it is 0."""
    result = vs.relative_log_amplitude(Taps(3).probe(noise(128, 1, 8, 8)))
    frequency, depth = vs.plot(result, curve=curve).axes[:2]
    assert len(frequency.collections) == 3 * has_interval
    lengths = [np.ptp(path.vertices[:, 1]) for bars in depth.collections for path in bars.get_paths()]
    assert bool(np.nansum(lengths) > 0) == has_interval
    assert len(vs.plot({"a": result, "b": result}, curve=curve, view="depth").axes) == 1


def test_a_tap_that_was_not_reached_has_no_line():
    model = Taps(2)
    probe = model.probe(noise(2, 1, 8, 8))
    unused = vs.Tap(name="unused", kind="conv", stage=1, depth=1.0, module=nn.Identity())
    model.add_module("unused", unused.module)
    probe = vs.Probe(model, probe.batches, taps=[*probe.taps, unused])
    with pytest.warns(NullWarning, match="unused"):
        result = vs.relative_log_amplitude(probe)
    lines = vs.plot(result, view="frequency").axes[0].get_lines()
    assert len(lines) == 2
    assert np.isnan(result.high_frequency).tolist() == [False, False, True]


def test_figure_refuses_what_it_does_not_know():
    result = measure(noise(3, 2, 8, 8))
    with pytest.raises(ValueError, match="view to be one of both, frequency, depth, received 'side'"):
        vs.plot(result, view="side")
