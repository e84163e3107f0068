"""Structure of vision models of Hugging Face's transformers: units, kinds, branches, lesions, prefix tokens."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitscope as vs

pytest.importorskip("transformers")
from tests.fixtures.networks.transformers_models import FAMILIES, built, expected_units, images, named_modules, selected
from vitscope.models.structure import reading
from vitscope.models.structure.parameter_groups import parameter_kinds
from vitscope.models.structure.residual_units import Unit, head_zeroed, units, zeroed
from vitscope.runtime.errors import StructureError

pytestmark = pytest.mark.filterwarnings("ignore:parameters that the forward pass in eval mode does not use")


@pytest.mark.parametrize("name", FAMILIES)
def test_units_are_those_that_the_names_of_classes_tell(name: str) -> None:
    model = built(name)
    structure = vs.structure(model)
    assert structure.is_complete, structure.missing
    assert Counter(unit.kind for unit in structure.units if unit.residual) == expected_units(model)
    assert max(unit.stage for unit in structure.units) == FAMILIES[name].n_stages
    kinds = structure.parameter_kinds
    assert list(kinds) == [key for key, _ in model.named_parameters()]
    owners = [key for unit in structure.units for key in unit.parameters]
    assert len(owners) == len(set(owners))
    assert not {key for key in owners if kinds[key] in ("stem", "head")}
    others = {key for key in kinds if kinds[key] not in ("stem", "head")} - set(owners)
    assert all("norm" in key or "downsampling_layer.0" in key for key in others)  # norms between units
    for kind, pattern in (("msa", "Attention$"), ("mlp", "MLP$"), ("conv", "ConvNext(V2)?Layer$")):
        for path, module in named_modules(model, pattern):
            assert {kinds[f"{path}.{key}"] for key, _ in module.named_parameters()} == {kind}, path
    head = [key for key in kinds if key.startswith(("classifier", "decode_head", "visual_projection", "head."))]
    assert head
    assert {kinds[key] for key in head} == {"head"}
    assert {kinds[key] for key in kinds if "embeddings" in key and "stages.1" not in key} == {"stem"}


def outputs_of(model: nn.Module, places: dict[str, tuple[nn.Module, int]], x: Tensor) -> tuple[Any, dict[str, Tensor]]:
    """Run the model; return its output and the first tensor that each module returned in its call of that number."""
    read: dict[str, Tensor] = {}
    calls = Counter[str]()
    handles = []
    for key, (module, call) in places.items():

        def note(_m: nn.Module, _a: Any, out: Any, key: str = key, call: int = call) -> None:
            if calls[key] == call:
                read[key] = (out[0] if isinstance(out, tuple) else out).clone()
            calls[key] += 1

        handles.append(module.register_forward_hook(note))
    output = model(x)
    for handle in handles:
        handle.remove()
    return output, read


@pytest.mark.parametrize("name", [
    name if name in ("dinov2_with_registers", "swin", "convnext", "segmentation", "clip")
    else pytest.param(name, marks=pytest.mark.slow)
    for name in FAMILIES
])  # fmt: skip
@torch.no_grad()
def test_units_add_their_branches_and_lesions_zero_them(name: str) -> None:
    model, x = built(name), images(name)
    found = units(model)
    layers = dict(named_modules(model, "Layer$"))
    places = {unit.name: (unit.branch_out.module, unit.branch_out.call) for unit in found if unit.branch_out}
    assert len(places) == len(found)
    starts: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda _m, args, path=path: starts.update({path: args[0].clone()}))
        for path, layer in layers.items()
    ]
    clean, read = outputs_of(model, {**places, **{f"after {path}": (m, 0) for path, m in layers.items()}}, x)
    for handle in handles:
        handle.remove()
    for path in layers:
        branches = [read[unit.name] for unit in found if unit.name == path or unit.name.startswith(path + ".")]
        assert branches
        added = sum(branch.reshape(starts[path].shape) for branch in branches)
        after = read[f"after {path}"]
        assert (after - starts[path] - added).abs().max() < 1e-12 * (1 + after.abs().max()), path
    parameters = {unit.name: unit.parameters for unit in vs.structure(model).units}
    for unit in found:
        with zeroed(unit):
            lesion = selected(model(x), name)
        # with all parameters of the unit at 0 its branch ends in a layer or norm without weight and bias
        values = {key: model.get_parameter(key).clone() for key in parameters[unit.name]}
        for key in values:
            model.get_parameter(key).zero_()
        explicit = selected(model(x), name)
        for key, value in values.items():
            model.get_parameter(key).copy_(value)
        assert (lesion - explicit).abs().max() < 1e-11 * (1 + explicit.abs().max()), unit.name
        assert not torch.equal(lesion, selected(clean, name)), unit.name


@pytest.mark.parametrize("name", ["vit", "clip"])
@torch.no_grad()
def test_heads_are_removed_one_by_one(name: str) -> None:
    model, x = built(name), images(name)
    unit: Unit = next(u for u in units(model) if u.kind == "msa")
    assert unit.n_heads == 2
    with head_zeroed(unit, 1):
        lesion = selected(model(x), name)
    values = next(m for path, m in model.named_modules() if path.startswith(unit.name) and path.endswith("v_proj"))
    width = len(values.weight) // 2
    values.weight[width:] = 0  # the values of the second head
    values.bias[width:] = 0
    assert (lesion - selected(model(x), name)).abs().max() < 1e-12


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_taps_have_the_grid_of_the_pass_without_prefix_tokens(name: str) -> None:
    model, x = built(name), images(name, 2)
    taps = vs.taps(model)
    assert {tap.n_prefix for tap in taps} == {FAMILIES[name].n_prefix}
    maps: dict[str, Tensor] = {}
    with reading(model, taps, lambda _i, tap, x: maps.update({tap.name: x.clone()})):
        model(x)
    sides = {tuple(value.shape[2:]) for value in maps.values()}
    first = FAMILIES[name].side // (4 if name.startswith("convnext") else 2)
    assert sides == {(first // 2**i, first // 2**i) for i in range(FAMILIES[name].n_stages)}


@torch.no_grad()
def test_register_tokens_and_images_that_are_not_square() -> None:
    model = built("dinov2_with_registers")
    x = torch.randn(2, 3, 6, 10, dtype=torch.float64)
    maps: dict[str, Tensor] = {}
    with reading(model, vs.taps(model), lambda _i, tap, x: maps.update({tap.name: x.clone()})):
        hidden = model(x, output_hidden_states=True).hidden_states
    last = list(maps.values())[-1]
    assert last.shape == (2, 8, 3, 5)
    assert torch.equal(last, hidden[-1][:, 5:].mT.reshape(2, 8, 3, 5))  # (B, L, C) without class and register tokens


def test_mask_tokens_belong_to_the_stem() -> None:
    kinds = parameter_kinds(built("dinov2"))
    assert kinds["dinov2.embeddings.mask_token"] == "stem"


class Pooled(nn.Module):
    """Attention that adds to no stream, between a network of transformers and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.network = built("vit").vit
        self.mixer = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.network(x).last_hidden_state
        return self.head(self.mixer(tokens, tokens, tokens, need_weights=False)[0].mean(1))


def test_attention_outside_of_units_is_refused() -> None:
    with pytest.raises(
        StructureError, match="Pooled: attention module mixer is not part of a known unit; pass structure="
    ):
        parameter_kinds(Pooled().double())


@torch.no_grad()
def test_a_pass_that_adapts_the_model_to_its_images_is_undone() -> None:
    model, x = built("swin"), images("swin")
    before = selected(model(x), "swin")
    with pytest.raises(StructureError, match="its forward pass fails: .*size"):
        vs.structure(model, x[:, :, :8, :8])  # it makes the windows of its second stage smaller for these images
    assert torch.equal(selected(model(x), "swin"), before)


def test_a_model_that_states_no_size_is_tried_on_images_of_which_a_map_is_left() -> None:
    import transformers

    config = transformers.PoolFormerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8]
    )  # 1/32 of the images in the end
    structure = vs.structure(transformers.PoolFormerForImageClassification(config).eval())
    assert Counter(unit.kind for unit in structure.units if unit.residual) == {"pool": 4, "mlp": 4}
    assert max(unit.stage for unit in structure.units) == 4


def test_a_block_without_a_shortcut_is_one_layer() -> None:
    import transformers

    config = transformers.EfficientNetConfig(
        width_coefficient=0.2, depth_coefficient=0.6, image_size=64, hidden_dim=256, num_labels=3
    )
    model = transformers.EfficientNetForImageClassification(config).eval()  # its additions run in a part of the block
    structure = vs.structure(model)
    assert structure.is_complete, structure.missing
    owners = [key for unit in structure.units for key in unit.parameters]
    assert len(owners) == len(set(owners))
    kinds = structure.parameter_kinds
    assert {kinds[key] for key in kinds if ".blocks." in key} == {"conv"}
    assert {kinds[key] for key in kinds if ".embeddings." in key} == {"stem"}
