from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from vitscope import models
from vitscope.models.layers.attention import SelfAttention, neighborhood


def tokens(n: int = 64, dim: int = 6) -> torch.Tensor:
    return torch.randn(2, n, dim, dtype=torch.float64)


def test_global_attention_equals_torchs() -> None:
    ours = SelfAttention(6, 2, qkv_bias=True).double()
    theirs = nn.MultiheadAttention(6, 2, batch_first=True).double()
    theirs.load_state_dict({
        "in_proj_weight": ours.qkv.weight, "in_proj_bias": ours.qkv.bias,
        "out_proj.weight": ours.proj.weight, "out_proj.bias": ours.proj.bias,
    })  # fmt: skip
    x = tokens()
    assert (ours(x) - theirs(x, x, x)[0]).abs().max() < 1e-12


def brute_force(attention: SelfAttention, x: torch.Tensor, side: int, kernel: int, zero: bool) -> torch.Tensor:
    """One query at a time, its neighbors in a list; with ``zero`` those outside are zero keys and values."""
    b, n, _ = x.shape
    heads, d = attention.num_heads, attention.head_dim
    q, k, v = attention.qkv(x).reshape(b, n, 3, heads, d).permute(2, 0, 3, 1, 4)
    out, r = torch.zeros_like(q), kernel // 2
    for i in range(n):
        keys, values = [], []
        for row in range(i // side - r, i // side + r + 1):
            for column in range(i % side - r, i % side + r + 1):
                inside = 0 <= row < side and 0 <= column < side
                if inside:
                    keys.append(k[:, :, row * side + column])
                    values.append(v[:, :, row * side + column])
                elif zero:
                    keys.append(torch.zeros_like(k[:, :, 0]))
                    values.append(torch.zeros_like(k[:, :, 0]))
        scores = (torch.stack(keys, 2) * q[:, :, i, None]).sum(-1) / d**0.5
        out[:, :, i] = (scores.softmax(-1)[..., None] * torch.stack(values, 2)).sum(2)
    return attention.proj(out.transpose(1, 2).reshape(b, n, heads * d))


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("padding", ["masked", "zero"])
def test_local_attention_equals_brute_force(kernel: int, padding: str) -> None:
    attention = SelfAttention(6, 2, grid=(4, 4), kernel_size=kernel, padding=padding).double()
    nn.init.normal_(attention.qkv.weight)
    x = tokens(16)
    assert (attention(x) - brute_force(attention, x, 4, kernel, padding == "zero")).abs().max() < 1e-12


def test_kernel_15_on_8x8_tokens_is_global_attention() -> None:
    local = SelfAttention(6, 2, grid=(8, 8), kernel_size=15).double()
    plain = SelfAttention(6, 2).double()
    plain.load_state_dict(local.state_dict())
    x = tokens()
    assert neighborhood((8, 8), 15).all()
    assert not neighborhood((8, 8), 13).all()
    assert (local(x) - plain(x)).abs().max() < 1e-14


def test_zero_padding_takes_attention_mass_at_the_border_only() -> None:
    masked = SelfAttention(6, 2, grid=(8, 8), kernel_size=3).double()
    zero = SelfAttention(6, 2, grid=(8, 8), kernel_size=3, padding="zero").double()
    zero.load_state_dict(masked.state_dict())
    x = tokens()
    difference = (masked(x) - zero(x)).abs().amax((0, 2)).reshape(8, 8)
    assert difference[1:-1, 1:-1].max() < 1e-15
    assert difference[0].min() > 1e-6


def test_convit_global_is_a_gap_vit() -> None:
    local = models.convit(kernel_size="global", depth=2).eval()
    plain = models.vit(pool="gap", patch_size=4, depth=2).eval()
    plain.load_state_dict(local.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert (local(x) - plain(x)).abs().max() < 1e-6  # float32


def test_convit_kernels_differ_and_have_equal_parameters() -> None:
    built = [models.convit(kernel_size=k, depth=1).eval() for k in (3, 5, 7, "global")]
    assert len({sum(p.numel() for p in m.parameters()) for m in built}) == 1
    x = torch.randn(1, 3, 32, 32)
    outputs = []
    for model in built:
        model.load_state_dict(built[0].state_dict())
        outputs.append(model(x))
    assert all((a - b).abs().max() > 1e-6 for a, b in itertools.pairwise(outputs))


def test_an_even_kernel_and_a_missing_grid_are_refused() -> None:
    with pytest.raises(ValueError, match=r"kernel_size to be odd, with a grid, received 4"):
        SelfAttention(6, 2, grid=(8, 8), kernel_size=4)
    with pytest.raises(ValueError, match="odd, with a grid"):
        SelfAttention(6, 2, kernel_size=3)
    with pytest.raises(ValueError, match="takes no mask from outside"):
        SelfAttention(6, 2)(torch.zeros(1, 4, 6), attn_mask=torch.zeros(4, 4))


@pytest.mark.parametrize(
    ("options", "heads", "width"),
    [
        ({}, 3, 64),
        ({"heads": 6}, 6, 32),
        ({"heads": 12, "dim_head": 64}, 12, 64),
        ({"dim_head": 16}, 3, 16),
        ({"heads": 1}, 1, 192),
    ],
)
def test_heads_and_their_width(options: dict, heads: int, width: int) -> None:
    model = models.vit(patch_size=8, depth=2, **options)
    for block in model.blocks:
        assert (block.attn.num_heads, block.attn.head_dim) == (heads, width)
        assert block.attn.qkv.weight.shape == (3 * heads * width, 192)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_pooling_and_prefix_tokens() -> None:
    assert models.vit(patch_size=8, depth=1).num_prefix_tokens == 1
    assert models.vit(patch_size=8, depth=1, pool="gap").num_prefix_tokens == 0
    assert models.vit(patch_size=8, depth=1, pool="gap", class_token=True, reg_tokens=4).num_prefix_tokens == 5


def test_gap_pools_patch_tokens_only() -> None:
    model = models.vit(patch_size=8, depth=1, pool="gap", class_token=True).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    patches = model.forward_features(x)[:, 1:]
    expected = model.head(model.fc_norm(patches.mean(1)))
    assert (model(x) - expected).abs().max() < 1e-12
