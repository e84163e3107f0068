"""Swin transformer over timm, with the paper's patches and windows for CIFAR."""

from __future__ import annotations

from timm.models.swin_transformer import SwinTransformer

from vitscope.models.vit import token_grid
from vitscope.runtime.value_ranges import ImageSize, PositiveInt, ShareBelowOne

SIZES = {
    "tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "small": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "base": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
}
"""Width of the first stage, depths and heads by name (Liu et al. 2021)."""


def swin(
    size: str = "tiny",
    num_classes: PositiveInt = 10,
    image_size: ImageSize = 32,
    patch_size: PositiveInt = 1,
    window_size: PositiveInt = 4,
    qkv_bias: bool = False,
    drop_path: ShareBelowOne = 0.0,
    in_chans: int = 3,
    *,
    grad_checkpointing: bool = False,
) -> SwinTransformer:
    """Swin (Liu et al. 2021), timm's implementation; at 32x32 and patch 1 the maps are 32, 16, 8 and 4.

    A map no larger than the window is one window, unshifted.

    Args:
        size: ``tiny``, ``small`` or ``base``.
        num_classes: Number of logits.
        image_size: Height and width of the images, or one number for both.
        patch_size: Side of a patch; must divide the image.
        window_size: Side of a window in tokens; must divide every larger map.
        qkv_bias: Biases on queries, keys and values; the paper has none.
        drop_path: Stochastic depth of the last block.
        in_chans: Channels of the images.
        grad_checkpointing: Trade a second forward pass for activation memory in training.

    Raises:
        ValueError: For an unknown size, or a patch or window that does not divide.
    """
    if size not in SIZES:
        raise ValueError(f"Unknown size {size!r}: {', '.join(SIZES)}.")
    maps = _maps(token_grid(image_size, patch_size))
    if not _fits(window_size, maps):
        fitting = [p for p in range(2, min(maps[0]) + 1) if _fits(p, maps)]
        raise ValueError(
            f"window_size={window_size} does not divide the maps {', '.join(f'{h}x{w}' for h, w in maps)}; "
            f"window sizes that do: {', '.join(map(str, fitting))}."
        )
    dim, depths, heads = SIZES[size]
    model = SwinTransformer(
        img_size=image_size, patch_size=patch_size, in_chans=in_chans, num_classes=num_classes, embed_dim=dim,
        depths=depths, num_heads=heads, window_size=window_size, qkv_bias=qkv_bias, drop_path_rate=drop_path,
    )  # fmt: skip
    model.set_grad_checkpointing(grad_checkpointing)
    return model


def _maps(grid: tuple[int, int]) -> list[tuple[int, int]]:
    maps = [grid]
    for _ in range(3):
        maps.append(((maps[-1][0] + 1) // 2, (maps[-1][1] + 1) // 2))
    return maps


def _fits(window: int, maps: list[tuple[int, int]]) -> bool:
    return window >= 1 and all(side <= window or side % window == 0 for size in maps for side in size)
