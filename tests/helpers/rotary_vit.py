"""A small vision transformer with rotary position embeddings, as a table of complex numbers or of cosines and sines."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, N_HEADS, N_TOKENS, N_CLASSES = 16, 2, 4, 4


class RotaryAttention(nn.Module):
    """Self-attention whose queries and keys are turned by an angle of their position."""

    freqs_cis: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, is_complex: bool) -> None:
        super().__init__()
        self.is_complex = is_complex
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        n_pairs = WIDTH // N_HEADS // 2
        angles = torch.outer(torch.arange(N_TOKENS).float(), 10.0 ** (-torch.arange(n_pairs) / n_pairs))
        table = torch.polar(torch.ones_like(angles), angles)  # (tokens, pairs), complex64
        if is_complex:
            self.register_buffer("freqs_cis", table)
        else:
            self.register_buffer("cos", table.real.clone())
            self.register_buffer("sin", table.imag.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens ``(B, n, WIDTH)``."""
        # (B, heads, n, width of a head) each
        q, k, v = self.qkv(x).unflatten(-1, (3, N_HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v)
        return self.proj(y.transpose(1, 2).flatten(-2))

    def turned(self, tokens: Tensor) -> Tensor:
        """Return queries or keys whose pairs of channels are turned."""
        pairs = tokens.unflatten(-1, (-1, 2))
        if self.is_complex:
            return torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * self.freqs_cis).flatten(-2)
        a, b = pairs.unbind(-1)
        return torch.stack((a * self.cos - b * self.sin, a * self.sin + b * self.cos), -1).flatten(-2)


class Block(nn.Module):
    """Attention and an MLP before norms."""

    def __init__(self, is_complex: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = RotaryAttention(is_complex)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens ``(B, n, WIDTH)``."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class RotaryViT(nn.Module):
    """Two blocks over four patches of an image of 8 pixels."""

    def __init__(self, is_complex: bool) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 4, 4)
        self.blocks = nn.Sequential(Block(is_complex), Block(is_complex))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(B, N_CLASSES)``."""
        return self.head(self.norm(self.blocks(self.patch(x).flatten(2).mT)).mean(1))


def rotary_pair() -> tuple[RotaryViT, RotaryViT]:
    """Return one network twice: with complex buffers, and with real ones of the same values."""
    torch.manual_seed(0)
    with_complex, with_real = RotaryViT(True), RotaryViT(False)
    with_real.load_state_dict(dict(with_complex.named_parameters()), strict=False)
    return with_complex, with_real
