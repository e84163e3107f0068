"""Forward passes of timm's ViT, Swin and ResNet written out with matrix products: maps, attention and branches of each unit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class ExplicitPass:
    """What one pass shows, by the names of vitscope's taps and units.

    Attributes:
        maps: (B, C, h, w) by tap.
        attention: (B, n_windows, heads, queries, keys) by unit.
        places: (n_windows, queries) number of each token's position on the map, row by row; -1 for prefix tokens and padding.
        branches: the normalized input and the output of each unit's branch, (B, C, h, w) each.
        logits: (B, K).
    """

    maps: dict[str, Tensor] = field(default_factory=dict)
    attention: dict[str, Tensor] = field(default_factory=dict)
    places: dict[str, Tensor] = field(default_factory=dict)
    branches: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


def _norm(x: Tensor, module: Any) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], module.weight, module.bias, module.eps)


def _linear(x: Tensor, module: Any) -> Tensor:
    return x @ module.weight.T + module.bias


def _mlp(x: Tensor, module: Any) -> Tensor:
    return _linear(F.gelu(_linear(x, module.fc1)), module.fc2)


def vit_pass(model: Any, x: Tensor) -> ExplicitPass:
    """Return the pass of a pre-norm ViT with a class token and register tokens over images ``(B, 3, H, W)``."""
    b, result = len(x), ExplicitPass()
    patches = F.conv2d(x, model.patch_embed.proj.weight, model.patch_embed.proj.bias, model.patch_embed.proj.stride)
    h, w = patches.shape[2:]
    prefix = torch.cat([model.cls_token, model.reg_token], dim=1).expand(b, -1, -1)
    tokens = torch.cat([prefix, patches.flatten(2).mT], dim=1) + model.pos_embed  # (B, n_prefix + h w, C)
    n_prefix = prefix.shape[1]

    def on_map(values: Tensor) -> Tensor:
        return values[:, n_prefix:].mT.reshape(b, -1, h, w)

    result.maps["stem"] = on_map(tokens)
    for i, block in enumerate(model.blocks):
        u = _norm(tokens, block.norm1)
        q, k, v = _linear(u, block.attn.qkv).reshape(b, -1, 3, block.attn.num_heads, block.attn.head_dim).unbind(2)
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / block.attn.head_dim**0.5).softmax(-1)
        branch = _linear(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2), block.attn.proj)
        tokens = tokens + branch
        name = f"blocks.{i}.attn"
        result.attention[name] = weights[:, None]
        result.places[name] = torch.cat([torch.full((n_prefix,), -1), torch.arange(h * w)])[None]
        result.branches[name], result.maps[name] = (on_map(u), on_map(branch)), on_map(tokens)
        u = _norm(tokens, block.norm2)
        branch = _mlp(u, block.mlp)
        tokens = tokens + branch
        name = f"blocks.{i}.mlp"
        result.branches[name], result.maps[name] = (on_map(u), on_map(branch)), on_map(tokens)
    result.logits = _linear(_norm(tokens, model.norm)[:, 0], model.head)
    return result


def swin_pass(model: Any, x: Tensor) -> ExplicitPass:
    """Return the pass of a Swin of one stage over images ``(B, 3, H, W)``; maps are rolled, padded, then cut into windows."""
    result = ExplicitPass()
    proj = model.patch_embed.proj
    state = _norm(F.conv2d(x, proj.weight, proj.bias, proj.stride).permute(0, 2, 3, 1), model.patch_embed.norm)
    result.maps["stem"] = state.permute(0, 3, 1, 2)
    for i, block in enumerate(model.layers[0].blocks):
        name = f"layers.0.blocks.{i}"
        u = _norm(state, block.norm1)
        branch, weights, places = _window_attention(u, block)
        state = state + branch
        result.attention[f"{name}.attn"], result.places[f"{name}.attn"] = weights, places
        result.branches[f"{name}.attn"] = (u.permute(0, 3, 1, 2), branch.permute(0, 3, 1, 2))
        result.maps[f"{name}.attn"] = state.permute(0, 3, 1, 2)
        u = _norm(state, block.norm2)
        branch = _mlp(u, block.mlp)
        state = state + branch
        result.branches[f"{name}.mlp"] = (u.permute(0, 3, 1, 2), branch.permute(0, 3, 1, 2))
        result.maps[f"{name}.mlp"] = state.permute(0, 3, 1, 2)
    result.logits = _linear(_norm(state, model.norm).mean((1, 2)), model.head.fc)
    return result


def _window_attention(u: Tensor, block: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the branch (B, h, w, C), the weights (B, n_windows, heads, Q, K) and the places of tokens (n_windows, Q)."""
    b, h, w, c = u.shape
    (side, _), (shift, _), attn = block.window_size, block.shift_size, block.attn
    down, right = -(-h // side), -(-w // side)

    def cut(grid: Tensor) -> Tensor:  # (..., down * side, right * side) -> (..., n_windows, side * side)
        parts = grid.unflatten(-1, (right, side)).unflatten(-3, (down, side))
        return parts.transpose(-3, -2).flatten(-2).flatten(-3, -2)

    padding = (0, right * side - w, 0, down * side - h)
    rolled = torch.roll(u.permute(0, 3, 1, 2), (-shift, -shift), (2, 3))
    windows = cut(F.pad(rolled, padding)).permute(0, 2, 3, 1)  # (B, n_windows, Q, C)
    numbers = torch.roll(torch.arange(h * w).reshape(h, w), (-shift, -shift), (0, 1))
    places = cut(F.pad(numbers, padding, value=-1))
    q, k, v = _linear(windows, attn.qkv).reshape(*windows.shape[:3], 3, attn.num_heads, -1).unbind(3)
    row, column = torch.arange(side * side) // side, torch.arange(side * side) % side
    offset = (row[:, None] - row + side - 1) * (2 * side - 1) + column[:, None] - column + side - 1
    scores = torch.einsum("bwqhd,bwkhd->bwhqk", q, k) / q.shape[-1] ** 0.5
    scores = scores + attn.relative_position_bias_table[offset].permute(2, 0, 1)
    if shift:  # timm numbers nine regions of the padded map; a query sees the keys of its own
        edges = [torch.tensor([n - side, n - shift]) for n in (down * side, right * side)]
        regions = [torch.bucketize(torch.arange(n), e, right=True) for n, e in zip((down * side, right * side), edges)]
        region = cut(3 * regions[0][:, None] + regions[1])
        scores = scores.masked_fill((region[:, :, None] != region[:, None])[:, None], -1e9)
    weights = scores.softmax(-1)
    out = _linear(torch.einsum("bwhqk,bwkhd->bwqhd", weights, v).flatten(3), attn.proj)  # (B, n_windows, Q, C)
    branch = out.new_zeros(b, h * w, c)
    is_on_map = places >= 0
    branch[:, places[is_on_map]] = out[:, is_on_map]
    return branch.reshape(b, h, w, c), weights, places


def pixel_distances(places: Tensor, grid: tuple[int, int], image: tuple[int, int]) -> np.ndarray:
    """Return the pixels between the centers of positions ``(n_windows, Q, Q)``; those of tokens without a place mean nothing."""
    rows, columns = (places // grid[1]) * (image[0] / grid[0]), (places % grid[1]) * (image[1] / grid[1])
    return np.hypot(*((side[:, :, None] - side[:, None]).double().numpy() for side in (rows, columns)))
