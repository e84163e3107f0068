"""Frequency bands and the noise in them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.fixtures.networks.frequency_detectors import SIZES, rho_of
from vitscope.diagnostics.frequency_noise import _bands as bands


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
