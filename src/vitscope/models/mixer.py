"""MLP-Mixer over timm."""

from __future__ import annotations

from timm.models.mlp_mixer import MlpMixer

from vitscope.models.vit import token_grid
from vitscope.runtime.value_ranges import ImageSize, PositiveInt, ShareBelowOne

SIZES = {"small": (512, 8), "base": (768, 12), "large": (1024, 24)}
"""Width and number of blocks by name (Tolstikhin et al. 2021)."""


def mixer(
    size: str = "small",
    num_classes: PositiveInt = 10,
    image_size: ImageSize = 32,
    patch_size: PositiveInt = 4,
    drop_path: ShareBelowOne = 0.0,
    in_chans: int = 3,
    *,
    grad_checkpointing: bool = False,
) -> MlpMixer:
    """MLP-Mixer (Tolstikhin et al. 2021), timm's implementation.

    Args:
        size: ``small``, ``base`` or ``large``.
        num_classes: Number of logits.
        image_size: Height and width of the images, or one number for both.
        patch_size: Side of a patch; must divide the image.
        drop_path: Stochastic depth of every block.
        in_chans: Channels of the images.
        grad_checkpointing: Trade a second forward pass for activation memory in training.

    Raises:
        ValueError: For an unknown size, or a patch that does not divide the image.
    """
    if size not in SIZES:
        raise ValueError(f"Expected size to be one of {', '.join(SIZES)}, received {size!r}.")
    token_grid(image_size, patch_size)
    dim, depth = SIZES[size]
    model = MlpMixer(
        num_classes=num_classes, img_size=image_size, in_chans=in_chans, patch_size=patch_size,  # pyright: ignore[reportArgumentType]  timm takes pairs
        num_blocks=depth, embed_dim=dim, drop_path_rate=drop_path,
    )  # fmt: skip
    model.set_grad_checkpointing(grad_checkpointing)
    return model
