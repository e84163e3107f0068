"""Every file of conf/model, without being named here: logits, derivatives of both orders, taps, units, parameter kinds."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.fixtures.configs.model_configs import CONFIGS, from_config, stated_capabilities
from vitscope.core.tap import Kind, Tap
from vitscope.models.structure.capabilities import ModelCapabilities, capabilities_of
from vitscope.models.structure.parameter_groups import parameter_kinds, parameter_stages
from vitscope.models.structure.residual_units import Unit, reading_branches, resumed, units, zeroed
from vitscope.models.structure.taps import reading, taps


@pytest.fixture(params=CONFIGS, scope="module")
def built(request: pytest.FixtureRequest) -> tuple[nn.Module, int]:
    try:
        return from_config(request.param, image_size=16), 16
    except ValueError:  # a window or patch that needs more pixels
        return from_config(request.param), 32


@pytest.fixture
def model(built: tuple[nn.Module, int]) -> nn.Module:
    return built[0]


@pytest.fixture
def stated(request: pytest.FixtureRequest) -> ModelCapabilities:
    return stated_capabilities(request.node.callspec.params["built"])


@pytest.fixture
def needs_residual_units(stated: ModelCapabilities) -> None:
    if not stated.residual_units:
        pytest.skip("the configuration states that the model has no residual units")


@pytest.fixture
def x(built: tuple[nn.Module, int]) -> Tensor:
    return torch.rand(1, 3, built[1], built[1], dtype=torch.float64)


@pytest.fixture(scope="module")
def model_taps(built: tuple[nn.Module, int]) -> list[Tap]:
    """Return the taps of the model, which take a forward pass to find."""
    return taps(built[0])


@pytest.fixture(scope="module")
def model_units(built: tuple[nn.Module, int]) -> list[Unit]:
    """Return the residual units of the model, which take a forward pass to find."""
    return units(built[0])


def maps(model: nn.Module, model_taps: list[Tap], x: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    with torch.no_grad(), reading(model, model_taps, lambda i, tap, value: found.update({tap.name: value.clone()})):
        model(x)
    return found


def test_the_model_has_what_its_configuration_states(model: nn.Module, stated: ModelCapabilities) -> None:
    assert capabilities_of(model) == stated
    if not stated.residual_units:
        with pytest.raises(ValueError, match="no residual unit"):
            units(model)


def test_logits_and_a_symmetric_second_derivative(model: nn.Module, x: Tensor) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    u, v = ([torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters] for _ in range(2))
    with sdpa_kernel(SDPBackend.MATH):
        logits = model(x)
        assert logits.shape == (1, 3)
        assert logits.isfinite().all()
        loss = F.cross_entropy(logits, torch.tensor([2]))
        gradient = torch.autograd.grad(loss, parameters, create_graph=True)
        products = [
            torch.autograd.grad(sum((g * d).sum() for g, d in zip(gradient, w)), parameters, retain_graph=True)
            for w in (u, v)
        ]
    vhu, uhv = (sum((p * d).sum() for p, d in zip(h, w)) for h, w in zip(products, (v, u)))
    assert vhu.abs() > 1e-8
    assert torch.allclose(vhu, uhv, rtol=1e-8, atol=0)


def test_taps_are_ordered_named_and_give_maps(
    model: nn.Module, model_taps: list[Tap], x: Tensor, stated: ModelCapabilities
) -> None:
    found = model_taps
    assert len({tap.name for tap in found}) == len(found) >= 3
    assert (found[0].kind == "stem") == stated.residual_units  # the map that the first unit takes
    assert [tap.depth for tap in found] == [i / (len(found) - 1) for i in range(len(found))]
    assert [tap.stage for tap in found] == sorted(tap.stage for tap in found)
    assert all(tap.kind in get_args(Kind) for tap in found)
    read = maps(model, model_taps, x)
    assert list(read) == [tap.name for tap in found]  # each once, in order of depth
    assert all(value.ndim == 4 and len(value) == 1 and value.isfinite().all() for value in read.values())
    for before, tap in zip(found, found[1:]):
        smaller = read[tap.name].shape[-1] < read[before.name].shape[-1]
        assert smaller == tap.subsamples or (tap.subsamples and read[before.name].shape[-1] == 1)


@pytest.mark.usefixtures("needs_residual_units")
def test_the_map_after_a_unit_is_the_map_before_plus_the_branch(
    model: nn.Module, model_taps: list[Tap], model_units: list[Unit], x: Tensor
) -> None:
    after = maps(model, model_taps, x)
    before = dict(zip([tap.name for tap in model_taps][1:], after.values()))
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}

    def keep(_, unit, side, value) -> None:
        (inputs if side == "input" else outputs)[unit.name] = value.clone()

    with torch.no_grad(), reading_branches(model, model_units, keep):
        model(x)
    for unit in model_units:
        assert unit.name in inputs
        if unit.subsamples or before[unit.name].shape != after[unit.name].shape:
            continue  # the shortcut is projected
        plain = before[unit.name] + outputs[unit.name]
        error = min((after[unit.name] - y).abs().max() for y in (plain, plain.relu()))  # pre- or post-activation
        assert error < 1e-12


@pytest.mark.usefixtures("needs_residual_units")
def test_a_removed_unit_leaves_its_stream_as_it_was(
    model: nn.Module, model_taps: list[Tap], model_units: list[Unit], x: Tensor
) -> None:
    found = model_units
    chosen = [found[i] for i in sorted({0, 1, len(found) // 2, len(found) - 1})]
    names = [tap.name for tap in model_taps]
    clean = maps(model, model_taps, x)
    for unit in chosen:
        with zeroed(unit):
            without = maps(model, model_taps, x)
        previous = names[names.index(unit.name) - 1]
        assert torch.equal(without[previous], clean[previous])
        if without[unit.name].shape == clean[previous].shape and not unit.subsamples:
            assert torch.equal(without[unit.name], clean[previous])
        assert not torch.equal(without[unit.name], clean[unit.name])
    again = maps(model, model_taps, x)
    assert all(torch.equal(again[name], clean[name]) for name in names)


@pytest.mark.usefixtures("needs_residual_units")
def test_resuming_from_a_block_gives_the_same_logits(model: nn.Module, model_units: list[Unit], x: Tensor) -> None:
    found = model_units
    inputs: dict[nn.Module, Tensor] = {}
    handles = [
        u.block.register_forward_pre_hook(lambda block, args: inputs.update({block: args[0].clone()})) for u in found
    ]
    with torch.no_grad():
        clean = model(x)
        for handle in handles:
            handle.remove()
        for unit in (found[0], found[len(found) // 2], found[-1]):
            with resumed(found, unit, inputs[unit.block]):
                assert torch.equal(model(x), clean)
                with zeroed(unit):
                    resumed_without = model(x)
            with zeroed(unit):
                assert torch.equal(model(x), resumed_without)
        assert torch.equal(model(x), clean)
    assert not any("forward" in vars(module) for module in model.modules())


def test_every_parameter_has_a_kind_and_a_stage(
    model: nn.Module, model_taps: list[Tap], stated: ModelCapabilities
) -> None:
    names = [name for name, _ in model.named_parameters()]
    kinds, stages = parameter_kinds(model), parameter_stages(model)
    assert list(kinds) == list(stages) == names
    assert (kinds[names[0]] == "stem") == stated.stem
    assert kinds[names[-1]] == "head"
    assert {kinds[name] for name in names} >= {unit.kind for unit in (units(model) if stated.residual_units else [])}
    last = max(tap.stage for tap in model_taps)
    assert all((stage == 0) == (kinds[name] == "stem") for name, stage in stages.items())
    assert all((stage == last + 1) == (kinds[name] == "head") for name, stage in stages.items())
