"""The ResNet for CIFAR of He et al. (2016, section 4.2) with shortcuts of option A, in the parameter names of common checkpoints.

It is a network of its own package as far as vitscope is concerned: the gallery measures it with ``model=module``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride, self.added = stride, out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, (B, out_channels, h / stride, w / stride)."""
        residual = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.added:  # option A: every second pixel, zeros for the new channels, half of them on each side
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added // 2, self.added // 2))
        return torch.relu(residual + x)


class CifarResNet(nn.Module):
    """A ResNet of ``6 n_blocks + 2`` layers for images of 32x32 pixels; ResNet-20 by default, 269,722 parameters."""

    def __init__(self, n_blocks: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1, n_blocks)
        self.layer2 = self._stage(16, 32, 2, n_blocks)
        self.layer3 = self._stage(32, 64, 2, n_blocks)
        self.linear = nn.Linear(64, num_classes)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, stride: int, n_blocks: int) -> nn.Sequential:
        first = BasicBlock(in_channels, out_channels, stride)
        return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(n_blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (B, num_classes), of images, (B, 3, 32, 32)."""
        x = self.layer3(self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))
