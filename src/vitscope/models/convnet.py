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
    width: PositiveInt | None = None,
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
        width: Channels of the stem and of the first stage's 3x3 convolutions, a multiple of 8; the other stages have 2, 4 and 8
            times as many. None: 64.

    Raises:
        ValueError: For an unknown depth or stem, or a width that is no multiple of 8.
    """
    if preact:
        return preresnet(
            depth, num_classes, image_size, stem, drop_path, in_chans,
            zero_init_last=zero_init_last, grad_checkpointing=grad_checkpointing, width=width,
        )  # fmt: skip
    _check(depth, stem)
    check_width(width)
    return _resnet(f"resnet{depth}", num_classes, stem, drop_path, in_chans, zero_init_last, grad_checkpointing, width)


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
        raise ValueError(f"Expected depth of ResNeXt to be 50 or 101, received {depth}.")
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
    width: PositiveInt | None = None,
) -> ResNetV2:
    """Pre-activation ResNet (He et al. 2016b), timm's implementation; arguments as `convnet`.

    Raises:
        ValueError: For an unknown depth or stem, or a width that is no multiple of 8.
    """
    _check(depth, stem)
    check_width(width)
    basic, first = depth in (18, 34), width or 64
    options: dict[str, Any] = {"basic": True, "bottle_ratio": 1.0} if basic else {}
    options |= {"channels": tuple(first * factor for factor in ((1, 2, 4, 8) if basic else (4, 8, 16, 32)))}
    options |= {"stem_chs": first}
    model = ResNetV2(
        layers=list(BLOCKS[depth]), num_classes=num_classes, in_chans=in_chans, drop_path_rate=drop_path,
        conv_layer=create_conv2d, norm_layer=BatchNormAct2d, zero_init_last=zero_init_last, **options,
    )  # fmt: skip
    if stem == "cifar":
        model.stem = nn.Sequential(OrderedDict(conv=_cifar_stem(in_chans, first)))
    model.set_grad_checkpointing(grad_checkpointing)
    return model


def _check(depth: int, stem: str) -> None:
    if depth not in BLOCKS:
        raise ValueError(f"Expected depth of ResNet to be one of {', '.join(map(str, BLOCKS))}, received {depth}.")
    if stem not in ("cifar", "imagenet"):
        raise ValueError(f"Expected stem to be cifar or imagenet, received {stem!r}.")


def check_width(width: int | None) -> None:
    """Refuse a width that is no multiple of 8, to which timm rounds the channels of stages.

    Raises:
        ValueError: With the nearest widths.
    """
    if width is not None and (width < 8 or width % 8):
        nearest = sorted({max(8, width // 8 * 8), (width // 8 + 1) * 8})
        raise ValueError(f"Expected width a multiple of 8, received {width}: {' or '.join(map(str, nearest))}.")


def _cifar_stem(in_chans: int, width: int = 64) -> nn.Conv2d:
    return _stem_convolution(nn.Conv2d(in_chans, width, 3, padding=1, bias=False))


def _stem_convolution(conv: nn.Conv2d) -> nn.Conv2d:
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # as timm's other convolutions
    return conv


def _resnet(
    name: str, num_classes: int, stem: str, drop_path: float, in_chans: int, zero_init_last: bool, checkpointing: bool,
    width: int | None = None,
) -> ResNet:  # fmt: skip
    options: dict[str, Any] = {}
    if width is not None:  # only a deep stem of timm's has another width than 64; it is replaced below
        channels = tuple(width * factor for factor in (1, 2, 4, 8))
        options = {"channels": channels, "stem_type": "deep", "stem_width": width // 2}
    model = cast(ResNet, timm.create_model(
        name, num_classes=num_classes, in_chans=in_chans, drop_path_rate=drop_path, zero_init_last=zero_init_last, **options
    ))  # fmt: skip
    if stem == "imagenet" and width is not None:
        model.conv1 = _stem_convolution(nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False))
    if stem == "cifar":
        model.conv1 = _cifar_stem(in_chans, width or 64)
        model.maxpool = nn.Identity()
    model.set_grad_checkpointing(checkpointing)
    return model
