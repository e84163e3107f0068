"""Swin transformer over timm, with the paper's patches and windows for CIFAR."""

from __future__ import annotations

from collections.abc import Sequence

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
    width: PositiveInt | None = None,
    depths: Sequence[PositiveInt] | None = None,
    stage_heads: Sequence[PositiveInt] | None = None,
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
        width: Width of the first stage, which each further one doubles; None: of that size.
        depths: Blocks of each stage, any number of stages; None: of that size.
        stage_heads: Heads of each stage, as many as ``depths``; None: of that size.

    Raises:
        ValueError: For an unknown size, a patch or window that does not divide, or heads that do not fit depths or widths.
    """
    if size not in SIZES:
        raise ValueError(f"Expected size to be one of {', '.join(SIZES)}, received {size!r}.")
    default_dim, default_depths, default_heads = SIZES[size]
    dim = default_dim if width is None else width
    depths, heads = tuple(depths or default_depths), tuple(stage_heads or default_heads)
    check_stages(dim, depths, heads)
    maps = _maps(token_grid(image_size, patch_size), len(depths))
    if not _fits(window_size, maps):
        fitting = [p for p in range(2, min(maps[0]) + 1) if _fits(p, maps)]
        raise ValueError(
            f"Expected window_size to divide the maps {', '.join(f'{h}x{w}' for h, w in maps)}, received {window_size}; "
            f"window sizes that do: {', '.join(map(str, fitting))}."
        )
    model = SwinTransformer(
        img_size=image_size, patch_size=patch_size, in_chans=in_chans, num_classes=num_classes, embed_dim=dim,
        depths=depths, num_heads=heads, window_size=window_size, qkv_bias=qkv_bias, drop_path_rate=drop_path,
    )  # fmt: skip
    model.set_grad_checkpointing(grad_checkpointing)
    return model


def check_stages(width: int, depths: Sequence[int], heads: Sequence[int]) -> None:
    """Refuse heads that are not one number per stage, or that do not divide a stage's width ``width * 2**stage``.

    Raises:
        ValueError: With the stage and its width.
    """
    if len(heads) != len(depths):
        raise ValueError(
            f"Expected as many stage_heads as stages in depths={tuple(depths)}, received stage_heads={tuple(heads)}."
        )
    for stage, n_heads in enumerate(heads):
        if (width << stage) % n_heads:
            expected = f"heads that divide the width {width << stage} of stage {stage + 1}"
            raise ValueError(f"Expected {expected}, received stage_heads={tuple(heads)}.")


def _maps(grid: tuple[int, int], n_stages: int) -> list[tuple[int, int]]:
    maps = [grid]
    for _ in range(n_stages - 1):
        maps.append(((maps[-1][0] + 1) // 2, (maps[-1][1] + 1) // 2))
    return maps


def _fits(window: int, maps: list[tuple[int, int]]) -> bool:
    return window >= 1 and all(side <= window or side % window == 0 for size in maps for side in size)
