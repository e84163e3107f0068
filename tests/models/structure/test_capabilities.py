from __future__ import annotations

from timm.models.convmixer import ConvMixer
from timm.models.resnet import BasicBlock
from torch import nn

from vitscope.models.structure.capabilities import ModelCapabilities, capabilities_of


def test_capabilities_of_models_with_and_without_units_and_stem() -> None:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    assert capabilities_of(nn.Sequential(nn.Conv2d(3, 3, 1), BasicBlock(3, 3), *head)) == ModelCapabilities()
    assert capabilities_of(nn.Sequential(BasicBlock(3, 3), *head)) == ModelCapabilities(stem=False)
    lacking = ModelCapabilities(residual_units=False, stem=False)
    assert capabilities_of(ConvMixer(8, 2, kernel_size=3, patch_size=4, num_classes=2)) == lacking
