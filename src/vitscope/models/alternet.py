"""AlterNet: a pre-activation ResNet whose stages end in window attention (Park & Kim 2022, Figure 11)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

from timm.layers.create_conv2d import create_conv2d
from timm.layers.drop import DropPath
from timm.layers.norm_act import BatchNormAct2d
from timm.models.resnetv2 import DownsampleConv, PreActBasic, PreActBottleneck
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitscope.models.alternet_layout import (
    DEFAULT_MSA,
    Placement,
    Stem,
    blocks_of,
    build_up,
    check_window,
    feature_map_sizes,
    stage_blocks,
    valid_window_sizes,
)
from vitscope.models.convnet import check_width
from vitscope.models.layers.window_attention import FixedMixing, Mixer, PositionBias, WindowAttention
from vitscope.models.structure.residual_structure import Read, ResidualUnit, parts
from vitscope.runtime.value_ranges import ImageSize, PositiveInt, ShareBelowOne

__all__ = ["AlterNet", "MSABlock", "alternet", "build_up", "feature_map_sizes", "valid_window_sizes"]


class MSABlock(nn.Module):
    """Pre-activation attention block: BN, GELU, 1x1 convolution, BN, window mixing, plus the shortcut.

    (B, in_chs, H, W) -> (B, out_chs, H, W). The 1x1 convolution narrows to ``in_chs / expansion``, the
    output projection of the mixing widens to ``out_chs``. A change of width gives the shortcut a 1x1
    convolution of the pre-activated input.
    """

    def __init__(self, in_chs: int, out_chs: int, *, mixing: nn.Module, width: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.downsample = nn.Conv2d(in_chs, out_chs, 1, bias=False) if in_chs != out_chs else None
        self.norm1 = nn.BatchNorm2d(in_chs)
        self.act = nn.GELU()
        self.conv = nn.Conv2d(in_chs, width, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.attn = mixing
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Add the attention branch to the shortcut."""
        active = self.act(self.norm1(x))
        shortcut = x if self.downsample is None else self.downsample(active)
        branch = self.norm2(self.conv(active)).permute(0, 2, 3, 1)  # (B, H, W, C)
        branch = self.attn(branch).permute(0, 3, 1, 2)  # (B, out_chs, H, W)
        return self.drop_path(branch) + shortcut


@parts.register(MSABlock)
def _(block: MSABlock) -> tuple[ResidualUnit, ...]:
    attention = block.attn if isinstance(block.attn, WindowAttention) else None
    kind = "pool" if isinstance(block.attn, FixedMixing) and block.attn.mixer == "blur" else "msa"
    return (ResidualUnit(kind, Read(block), Read(block.norm1), Read(block.drop_path), attention=attention),)


class AlterNet(nn.Module):
    """Stem, four stages of convolution and attention blocks, BN-ReLU-GAP-Linear. Build it with `alternet`."""

    def __init__(self, stem: nn.Module, stages: Sequence[nn.Sequential], width: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.grad_checkpointing = False
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.norm = BatchNormAct2d(width)
        self.fc = nn.Linear(width, num_classes)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass of training instead of keeping its activations."""
        self.grad_checkpointing = enable

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to the last feature map, after BN and ReLU."""
        x = self.stem(x)
        for stage in self.stages:
            for block in cast(nn.Sequential, stage):
                recompute = self.grad_checkpointing and self.training
                x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, num_classes)."""
        return self.fc(self.forward_features(x).mean((2, 3)))


def alternet(
    depth: PositiveInt = 18,
    num_classes: PositiveInt = 10,
    image_size: ImageSize = 32,
    window_size: PositiveInt = 4,
    n_msa: Sequence[int] | None = None,
    dim_head: PositiveInt = 64,
    stem: Stem = "cifar",
    pad: bool = False,
    *,
    heads: Sequence[PositiveInt] = (3, 6, 12, 24),
    mixer: Mixer = "msa",
    blur_size: int = 2,
    placement: Placement = "stage_end",
    position_bias: PositionBias = "shared",
    drop_path: ShareBelowOne = 0.0,
    in_chans: int = 3,
    grad_checkpointing: bool = False,
    width: PositiveInt | None = None,
) -> AlterNet:
    """AlterNet of depth 18, 34 (basic blocks), 50, 101 or 152 (bottlenecks), as the official code builds it.

    Source: docs/paper.md section 2; blocks a stage 2222, 3-4-6-4 or 3-4-23-4; convolution blocks are timm's.

    Args:
        depth: 18, 34, 50, 101 or 152.
        num_classes: Number of logits.
        image_size: Height and width of the images, used to check the window.
        window_size: Side of the attention windows; must divide the map of each stage with attention.
        n_msa: Attention blocks a stage. None: the official code's default, (0, 1, 1, 1) at depth 18,
            else (0, 1, 3, 2). The paper's Figure 11 for CIFAR is (0, 1, 1, 2); none at all is the control.
        dim_head: Width of a head.
        stem: ``cifar`` (3x3, stride 1) or ``imagenet`` (7x7, stride 2, max pooling).
        pad: Pad and mask maps that the window does not divide instead of refusing them.
        heads: Heads of each stage.
        mixer: Operation of the attention blocks: ``msa``; ``uniform`` (equal weights over the window);
            ``blur`` (a box blur); ``conv`` (an ordinary convolution block instead: no attention anywhere).
        blur_size: Side of the box blur, 2 or 3.
        placement: Rule for the positions of attention, see `vitscope.models.alternet_layout.stage_blocks`.
        position_bias: ``shared`` by all heads (official) or ``per_head``.
        drop_path: Stochastic depth of the last block; block j of N has ``drop_path * j / (N - 1)``.
        in_chans: Channels of the images.
        grad_checkpointing: Trade a second forward pass for activation memory in training.
        width: Channels of the stem and of the first stage's 3x3 convolutions, a multiple of 8; the other stages have 2, 4 and 8
            times as many. None: 64.

    Raises:
        ValueError: For an unknown depth or option, or a window that does not fit (the sizes that do are named).
    """
    if mixer not in ("msa", "conv", "uniform", "blur"):
        raise ValueError(f"Expected mixer to be msa, conv, uniform or blur, received {mixer!r}.")
    if blur_size not in (2, 3):
        raise ValueError(f"Expected blur_size to be 2 or 3, received {blur_size}.")
    counts = DEFAULT_MSA[depth] if n_msa is None and depth in DEFAULT_MSA else tuple(n_msa or ())
    sequences = stage_blocks(blocks_of(depth), counts, placement)
    if mixer == "conv":
        sequences = tuple("C" * len(sequence) for sequence in sequences)
    if not pad and mixer in ("msa", "uniform"):
        check_window(image_size, stem, [sequence.count("M") for sequence in sequences], window_size)
    expansion = 1 if depth in (18, 34) else 4
    mixing = partial(
        _mixing, mixer=mixer, dim_head=dim_head, window_size=window_size, pad=pad,
        position_bias=position_bias, blur_size=blur_size,
    )  # fmt: skip
    check_width(width)
    widths = [(width or 64) * factor for factor in (1, 2, 4, 8)]
    stages = _stages(sequences, widths, expansion, heads, mixing, drop_path)
    model = AlterNet(_stem(in_chans, stem, widths[0]), stages, widths[-1] * expansion, num_classes)
    model.set_grad_checkpointing(grad_checkpointing)
    return model


def _stages(
    sequences: Sequence[str],
    widths: Sequence[int],
    expansion: int,
    heads: Sequence[int],
    mixing: Callable[..., nn.Module],
    drop_path: float,
) -> list[nn.Sequential]:
    """Return the stages; the first block of each stage but the first one halves the map.

    Args:
        sequences: Blocks of each stage, ``C`` and ``M``.
        widths: Channels of the 3x3 convolutions of each stage.
        expansion: Channels of a block's output as a multiple of these.
        heads: Heads of each stage.
        mixing: Function that makes the operation of an attention block.
        drop_path: Stochastic depth of the last block, to which that of the others rises in equal steps.
    """
    n_blocks = sum(map(len, sequences))
    rates = iter([drop_path * i / (n_blocks - 1) for i in range(n_blocks)])
    stages, channels = [], widths[0]
    for stage, (sequence, stage_width) in enumerate(zip(sequences, widths)):
        out = stage_width * expansion
        blocks = []
        for place, letter in enumerate(sequence):
            if letter == "M":
                inner = channels // expansion
                operation = mixing(inner, out, heads=heads[stage])
                blocks.append(MSABlock(channels, out, mixing=operation, width=inner, drop_path=next(rates)))
            else:
                stride = 2 if stage > 0 and place == 0 else 1
                blocks.append(_conv_block(channels, out, stride, expansion, next(rates)))
            channels = out
        stages.append(nn.Sequential(*blocks))
    return stages


def _mixing(
    dim: int, dim_out: int, *, heads: int, mixer: Mixer, dim_head: int,
    window_size: int, pad: bool, position_bias: PositionBias, blur_size: int,
) -> nn.Module:  # fmt: skip
    if mixer == "msa":
        return WindowAttention(
            dim, dim_out, heads=heads, dim_head=dim_head, window_size=window_size, pad=pad,
            position_bias=position_bias,
        )  # fmt: skip
    return FixedMixing(
        dim, dim_out, inner=heads * dim_head, mixer=mixer, window_size=window_size, pad=pad, blur_size=blur_size
    )


def _conv_block(in_chs: int, out_chs: int, stride: int, expansion: int, drop_path: float) -> nn.Module:
    block = PreActBasic if expansion == 1 else PreActBottleneck
    return block(
        in_chs,
        out_chs,
        bottle_ratio=1 / expansion,
        stride=stride,
        conv_layer=create_conv2d,
        norm_layer=BatchNormAct2d,
        proj_layer=DownsampleConv if stride != 1 or in_chs != out_chs else None,
        drop_path_rate=drop_path,
    )


def _stem(in_chans: int, stem: Stem, width: int) -> nn.Sequential:
    if stem == "imagenet":
        return nn.Sequential(
            nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False), nn.MaxPool2d(3, stride=2, padding=1)
        )
    return nn.Sequential(nn.Conv2d(in_chans, width, 3, padding=1, bias=False))
