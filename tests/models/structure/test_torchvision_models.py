"""Units of torchvision's models, without weights on the meta device."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torchvision

import vitscope as vs
from tests.fixtures.oracles.attention_rule import attention_parameters


@pytest.mark.parametrize(
    ("name", "units", "stages"),
    [
        ("resnet18", {"conv": 8}, 4),
        ("vit_b_16", {"msa": 12, "mlp": 12}, 1),
        ("swin_t", {"msa": 12, "mlp": 12}, 4),
        ("swin_v2_t", {"msa": 12, "mlp": 12}, 4),
        ("convnext_tiny", {"conv": 18}, 4),
        pytest.param("maxvit_t", {"conv": 11, "msa": 22, "mlp": 22}, 4, marks=pytest.mark.slow),
        ("mobilenet_v2", {"conv": 10}, 5),
        ("efficientnet_b0", {"conv": 9}, 5),
        ("vgg11", {}, 6),
        pytest.param("densenet121", {}, 5, marks=pytest.mark.slow),
        ("googlenet", {}, 5),
        pytest.param("inception_v3", {}, 7, marks=pytest.mark.slow),
        ("regnet_x_400mf", {"conv": 22}, 4),
        ("regnet_y_400mf", {"conv": 16}, 4),
    ],
)
@pytest.mark.filterwarnings("ignore:The default weight initialization of")
@pytest.mark.filterwarnings("ignore:parameters that the forward pass in eval mode does not use")
def test_units_of_a_model_of_torchvision(name: str, units: dict[str, int], stages: int) -> None:
    device = "cpu" if name.startswith("regnet") else "meta"  # whose initial values are computed from values
    with torch.device(device):
        model = torchvision.models.get_model(name, weights=None).eval().to("meta")
    structure = vs.structure(model)
    assert structure.is_complete, structure.missing
    assert structure.is_residual == bool(units)
    assert Counter(unit.kind for unit in structure.units if unit.residual) == units
    assert max(unit.stage for unit in structure.units) == stages
    assert set(structure.parameter_kinds) == {key for key, _ in model.named_parameters()}
    assert all(structure.parameter_kinds[key] == "msa" for key in attention_parameters(model))


@pytest.mark.filterwarnings("ignore:The default weight initialization of")
def test_heads_that_run_in_training_alone_are_heads_and_have_no_tap() -> None:
    with torch.device("meta"):
        model = torchvision.models.googlenet(weights=None, num_classes=4).eval()
    with pytest.warns(UserWarning, match="does not use have their unit's kind: aux1.conv.conv.weight"):
        kinds = vs.structure(model).parameter_kinds
    assert {kinds[key] for key in kinds if key.startswith(("aux", "fc"))} == {"head"}
    assert {kinds[key] for key in kinds if key.startswith("inception") and "conv.weight" in key} == {"conv"}
    assert not [tap.name for tap in vs.taps(model) if tap.name.startswith("aux")]
