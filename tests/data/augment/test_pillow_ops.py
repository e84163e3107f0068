"""Each operation against timm's call of Pillow, image by image."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import auto_augment as timm_augment

from vitscope.data.augment import pillow_ops as ops

FILL = (120, 115, 100)


@pytest.fixture(scope="module")
def images():
    """Crops of a photograph, and images with nothing in them: `(B, 32, 32, 3)`."""
    photograph = load_sample_image("china.jpg")
    rng = np.random.default_rng(0)
    rows, columns = rng.integers(0, 390, 40), rng.integers(0, 600, 40)
    crops = [photograph[row : row + 32, column : column + 32] for row, column in zip(rows, columns)]
    flat = [np.full((32, 32, 3), value, dtype=np.uint8) for value in (0, 77, 255)]
    spot = np.zeros((32, 32, 3), dtype=np.uint8)
    spot[3, 4] = 200
    return np.stack([*crops, *flat, spot])


def compare(images, batched, single):
    result = batched(images.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    expected = np.stack([np.asarray(single(Image.fromarray(image), index)) for index, image in enumerate(images)])
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(
    ("batched", "single"),
    [
        (ops.auto_contrast, timm_augment.auto_contrast),
        (ops.equalize, timm_augment.equalize),
        (ops.invert, timm_augment.invert),
    ],
)
def test_plain_operations_equal_pillow(images, batched, single):
    compare(images, batched, lambda image, index: single(image))


@pytest.mark.parametrize(
    ("batched", "single", "low", "high", "integer"),
    [
        (ops.posterize, timm_augment.posterize, 1, 8, True),
        (ops.solarize, timm_augment.solarize, 0, 256, True),
        (ops.solarize_add, timm_augment.solarize_add, 0, 128, True),
        (ops.color, timm_augment.color, 0.1, 1.9, False),
        (ops.contrast, timm_augment.contrast, 0.1, 1.9, False),
        (ops.brightness, timm_augment.brightness, 0.1, 1.9, False),
        (ops.sharpness, timm_augment.sharpness, 0.1, 1.9, False),
    ],
)
def test_graded_operations_equal_pillow(images, batched, single, low, high, integer):
    strengths = np.linspace(low, high, len(images))
    strengths = np.floor(strengths) if integer else strengths
    as_given = [int(value) if integer else float(value) for value in strengths]
    compare(images, lambda x: batched(x, strengths), lambda image, index: single(image, as_given[index]))


def test_posterize_to_no_bits_is_black(images):
    # Pillow 13 refuses it; timm asks for it at the highest magnitude of the increasing variant
    assert not ops.posterize(images.transpose(0, 3, 1, 2), np.zeros(len(images))).any()


@pytest.mark.parametrize("bicubic", [False, True])
def test_rotation_equals_pillow(images, bicubic):
    degrees = np.linspace(-30, 30, len(images))
    kwargs = {"resample": Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR, "fillcolor": FILL}
    compare(
        images,
        lambda x: ops.rotate(x, degrees, np.array(FILL, dtype=np.uint8), bicubic=bicubic),
        lambda image, index: image.rotate(degrees[index], **kwargs),
    )


@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize("kind", ["shear", "translation"])
def test_shifts_equal_pillow(images, kind, bicubic):
    amount = np.linspace(-0.3, 0.3, len(images)) * (1 if kind == "shear" else 32)
    shift = amount[:, None] * (np.arange(32) + 0.5 if kind == "shear" else np.ones(32))
    kwargs = {"resample": Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR, "fillcolor": FILL}

    def single(image, index):
        b, c = (amount[index], 0) if kind == "shear" else (0, amount[index])
        return image.transform((32, 32), Image.Transform.AFFINE, (1, b, c, 0, 1, 0), **kwargs)

    compare(images, lambda x: ops.shift_rows(x, shift, np.array(FILL, dtype=np.uint8), bicubic=bicubic), single)
