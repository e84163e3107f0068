"""ConvNeXt over timm, with any stem patch and depthwise kernel."""

from __future__ import annotations

from typing import cast

import timm
from timm.models.convnext import ConvNeXt
from torch import nn

from vitscope.runtime.value_ranges import ImageSize, PositiveInt, ShareBelowOne

SIZES = ("atto", "femto", "pico", "nano", "tiny", "small", "base", "large")


def convnext(
    size: str = "atto",
    num_classes: PositiveInt = 10,
    image_size: ImageSize = 32,
    patch_size: PositiveInt = 2,
    kernel_size: int = 7,
    layer_scale: float | None = 1e-6,
    drop_path: ShareBelowOne = 0.0,
    in_chans: int = 3,
    *,
    grad_checkpointing: bool = False,
) -> ConvNeXt:
    """ConvNeXt (Liu et al. 2022), timm's implementation.

    Args:
        size: ``atto`` (3.4M parameters) to ``large``.
        num_classes: Number of logits.
        image_size: Size of the images, at least 8 patches on each side (each later stage halves the map).
        patch_size: Side of the stem's patches: the first stage has image / patch positions a side. 4 in the
            publication, for 224x224.
        kernel_size: Odd side of the depthwise convolutions.
        layer_scale: Initial scale of the branches, None for no scale. At the published 1e-6 a fresh model is
            nearly its shortcuts: choose 1 to compare spectra of branches with those of the random baseline.
        drop_path: Stochastic depth of the last block.
        in_chans: Channels of the images.
        grad_checkpointing: Trade a second forward pass for activation memory in training.

    Raises:
        ValueError: For an unknown size, an even kernel, or an image of fewer than 8 patches a side.
    """
    if size not in SIZES:
        raise ValueError(f"Expected size to be one of {', '.join(SIZES)}, received {size!r}.")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"Expected kernel_size to be odd, received {kernel_size}.")
    shortest = image_size if isinstance(image_size, int) else min(image_size)
    if patch_size < 1 or shortest // patch_size < 8:
        raise ValueError(
            f"Expected patch_size with at least 8 patches on a side of {shortest} pixels, received {patch_size}."
        )
    model = cast(ConvNeXt, timm.create_model(
        f"convnext_{size}", num_classes=num_classes, in_chans=in_chans, patch_size=patch_size,
        kernel_sizes=kernel_size, ls_init_value=layer_scale, drop_path_rate=drop_path,
    ))  # fmt: skip
    if patch_size == 2:  # timm would make up for the finer stem by subsampling once more before the first stage
        model.stages[0].downsample = nn.Identity()
    model.set_grad_checkpointing(grad_checkpointing)
    return model
