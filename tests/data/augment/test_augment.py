from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from timm.data.random_erasing import RandomErasing

from vitscope.data import philox
from vitscope.data.augment import augment as augmentation
from vitscope.data.augment.augment import CROP_PADDING, Recipe, augment, crop_flip, erase, normalize
from vitscope.data.philox import AUGMENT, Key
from vitscope.runtime.errors import ConfigError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def key(indices, epoch=0, seed=0):
    return Key(np.asarray(indices), epoch, AUGMENT, seed)


@pytest.fixture
def images():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (64, 3, 32, 32), dtype=np.uint8))


@pytest.mark.parametrize("flip", [False, True])
def test_crop_flip_equals_padding_slicing_and_mirroring_each_image(images, flip):
    draws = philox.uniforms(np.arange(64), 3, seed=0, stream=AUGMENT)
    result = crop_flip(images, draws, flip=flip, fill=9)
    mirrored = 0
    for image, cropped, (row, column, mirror) in zip(images, result, draws):
        padded = torch.nn.functional.pad(image, (CROP_PADDING,) * 4, value=9)
        top, left = int(9 * row), int(9 * column)
        expected = padded[:, top : top + 32, left : left + 32]
        if flip and mirror < 0.5:
            expected, mirrored = expected.flip(2), mirrored + 1
        assert torch.equal(cropped, expected)
    assert (16 < mirrored < 48) == flip


def test_all_offsets_of_a_crop_are_equally_likely():
    draws = philox.uniforms(np.arange(9000), 3, seed=0, stream=AUGMENT)
    counts = np.bincount((draws[:, 0] * 9).astype(int), minlength=9)
    assert np.abs(counts - 1000).max() < 4 * np.sqrt(1000)  # four standard errors


@pytest.mark.parametrize("text", ["none", "crop_flip", "rand-m9-n2-mstd1.0"])
def test_augmentation_is_a_function_of_seed_epoch_and_index(images, text):
    recipe = Recipe(augment=text, mean=MEAN, std=STD)
    order = np.random.default_rng(1).permutation(64)
    every = augment(images, key(np.arange(64), epoch=3), recipe)
    shuffled = augment(images[order], key(order, epoch=3), recipe)
    assert torch.equal(shuffled, every[order])
    for index in (0, 17, 63):
        assert torch.equal(augment(images[index : index + 1], key([index], epoch=3), recipe)[0], every[index])
    for other in (key(np.arange(64), epoch=4), key(np.arange(64), epoch=3, seed=1)):
        assert torch.equal(augment(images, other, recipe), every) == (text == "none")


def test_augmentation_leaves_its_input_alone(images):
    before = images.clone()
    augment(images, key(np.arange(64)), Recipe(augment="rand-m9-n2-mstd1.0"))
    assert torch.equal(images, before)


def test_uncovered_pixels_have_the_mean_color_as_timm_rounds_it(images, monkeypatch):
    fills = []
    monkeypatch.setattr(augmentation, "rand_augment", lambda images, draws, policy, fill: fills.append(fill) or images)
    augment(images, key(np.arange(64)), Recipe(augment="rand-m9-n2", mean=(0.485, 0.456, 0.406)))
    assert fills == [(124, 116, 104)]  # 255 times the mean is 123.7, 116.3 and 103.5


def test_normalize_is_the_definition(images):
    expected = (images.double() / 255 - torch.tensor(MEAN, dtype=torch.float64).view(3, 1, 1)) / torch.tensor(
        STD, dtype=torch.float64
    ).view(3, 1, 1)
    result = normalize(images, MEAN, STD)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=2e-6)  # two float32 roundings of values to 5


def test_erased_rectangles_are_distributed_as_timms():
    recipe = Recipe(augment="crop_flip", random_erasing=0.6)
    mine = erase(torch.ones(4000, 1, 32, 32), key(np.arange(4000)), recipe)
    random.seed(0)
    theirs = RandomErasing(probability=0.6, mode="const", device="cpu")(torch.ones(4000, 1, 32, 32))
    boxes = []
    for erased in (mine, theirs):
        gone = erased[:, 0].numpy() == 0
        height, width = gone.any(2).sum(1), gone.any(1).sum(1)
        np.testing.assert_array_equal(gone.sum((1, 2)), height * width)  # one full rectangle, or none
        assert (height > 0).mean() == pytest.approx(0.6, abs=0.03)  # four standard errors
        assert max(height.max(), width.max()) < 32  # what does not fit is drawn again
        hit = height > 0
        boxes.append((height[hit], width[hit], gone.any(2).argmax(1)[hit], gone.any(1).argmax(1)[hit]))
    for ours, timms in zip(*boxes):
        assert ks_2samp(ours, timms).pvalue > 0.001


def test_evaluation_never_erases(images):
    recipe = Recipe(augment="crop_flip", random_erasing=1.0)
    ones = torch.ones(64, 3, 32, 32)
    assert torch.equal(erase(ones.clone(), key(np.arange(64)), recipe.plain()), ones)
    assert (erase(ones.clone(), key(np.arange(64)), recipe) == 0).flatten(1).any(1).all()


@pytest.mark.parametrize("text", ["autoaugment", "", "crop", "rand"])
def test_an_unknown_augmentation_is_refused(text):
    with pytest.raises(ConfigError, match=r"objective\.augment=.*: unknown augmentation; choose none, crop_flip"):
        Recipe(augment=text)
