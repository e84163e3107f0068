from __future__ import annotations

import numpy as np
import pytest
import torch

from vitscope.data.sources import shapes
from vitscope.runtime.errors import DataError


@pytest.mark.parametrize("split", ["val", "test"])
def test_shape_and_texture_agree_outside_the_conflict_split(split):
    images = shapes.load(split)
    assert images.images.shape == (shapes.SPLITS[split], 3, 32, 32)
    assert torch.equal(images.labels, images.attributes["texture"])
    assert torch.equal(images.labels.bincount(), torch.full((8,), shapes.SPLITS[split] // 8))


def test_cue_conflict_pairs_each_shape_with_each_other_texture_equally_often():
    images = shapes.load("cue_conflict")
    pairs = torch.bincount(8 * images.labels + images.attributes["texture"], minlength=64).view(8, 8)
    assert torch.equal(pairs, 20 * (1 - torch.eye(8, dtype=torch.int64)))
    assert torch.equal(images.attributes["shape"], images.labels)


def test_outlines_have_their_areas():
    fine = (np.arange(800) + 0.5) / 400 - 1  # the square from -1 to 1
    x, y = np.meshgrid(fine, fine)
    exact = {
        "disk": np.pi,
        "square": 2.0,
        "triangle": 3 * np.sqrt(3) / 4,
        "cross": 4 * (2 * 0.33 - 0.33**2),
        "ring": np.pi * (1 - 0.56**2),
        "flower": np.pi * (0.72**2 + 0.28**2 / 2),
    }
    for name, area in exact.items():
        inside = shapes.SHAPES[name](x, y) < 1
        assert 4 * inside.mean() == pytest.approx(area, rel=0.01), name  # pixels of the border


def test_textures_stay_between_zero_and_one_and_vary():
    x, y = np.meshgrid(np.linspace(-16, 16, 64), np.linspace(-16, 16, 64))
    for name, texture in shapes.TEXTURES.items():
        values = texture(x, y, np.full_like(x, 1.4))
        assert values.min() >= 0, name
        assert values.max() <= 1, name
        assert values.std() > 0.1, name


def test_texture_fills_the_shape_and_only_the_shape():
    draws = np.tile(np.linspace(0.1, 0.9, 14), (64, 1))
    shape, texture = np.repeat(np.arange(8), 8), np.tile(np.arange(8), 8)
    images, masks = shapes._draw(shape, texture, draws)
    images, masks = images.reshape(8, 8, 3, 32, 32), masks.reshape(8, 8, 32, 32)
    assert (masks == masks[:, :1]).all()  # the texture does not change the shape
    background = images[:, :, :, 0, 0]
    assert (background == background[:1, :1]).all()
    differs = (images != images[:, :1]).any((1, 2))  # where some texture differs from the first, by shape
    mask = shapes._mask(np.arange(8), *(np.zeros((8, 1, 1)),) * 2, np.full((8, 1, 1), 13.0), np.zeros((8, 1, 1)))
    assert 0.1 < differs.mean() < mask.mean()


def test_object_masks_hold_the_pixels_that_differ_from_the_background():
    images = shapes.load("val")
    object_mask = images.attributes["object_mask"]
    assert (object_mask.dtype, object_mask.shape) == (torch.bool, (512, 32, 32))
    background = images.images[:, :, :1, :1]  # no shape reaches the corner
    differs = (images.images != background).any(1)
    assert not (object_mask & ~differs).float().mean() > 0.001  # a texture may have the background's color somewhere
    outside = ~torch.nn.functional.max_pool2d(
        object_mask.float(), 3, 1, 1
    ).bool()  # further than one pixel from the object
    assert not (differs & outside).any()


def test_the_set_is_the_same_every_time_and_its_splits_differ():
    first, again, other = shapes.load("val"), shapes.load("val", split_seed=7), shapes.load("test")
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images[: len(first)])


def test_an_unknown_split_is_refused():
    with pytest.raises(DataError, match=r"data=shapes: there is no split 'dev'; choose one of .*cue_conflict"):
        shapes.load("dev")
