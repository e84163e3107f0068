"""Units of one small variant of each of timm's modules, against a table and against names of classes and attributes."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.fixtures.networks import timm_versions
from tests.fixtures.oracles.attention_rule import attention_parameters
from tests.fixtures.oracles.replayed_pass import replayed
from tests.models.structure.timm_families import FAMILIES, NOT_RESIDUAL
from vitscope.models.structure.found_structure import find_structure
from vitscope.models.structure.residual_units import known_units, zeroed
from vitscope.models.structure.structure_table import Structure
from vitscope.models.tracing.recorder import trace
from vitscope.models.tracing.traced_structure import traced_structure
from vitscope.models.tracing.units import traced_units

FAST = (
    "convmixer", "convnext", "efficientnet", "hiera", "levit", "maxxvit", "mlp_mixer", "mobilevit", "pvt_v2", "resnet",
    "swin_transformer", "tnt", "vgg", "vision_transformer", "xcit",
)  # fmt: skip
KINDS = {"stem", "conv", "msa", "mlp", "pool", "head"}


def built(name: str, device: str = "meta") -> nn.Module:
    with torch.device(device):
        return timm.create_model(name, num_classes=3, pretrained=False).eval()


def check_family(module: str) -> None:
    name, counts, stages = FAMILIES[module]
    try:
        model = built(name)
        structure = vs.structure(model)
    except (RuntimeError, NotImplementedError):  # initial values that are computed from values
        model = built(name, "cpu")
        structure = vs.structure(model)
    assert structure.is_complete, structure.missing
    assert structure.is_residual == (module not in NOT_RESIDUAL)
    assert set(structure.parameter_kinds) == {key for key, _ in model.named_parameters()}
    assert set(structure.parameter_kinds.values()) <= KINDS
    assert dict(Counter(unit.kind for unit in structure.units if unit.residual)) == counts
    assert max(unit.stage for unit in structure.units) == stages
    check_owners(structure)
    wrong = {key for key in attention_parameters(model) if structure.parameter_kinds[key] != "msa"}
    assert not wrong if structure.is_residual else "msa" not in structure.parameter_kinds.values()


def check_owners(structure: Structure) -> None:
    """Every parameter of a unit has the unit's kind; the head comes after the last unit, so no unit has parameters of it."""
    for unit in structure.units:
        assert {structure.parameter_kinds[key] for key in unit.parameters} <= {unit.kind}, unit.name


@pytest.mark.parametrize("module", FAST)
@pytest.mark.filterwarnings("ignore:parameters that the forward pass in eval mode does not use")
@pytest.mark.filterwarnings("ignore:one branch holds attention and an MLP")
def test_units_of_a_family(module: str) -> None:
    check_family(module)


@pytest.mark.slow
@pytest.mark.parametrize("module", sorted(set(timm.list_modules()) - set(FAST)))
@pytest.mark.filterwarnings("ignore:parameters that the forward pass in eval mode does not use")
@pytest.mark.filterwarnings("ignore:one branch holds attention and an MLP")
def test_units_of_every_family(module: str) -> None:
    if timm.list_models(module=module):
        check_family(module)


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "resnet18",
        "resnetv2_50",
        "convnext_atto",
        "swin_tiny_patch4_window7_224",
        "mixer_s32_224",
    ],
)
def test_a_trace_agrees_with_the_descriptions_of_blocks(name: str) -> None:
    model = built(name)
    described = find_structure(model)
    assert described.places is None  # found by type
    traced = traced_structure(model, trace(model))
    assert traced is not None
    kinds = vs.structure(model).parameter_kinds
    assert {key: kind for key, (kind, _) in traced.places.items()} == kinds
    for ours, theirs in zip(described.components, traced.components, strict=True):
        assert (ours.name.replace(".downsample", ""), ours.part.kind, ours.stage, ours.n_prefix) == (
            theirs.name.replace(".downsample", ""), theirs.part.kind, theirs.stage, theirs.n_prefix,
        )  # fmt: skip
        assert ours.part.subsamples == theirs.part.subsamples
        assert ours.part.is_residual == theirs.part.is_residual
        if ours.part.branch_out is not None and not name.startswith("mixer"):
            assert theirs.part.branch_out is not None
            assert ours.part.branch_out.module is theirs.part.branch_out.module
            assert ours.part.branch_out.layout == theirs.part.branch_out.layout
        assert ours.part.after is not None
        assert theirs.part.after is not None
        assert ours.part.after.layout == theirs.part.after.layout


#: small enough for a real pass in float64
REAL = (
    "test_vit", "test_resnet", "test_convnext", "test_coatnet", "test_mambaout", "pvt_v2_b0", "mobilevitv2_050", "levit_128s",
    "xcit_nano_12_p16_224", "mobilenetv3_small_050", "edgenext_xx_small", "efficientvit_b0", "hrnet_w18_small", "ghostnet_050",
)  # fmt: skip


@pytest.mark.parametrize("name", timm_versions.named("test_resnet", "test_coatnet", "mobilenetv3_small_050"))
def test_every_unit_adds_its_branch_and_a_lesion_zeroes_it(name: str) -> None:
    check_branches(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_every_unit_adds_its_branch_and_a_lesion_zeroes_it_in_more_families(name: str) -> None:
    check_branches(name)


@torch.no_grad()
def check_branches(name: str) -> None:
    torch.manual_seed(0)
    model = built(name, "cpu").double()
    for p in model.parameters():  # layer scales and norms that start at 0 would hide a branch
        p.add_(0.02 * torch.randn_like(p))
    size = int(timm.get_pretrained_cfg(name).input_size[-1])
    x = torch.rand(1, 3, size, size, dtype=torch.float64)
    replica = copy.deepcopy(model)  # a pass may fill caches, which would give its replay other functions
    recorded = trace(model, x)
    additions = {unit.addition.result: unit for unit in traced_units(recorded)}
    units = known_units(model, x)
    assert len(units) == len(additions)
    read: dict[str, Tensor] = {}
    handles = []
    for unit in units:
        assert unit.branch_out is not None, unit.name
        place, count = unit.branch_out, Counter[str]()

        def keep(_m: nn.Module, _a: Any, out: Any, unit=unit, place=place, count=count) -> None:
            count[unit.name] += 1
            if count[unit.name] == place.call + 1:
                read[unit.name] = (out[0] if isinstance(out, tuple) else out).clone()

        handles.append(place.module.register_forward_hook(keep))
    clean = model(x)
    for handle in handles:
        handle.remove()
    sums: dict[int, tuple[list[Tensor], Tensor]] = {}
    again = replayed(
        copy.deepcopy(replica),
        x,
        additions,
        lambda i, operands, total: sums.update({i: (operands, total.clone())}) or total,
    )
    assert (again - clean).abs().max() < 1e-10 * (1 + clean.abs().max())
    for unit, (index, traced) in zip(units, additions.items(), strict=True):
        operands, total = sums[index]
        node = recorded.nodes[index]
        branch = operands[list(node.inputs).index(traced.addition.branch)]
        stream = operands[list(node.inputs).index(traced.addition.stream)]
        assert (total - stream - branch).abs().max() < 1e-12, unit.name
        if unit.branch_out is not None and unit.branch_out.layout != "unknown":
            assert torch.equal(read[unit.name].flatten().sort().values, branch.flatten().sort().values), unit.name
    for unit, (index, traced) in list(zip(units, additions.items()))[:: max(len(units) // 4, 1)]:
        place = list(recorded.nodes[index].inputs).index(traced.addition.stream)
        explicit = replayed(copy.deepcopy(replica), x, [index], lambda i, operands, total, place=place: operands[place])
        with zeroed(unit):
            assert (model(x) - explicit).abs().max() < 1e-10 * (1 + clean.abs().max()), unit.name
