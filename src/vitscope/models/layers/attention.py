"""Self-attention over tokens with any number and width of heads, global or within a square neighborhood."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Padding = Literal["masked", "zero"]


def neighborhood(grid: tuple[int, int], kernel_size: int) -> Tensor:
    """Mask of the keys that each query sees: True inside the k x k square around it, (N, N) for N = h * w tokens."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    place = torch.stack((rows.flatten(), columns.flatten()), -1)
    return (place[:, None] - place[None, :]).abs().amax(-1) <= kernel_size // 2


class SelfAttention(nn.Module):
    """Multi-head self-attention, tokens (B, N, dim) -> (B, N, dim), with the parameter names of timm's.

    With ``kernel_size`` each query attends to the k x k tokens around it (the paper's convolutional MSA,
    Figure 7). At the border, ``masked`` (default) leaves the missing neighbors out; ``zero`` is the official
    code's behavior: each missing neighbor is a key and a value of zeros that takes its share of the
    softmax. All padded keys of a query have score 0, so they are one extra zero token with the logarithm of
    their number as bias, which is exact.

    Args:
        dim: Width of the tokens.
        heads: Number of heads.
        dim_head: Width of a head; None: ``dim / heads``.
        qkv_bias: Whether queries, keys and values have biases.
        grid: Height and width of the token grid, needed with a kernel.
        kernel_size: Odd side of the neighborhood; None: global.
        padding: ``masked`` or ``zero``.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int | None = None,
        qkv_bias: bool = False,
        *,
        grid: tuple[int, int] | None = None,
        kernel_size: int | None = None,
        padding: Padding = "masked",
    ) -> None:
        super().__init__()
        if dim_head is None and dim % heads:
            raise ValueError(
                f"Expected heads to divide the width {dim}, received {heads}; pass a divisor, or dim_head."
            )
        if padding not in ("masked", "zero"):
            raise ValueError(f"Expected padding to be masked or zero, received {padding!r}.")
        self.num_heads = heads
        self.head_dim = dim // heads if dim_head is None else dim_head
        self.kernel_size, self.padding = kernel_size, padding
        self.qkv = nn.Linear(dim, 3 * heads * self.head_dim, bias=qkv_bias)
        self.proj = nn.Linear(heads * self.head_dim, dim)
        for layer in (self.qkv, self.proj):  # timm's initialization of a ViT
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        self.seen: Tensor | None
        self.register_buffer("seen", self._seen(grid), persistent=False)

    def _seen(self, grid: tuple[int, int] | None) -> Tensor | None:
        if self.kernel_size is None:
            return None
        if grid is None or self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"Expected kernel_size to be odd, with a grid, received {self.kernel_size} and {grid}.")
        return neighborhood(grid, self.kernel_size)

    def _zero_token_mask(self, like: Tensor) -> Tensor:
        """Additive mask (N, N + 1) whose last key stands for all padded keys of a query."""
        assert self.seen is not None
        assert self.kernel_size is not None
        visibility_mask = torch.zeros_like(self.seen, dtype=like.dtype).masked_fill(~self.seen, float("-inf"))
        outside = self.kernel_size**2 - self.seen.sum(1, keepdim=True)
        return torch.cat((visibility_mask, outside.to(like.dtype).log()), dim=1)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend; ``attn_mask`` and ``is_causal`` exist for timm's blocks and must keep their defaults."""
        if attn_mask is not None or is_causal:
            raise ValueError(
                "Expected attn_mask=None and is_causal=False, received others: this attention takes no mask from outside."
            )
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, N, dim_head)
        mask = self.seen
        if self.seen is not None and self.padding == "zero":
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            mask = self._zero_token_mask(q)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, N, dim_head)
        return self.proj(out.transpose(1, 2).reshape(b, n, -1))  # (B, N, heads * dim_head)
