"""The generated corruptions against the published constants and against direct computations."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
import skimage.color
import skimage.data
from scipy.ndimage import zoom
from skimage.transform import resize

from vitscope.diagnostics.corruption import _transforms
from vitscope.diagnostics.corruption._severity_table import COMMON, SEVERITIES, VALIDATION
from vitscope.diagnostics.corruption._transforms import corrupted, shuffled

# The constants of the code that was released with CIFAR-10-C (32), Tiny-ImageNet-C (64) and ImageNet-C (224), severities 1 to 5.
PUBLISHED: dict[int, dict[str, list[tuple[float, ...]]]] = {
    32: {
        "gaussian_noise": [(0.04,), (0.06,), (0.08,), (0.09,), (0.10,)],
        "shot_noise": [(500,), (250,), (100,), (75,), (50,)],
        "impulse_noise": [(0.01,), (0.02,), (0.03,), (0.05,), (0.07,)],
        "defocus_blur": [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)],
        "glass_blur": [(0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)],
        "motion_blur": [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)],
        "zoom_blur": [(1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)],
        "snow": [(0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
                 (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)],
        "frost": [(1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)],
        "fog": [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)],
        "brightness": [(0.05,), (0.1,), (0.15,), (0.2,), (0.3,)],
        "contrast": [(0.75,), (0.5,), (0.4,), (0.3,), (0.15,)],
        "elastic_transform": [(0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6), (3.2, 0.96, 0.96)],
        "pixelate": [(0.95,), (0.9,), (0.85,), (0.75,), (0.65,)],
        "jpeg_compression": [(80,), (65,), (58,), (50,), (40,)],
    },
    64: {
        "gaussian_noise": [(0.04,), (0.08,), (0.12,), (0.15,), (0.18,)],
        "shot_noise": [(250,), (100,), (50,), (30,), (15,)],
        "impulse_noise": [(0.01,), (0.02,), (0.05,), (0.08,), (0.14,)],
        "defocus_blur": [(0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)],
        "glass_blur": [(0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)],
        "motion_blur": [(10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)],
        "zoom_blur": [(1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)],
        "snow": [(0.1, 0.2, 1, 0.6, 8, 3, 0.8), (0.1, 0.2, 1, 0.5, 10, 4, 0.8), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
                 (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6)],
        "frost": [(1, 0.3), (0.9, 0.4), (0.8, 0.45), (0.75, 0.5), (0.7, 0.55)],
        "fog": [(0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)],
        "brightness": [(0.1,), (0.2,), (0.3,), (0.4,), (0.5,)],
        "contrast": [(0.4,), (0.3,), (0.2,), (0.1,), (0.05,)],
        "elastic_transform": [(0, 0, 5.12), (3.2, 19.2, 3.84), (6.4, 5.12, 3.84), (6.4, 1.92, 1.92), (10.24, 1.92, 1.28)],
        "pixelate": [(0.9,), (0.8,), (0.7,), (0.6,), (0.5,)],
        "jpeg_compression": [(65,), (58,), (50,), (40,), (25,)],
    },
    224: {
        "gaussian_noise": [(0.08,), (0.12,), (0.18,), (0.26,), (0.38,)],
        "shot_noise": [(60,), (25,), (12,), (5,), (3,)],
        "impulse_noise": [(0.03,), (0.06,), (0.09,), (0.17,), (0.27,)],
        "defocus_blur": [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)],
        "glass_blur": [(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)],
        "motion_blur": [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)],
        "zoom_blur": [(1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)],
        "snow": [(0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
                 (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55)],
        "frost": [(1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)],
        "fog": [(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)],
        "brightness": [(0.1,), (0.2,), (0.3,), (0.4,), (0.5,)],
        "contrast": [(0.4,), (0.3,), (0.2,), (0.1,), (0.05,)],
        "elastic_transform": [(488, 170.8, 24.4), (488, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88),
                              (29.28, 2.44, 4.88)],
        "pixelate": [(0.6,), (0.5,), (0.4,), (0.3,), (0.25,)],
        "jpeg_compression": [(25,), (18,), (15,), (10,), (7,)],
    },
}  # fmt: skip


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def cat(side: int) -> np.ndarray:
    image = np.asarray(resize(skimage.data.chelsea()[:, 60:360], (side, side), anti_aliasing=True))
    return np.round(255 * image) / 255


@pytest.mark.parametrize(("side", "name"), list(product(PUBLISHED, COMMON)))
def test_every_strength_is_the_published_one(side: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def record(x: np.ndarray, generator: np.random.Generator, scale: float, *strength: float) -> np.ndarray:
        given.append((scale, *strength))
        return x

    monkeypatch.setitem(_transforms.FUNCTIONS, name, record)
    for severity in SEVERITIES:
        corrupted(np.zeros((side, side, 3)), name, severity, rng())
    expected = [(1.0, *strength) for strength in PUBLISHED[side][name]]
    assert all(len(a) == len(b) for a, b in zip(given, expected, strict=True))
    # the products of shares and sides round in their last places
    np.testing.assert_allclose(np.array(given), np.array(expected), rtol=1e-12)


def must_grow(name: str, milder: tuple[float, ...], stronger: tuple[float, ...]) -> bool:
    """Tell whether a step of the published constants has to do more damage, for a type whose steps do not all.

    - frost, ``kept * x + share * ice``: where the kept share falls by more than the share of ice rises, more light is taken
      away than is added, which brings the mean back to the image's.
    - motion_blur, half a Gaussian on a line of ``2 * radius + 1`` pixels: with the same deviation, a line that is long enough
      already changes nothing.
    - fog, ``(x + amount * clouds) * m / (m + amount)`` with m the brightest pixel: differs from x by
      ``amount / (m + amount) * (m * clouds - x)``; with the same amount only the clouds' roughness differs.
    - snow: flakes are normal draws above a threshold, so fewer fall where ``(threshold - mean) / deviation`` rises.
    """
    if name == "frost":
        return stronger[1] - milder[1] >= milder[0] - stronger[0] - 1e-9
    if name == "motion_blur":
        return stronger[1] > milder[1]
    if name == "fog":
        return stronger[0] > milder[0]
    rarity = [(threshold - mean) / deviation for mean, deviation, _, threshold, *_ in (milder, stronger)]
    return rarity[1] <= rarity[0] + 1e-9


@pytest.mark.parametrize("name", ["frost", "motion_blur", "fog", "snow"])
@pytest.mark.parametrize("side", PUBLISHED)
def test_damage_grows_where_the_published_constants_say_so(side: int, name: str) -> None:
    x = cat(side)
    images = {s: [corrupted(x, name, s, np.random.default_rng(i)) for i in range(4)] for s in SEVERITIES}
    damage = {s: np.mean([np.square(y - x).mean() for y in ys]) for s, ys in images.items()}
    for s, (milder, stronger) in enumerate(pairwise(PUBLISHED[side][name]), start=1):
        if must_grow(name, milder, stronger):
            assert damage[s + 1] > damage[s], (s, damage)
        elif name == "motion_blur":
            np.testing.assert_array_equal(images[s + 1], images[s])


def test_steps_that_need_not_grow_are_few() -> None:
    exempt = [
        (side, name, step)
        for side, name in product(PUBLISHED, ("frost", "motion_blur", "fog", "snow"))
        for step, (milder, stronger) in enumerate(pairwise(PUBLISHED[side][name]), start=1)
        if not must_grow(name, milder, stronger)
    ]
    assert exempt == [
        (32, "frost", 3), (32, "frost", 4), (32, "motion_blur", 3), (64, "frost", 2),
        (224, "frost", 3), (224, "fog", 3), (224, "snow", 2),
    ]  # fmt: skip


def test_fog_differs_from_the_image_by_its_closed_form() -> None:
    """At 32, severities 1 and 2 have one fading, so one landscape of clouds."""
    x, amounts = cat(32), [PUBLISHED[32]["fog"][s - 1][0] for s in (1, 2)]
    m = x.max()
    shifts = [(corrupted(x, "fog", s, rng()) - x) * (m + a) / a for s, a in zip((1, 2), amounts)]  # m * clouds - x
    bound = sum(0.5 / 255 * (m + a) / a for a in amounts)  # each image is rounded to 8 bits
    np.testing.assert_allclose(shifts[0], shifts[1], rtol=0, atol=bound + 1e-9)


@pytest.mark.parametrize(("side", "severity"), list(product((32, 64, 224), SEVERITIES)))
def test_brightness_is_the_value_of_hsv_also_for_black(side: int, severity: int) -> None:
    x = cat(side)
    x[: side // 2] = np.round(255 * 0.05 * x[: side // 2]) / 255  # nearly black
    x[:4] = 0
    hsv = skimage.color.rgb2hsv(x)
    hsv[..., 2] = np.clip(hsv[..., 2] + PUBLISHED[side]["brightness"][severity - 1][0], 0, 1)
    expected = skimage.color.hsv2rgb(hsv)
    noise = 1e-8 * rng().random(x.shape)  # what normalizing in float32 and back leaves
    brighter = corrupted(x + noise, "brightness", severity, rng())
    np.testing.assert_allclose(brighter, expected, atol=0.5 / 255 + 1e-9)
    assert (brighter[:4] == brighter[:4, :, :1]).all()  # black becomes gray


@pytest.mark.parametrize("shape", [(32, 32), (64, 48), (33, 41)])
def test_zoom_blur_is_the_mean_of_cropped_zooms(shape: tuple[int, int]) -> None:
    x = cat(64)[: shape[0], : shape[1]]
    for severity, end in zip(SEVERITIES, (1.06, 1.11, 1.16, 1.21, 1.26)):
        total, factors = x.copy(), np.arange(1, end, 0.01)
        for factor in factors:
            crop = [int(np.ceil(n / factor)) for n in shape]
            top, left = ((n - c) // 2 for n, c in zip(shape, crop))
            larger = zoom(x[top : top + crop[0], left : left + crop[1]], (factor, factor, 1), order=1)
            down, right = ((m - n) // 2 for m, n in zip(larger.shape, shape))
            total += larger[down : down + shape[0], right : right + shape[1]]
        # half a step of 8 bits
        expected = total / (len(factors) + 1)
        np.testing.assert_allclose(corrupted(x, "zoom_blur", severity, rng()), expected, atol=0.5 / 255 + 1e-9)


@pytest.mark.parametrize(("h", "w", "reach"), [(9, 9, 1), (12, 17, 2), (5, 40, 1), (3, 3, 1), (1, 1, 1)])
def test_shuffle_is_that_of_pixels_one_after_the_other(h: int, w: int, reach: int) -> None:
    generator = rng()
    down, right = generator.integers(-reach, reach, (2, h, w))
    image = np.arange(h * w).reshape(h, w)
    for row in range(h - reach, reach, -1):
        for column in range(w - reach, reach, -1):
            if row < h and column < w:
                image[row, column] = image[min(row + down[row, column], h - 1), min(column + right[row, column], w - 1)]
    np.testing.assert_array_equal(shuffled(down, right, reach), image.ravel())


@pytest.mark.parametrize("name", COMMON + VALIDATION)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 2), (3, 5), (17, 4), (29, 31), (50, 130)])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_shape(name: str, shape: tuple[int, int], channels: int) -> None:
    x = rng().random((*shape, channels)).astype(np.float32)
    for severity, image in ((1, x), (3, x), (5, x), (5, np.zeros_like(x))):
        y = corrupted(image, name, severity, rng())
        assert y.shape == image.shape
        assert y.dtype == np.float64
        assert ((y >= 0) & (y <= 1)).all()  # false for NaN
        np.testing.assert_array_equal(255 * y, np.round(255 * y))


@pytest.mark.parametrize(
    "name", [name for name in COMMON if name not in ("gaussian_noise", "shot_noise", "impulse_noise", "frost")]
)
def test_gray_content_stays_gray(name: str) -> None:
    gray = np.repeat(cat(32).mean(axis=2, keepdims=True), 3, axis=2)
    for severity in SEVERITIES:
        y = corrupted(gray, name, severity, rng())
        assert np.ptp(y, axis=2).max() <= 1.001 / 255, severity  # JPEG's color transform rounds


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4)), r"height, width, 1 or 3 channels\), received \(4, 4\)"),
        (np.zeros((4, 4, 4)), r"received \(4, 4, 4\)"),
        (np.zeros((0, 4, 3)), r"received \(0, 4, 3\)"),
        (np.full((4, 4, 3), np.nan), "finite values, received NaN"),
    ],
)
def test_what_is_no_image_is_refused(image: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        corrupted(image, "fog", 1, rng())
