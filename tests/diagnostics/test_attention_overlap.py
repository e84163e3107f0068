"""Masks of attention maps: against a stable sort, with masks of objects, and at their bounds."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import vitscope as vs
from tests.fixtures.networks.attention_probes import filled, images, probe_of, vit
from vitscope.diagnostics.attention._overlap import covered, masks_of_layers, mass_masks, mean_of_pairs, overlaps


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


def test_masks_of_mass_and_their_overlap() -> None:
    values = [[[0.5, 0.2], [0.2, 0.1]], [[0.25, 0.25], [0.25, 0.25]], [[0.0, 0.0], [0.0, 0.0]]]
    maps = torch.tensor([values], dtype=torch.float64)
    masks = mass_masks(maps, 0.6)
    assert masks[0].flatten(1).tolist() == [[True, True, False, False], [True, True, True, False], [False] * 4]
    assert mass_masks(maps, 0.5)[0, 0].flatten().tolist() == [True, False, False, False]
    assert mass_masks(maps[:, 1:2], 1.0).all()
    overlap = overlaps(masks, masks)
    assert overlap[0, 0].tolist() == [1.0, 2 / 3, 0.0]
    assert bool(overlap[0, 2, 2].isnan())
    assert mean_of_pairs(overlap[:, :2, :2]).item() == pytest.approx(2 / 3)


def test_masks_are_those_of_a_stable_sort() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(0, 6, (2, 3, 4, 5), generator=generator).double()  # many equal values
    maps[0, 0, 1, 2], maps[1, 1, 0, 0] = torch.nan, torch.inf
    masks = mass_masks(maps, 0.6)
    for values, mask in zip(maps.reshape(6, 20).tolist(), masks.reshape(6, 20).tolist()):
        expected, held = [False] * 20, 0.0
        for place in sorted(range(20), key=lambda i: -values[i]):
            if held >= 0.6 * sum(values) or not np.isfinite(sum(values)):
                break
            expected[place], held = True, held + values[place]
        assert mask == expected
    layers = [maps, maps[:, :1], maps + 1]
    for found, layer in zip(masks_of_layers(layers, 0.6), layers, strict=True):
        assert torch.equal(found, mass_masks(layer, 0.6))


@pytest.mark.filterwarnings("ignore:.*the intervals.*:vitscope.core.undefined_values.NullWarning")
def test_masks_of_objects() -> None:
    model, x = filled(vit()), images(16)
    probe = probe_of(model, x)
    found = vs.attention_maps(probe, images=4)
    own = mass_masks(torch.from_numpy(np.array(found.maps[1][:, 2])), 0.6)  # of the last layer's last head
    objects = own.repeat_interleave(4, 1).repeat_interleave(4, 2)
    result = vs.attention_maps(probe, masks=objects.numpy())
    assert result.mask_iou[1][2] == 1.0
    assert result.scalars()["mask_iou_largest"] == 1.0
    # of layers with a grid too coarse for the objects there is no value, whichever comes first
    of_fine_layers = dataclasses.replace(result, mask_iou=tuple(np.array([[np.nan] * 3, [0.25, np.nan, 0.5]])))
    assert of_fine_layers.scalars()["mask_iou_largest"] == 0.5
    of_data = vs.attention_maps(vs.Probe(model, list(probe.batches), about={"object_mask": objects}))
    np.testing.assert_array_equal(of_data.mask_iou, result.mask_iou)
    expected = overlaps(mass_masks(torch.from_numpy(np.array(found.maps[0])), 0.6), own[:, None])[..., 0].mean(0)
    np.testing.assert_allclose(result.mask_iou[0], expected, rtol=1e-12)
    with pytest.raises(ValueError, match=r"Expected masks of shape \(4, H, W\), received \(3, 16, 16\)"):
        vs.attention_maps(probe, masks=objects[:3])
    uneven = [(part, torch.zeros(len(part)).long()) for part in x.split([1, 2, 1])]
    with pytest.raises(
        ValueError, match=r"batches of one size for masks, the last excepted, received sizes \[1, 2, 1\]"
    ):
        vs.attention_maps(vs.Probe(model, uneven), masks=objects)
