"""timm's NaFlex networks: patches of an image by a linear layer, and packed sequences of patches with their coordinates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from torch import Tensor, nn

import vitscope as vs
from vitscope.models.structure.taps import reading, taps


@pytest.fixture(scope="module")
def network() -> NaFlexVit:
    torch.manual_seed(0)
    settings = NaFlexVitCfg(
        patch_size=8, embed_dim=24, depth=2, num_heads=2, class_token=False, reg_tokens=1, global_pool="avg"
    )
    return NaFlexVit(settings, num_classes=4).eval()


def packed(images: Tensor) -> dict[str, Tensor]:
    """Return (B, 3, 32, 48) images as 24 patches of 8 pixels, whose values stand in the order row, column, channel."""
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    patches = images.reshape(-1, 3, 4, 8, 6, 8).permute(0, 2, 4, 3, 5, 1)  # to (B, row, column, 8, 8, C)
    return {
        "patches": patches.reshape(-1, 24, 8 * 8 * 3),
        "patch_coord": torch.stack((rows, columns), -1).reshape(1, 24, 2).repeat(len(images), 1, 1),
        "patch_valid": torch.ones(len(images), 24, dtype=torch.bool),
    }


def probe(network: NaFlexVit, images: Tensor, labels: Tensor) -> vs.Probe:
    def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model({key: value for key, value in batch.items() if key != "labels"})

    return vs.Probe(network, [{**packed(images), "labels": labels}], forward=forward, targets="labels")


def test_the_grid_of_linear_patches_is_found(network: NaFlexVit) -> None:
    images, outputs, maps = torch.rand(2, 3, 32, 48), [], {}
    handle = network.blocks[-1].register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad(), reading(network, taps(network, images), lambda i, tap, value: maps.update({tap.name: value})):
        network(images)
    handle.remove()
    tokens = outputs[-1][:, 1:]  # (B, 4 * 6, C) behind one register token
    torch.testing.assert_close(maps["blocks.1.mlp"], tokens.mT.unflatten(2, (4, 6)), rtol=0, atol=0)
    assert len(maps) == 5


def test_packed_patches_are_measured_where_no_map_is_needed(network: NaFlexVit) -> None:
    images, labels = torch.rand(3, 3, 32, 48), torch.arange(3)
    with torch.no_grad():
        torch.testing.assert_close(network(packed(images)), network(images))  # the same patches in the same order
    whole, of_patches = vs.Probe(network, [(images, labels)]), probe(network, images, labels)
    # sums in float32 over another order of calls: values are of order 1
    assert vs.evaluation(of_patches).nll == pytest.approx(vs.evaluation(whole).nll, rel=1e-5)
    np.testing.assert_allclose(vs.lesion(of_patches).nll_change, vs.lesion(whole).nll_change, atol=1e-5)


@pytest.mark.parametrize("measure", ["relative_log_amplitude", "feature_map_variance", "cka"])
def test_measures_of_maps_refuse_packed_patches(network: NaFlexVit, measure: str) -> None:
    with pytest.raises(ValueError, match=r"'stem' tokens of a known grid, received 25 tokens.*declare them: taps="):
        getattr(vs, measure)(probe(network, torch.rand(2, 3, 32, 48), torch.arange(2)))
