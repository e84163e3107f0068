"""Corruptions of an image: strength, shape, moments and closed forms."""

from __future__ import annotations

from io import BytesIO
from itertools import pairwise

import numpy as np
import pytest
import skimage.color
import skimage.data
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.transform import resize

from vitscope.data.sources import photos
from vitscope.diagnostics.corruption._kernels import disk, streak, zoom_matrix
from vitscope.diagnostics.corruption._severity_table import COMMON, LARGE, MEDIUM, SEVERITIES, SMALL, TABLES, VALIDATION
from vitscope.diagnostics.corruption._transforms import corrupted, gaussian_blur, shot_noise, zoom_blur
from vitscope.diagnostics.corruption._weather import clouds, fog


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def cat(side: int = 32) -> np.ndarray:
    return np.asarray(resize(skimage.data.chelsea()[:, 60:360], (side, side), anti_aliasing=True))


#: types whose published steps do not all do more damage than the one before: the first two blur less or displace less at some
#: of them; which steps of the other four have to is derived and tested in test_corruption_strengths.py
BACK_AND_FORTH = ("glass_blur", "elastic_transform", "frost", "motion_blur", "fog", "snow")
GROWING = tuple(name for name in COMMON + VALIDATION if name not in BACK_AND_FORTH)


def test_damage_grows_with_every_step_on_photos() -> None:
    data = photos.load("test")
    images = data.images[:: len(data) // 24].permute(0, 2, 3, 1).double().numpy() / 255
    for name in (v for v in GROWING if v != "saturate"):  # gray has no saturation
        damage = [
            np.mean([np.square(corrupted(x, name, s, rng(i)) - x).mean() ** 0.5 for i, x in enumerate(images)])
            for s in SEVERITIES
        ]
        assert all(b > 1.01 * a for a, b in pairwise(damage)), (name, damage)
        assert damage[0] > 0.005


@pytest.mark.parametrize("name", GROWING)
def test_damage_grows_with_every_step_on_a_color_image(name: str) -> None:
    for side in (32, 64, 128, 160):  # two sides of each table
        x = cat(side)
        damage = [np.mean([np.square(corrupted(x, name, s, rng(i)) - x).mean() for i in range(4)]) for s in SEVERITIES]
        assert all(b > a for a, b in pairwise(damage)), damage


@pytest.mark.parametrize("name", COMMON + VALIDATION)
@pytest.mark.parametrize("shape", [(32, 32, 3), (33, 41, 3), (70, 64, 1)])
def test_results_are_images_of_the_same_shape_and_reproducible(name: str, shape: tuple[int, int, int]) -> None:
    x = rng().random(shape)
    for severity in (1, 5):
        y = corrupted(x, name, severity, rng(5))
        assert y.shape == shape
        assert 0 <= y.min() <= y.max() <= 1
        np.testing.assert_array_equal(255 * y, np.round(255 * y))  # 8 bits, as the published files
        np.testing.assert_array_equal(y, corrupted(x, name, severity, rng(5)))


def test_tables_have_every_type_at_five_severities() -> None:
    assert len(COMMON) == 15
    assert set(SMALL) == set(MEDIUM) == set(LARGE) == set(COMMON + VALIDATION)
    assert all(len(steps) == 5 for table in TABLES.values() for steps in table.values())


def test_noises_have_their_moments() -> None:
    x = np.full((128, 128, 3), 0.5)
    n = x.size
    for severity, (deviation,) in zip(SEVERITIES, LARGE["gaussian_noise"][:2]):
        noise = corrupted(x, "gaussian_noise", severity, rng()) - x
        # four standard errors of a standard deviation, and the rounding to 8 bits
        assert noise.std() == pytest.approx(deviation, abs=4 * deviation / np.sqrt(2 * n) + 1e-3)
    photons = LARGE["shot_noise"][0][0]
    counts = photons * shot_noise(x, rng(), 1.0, photons)
    assert counts.var() == pytest.approx(photons / 2, rel=0.06)  # Poisson: variance equals mean
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-9)
    hit = corrupted(x, "impulse_noise", 3, rng()) != np.round(255 * x) / 255
    share = LARGE["impulse_noise"][2][0]
    assert hit.mean() == pytest.approx(share, abs=4 * np.sqrt(share / n))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_color_changes_equal_skimage(severity: int) -> None:
    x = np.round(255 * cat()) / 255
    hsv = skimage.color.rgb2hsv(x)
    hsv[..., 2] = np.clip(hsv[..., 2] + SMALL["brightness"][severity - 1][0], 0, 1)
    np.testing.assert_allclose(
        corrupted(x, "brightness", severity, rng()), skimage.color.hsv2rgb(hsv), atol=0.5 / 255 + 1e-9
    )
    hsv = skimage.color.rgb2hsv(x)
    factor, amount = SMALL["saturate"][severity - 1]
    hsv[..., 1] = np.clip(factor * hsv[..., 1] + amount, 0, 1)
    np.testing.assert_allclose(
        corrupted(x, "saturate", severity, rng()), skimage.color.hsv2rgb(hsv), atol=0.5 / 255 + 1e-9
    )


def test_digital_corruptions_equal_their_libraries() -> None:
    pixels = np.round(255 * cat()).astype(np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=58)
    np.testing.assert_array_equal(
        np.round(255 * corrupted(pixels / 255, "jpeg_compression", 3, rng())), np.asarray(Image.open(buffer))
    )
    half = pixels.reshape(16, 2, 16, 2, 3).mean((1, 3)).repeat(2, 0).repeat(2, 1)
    table = {**SMALL, "pixelate": ((0.5,),) * 5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TABLES, 32, table)
        boxed = corrupted(pixels / 255, "pixelate", 1, rng())
    np.testing.assert_allclose(255 * boxed, half, atol=1)  # PIL rounds between its two passes
    mean = pixels.mean((0, 1)) / 255
    np.testing.assert_allclose(
        corrupted(pixels / 255, "contrast", 2, rng()), mean + 0.5 * (pixels / 255 - mean), atol=0.5 / 255 + 1e-9
    )


def test_blurs_keep_constants_and_equal_their_closed_forms() -> None:
    flat = np.full((40, 32, 3), 0.4)
    for name in ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "gaussian_blur", "elastic_transform"):
        np.testing.assert_allclose(corrupted(flat, name, 5, rng()), flat, atol=0.5 / 255)
    x = cat()
    np.testing.assert_allclose(gaussian_blur(x, rng(), 2.0, 0.7), gaussian_filter(x, (1.4, 1.4, 0), mode="nearest"))
    kernel = disk(3.0, 1e-6)
    assert kernel.sum() == pytest.approx(1.0, abs=1e-12)
    assert np.count_nonzero(kernel > 1e-9) == 29  # lattice points in a circle of radius 3
    line = streak(4, 100.0, 0.0)
    np.testing.assert_allclose(line[line > 0], np.full(9, 1 / 9), rtol=0.01)  # nine pixels to the right
    assert np.unique(np.nonzero(line)[0]).tolist() == [line.shape[0] // 2]
    assert np.nonzero(streak(4, 100.0, 90.0) > 1e-9)[1].max() == streak(4, 100.0, 90.0).shape[1] // 2


def test_zoom_maps_a_ramp_to_a_flatter_ramp() -> None:
    ramp = np.arange(21.0)
    # 11 pixels from the 6th on stretched over 22, of which the first 21 are shown
    np.testing.assert_allclose(zoom_matrix(21, 2.0) @ ramp, 5 + ramp * 10 / 21, atol=1e-12)
    np.testing.assert_array_equal(zoom_matrix(7, 1.0), np.eye(7))
    x = cat()
    np.testing.assert_allclose(zoom_blur(x, rng(), 1.0, 1.005, 0.01), x, atol=1e-12)  # the image twice


def test_fog_keeps_the_brightest_value_at_most() -> None:
    x = cat()
    assert fog(x, rng(), 1.0, 2.0, 2.0).max() <= x.max() + 1e-12
    landscape = clouds((20, 50), rng(), 2.0)
    assert (landscape.min(), landscape.max()) == (0.0, 1.0)


def test_unknown_corruption_and_severity() -> None:
    with pytest.raises(ValueError, match="received 'rain'"):
        corrupted(cat(), "rain", 1, rng())
    with pytest.raises(ValueError, match="severities from 1 to 5, received 6"):
        corrupted(cat(), "fog", 6, rng())
