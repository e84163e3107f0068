"""Masks of attention maps at their bounds: shares that are reached exactly, and positions half of whose pixels are covered."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import vitscope as vs
from vitscope.diagnostics.attention._overlap import covered, mass_masks


@pytest.mark.parametrize("n", [3, 6, 7, 10, 12, 49])
def test_a_share_of_k_of_n_equal_positions_takes_k_of_them(n: int) -> None:
    """Sums of 1 / n miss k / n by a rounding, which is no reason for another position."""
    even = torch.full((1, n), 1 / n, dtype=torch.float64)
    counts = [int(mass_masks(even, k / n).sum()) for k in range(1, n + 1)]
    assert counts == list(range(1, n + 1))


def test_a_position_is_covered_where_half_of_its_pixels_are() -> None:
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    mask[0, 0, :2] = True  # 2 of the 4 pixels of the first of 2 x 3 positions
    mask[0, 1, 2] = True  # 1 of 4
    mask[0, 2:, 4:] = True  # all
    assert covered(mask, (2, 3))[0, 0].tolist() == [[True, False, False], [False, False, True]]


@pytest.mark.filterwarnings("ignore:attention_maps")
def test_maps_that_are_not_finite_overlap_with_nothing_known() -> None:
    """Their masks are empty, and an overlap of 0 with other layers, heads or objects would be a number from none."""
    torch.manual_seed(0)
    model = VisionTransformer(16, 4, num_classes=3, embed_dim=12, depth=2, num_heads=3).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
        last = model.blocks[1].attn.qkv.weight
        last[:4] = last[12:16] = 1e200  # scores of the first head overflow
        last[:4, ::2] = -1e200
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    objects = np.zeros((4, 16, 16), dtype=bool)
    objects[:, :8, :8] = True
    probe = vs.Probe(model, [(x, torch.zeros(4, dtype=torch.long))])
    found = vs.attention_maps(probe, masks=objects, images=1, gradient=False)
    assert np.isnan(found.entropy).tolist() == [[False] * 3, [True, False, False]]
    assert np.isnan(found.mask_iou).tolist() == [[False] * 3, [True, False, False]]
    assert np.isnan(found.head_iou_pairs[1]).tolist() == [[True] * 3, [True, False, False], [True, False, False]]
    assert np.isnan(found.head_iou).tolist() == [False, True]
    assert np.isnan(found.layer_iou).tolist() == [[False, True], [True, True]]
    alone = vs.attention_maps(probe, masks=objects, images=1, gradient=False, heads=[1, 2])
    np.testing.assert_array_equal(np.array(alone.mask_iou)[1], np.array(found.mask_iou)[1, 1:])
    assert np.isfinite(alone.layer_iou).all()
