"""Window attention of AlterNet, and the fixed smoothings that can stand in its place."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Mixer = Literal["msa", "conv", "uniform", "blur"]
PositionBias = Literal["shared", "per_head"]


def partition(x: Tensor, size: int) -> Tensor:
    """Cut a map (B, H, W, C) into windows (B * n_windows, size * size, C), row by row."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // size, size, w // size, size, c).transpose(2, 3)  # (B, H/p, W/p, p, p, C)
    return x.reshape(-1, size * size, c)


def merge(windows: Tensor, size: int, height: int, width: int) -> Tensor:
    """Put windows (B * n_windows, size * size, C) back into a map (B, H, W, C)."""
    c = windows.shape[-1]
    x = windows.reshape(-1, height // size, width // size, size, size, c).transpose(2, 3)  # (B, H/p, p, W/p, p, C)
    return x.reshape(-1, height, width, c)


def relative_position_index(size: int) -> Tensor:
    """Row of the flattened (2p-1, 2p-1) bias table for each (query, key) of a p x p window: (p*p, p*p)."""
    place = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij"), -1).reshape(-1, 2)
    offset = place[None, :, :] - place[:, None, :] + size - 1  # key minus query, from 0
    return offset[..., 0] * (2 * size - 1) + offset[..., 1]


class WindowAttention(nn.Module):
    """Multi-head self-attention inside unshifted windows, with a learned relative-position bias.

    Map (B, H, W, dim) -> (B, H, W, dim_out). As in the official AlterNet: queries, keys and values without
    bias, inner width ``heads * dim_head``, an output projection with bias. The bias is added to the scores
    through ``scaled_dot_product_attention``'s additive mask.

    Args:
        dim: Width of the input.
        dim_out: Width of the output.
        heads: Number of heads.
        dim_head: Width of a head.
        window_size: Side of a window in positions.
        pad: Whether a map that the window does not divide is padded at the bottom and right; padded
            positions are masked as keys. Without it such a map is refused.
        position_bias: ``shared``, one table for all heads as in the official code, or ``per_head``, as in Swin.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        *,
        heads: int,
        dim_head: int = 64,
        window_size: int = 4,
        pad: bool = False,
        position_bias: PositionBias = "shared",
    ) -> None:
        super().__init__()
        if position_bias not in ("shared", "per_head"):
            raise ValueError(f"Expected position_bias to be shared or per_head, received {position_bias!r}.")
        self.num_heads, self.head_dim, self.window_size, self.pad = heads, dim_head, window_size, pad
        self.qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.proj = nn.Linear(heads * dim_head, dim_out)
        tables = heads if position_bias == "per_head" else 1
        self.position_bias = nn.Parameter(0.02 * torch.randn(tables, 2 * window_size - 1, 2 * window_size - 1))
        self.position_index: Tensor
        self.register_buffer("position_index", relative_position_index(window_size), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Attend inside each window; see the class for shapes. A map that does not divide raises ValueError."""
        _, h, w, _ = x.shape
        p = self.window_size
        bottom, right = -h % p, -w % p
        if bottom or right:
            if not self.pad:
                raise ValueError(f"Expected window_size to divide the {h}x{w} feature map, received {p}; set pad=True.")
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        windows = partition(x, p)
        n, length, _ = windows.shape
        qkv = self.qkv(windows).reshape(n, length, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B * n_windows, heads, p * p, dim_head)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask(h, w, n).to(q.dtype))
        out = self.proj(out.transpose(1, 2).reshape(n, length, -1))  # (B * n_windows, p * p, heads * dim_head)
        return merge(out, p, h + bottom, w + right)[:, :h, :w]

    def _mask(self, height: int, width: int, n: int) -> Tensor:
        """Additive mask, (1, heads or 1, p*p, p*p); with padding (B * n_windows, ...)."""
        p = self.window_size
        bias = self.position_bias.flatten(1)[:, self.position_index].unsqueeze(0)  # (1, heads or 1, p * p, p * p)
        bottom, right = -height % p, -width % p
        if not (bottom or right):
            return bias
        real = F.pad(bias.new_ones(1, height, width, 1), (0, 0, 0, right, 0, bottom))
        hidden = torch.log(partition(real, p)).reshape(-1, 1, 1, p * p)  # 0 for keys in the map, -inf for padding
        return (bias + hidden).repeat(n // hidden.shape[0], 1, 1, 1)


class FixedMixing(nn.Module):
    """Attention with weights that do not depend on the input: what remains of an MSA if only smoothing matters.

    Value and output projections are those of `WindowAttention`; in between stand equal weights over
    the window (``uniform``) or a box blur at unchanged size (``blur``; borders repeat the edge, so a constant
    map stays constant). Map (B, H, W, dim) -> (B, H, W, dim_out).
    """

    def __init__(
        self, dim: int, dim_out: int, *, inner: int, mixer: Mixer, window_size: int, pad: bool, blur_size: int
    ) -> None:
        super().__init__()
        self.mixer, self.window_size, self.pad, self.blur_size = mixer, window_size, pad, blur_size
        self.value = nn.Linear(dim, inner, bias=False)
        self.proj = nn.Linear(inner, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """Smooth the values; see the class for shapes."""
        v = self.value(x)
        return self.proj(self._window_mean(v) if self.mixer == "uniform" else box_blur(v, self.blur_size))

    def _window_mean(self, v: Tensor) -> Tensor:
        _, h, w, _ = v.shape
        p = self.window_size
        if (h % p or w % p) and not self.pad:
            raise ValueError(f"Expected window_size to divide the {h}x{w} feature map, received {p}; set pad=True.")
        v = v.permute(0, 3, 1, 2)  # (B, h, w, inner) to (B, inner, h, w)
        mean = F.avg_pool2d(v, p, ceil_mode=True, count_include_pad=False)  # a window over the border counts its part
        mean = mean.repeat_interleave(p, 2).repeat_interleave(p, 3)[:, :, :h, :w]
        return mean.permute(0, 2, 3, 1)  # (B, inner, h, w) to (B, h, w, inner)


def box_blur(x: Tensor, size: int) -> Tensor:
    """Mean over size x size positions at unchanged map size, (B, H, W, C); the edge is repeated outward."""
    before = (size - 1) // 2
    # (B, H, W, C) to (B, C, H, W) and back
    padded = F.pad(x.permute(0, 3, 1, 2), (before, size - 1 - before) * 2, mode="replicate")
    return F.avg_pool2d(padded, size, stride=1).permute(0, 2, 3, 1)
