"""Error rate under plane waves of each frequency."""

from __future__ import annotations

import numpy as np
import pytest

import vitscope as vs
from tests.fixtures.networks.frequency_detectors import SIZES, Detector, counted, flat, mirrored, probe_of
from vitscope.diagnostics.frequency_noise.fourier_heatmap import plane_wave


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


def test_signs_differ_between_batches():
    seen = []

    class Record(Detector):
        def forward(self, x):
            seen.append(x)
            return super().forward(x)

    vs.fourier_heatmap(probe_of(Record(np.zeros((4, 4))), flat(40, 4, 4), batches=2), n=1, rms=0.25)
    clean, first, other_clean, second = seen[-4:]
    assert first.shape == second.shape == (20, 3, 4, 4)
    equal = ((first - clean)[..., 0, 0].sign() == (second - other_clean)[..., 0, 0].sign()).sum()
    assert 12 < equal < 48  # 60 pairs of fair signs: 12 or fewer, or 48 or more, have probability below 1e-5


def test_refusals_of_heat_map():
    probe = probe_of(Detector(np.ones((8, 8))), flat(2, 8, 8))
    with pytest.raises(ValueError, match="received rms=-1 and n=None"):
        vs.fourier_heatmap(probe, rms=-1)
    with pytest.raises(ValueError, match=r"received rms=0.1 and n=0"):
        vs.fourier_heatmap(probe, n=0)
