"""Units that a user declares: in Python and in YAML, beside found ones or in place of them."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

import vitscope as vs
from vitscope.config import factories
from vitscope.models.structure import UnitDescription, declare_units
from vitscope.models.structure.parameter_groups import parameter_kinds
from vitscope.models.structure.residual_units import units, zeroed
from vitscope.runtime.errors import ConfigError, StructureError

C = 16


class AttentionBlock(nn.Module):
    """Attention by PyTorch's own module, weighed against its input, which is no residual addition that a pass shows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(C)
        self.attention = nn.MultiheadAttention(C, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return torch.stack((x, self.attention(y, y, y, need_weights=False)[0])).mean(0)


class Network(nn.Module):
    def __init__(self, depth: int = 2, num_classes: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, C, 4, 4)
        self.blocks = nn.ModuleList([AttentionBlock() for _ in range(depth)])
        self.head = nn.Linear(C, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


DESCRIPTION = UnitDescription(
    "blocks.*.attention", "msa", branch_in="blocks.{0}.norm", after="blocks.{0}", modules=("blocks.{0}.norm",)
)
BATCHES = [(torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 3]))]


def test_a_network_without_known_units_is_refused_and_can_be_described() -> None:
    model = Network().eval()
    for find in (units, parameter_kinds):
        with pytest.raises(ValueError, match="vitscope"):
            find(model)
    probe = vs.Probe(model, BATCHES, structure=[DESCRIPTION])
    structure = vs.structure(model)
    assert structure.is_complete
    assert [(unit.name, unit.kind) for unit in structure.units] == [
        ("blocks.0.attention", "msa"),
        ("blocks.1.attention", "msa"),
    ]
    kinds = structure.parameter_kinds
    assert {name.split(".")[0] for name, kind in kinds.items() if kind == "msa"} == {"blocks"}
    assert kinds["patches.weight"] == "stem"
    assert kinds["head.bias"] == "head"
    assert [tap.kind for tap in probe.taps] == ["stem", "msa", "msa"]
    result = vs.lesion(probe)
    assert list(result.units) == ["blocks.0.attention", "blocks.1.attention"]
    assert set(vs.hessian_by_kind(probe, n_top=1).groups) >= {"msa"}


def test_a_described_unit_is_removed_like_its_branch() -> None:
    model = Network(depth=1).double().eval()
    declare_units(model, [DESCRIPTION])
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad(), zeroed(*units(model)):
        tokens = model.patches(x).flatten(2).mT
        assert torch.equal(model(x), model.head((torch.stack((tokens, 0 * tokens)).mean(0)).mean(1)))
    declare_units(model, None)
    with pytest.raises(ValueError, match="vitscope"):
        units(model)


def test_a_description_takes_the_place_of_a_found_unit() -> None:
    model = vs.models.vit(patch_size=8, depth=2)
    declare_units(model, [{"module": "blocks.1.mlp", "kind": "conv", "modules": "blocks.1.norm2"}])
    kinds = vs.structure(model).parameter_kinds
    assert {kinds["blocks.1.mlp.fc1.weight"], kinds["blocks.1.norm2.weight"]} == {"conv"}
    assert kinds["blocks.0.mlp.fc1.weight"] == "mlp"
    assert [unit.kind for unit in units(model)] == ["msa", "mlp", "msa", "conv"]


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"module": "blocks.*.mixer", "kind": "msa"}, r"no module is named 'blocks.\*.mixer'"),
        (
            {"module": "blocks.0.attention", "kind": "attention"},
            "kind of 'blocks.0.attention' to be one of conv, msa, mlp",
        ),
        ({"module": "blocks.0.attention", "kind": "msa", "layout": "BLC"}, "layout of 'blocks.0.attention'"),
        ({"module": "blocks.0.attention", "kind": "msa", "depth": 1}, "an entry of structure with module, kind"),
        ({"module": "blocks.0.attention", "kind": "msa", "after": "blocks.9"}, "no module is named 'blocks.9'"),
    ],
)
def test_wrong_descriptions_are_refused(entry: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        vs.Probe(Network(), BATCHES, structure=[entry])


def test_the_configuration_describes_units_too() -> None:
    node = {"_target_": f"{__name__}.Network", "depth": 1}
    entry = {"module": "blocks.*.attention", "kind": "msa", "modules": ["blocks.{0}.norm"]}
    cfg = OmegaConf.create({"model": {**node, "structure": [entry]}, "seed": 0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITSCOPE_TRUST", __name__.partition(".")[0])
        model = factories.model(cfg)
        assert [unit.kind for unit in units(model)] == ["msa"]
        cfg.model.structure[0].module = "blocks.*.mixer"
        with pytest.raises(ConfigError, match=r"model.structure: no module is named"):
            factories.model(cfg)


def test_the_error_survives_pickling_and_has_exit_code_2() -> None:
    import pickle

    error = pickle.loads(
        pickle.dumps(StructureError("vit_x", "attention module blocks.3.mixer is not part of a known unit"))
    )
    assert str(error) == "vit_x: attention module blocks.3.mixer is not part of a known unit; pass structure=[...]"
    assert error.exit_code == 2
    assert isinstance(error, ValueError)
