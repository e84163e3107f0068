"""Accuracy on low-pass and high-pass filtered images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import vitscope as vs
from tests.fixtures.networks.frequency_detectors import Detector, flat, mirrored, probe_of, rho_of
from vitscope.diagnostics.frequency_noise import _bands as bands
from vitscope.diagnostics.frequency_noise.fourier_heatmap import plane_wave


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


def test_narrow_images_are_filtered_in_single_precision():
    x = torch.rand(6, 3, 9, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    rho = bands.frequency(9, 12)
    low = bands.filtered(x, rho <= 0.5)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, bands.filtered(x.float(), rho <= 0.5).bfloat16())
    probe = vs.Probe(nn.Sequential(nn.Flatten(), nn.Linear(324, 2)).bfloat16(), [(x, torch.arange(6) % 2)])
    narrow = vs.input_filter(probe, cutoffs=(1.0,))
    assert narrow.low_pass_nll[0] == pytest.approx(
        narrow.clean_nll, rel=2**-6
    )  # the round trip: a rounding or two of bfloat16
    for construction in ("equal_rms", "official"):
        noisy = vs.frequency_noise_robustness(probe, n_bands=2, construction=construction, std=[1.0] * 3)
        assert np.isfinite(noisy.nll_change).all()


def test_refusals_of_input_filter():
    probe = probe_of(Detector(np.ones((8, 8))), flat(2, 8, 8))
    with pytest.raises(ValueError, match=r"Expected cutoffs in \[0, 1\], at least one, received \[0.5, 1.5\]"):
        vs.input_filter(probe, cutoffs=(0.5, 1.5))
    with pytest.raises(ValueError, match="at least one, received"):
        vs.input_filter(probe, cutoffs=())
