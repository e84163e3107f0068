"""Batch statistics of BatchNorm layers that hold a dropout of their own, as timm's may, and weights that cannot be moved."""

from __future__ import annotations

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

import vitscope as vs
from vitscope.core.weight_space import recalibrate


def network() -> nn.Module:
    torch.manual_seed(0)
    norm = BatchNormAct2d(4, drop_layer=nn.Dropout)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 3))
    return model.double().eval()


def image() -> Tensor:
    return torch.rand(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_the_dropout_of_a_norm_is_off_with_batch_statistics() -> None:
    model, x = network(), image()
    with vs.Probe(model, [(x, torch.tensor([0, 1, 2, 0]))]).guard(bn="batch") as guarded:
        assert torch.equal(guarded(x), guarded(x))


def test_the_dropout_of_a_norm_is_off_while_statistics_are_recomputed() -> None:
    model, x = network(), image()
    means = []
    for _ in range(2):
        recalibrate(model, iter([(x, torch.zeros(4))]))
        means.append(model[2].running_mean.clone())
    assert torch.equal(*means)
    assert not any(module.training for module in model.modules())


def test_weights_without_storage_are_refused_by_name() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    probe = vs.Probe(model, [(torch.zeros(2, 3, 2, 2), torch.zeros(2, dtype=torch.long))])
    with pytest.raises(ValueError, match=r"received '1\.weight' on the device meta: load weights first"):
        vs.loss_landscape(probe, n=2)
