"""ResNet, ResNeXt and pre-activation ResNet over timm, with the CIFAR stem of the paper."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Literal, cast

import timm
from timm.layers.create_conv2d import create_conv2d
from timm.layers.norm_act import BatchNormAct2d
from timm.models.resnet import ResNet
from timm.models.resnetv2 import ResNetV2
from torch import nn

from vitscope.runtime.value_ranges import ImageSize, PositiveInt, ShareBelowOne

Stem = Literal["cifar", "imagenet"]

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def convnet(
    depth: PositiveInt = 18,
    num_classes: PositiveInt = 10,
    image_size: ImageSize = 32,
    stem: Stem = "cifar",
    preact: bool = False,
    drop_path: ShareBelowOne = 0.0,
    in_chans: int = 3,
    *,
    zero_init_last: bool = False,
    grad_checkpointing: bool = False,
) -> ResNet | ResNetV2:
    """ResNet-18, -34, -50, -101 or -152 (He et al. 2016), timm's implementation.

    Args:
        depth: 18, 34 (basic blocks), 50, 101 or 152 (bottlenecks).
        num_classes: Number of logits.
        image_size: Size of the images; any works, it is taken for a uniform call of all models.
        stem: ``cifar`` (3x3, stride 1, no pooling) or ``imagenet`` (7x7, stride 2, max pooling).
        preact: Pre-activation blocks, no BN and activation in the stem, BN-ReLU before pooling.
        drop_path: Stochastic depth of the last block, growing linearly from 0 at the first.
        in_chans: Channels of the images.
        zero_init_last: Start every residual branch at zero. Off, against timm's default: branches of a fresh
            model would be constant, and every diagnostic of the random baseline with them.
        grad_checkpointing: Trade a second forward pass for activation memory in training.

    Raises:
        ValueError: For an unknown depth or stem.
    """
    if preact:
        return preresnet(
            depth, num_classes, image_size, stem, drop_path, in_chans,
            zero_init_last=zero_init_last, grad_checkpointing=grad_checkpointing,
        )  # fmt: skip
    _check(depth, stem)
    return _resnet(f"resnet{depth}", num_classes, stem, drop_path, in_chans, zero_init_last, grad_checkpointing)


def resnext(
    depth: PositiveInt = 50,
    num_classes: PositiveInt = 10,
    image_size: ImageSize = 32,
    stem: Stem = "cifar",
    drop_path: ShareBelowOne = 0.0,
    in_chans: int = 3,
    *,
    zero_init_last: bool = False,
    grad_checkpointing: bool = False,
) -> ResNet:
    """ResNeXt-50 (32x4d) or -101 (32x8d) (Xie et al. 2017), timm's implementation; arguments as `convnet`.

    Raises:
        ValueError: For an unknown depth or stem.
    """
    names = {50: "resnext50_32x4d", 101: "resnext101_32x8d"}
    if depth not in names:
        raise ValueError(f"ResNeXt has no depth {depth}: choose one of 50, 101.")
    _check(depth, stem)
    return _resnet(names[depth], num_classes, stem, drop_path, in_chans, zero_init_last, grad_checkpointing)


def preresnet(
    depth: PositiveInt = 18,
    num_classes: PositiveInt = 10,
    image_size: ImageSize = 32,
    stem: Stem = "cifar",
    drop_path: ShareBelowOne = 0.0,
    in_chans: int = 3,
    *,
    zero_init_last: bool = False,
    grad_checkpointing: bool = False,
) -> ResNetV2:
    """Pre-activation ResNet (He et al. 2016b), timm's implementation; arguments as `convnet`.

    Raises:
        ValueError: For an unknown depth or stem.
    """
    _check(depth, stem)
    basic = depth in (18, 34)
    options: dict[str, Any] = {"basic": True, "bottle_ratio": 1.0, "channels": (64, 128, 256, 512)} if basic else {}
    model = ResNetV2(
        layers=list(BLOCKS[depth]), num_classes=num_classes, in_chans=in_chans, drop_path_rate=drop_path,
        conv_layer=create_conv2d, norm_layer=BatchNormAct2d, zero_init_last=zero_init_last, **options,
    )  # fmt: skip
    if stem == "cifar":
        model.stem = nn.Sequential(OrderedDict(conv=_cifar_stem(in_chans)))
    model.set_grad_checkpointing(grad_checkpointing)
    return model


def _check(depth: int, stem: str) -> None:
    if depth not in BLOCKS:
        raise ValueError(f"ResNet has no depth {depth}: choose one of {', '.join(map(str, BLOCKS))}.")
    if stem not in ("cifar", "imagenet"):
        raise ValueError(f"Unknown stem {stem!r}: cifar or imagenet.")


def _cifar_stem(in_chans: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_chans, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # as timm's other convolutions
    return conv


def _resnet(
    name: str, num_classes: int, stem: str, drop_path: float, in_chans: int, zero_init_last: bool, checkpointing: bool
) -> ResNet:
    model = cast(ResNet, timm.create_model(
        name, num_classes=num_classes, in_chans=in_chans, drop_path_rate=drop_path, zero_init_last=zero_init_last
    ))  # fmt: skip
    if stem == "cifar":
        model.conv1 = _cifar_stem(in_chans)
        model.maxpool = nn.Identity()
    model.set_grad_checkpointing(checkpointing)
    return model
