"""The policy against timm's: same operations, magnitudes, signs and interpolation, in distribution."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from scipy.stats import chi2_contingency, ks_2samp
from timm.data import auto_augment as timm_augment

from vitscope.data.augment import randaugment
from vitscope.data.philox import AUGMENT, uniforms
from vitscope.runtime.errors import ConfigError

N = 6000
FILL = (120, 115, 100)


def ours(text, n=N):
    policy = randaugment.Policy.parse(text)
    draws = uniforms(np.arange(n), policy.n_draws, seed=0, stream=AUGMENT)
    return policy, [randaugment.choose(layer, policy) for layer in np.split(draws, policy.layers, axis=1)]


def timms(monkeypatch, text, n=N):
    """Run timm's own policy with its operations replaced by recorders."""
    calls = []
    for name in randaugment.OPERATIONS:
        recorder = lambda image, *arguments, _name=name, **kwargs: calls.append((_name, arguments, kwargs)) or image  # noqa: E731  one a name
        monkeypatch.setitem(timm_augment.NAME_TO_OP, name, recorder)
    transform = timm_augment.rand_augment_transform(text, {"img_mean": FILL})
    random.seed(0)
    np.random.seed(0)
    for _ in range(n):
        transform(Image.new("RGB", (2, 2)))
    return calls


@pytest.mark.parametrize("text", ["rand-m9-n2-mstd1.0", "rand-m9-n2-mstd0.5", "rand-m7-n3-mstd0.5-inc1-p0.8"])
def test_operations_are_chosen_as_often_as_timm_chooses_them(monkeypatch, text):
    policy, layers = ours(text)
    theirs = Counter(name.removesuffix("Increasing") for name, _, _ in timms(monkeypatch, text.replace("-inc1", "")))
    mine = Counter(randaugment.OPERATIONS[number] for choice in layers for number in choice.operation[choice.applied])
    table = [[counts[name] for name in randaugment.OPERATIONS] for counts in (mine, theirs)]
    assert min(map(min, table)) > 100
    assert chi2_contingency(table).pvalue > 0.001  # fixed seeds on both sides: no flicker
    expected = N * policy.layers * policy.prob
    assert abs(sum(mine.values()) - expected) < 4 * np.sqrt(expected)  # four standard errors, at most


@pytest.mark.parametrize(
    "name", ["Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast", "Brightness", "Sharpness"]
)
@pytest.mark.parametrize("increasing", [False, True])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_strengths_equal_timms_at_every_magnitude(monkeypatch, name, increasing, sign):
    monkeypatch.setattr(timm_augment, "_randomly_negate", lambda value: sign * value)
    magnitudes = np.linspace(0, 10, 201)
    idle = np.zeros(len(magnitudes), dtype=bool)
    choice = randaugment.Choice(idle.astype(int), idle, magnitudes / 10, np.full(len(magnitudes), sign), idle)
    known = name if not increasing or name == "SolarizeAdd" else f"{name}Increasing"
    theirs = [timm_augment.LEVEL_TO_ARG[known](float(magnitude), {}) for magnitude in magnitudes]
    theirs = [value[0] if isinstance(value, tuple) else value for value in theirs]
    np.testing.assert_array_equal(randaugment.strength(name, choice, increasing), theirs)


@pytest.mark.parametrize("name", ["Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"])
def test_geometry_moves_as_timms_for_each_level_sign_and_filter(monkeypatch, name):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    policy = randaugment.Policy.parse("rand-m9-n1-mstd1.0-p1.0")
    draws = uniforms(np.arange(30), 5, seed=0, stream=AUGMENT)
    draws[:, 0] = (randaugment.OPERATIONS.index(name) + 0.5) / len(randaugment.OPERATIONS)
    choice = randaugment.choose(draws, policy)
    result = randaugment.rand_augment(images.transpose(0, 3, 1, 2).copy(), draws, policy, FILL).transpose(0, 2, 3, 1)
    for index, image in enumerate(images):
        sign = choice.sign[index]
        monkeypatch.setattr(timm_augment, "_randomly_negate", lambda value, sign=sign: sign * value)
        arguments = timm_augment.LEVEL_TO_ARG[name](10 * choice.level[index], {})
        resample = Image.Resampling.BICUBIC if choice.bicubic[index] else Image.Resampling.BILINEAR
        moved = timm_augment.NAME_TO_OP[name](Image.fromarray(image), *arguments, resample=resample, fillcolor=FILL)
        difference = np.abs(np.asarray(moved).astype(int) - result[index])
        # a level that is rounded on its way through 10 * level may turn one truncation
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-3
    assert 5 < choice.bicubic.sum() < 25
    assert 5 < (choice.sign > 0).sum() < 25


def test_magnitudes_signs_and_filters_are_timms():
    _, (choice,) = ours("rand-m9-n1-mstd1.0", 20_000)
    random.seed(2)
    theirs = np.clip([random.gauss(9, 1) for _ in range(20_000)], 0, 10)
    assert ks_2samp(10 * choice.level, theirs).pvalue > 0.001
    assert (choice.level == 1).mean() == pytest.approx(0.1587, abs=0.01)  # P(N(9, 1) > 10)
    assert (choice.sign > 0).mean() == pytest.approx(0.5, abs=0.015)
    assert choice.bicubic.mean() == pytest.approx(0.5, abs=0.015)
    assert choice.applied.mean() == pytest.approx(0.5, abs=0.015)


def test_strengths_above_a_deviation_of_100_are_uniform_up_to_the_magnitude():
    """As timm's: such a deviation stands for an infinite one, and the bound holds after the draw."""
    draws = uniforms(np.arange(1000), 5, seed=0, stream=AUGMENT)
    level = randaugment.choose(draws, randaugment.Policy.parse("rand-m9-mstd101")).level
    np.testing.assert_allclose(level, 0.9 * draws[:, 2], rtol=1e-12)
    bounded = randaugment.choose(draws, randaugment.Policy.parse("rand-m9-mstd101-mmax5")).level
    np.testing.assert_allclose(bounded, np.minimum(0.9 * draws[:, 2], 0.5), rtol=1e-12)


def test_mean_image_statistics_equal_timms():
    rng = np.random.default_rng(3)
    images = np.repeat(np.repeat(rng.integers(0, 256, (1500, 8, 8, 3), dtype=np.uint8), 4, 1), 4, 2)
    policy = randaugment.Policy.parse("rand-m9-n2-mstd1.0")
    draws = uniforms(np.arange(len(images)), policy.n_draws, seed=0, stream=AUGMENT)
    mine = randaugment.rand_augment(images.transpose(0, 3, 1, 2).copy(), draws, policy, FILL)
    transform = timm_augment.rand_augment_transform("rand-m9-n2-mstd1.0", {"img_mean": FILL})
    random.seed(4)
    np.random.seed(4)
    theirs = np.stack([np.asarray(transform(Image.fromarray(image))) for image in images]).transpose(0, 3, 1, 2)
    for statistic in (np.mean, np.std):
        assert ks_2samp(statistic(mine, (1, 2, 3)), statistic(theirs, (1, 2, 3))).pvalue > 0.001


def test_an_image_does_not_depend_on_its_batch():
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (200, 3, 32, 32), dtype=np.uint8)
    policy = randaugment.Policy.parse("rand-m9-n2-mstd1.0")
    draws = uniforms(np.arange(200), policy.n_draws, seed=0, stream=AUGMENT)
    together = randaugment.rand_augment(images.copy(), draws, policy, FILL)
    for part in (slice(0, 1), slice(13, 50), slice(199, 200)):
        alone = randaugment.rand_augment(images[part].copy(), draws[part], policy, FILL)
        np.testing.assert_array_equal(alone, together[part])


def test_parsing():
    policy = randaugment.Policy.parse("rand-m9-n2-mstd1.0")
    assert policy == randaugment.Policy(magnitude=9, layers=2, std=1.0)
    assert randaugment.Policy.parse("rand-m5-n3-mstd101-p0.7-mmax8-inc1") == randaugment.Policy(
        5, 3, float("inf"), 0.7, True, 8
    )


@pytest.mark.parametrize("text", ["rand-m9-x3", "rand-m", "rand-tweights", "rand-m9-n2-mstdx"])
def test_a_section_that_cannot_be_read_is_named(text):
    with pytest.raises(ConfigError, match=r"objective\.augment=rand-.*cannot read the section"):
        randaugment.Policy.parse(text)


def test_no_operation_leaves_images_as_they_are():
    """A sweep over the number of operations may begin at 0, which timm takes too."""
    images = np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4)
    policy = randaugment.Policy.parse("rand-m9-n0")
    draws = uniforms(np.arange(2), policy.n_draws, seed=0, stream=AUGMENT)
    assert np.array_equal(randaugment.rand_augment(images.copy(), draws, policy, FILL), images)
