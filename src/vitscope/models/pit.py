"""PiT over timm: a vision transformer that pools its tokens between stages."""

from __future__ import annotations

from collections.abc import Sequence

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
    width: PositiveInt | None = None,
    depths: Sequence[PositiveInt] | None = None,
    stage_heads: Sequence[PositiveInt] | None = None,
) -> PoolingVisionTransformer:
    """PiT (Heo et al. 2021), timm's implementation, with the paper's patches for CIFAR.

    At 32x32, patch 2 and stride 1 the stages have 961, 256 and 64 tokens. (The official code leaves the
    stride at 8 and so trains on 4x4 tokens; docs/paper.md section 4.)

    Args:
        size: ``tiny``, ``xsmall``, ``small`` or ``base``.
        num_classes: Number of logits.
        image_size: Height and width of the images, or one number for both.
        patch_size: Side of the overlapping patches.
        stride: Distance of neighboring patches; None: half a patch, as published (16 and 8).
        drop_path: Stochastic depth of the last block.
        in_chans: Channels of the images.
        distilled: A distillation token and its own head.
        width: Width of the first stage; heads of all stages are as wide as its heads. None: of that size.
        depths: Blocks of the three stages; None: of that size.
        stage_heads: Heads of the three stages; None: of that size.

    Raises:
        ValueError: For an unknown size, patches larger than the image, other than three stages, or a width that its heads do
            not divide.
    """
    if size not in SIZES:
        raise ValueError(f"Expected size to be one of {', '.join(SIZES)}, received {size!r}.")
    rows, columns = (image_size, image_size) if isinstance(image_size, int) else image_size
    if not 1 <= patch_size <= min(rows, columns) or (stride is not None and stride < 1):
        raise ValueError(
            f"Expected patch_size from 1 to the {rows}x{columns} image and stride of at least 1, "
            f"received {patch_size} and {stride}."
        )
    base_dims, depth, default_heads = SIZES[size]
    depth, heads = tuple(depths or depth), tuple(stage_heads or default_heads)
    if len(depth) != 3 or len(heads) != 3:
        raise ValueError(f"Expected three stages, received depths={depth} and stage_heads={heads}.")
    if width is not None and width % heads[0]:
        raise ValueError(f"Expected width a multiple of the {heads[0]} heads of stage 1, received {width}.")
    base_dims = base_dims if width is None else (width // heads[0],) * 3
    return PoolingVisionTransformer(
        img_size=(rows, columns),  # pyright: ignore[reportArgumentType]  timm takes pairs, and annotates one number
        patch_size=patch_size, stride=max(patch_size // 2, 1) if stride is None else stride,
        base_dims=base_dims, depth=depth, heads=heads, mlp_ratio=4, num_classes=num_classes, in_chans=in_chans,
        drop_path_rate=drop_path, distilled=distilled,
    )  # fmt: skip
