"""The mean and standard deviation of each configuration are those of the training images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from vitscope.data.sources import digits, photos, shapes

CONF = Path(__file__).parents[2] / "conf" / "data"


@pytest.mark.parametrize("family", [photos, digits, pytest.param(shapes, marks=pytest.mark.slow)])
def test_configured_statistics_are_the_datas(family):
    name = family.__name__.rsplit(".", 1)[1]
    configured = OmegaConf.load(CONF / f"{name}.yaml")
    pixels = family.load("train").images.transpose(0, 1).flatten(1).double() / 255
    # three digits are configured; another split seed of digits moves the third
    for key, values in (("mean", pixels.mean(1)), ("std", pixels.std(1))):
        torch.testing.assert_close(torch.tensor(list(configured[key])).double(), values, rtol=0, atol=0.002)
    assert configured.num_classes == len(family.load("val").class_names)
