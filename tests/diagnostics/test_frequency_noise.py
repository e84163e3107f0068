from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import vitscope as vs
from tests.fixtures.networks.frequency_detectors import PIXELS, Detector, counted, flat, mirrored, probe_of, rho_of
from vitscope.core.undefined_values import NullWarning


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


@pytest.mark.filterwarnings("ignore:the first batch does not look normalized:UserWarning")  # images of 0
def test_all_bands_have_the_same_rms_in_pixels_and_the_normalization_scales_it():
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


@pytest.mark.filterwarnings("ignore:.*is not above chance")
@pytest.mark.parametrize(
    ("is_changed", "n_right", "has_interval"),
    [(True, 5, True), (True, 130, True), (True, 0, True), (False, 121, False), (False, 120, True)],
)
def test_a_change_of_the_loss_has_an_interval_where_ten_answers_were_wrong_before_or_after(
    is_changed: bool, n_right: int, has_interval: bool
):
    y = (torch.arange(130) >= n_right).long()  # clean answer 0; with noise that the model sees 1
    where = np.ones((8, 8)) - mirrored(8, 8, (0, 0)) if is_changed else np.zeros((8, 8))
    result = vs.frequency_noise_robustness(probe_of(Detector(where), flat(130, 8, 8), y), n_bands=1)
    assert result.clean_accuracy == n_right / 130
    assert result.accuracy_change[0] == pytest.approx(1 - 2 * n_right / 130 if is_changed else 0.0, abs=1e-12)
    assert np.isfinite(result.nll_change_half_width[0]) == has_interval


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


def test_batches_without_labels_count_nowhere():
    model, x = Detector(rho_of(16, 16) > 0.5), flat(4, 16, 16)
    batches, unlabeled = list(zip(x.split(2), torch.zeros(4, dtype=torch.long).split(2))), torch.full((2,), -100)
    labeled, mixed = (vs.Probe(model, part, about=PIXELS) for part in (batches, [*batches, (x[:2], unlabeled)]))
    for measure, options in ((vs.frequency_noise_robustness, {"n_bands": 2}), (vs.input_filter, {"cutoffs": (0.5,)})):
        expected, result = measure(labeled, **options), measure(mixed, **options)
        assert result.n_images == expected.n_images == 4
        assert result.chance == expected.chance == 0.5
        for name in ("accuracy_change", "nll_change", "low_pass_accuracy", "high_pass_nll"):
            np.testing.assert_array_equal(getattr(result, name, None), getattr(expected, name, None))
    with pytest.raises(ValueError, match="at least one image with a label to evaluate, received none"):
        vs.input_filter(vs.Probe(model, [(x[:2], unlabeled)], about=PIXELS))


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


def test_without_a_normalization_images_are_taken_for_pixels_with_a_warning():
    probe = vs.Probe(Detector(np.zeros((8, 8))), [(flat(3, 8, 8), torch.zeros(3, dtype=torch.long))])
    with pytest.warns(UserWarning, match=r"frequency_noise_robustness: no normalization is known"):
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


def test_figures_show_the_fields():
    probe = probe_of(Detector(rho_of(16, 16) > 0.5), flat(4, 16, 16))
    noise = vs.frequency_noise_robustness(probe, n_bands=5, curve_rms=(0.2,))
    figure = vs.plot({"a": noise, "b": noise})
    np.testing.assert_array_equal(figure.axes[0].get_lines()[0].get_ydata(), 100 * noise.accuracy_change)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["a", "b"]
    relative = vs.plot(noise, relative=True).axes[0].get_lines()[0].get_ydata()
    np.testing.assert_allclose(relative, noise.relative_change)
    by_chance = dataclasses.replace(noise, clean_accuracy=noise.chance)
    below_chance = dataclasses.replace(noise, clean_accuracy=0.0)
    for useless in (by_chance, below_chance):  # nothing to divide by, as in relative_change
        figure = vs.plot({"a": noise, "b": useless}, relative=True)
        assert np.isnan(np.asarray(figure.axes[0].get_lines()[1].get_ydata(), float)).all()
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
