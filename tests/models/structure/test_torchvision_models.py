"""Units of torchvision's models, without weights on the meta device."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torchvision

import vitscope as vs
from tests.helpers.attention_rule import attention_parameters


@pytest.mark.parametrize(
    ("name", "units", "stages"),
    [
        ("resnet18", {"conv": 8}, 4),
        ("vit_b_16", {"msa": 12, "mlp": 12}, 1),
        ("swin_t", {"msa": 12, "mlp": 12}, 4),
        ("swin_v2_t", {"msa": 12, "mlp": 12}, 4),
        ("convnext_tiny", {"conv": 18}, 4),
        ("maxvit_t", {"conv": 11, "msa": 22, "mlp": 22}, 4),
        ("mobilenet_v2", {"conv": 10}, 5),
        ("efficientnet_b0", {"conv": 9}, 5),
        ("vgg11", {}, 6),
        ("densenet121", {}, 5),
    ],
)
def test_units_of_a_model_of_torchvision(name: str, units: dict[str, int], stages: int) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None).eval()
    structure = vs.structure(model)
    assert structure.is_complete, structure.missing
    assert structure.is_residual == bool(units)
    assert Counter(unit.kind for unit in structure.units if unit.residual) == units
    assert max(unit.stage for unit in structure.units) == stages
    assert set(structure.parameter_kinds) == {key for key, _ in model.named_parameters()}
    assert all(structure.parameter_kinds[key] == "msa" for key in attention_parameters(model))
