"""Undone normalization of images, and images that it cannot be the normalization of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from vitscope.core.checks.unlikely_input import UnlikelyInputWarning
from vitscope.core.input_normalization import pixels_of, shown_images

PIXELS = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
HALVES = {"mean": [0.5] * 3, "std": [0.5] * 3}


def probe_of(x: Tensor, **about: list[float]) -> vs.Probe:
    return vs.Probe(nn.Flatten(), [(x, torch.arange(4))], about=about)


def normalized(mean: list[float], std: list[float]) -> Tensor:
    return (PIXELS - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@pytest.mark.parametrize("stated", [IMAGENET, HALVES, {"mean": [0.0], "std": [1.0]}])
def test_the_right_normalization_gives_pixels_without_a_word(stated: dict[str, list[float]]) -> None:
    x = normalized(**stated)
    torch.testing.assert_close(pixels_of(probe_of(x, **stated)).to_pixels(x), PIXELS)
    overshot = torch.where(PIXELS > 0.99, PIXELS + 0.15, PIXELS)  # as of bicubic filters
    pixels_of(probe_of(overshot, mean=[0.0], std=[1.0]))


def test_another_normalization_than_the_images_is_noticed() -> None:
    with pytest.warns(UnlikelyInputWarning, match=r"mean=\[0.5, 0.5, 0.5\] .* pixels x \* std \+ mean go from -0.5"):
        pixels_of(probe_of(normalized(**IMAGENET)), **HALVES)
    with pytest.warns(
        UnlikelyInputWarning, match=r"values lie in \[0, 1\], as those of pixels that are not normalized"
    ):
        pixels_of(probe_of(PIXELS, **IMAGENET))
    assert shown_images(probe_of(PIXELS, **IMAGENET), 2).shape == (2, 6, 6, 3)  # a figure alone


def test_means_of_pixels_up_to_255_are_refused() -> None:
    probe = probe_of(normalized(**IMAGENET), mean=[123.7, 116.3, 103.5], std=[58.4, 57.1, 57.4])
    with pytest.raises(ValueError, match=r"received .* to \d+: give mean and std of pixels in \[0, 1\]"):
        pixels_of(probe)
    with pytest.raises(ValueError, match=r"give mean and std of pixels in \[0, 1\]"):
        pixels_of(probe_of(255 * PIXELS, mean=[0.0], std=[1.0]))
