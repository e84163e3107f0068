"""A transformer whose class and register tokens stand behind the patches, or in front of them, with the same numbers."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn


class TransformerOfOnesOwn(nn.Module):
    """timm's blocks on patches of 4x4 pixels and one class token and one register token.

    Args:
        is_behind: whether these two stand behind the patches.
    """

    def __init__(self, is_behind: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.is_behind = is_behind
        self.patch_embed = nn.Conv2d(3, 24, 4, 4)
        self.cls_token, self.reg_token = (nn.Parameter(torch.zeros(1, 1, 24)) for _ in range(2))
        self.pos_embed = nn.Parameter(torch.zeros(1, 12, 24))
        self.blocks = nn.Sequential(*(Block(24, 3) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 4)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, 4) of images (B, 3, 12, 16)."""
        patches = self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos_embed
        others = torch.cat([self.cls_token, self.reg_token], dim=1).expand(len(x), -1, -1)
        parts = [patches, others] if self.is_behind else [others, patches]
        tokens = self.norm(self.blocks(torch.cat(parts, dim=1)))
        return self.head(tokens[:, patches.shape[1] if self.is_behind else 0])
