"""PiT over timm: a vision transformer that pools its tokens between stages."""

from __future__ import annotations

from timm.models.pit import PoolingVisionTransformer

from vitscope.runtime.value_ranges import ImageSize, PositiveInt, ShareBelowOne

SIZES = {
    "tiny": ((32, 32, 32), (2, 6, 4), (2, 4, 8)),
    "xsmall": ((48, 48, 48), (2, 6, 4), (2, 4, 8)),
    "small": ((48, 48, 48), (2, 6, 4), (3, 6, 12)),
    "base": ((64, 64, 64), (3, 6, 4), (4, 8, 16)),
}
"""Width of a head, depth and heads of the three stages by name (Heo et al. 2021)."""


def pit(
    size: str = "tiny",
    num_classes: PositiveInt = 10,
    image_size: ImageSize = 32,
    patch_size: PositiveInt = 2,
    stride: int | None = None,
    drop_path: ShareBelowOne = 0.0,
    in_chans: int = 3,
    *,
    distilled: bool = False,
) -> PoolingVisionTransformer:
    """PiT (Heo et al. 2021), timm's implementation, with the paper's patches for CIFAR.

    At 32x32, patch 2 and stride 1 the stages have 961, 256 and 64 tokens. (The official code leaves the
    stride at 8 and so trains on 4x4 tokens; docs/paper.md section 2.)

    Args:
        size: ``tiny``, ``xsmall``, ``small`` or ``base``.
        num_classes: Number of logits.
        image_size: Height and width of the images, or one number for both.
        patch_size: Side of the overlapping patches.
        stride: Distance of neighboring patches; None: half a patch, as published (16 and 8).
        drop_path: Stochastic depth of the last block.
        in_chans: Channels of the images.
        distilled: A distillation token and its own head.

    Raises:
        ValueError: For an unknown size, or patches larger than the image.
    """
    if size not in SIZES:
        raise ValueError(f"Unknown size {size!r}: {', '.join(SIZES)}.")
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if not 1 <= patch_size <= min(height, width) or (stride is not None and stride < 1):
        raise ValueError(
            f"patch_size={patch_size} and stride={stride} do not fit the {height}x{width} image: "
            "both must be at least 1 and the patch no larger than the image."
        )
    base_dims, depth, heads = SIZES[size]
    return PoolingVisionTransformer(
        img_size=(height, width),  # pyright: ignore[reportArgumentType]  timm takes pairs, and annotates one number
        patch_size=patch_size, stride=max(patch_size // 2, 1) if stride is None else stride,
        base_dims=base_dims, depth=depth, heads=heads, mlp_ratio=4, num_classes=num_classes, in_chans=in_chans,
        drop_path_rate=drop_path, distilled=distilled,
    )  # fmt: skip
