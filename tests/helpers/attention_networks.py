"""Small networks with attention whose queries, keys and values lie in their weights in every order."""

from __future__ import annotations

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIM, HEADS = 8, 2
HEAD = DIM // HEADS


class Attention(nn.Module):
    """Attention over the tokens of a 4 x 4 map with a fused layer whose rows lie as ``order`` says.

    Args:
        order: axes of the fused output: three of ``s`` (which of q, k, v), ``h`` (head), ``d`` (width of a head).
        form: how scores are computed.
    """

    def __init__(self, order: str = "shd", form: str = "matmul") -> None:
        super().__init__()
        self.order, self.form = order, form
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def heads(self, x: Tensor) -> list[Tensor]:
        sizes = {"s": 3, "h": HEADS, "d": HEAD}
        x = self.qkv(x).reshape(*x.shape[:2], *(sizes[axis] for axis in self.order))
        x = x.permute(2 + self.order.index("s"), 0, 2 + self.order.index("h"), 1, 2 + self.order.index("d"))
        return list(x)  # each (B, heads, N, head)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        if self.form == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v)
        elif self.form == "einsum":
            out = torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v)
        elif self.form == "transposed":  # scores (keys, queries), the softmax over rows
            out = (k @ q.transpose(-2, -1)).softmax(-2).transpose(-2, -1) @ v
        elif self.form == "masked":
            scores = q @ k.transpose(-2, -1)
            out = scores.masked_fill(torch.eye(scores.shape[-1]).bool(), float("-inf")).softmax(-1) @ v
        elif self.form == "normalized":
            q, k = F.layer_norm(q, (HEAD,)), F.normalize(k, dim=-1)
            out = F.softmax(q @ k.mT, dim=-1) @ v
        elif self.form == "channels":  # cross-covariance attention
            out = ((q.mT @ k).softmax(-1) @ v.mT).mT
        elif self.form == "linear":
            out = q.relu() @ (k.relu().mT @ v)
        elif self.form == "shared":  # values that are keys too
            out = F.scaled_dot_product_attention(q, k + v, v)
        else:
            out = torch.softmax(HEAD**-0.5 * (q @ k.transpose(-2, -1)), dim=-1) @ v
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class Separate(nn.Module):
    """Attention with a layer each; ``reduced`` gives keys and values one layer, after one before both."""

    def __init__(self, reduced: bool = False) -> None:
        super().__init__()
        self.q, self.proj, self.reduced = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), reduced
        if reduced:
            self.sr, self.kv = nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM, bias=False)
        else:
            self.to_k, self.to_v = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(F.gelu(self.sr(x[:, ::2]))).chunk(2, -1) if self.reduced else (self.to_k(x), self.to_v(x))
        q, k, v = (t.unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for t in (self.q(x), k, v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class Network(nn.Module):
    """Tokens of patches, one attention in a residual connection, a classifier."""

    def __init__(self, attn: nn.Module, side: int = 8) -> None:
        super().__init__()
        self.embed, self.attn, self.head = nn.Conv2d(3, DIM, 2, 2), attn, nn.Linear(DIM, 3)
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        y = self.attn(x, x, x)[0] if isinstance(self.attn, nn.MultiheadAttention) else self.attn(x)
        return self.head((x + y).mean(1))


def built(attn: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = Network(attn).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn_like(p))
    return model


def batch(n: int = 3, side: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n, 3, side, side, generator=generator, dtype=torch.float64), torch.arange(n) % 3


def rows_of_order(order: str) -> dict[str, list[int]]:
    """Return the rows of queries, keys and values of a fused weight, by counting through its axes."""
    sizes = {"s": 3, "h": HEADS, "d": HEAD}
    grid = np.arange(3 * DIM).reshape([sizes[axis] for axis in order])
    by_part = np.moveaxis(grid, order.index("s"), 0).reshape(3, -1)
    return {part: sorted(rows.tolist()) for part, rows in zip("qkv", by_part)}


def vit(depth: int = 2) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=DIM, num_heads=HEADS, depth=depth, num_classes=3
    )
    return model.double().eval()
