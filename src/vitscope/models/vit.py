"""Vision transformers over timm: any patch, CLS or GAP, free heads, global or local attention."""

from __future__ import annotations

from typing import Literal

from timm.models.vision_transformer import Block, VisionTransformer

from vitscope.models.layers.attention import Padding, SelfAttention
from vitscope.runtime.value_ranges import ImageSize, PositiveInt, ShareBelowOne

SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
"""Width, depth and heads by name (Touvron et al. 2021)."""


def vit(
    size: str = "tiny",
    num_classes: PositiveInt = 10,
    image_size: ImageSize = 32,
    patch_size: PositiveInt = 2,
    pool: Literal["cls", "gap"] = "cls",
    heads: PositiveInt | None = None,
    dim_head: PositiveInt | None = None,
    qkv_bias: bool = False,
    depth: PositiveInt | None = None,
    drop_path: ShareBelowOne = 0.0,
    in_chans: int = 3,
    *,
    reg_tokens: int = 0,
    class_token: bool | None = None,
    grad_checkpointing: bool = False,
    width: PositiveInt | None = None,
) -> VisionTransformer:
    """ViT (Dosovitskiy et al. 2021), timm's implementation, with the paper's defaults for CIFAR.

    Args:
        size: ``tiny``, ``small``, ``base`` or ``large``.
        num_classes: Number of logits.
        image_size: Height and width of the images, or one number for both.
        patch_size: Side of a patch; must divide the image.
        pool: ``cls`` reads the class token; ``gap`` averages the patch tokens, then normalizes.
        heads: Number of heads; None: of that size.
        dim_head: Width of a head; None: width of the tokens / heads, or that of the size if only ``heads``
            is given and does not divide it. Varying one of the two alone gives Figures C.5 and C.6.
        qkv_bias: Biases on queries, keys and values; the paper has none.
        depth: Number of blocks; None: of that size.
        drop_path: Stochastic depth of the last block, growing linearly from 0 at the first.
        in_chans: Channels of the images.
        reg_tokens: Number of register tokens.
        class_token: Whether there is a class token; None: only for ``pool="cls"``.
        grad_checkpointing: Trade a second forward pass for activation memory in training.
        width: Width of the tokens, a multiple of the number of heads, which is then width / 64 (at least 1) by default. None: of
            that size.

    Raises:
        ValueError: For an unknown size or pool, a patch that does not divide the image, or a width that heads do not divide.
    """
    if size not in SIZES:
        raise ValueError(f"Expected size to be one of {', '.join(SIZES)}, received {size!r}.")
    if pool not in ("cls", "gap"):
        raise ValueError(f"Expected pool to be cls or gap, received {pool!r}.")
    dim, default_depth, default_heads = _layout(size, width, heads)
    grid = token_grid(image_size, patch_size)
    model = VisionTransformer(
        img_size=(grid[0] * patch_size, grid[1] * patch_size), patch_size=patch_size, in_chans=in_chans,
        num_classes=num_classes, global_pool="token" if pool == "cls" else "avg",
        class_token=pool == "cls" if class_token is None else class_token, reg_tokens=reg_tokens,
        embed_dim=dim, depth=default_depth if depth is None else depth, num_heads=default_heads,
        qkv_bias=qkv_bias, drop_path_rate=drop_path,
    )  # fmt: skip
    heads = default_heads if heads is None else heads
    if heads != default_heads or dim_head not in (None, dim // default_heads):
        for block in model.blocks:
            assert isinstance(block, Block)
            block.attn = SelfAttention(dim, heads, dim_head, qkv_bias)
    model.set_grad_checkpointing(grad_checkpointing)
    return model


def convit(
    size: str = "tiny",
    num_classes: PositiveInt = 10,
    image_size: ImageSize = 32,
    patch_size: PositiveInt = 4,
    kernel_size: int | Literal["global"] = 3,
    padding: Padding = "masked",
    heads: PositiveInt | None = None,
    dim_head: PositiveInt | None = None,
    qkv_bias: bool = False,
    depth: PositiveInt | None = None,
    drop_path: ShareBelowOne = 0.0,
    in_chans: int = 3,
    *,
    grad_checkpointing: bool = False,
    width: PositiveInt | None = None,
) -> VisionTransformer:
    """ViT with convolutional (local) attention, global average pooling and no class token (Figure 7).

    The official code's name; not d'Ascoli et al.'s ConViT. ``global`` is the same model with plain attention, so
    a comparison of kernels changes nothing else. A kernel of 8 on 8x8 tokens is no substitute: its queries
    see 16 to 64 of the 64 tokens, hence even kernels are refused.

    Args:
        size: Size of the model, see `vit`.
        num_classes: Number of logits.
        image_size: Height and width of the images, or one number for both.
        patch_size: Side of a patch; must divide the image.
        kernel_size: Odd side of the neighborhood in tokens, or ``global``.
        padding: ``masked`` (missing neighbors are left out) or ``zero`` (the official code's zero keys).
        heads: Number of heads; None: of that size.
        dim_head: Width of a head; None: width of the tokens / heads.
        qkv_bias: Biases on queries, keys and values.
        depth: Number of blocks; None: of that size.
        drop_path: Stochastic depth of the last block.
        in_chans: Channels of the images.
        grad_checkpointing: Trade a second forward pass for activation memory in training.
        width: Width of the tokens, see `vit`.

    Raises:
        ValueError: For an unknown size, an even kernel, or a patch that does not divide the image.
    """
    if kernel_size != "global" and (not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0):
        raise ValueError(f"Expected kernel_size to be odd or 'global', received {kernel_size!r}.")
    model = vit(
        size, num_classes, image_size, patch_size, "gap", heads if width else None, None, qkv_bias, depth, drop_path, in_chans,
        grad_checkpointing=grad_checkpointing, width=width,
    )  # fmt: skip
    dim, _, default_heads = _layout(size, width, heads)
    for block in model.blocks:
        assert isinstance(block, Block)
        block.attn = SelfAttention(
            dim, heads or default_heads, dim_head, qkv_bias, grid=token_grid(image_size, patch_size),
            kernel_size=None if kernel_size == "global" else kernel_size, padding=padding,
        )  # fmt: skip
    return model


def _layout(size: str, width: int | None, heads: int | None) -> tuple[int, int, int]:
    """Return width, depth and heads of a size, or of a width of one's own with the size's depth."""
    dim, depth, default_heads = SIZES[size]
    if width is None:
        return dim, depth, default_heads
    n_heads = heads or max(1, width // 64)
    if width % n_heads:
        raise ValueError(
            f"Expected width a multiple of {n_heads} heads, received {width}: {n_heads * (width // n_heads)}."
        )
    return width, depth, n_heads


def token_grid(image_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches.

    Raises:
        ValueError: If the patch does not divide the image; the patch sizes that do are named.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if patch_size < 1 or height % patch_size or width % patch_size:
        fitting = [p for p in range(1, min(height, width) + 1) if height % p == 0 and width % p == 0]
        raise ValueError(
            f"Expected patch_size to divide the {height}x{width} image, received {patch_size}; "
            f"patch sizes that do: {', '.join(map(str, fitting))}."
        )
    return height // patch_size, width // patch_size
