from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import vitscope as vs
from vitscope.core.undefined_values import NullWarning
from vitscope.diagnostics.frequency_noise import _bands as bands
from vitscope.diagnostics.frequency_noise.fourier_heatmap import plane_wave

PIXELS = {"mean": [0.0], "std": [1.0]}
SIZES = [(8, 8), (9, 9), (32, 32), (7, 12), (12, 9), (15, 4)]


class Detector(nn.Module):
    """Answers class 1 where the images hold power in given bins (and their mirror images) above ``threshold``."""

    def __init__(self, where: np.ndarray, threshold: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.register_buffer("where", torch.from_numpy(where))
        self.threshold = threshold

    def forward(self, x):
        power = (torch.fft.fft2(x).abs().square() * self.where).sum((1, 2, 3)) / x[0].numel()
        return torch.stack([torch.full_like(power, self.threshold), power], dim=1) * 1e9


def counted(model: nn.Module) -> list[int]:
    """Return a list that grows by one at every pass of the model."""
    passes: list[int] = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    return passes


def mirrored(h: int, w: int, *bins: tuple[int, int]) -> np.ndarray:
    where = np.zeros((h, w))
    for k, l in bins:
        where[k % h, l % w] = where[-k % h, -l % w] = 1
    return where


def flat(n: int, h: int, w: int) -> torch.Tensor:
    """Images of one grey each: no frequency but 0."""
    return torch.linspace(0.2, 0.8, n, dtype=torch.float64)[:, None, None, None].expand(n, 3, h, w).clone()


def probe_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor | None = None, batches: int = 2, **about) -> vs.Probe:
    y = torch.zeros(len(x), dtype=torch.long) if y is None else y
    return vs.Probe(model, list(zip(x.chunk(batches), y.chunk(batches))), about=about or PIXELS)


def rho_of(h: int, w: int) -> np.ndarray:
    return np.maximum(2 * np.abs(np.fft.fftfreq(h))[:, None], 2 * np.abs(np.fft.fftfreq(w)))


# --- bands and noise ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("n_bands", [1, 3, 10])
def test_each_bin_but_the_constant_is_in_exactly_one_band(size: tuple[int, int], n_bands: int):
    h, w = size
    index, times = bands.rings(h, w, n_bands), bands.multiplicity(h, w)
    assert index[0, 0] == -1
    assert (index == -1).sum() == 1
    assert index.max() < n_bands
    assert sum(times[index == j].sum() for j in range(n_bands)) == h * w - 1
    rho = rho_of(h, w)[:, : w // 2 + 1]
    inside = index >= 0
    assert (rho[inside] > index[inside] / n_bands - 1e-12).all()
    assert (rho[inside] <= (index[inside] + 1) / n_bands + 1e-12).all()


@pytest.mark.parametrize("size", SIZES)
def test_band_noise_is_real_has_unit_rms_and_all_its_energy_in_its_band(size: tuple[int, int]):
    h, w = size
    index = bands.rings(h, w, 5)
    full = np.ceil(rho_of(h, w) * 5 - 1e-9).astype(int) - 1
    white = bands.white_noise((4, 3, h, w), seed=3, batch=1)
    for j in np.unique(index[index >= 0]):
        noise = bands.band_noise(white, index == j)
        # float64 rounding only
        torch.testing.assert_close(
            noise.square().mean((1, 2, 3)), torch.ones(4, dtype=torch.float64), rtol=1e-12, atol=0
        )
        power = np.abs(np.fft.fft2(noise.numpy())) ** 2
        assert power[..., full != j].sum() <= 1e-20 * power.sum()
        assert (power[..., full == j].sum((0, 1)) > 0).all()


def test_white_noise_depends_on_seed_and_batch_alone():
    torch.manual_seed(1)
    one = bands.white_noise((2, 3, 4, 4), seed=0, batch=5)
    torch.manual_seed(2)
    torch.testing.assert_close(one, bands.white_noise((2, 3, 4, 4), seed=0, batch=5), rtol=0, atol=0)
    assert not torch.equal(one, bands.white_noise((2, 3, 4, 4), seed=0, batch=6))
    assert not torch.equal(one, bands.white_noise((2, 3, 4, 4), seed=1, batch=5))


def test_official_masks_have_the_energy_that_the_released_code_gives():
    # rms of one draw each at h = 32, eps 1, measured with the released code (docs/definitions.md section 6): a draw of a
    # few dozen bins in three channels spreads by up to 6%
    measured = [0.116, 0.195, 0.136, 0.264, 0.170, 0.331, 0.359, 0.223, 0.411]
    masks = [bands.official_mask(32, 32, (j + 1) / 10, 0.05) for j in range(9)]
    np.testing.assert_allclose([bands.official_rms(mask) for mask in masks], measured, rtol=0.06)
    assert masks[0][16, 16]  # the lowest holds the constant part
    assert not any(mask[16, 16] for mask in masks[1:])


@pytest.mark.parametrize("size", [(32, 32), (15, 15), (12, 20)])
def test_official_noise_is_the_released_recipe(size: tuple[int, int]):
    h, w = size
    mask = bands.official_mask(h, w, 0.5, 0.1)
    white = bands.white_noise((400, 1, h, w), seed=0, batch=0)
    spectrum = np.fft.fftshift(np.fft.fft2(np.sign(white.numpy())), axes=(-2, -1)) * mask
    expected = np.fft.ifft2(np.fft.ifftshift(spectrum, axes=(-2, -1))).real
    noise = bands.official_noise(white, mask)
    np.testing.assert_allclose(noise.numpy(), expected, atol=1e-12)
    # 400 draws of at least 40 bins: the rms is known to sqrt(2 / 16000) / 2 = 0.6%
    assert noise.square().mean().sqrt().item() == pytest.approx(bands.official_rms(mask), rel=0.02)


# --- frequency_noise_robustness ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (15, 15), (12, 20)])
def test_only_noise_in_the_bins_a_model_looks_at_changes_its_answers(size: tuple[int, int]):
    h, w = size
    rho = rho_of(h, w)
    where = ((rho > 0.4) & (rho <= 0.6)).astype(float)
    result = vs.frequency_noise_robustness(probe_of(Detector(where), flat(6, h, w)), n_bands=5)
    np.testing.assert_allclose(result.normalized_frequency, [0.1, 0.3, 0.5, 0.7, 0.9])
    np.testing.assert_array_equal(result.accuracy_change, [0, 0, -1, 0, 0])
    assert np.isnan(result.accuracy_change_half_width).all()  # no answer changes: there is nothing to judge by
    np.testing.assert_array_equal(result.relative_change, [0, 0, -2, 0, 0])  # chance is 1/2
    assert result.band_sizes.sum() == h * w - 1
    assert result.nll_change[2] > 0
    assert result.high_minus_low == 0.0
    assert result.scalars()["worst_frequency"] == 0.5
    assert result.clean_accuracy == 1.0
    assert result.n_images == 6


def test_all_bands_have_the_same_rms_in_pixels_and_the_normalisation_scales_it():
    seen = []

    class Record(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x):
            seen.append(x)
            return x.new_zeros(len(x), 4)

    std = [0.5, 0.25, 0.1]
    with pytest.warns(NullWarning, match=r"relative_change \(clean accuracy 0 is not above chance 0.25"):
        vs.frequency_noise_robustness(
            probe_of(Record(), flat(3, 16, 16), torch.full((3,), 2), 1, mean=[0.4] * 3, std=std), n_bands=4, rms=0.07
        )
    clean, *noisy = seen[2:]  # after two passes of the check that the model repeats itself
    noise = torch.stack(noisy) - clean  # (4 bands, B, C, h, w)
    pixels = noise * torch.tensor(std, dtype=torch.float64)[:, None, None]
    rms = pixels.square().mean((2, 3, 4)).sqrt()
    torch.testing.assert_close(rms, torch.full_like(rms, 0.07), rtol=1e-9, atol=0)  # float64, x + noise - x rounds


def test_a_threshold_on_power_gives_a_step_over_rms():
    # all power of noise with rms r is r^2 a pixel: answers flip where r^2 > threshold
    model = Detector(np.ones((8, 8)) - mirrored(8, 8, (0, 0)), threshold=64 * 0.1**2)
    result = vs.frequency_noise_robustness(
        probe_of(model, flat(4, 8, 8)), n_bands=2, rms=0.05, curve_rms=(0.2, 0.09, 0.11)
    )
    np.testing.assert_array_equal(result.curve_rms, [0.05, 0.09, 0.11, 0.2])
    np.testing.assert_array_equal(result.curve_accuracy_change, [[0, 0], [0, 0], [-1, -1], [-1, -1]])
    np.testing.assert_array_equal(result.accuracy_change, [0, 0])


def test_interval_is_paired_with_the_clean_answer():
    x = flat(32, 8, 8)
    y = torch.tensor([0, 1, 0, 1, 0, 0, 1, 0] * 4)  # clean answer 0; with noise 1
    result = vs.frequency_noise_robustness(
        probe_of(Detector(np.ones((8, 8)) - mirrored(8, 8, (0, 0))), x, y), n_bands=1
    )
    change = np.where(y.numpy() == 1, 1.0, -1.0)
    assert result.accuracy_change[0] == change.mean()
    expected = 2.039513 * change.std(ddof=1) / np.sqrt(32)  # t quantile of 31 degrees of freedom
    assert result.accuracy_change_half_width[0] == pytest.approx(expected, rel=1e-6)
    assert np.isnan(result.high_minus_low)


def test_high_minus_low_contrasts_the_outer_thirds():
    rho = rho_of(32, 32)
    result = vs.frequency_noise_robustness(probe_of(Detector((rho > 0.8).astype(float)), flat(4, 32, 32)))
    np.testing.assert_array_equal(result.accuracy_change, [0] * 8 + [-1] * 2)
    assert result.high_minus_low == pytest.approx(-2 / 3)


def test_official_construction_by_name():
    result = vs.frequency_noise_robustness(
        probe_of(Detector(np.ones((32, 32)) - mirrored(32, 32, (0, 0))), flat(4, 32, 32)), construction="official"
    )
    np.testing.assert_allclose(result.normalized_frequency, np.arange(1, 10) / 10)
    np.testing.assert_array_equal(result.accuracy_change, -np.ones(9))
    assert np.diff(result.band_rms).min() < 0  # its energy is not even monotone
    assert result.construction == "official"


def test_bands_without_a_bin_are_null_and_named():
    with pytest.warns(NullWarning, match=r"the band at 0.05 pi, the band at 0.15 pi, .* \(no bin at this image size\)"):
        result = vs.frequency_noise_robustness(probe_of(Detector(np.ones((8, 8))), flat(4, 8, 8)))
    present = [2, 4, 7, 9]  # rho = 1/4, 1/2, 3/4, 1
    assert np.isfinite(result.accuracy_change[present]).all()
    assert np.isnan(np.delete(result.accuracy_change, present)).all()


def test_logits_that_are_not_finite_are_null():
    class Spoiled(Detector):
        def forward(self, x):
            logits = super().forward(x)
            return logits.masked_fill(logits[:, 1:] > logits[:, :1], float("nan"))

    rho = rho_of(16, 16)
    with pytest.warns(NullWarning, match=r"the band at 0.75 pi \(logits are not finite\)$"):
        result = vs.frequency_noise_robustness(
            probe_of(Spoiled((rho > 0.5).astype(float)), flat(4, 16, 16)), n_bands=2, level=0.9
        )
    assert result.accuracy_change[0] == 0
    assert np.isnan(result.accuracy_change[1])


def test_without_a_normalisation_images_are_taken_for_pixels_with_a_warning():
    probe = vs.Probe(Detector(np.zeros((8, 8))), [(flat(3, 8, 8), torch.zeros(3, dtype=torch.long))])
    with pytest.warns(UserWarning, match=r"frequency_noise_robustness: no normalisation is known"):
        vs.frequency_noise_robustness(probe, n_bands=1)
    vs.frequency_noise_robustness(probe, n_bands=1, mean=[0.5], std=[0.2])


def test_an_interrupted_measurement_goes_on_where_it_stopped():
    model, x = Detector(np.ones((8, 8)) - mirrored(8, 8, (0, 0))), flat(6, 8, 8)
    rows: dict = {}
    passes = counted(model)
    full = vs.frequency_noise_robustness(probe_of(model, x), n_bands=4, partial=rows)
    assert len(passes) == 2 + 2 * 5  # two of the check that the model repeats itself; two batches, clean and four bands
    kept = dict(list(rows.items())[:7])
    passes.clear()
    resumed = vs.frequency_noise_robustness(probe_of(model, x), n_bands=4, partial=kept)
    assert len(passes) == 2 + 3
    np.testing.assert_array_equal(resumed.nll_change, full.nll_change)
    assert resumed.chance == full.chance


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"construction": "pink"}, "equal_rms, official, received 'pink'"),
        ({"n_bands": 0}, "n_bands to be at least 1, received 0"),
        ({"rms": 0.0}, "finite and above 0"),
        ({"level": 2.0}, "level"),
        ({"std": [0.0]}, "above 0"),
    ],
)
def test_refusals_of_frequency_noise(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        vs.frequency_noise_robustness(probe_of(Detector(np.ones((8, 8))), flat(2, 8, 8)), **options)


def test_images_of_one_pixel_are_refused():
    with pytest.raises(ValueError, match="at least one bin in a band, received 1x1"):
        vs.frequency_noise_robustness(probe_of(Detector(np.ones((1, 1))), flat(2, 1, 1)))


# --- input_filter ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (15, 15), (12, 20)])
def test_filters_split_the_image_at_the_cut_off(size: tuple[int, int]):
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rho = bands.frequency(*size)
    low, high = bands.filtered(x, rho <= 0.5), bands.filtered(x, (rho > 0.5) | (rho == 0))
    torch.testing.assert_close(low + high, x + x.mean((-1, -2), keepdim=True), rtol=0, atol=1e-12)
    power = np.abs(np.fft.fft2(low.numpy())) ** 2
    assert power[..., rho_of(*size) > 0.5].sum() < 1e-20 * power.sum()


def test_accuracy_by_cut_off_follows_the_bins_a_model_needs():
    h = 16
    k = 4  # rho = 1/2
    wave = plane_wave(h, h, k, 0)
    x = flat(6, h, h) + torch.tensor([0.0, 0.5] * 3, dtype=torch.float64)[:, None, None, None] * wave
    y = torch.tensor([0, 1] * 3)
    probe = probe_of(Detector(mirrored(h, h, (k, 0)), threshold=0.1), x, y)
    result = vs.input_filter(probe, cutoffs=(0.6, 0.0, 0.4, 0.5, 1.0))
    np.testing.assert_array_equal(result.cutoff, [0, 0.4, 0.5, 0.6, 1])
    np.testing.assert_array_equal(result.low_pass_accuracy, [0.5, 0.5, 1, 1, 1])
    np.testing.assert_array_equal(result.high_pass_accuracy, [1, 1, 0.5, 0.5, 0.5])
    assert result.clean_accuracy == 1.0
    assert result.low_pass_nll[-1] == pytest.approx(result.clean_nll)
    assert result.chance == 0.5
    assert result.scalars()["low_pass_accuracy_mean"] == pytest.approx(0.8)


def test_refusals_of_input_filter():
    probe = probe_of(Detector(np.ones((8, 8))), flat(2, 8, 8))
    with pytest.raises(ValueError, match=r"each in \[0, 1\], received \[0.5, 1.5\]"):
        vs.input_filter(probe, cutoffs=(0.5, 1.5))
    with pytest.raises(ValueError, match="at least one cut-off"):
        vs.input_filter(probe, cutoffs=())


# --- fourier_heatmap ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_plane_waves_have_unit_rms_and_two_bins(size: tuple[int, int]):
    h, w = size
    for k, l in ((0, 0), (1, 0), (h // 2, w // 2), (2, -1)):
        wave = plane_wave(h, w, k, l)
        assert wave.square().mean().item() == pytest.approx(1, rel=1e-12)
        power = np.abs(np.fft.fft2(wave.numpy())) ** 2
        assert power[mirrored(h, w, (k, l)) == 0].sum() < 1e-18 * power.sum()


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (6, 9)])
def test_heat_map_shows_the_frequency_a_model_looks_at_and_its_mirror(size: tuple[int, int]):
    h, w = size
    k, l = 2, -1
    result = vs.fourier_heatmap(probe_of(Detector(mirrored(h, w, (k, l))), flat(4, h, w)))
    expected = np.zeros((h, w))
    expected[h // 2 + k, w // 2 + l] = expected[h // 2 - k, w // 2 - l] = 1
    np.testing.assert_array_equal(result.error_rate, expected)
    assert result.vertical[h // 2] == 0
    assert result.horizontal[w // 2] == 0
    np.testing.assert_allclose(np.diff(result.vertical), 2 / h)
    assert result.clean_error_rate == 0.0


def test_nyquist_and_constant_have_one_place_each_at_even_sizes():
    h = 6
    looks = mirrored(h, h, (3, 1)) + mirrored(h, h, (0, 0))
    result = vs.fourier_heatmap(probe_of(Detector(looks, threshold=10.0), flat(2, h, h) * 0, batches=1), rms=1.0)
    assert np.argwhere(result.error_rate == 1).tolist() == [[0, 2], [0, 4], [3, 3]]  # (-3, -1), (-3, 1) and (0, 0)


def test_only_the_lowest_frequencies():
    model = Detector(mirrored(16, 16, (1, 1)))
    passes = counted(model)
    result = vs.fourier_heatmap(probe_of(model, flat(2, 16, 16), batches=1), n=5)
    assert result.error_rate.shape == (5, 5)
    assert len(passes) == 2 + 1 + 13  # two of the check, clean, the constant and half of the 24 others
    np.testing.assert_allclose(result.vertical, np.arange(-2, 3) / 8)
    assert np.argwhere(result.error_rate == 1).tolist() == [[1, 1], [3, 3]]


def test_signs_differ_between_images_and_channels():
    seen = []

    class Record(Detector):
        def forward(self, x):
            seen.append(x)
            return super().forward(x)

    vs.fourier_heatmap(probe_of(Record(np.zeros((4, 4))), flat(40, 4, 4), batches=1), n=1, rms=0.25)
    shift = (seen[3] - seen[2])[..., 0, 0]  # after two passes of the check: the constant wave
    np.testing.assert_allclose(shift.abs(), 0.25, rtol=1e-12)
    # 120 fair signs: fewer than 30 or more than 90 of one kind has probability below 1e-7
    assert 30 < (shift > 0).sum() < 90


def test_refusals_of_heat_map():
    probe = probe_of(Detector(np.ones((8, 8))), flat(2, 8, 8))
    with pytest.raises(ValueError, match="received rms=-1 and n=None"):
        vs.fourier_heatmap(probe, rms=-1)
    with pytest.raises(ValueError, match=r"received rms=0.1 and n=0"):
        vs.fourier_heatmap(probe, n=0)


# --- figures -----------------------------------------------------------------------------------------------------


def test_figures_show_the_fields():
    probe = probe_of(Detector(rho_of(16, 16) > 0.5), flat(4, 16, 16))
    noise = vs.frequency_noise_robustness(probe, n_bands=5, curve_rms=(0.2,))
    figure = vs.plot({"a": noise, "b": noise})
    np.testing.assert_array_equal(figure.axes[0].get_lines()[0].get_ydata(), 100 * noise.accuracy_change)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["a", "b"]
    relative = vs.plot(noise, relative=True).axes[0].get_lines()[0].get_ydata()
    np.testing.assert_allclose(relative, noise.relative_change)
    assert len(vs.plot({"a": noise, "b": noise}, view="rms").axes) == 2
    with pytest.raises(ValueError, match="bands, rms, received 'x'"):
        vs.plot(noise, view="x")
    filters = vs.input_filter(probe, cutoffs=(0.3, 0.7))
    low, high = vs.plot(filters).axes
    np.testing.assert_array_equal(low.get_lines()[0].get_ydata(), 100 * filters.low_pass_accuracy)
    np.testing.assert_array_equal(high.get_lines()[0].get_ydata(), 100 * filters.high_pass_accuracy)
    heat = vs.fourier_heatmap(probe, n=3)
    panel = vs.plot({"a": heat, "b": heat}).axes[0]
    np.testing.assert_array_equal(panel.collections[0].get_array().reshape(3, 3), 100 * heat.error_rate)
