"""Measures of feature maps refuse a probe without taps in one line, also where they compare no kinds of units."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vitscope as vs


@pytest.mark.parametrize(
    "name",
    [
        "cka",
        "depth_probes",
        "effective_rank",
        "effective_receptive_field",
        "patch_pca",
        "feature_map_variance",
        "relative_log_amplitude",
        "similarity",
        "tap_table",
        "oversmoothing",
        "token_norms",
    ],
)
def test_a_probe_without_taps_is_refused(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    batches = [(torch.randn(5, 1, 4, 4), torch.randint(3, (5,)))]
    probe = vs.Probe(model, batches, taps=[])
    with pytest.raises(
        ValueError, match=r"Expected at least one tap, received none: pass taps=\[\.\.\.\] to the probe\."
    ):
        getattr(vs, name)(probe)


def test_a_second_probe_without_taps_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.Flatten(), nn.Linear(8, 3))
    batches = [(torch.randn(5, 1, 4, 4), torch.randint(3, (5,)))]
    taps = [vs.Tap("a", "conv", 1, 0.0, model[0]), vs.Tap("b", "conv", 1, 1.0, model[2])]
    with pytest.raises(ValueError, match="Expected at least one tap, received none"):
        vs.cka(vs.Probe(model, batches, taps=taps), vs.Probe(model, batches, taps=[]))
