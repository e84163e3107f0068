"""Networks of free width: the published ones at their published width, proportionate ones below, and clear refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import vitscope as vs
from tests.fixtures.runs.report_runs import configuration
from vitscope.config.experiment_identity import config_hash, identity

HEADS = (2, 4, 8, 16)


def n_parameters(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (vs.models.convnet, {"width": 64}),
        (vs.models.preresnet, {"width": 64}),
        (vs.models.alternet, {"width": 64}),
        (vs.models.vit, {"width": 192}),
        (vs.models.convit, {"width": 192}),
        (vs.models.swin, {"width": 96, "depths": (2, 2, 6, 2), "stage_heads": (3, 6, 12, 24)}),
        (vs.models.pit, {"width": 64, "depths": (2, 6, 4), "stage_heads": (2, 4, 8)}),
    ],
)
def test_the_published_width_is_the_published_network(build: Any, options: dict[str, Any]) -> None:
    with torch.device("meta"):
        ours, published = build(**options), build()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in published.state_dict().items()}


def resnet_parameters(blocks: tuple[int, ...], width: int, classes: int = 10) -> int:
    """Return the parameters of a ResNet of basic blocks by the sizes of its layers."""
    total, channels = 27 * width + 2 * width, width  # the stem and its BatchNorm
    for stage, n in enumerate(blocks):
        out = width << stage
        for i in range(n):
            first = channels if i == 0 else out
            total += 9 * first * out + 9 * out * out + 4 * out
            total += (first * out + 2 * out) * (first != out)  # the shortcut
        channels = out
    return total + channels * classes + classes


@pytest.mark.parametrize(("depth", "width"), [(18, 16), (34, 8), (34, 64)])
def test_a_narrow_resnet_has_the_parameters_of_its_layers(depth: int, width: int) -> None:
    blocks = (2, 2, 2, 2) if depth == 18 else (3, 4, 6, 3)
    net = vs.models.convnet(depth, width=width)
    assert n_parameters(net) == resnet_parameters(blocks, width)
    # pre-activation: norms before convolutions, none on shortcuts and in the stem, one at the end
    shortcut_norms = sum(2 * (width << stage) for stage in (1, 2, 3))
    inner = sum(2 * ((width << (stage - (i == 0 and stage > 0))) - (width << stage)) for stage, n in enumerate(blocks)
                for i in range(n))  # fmt: skip
    expected = resnet_parameters(blocks, width) - shortcut_norms - 2 * width + 2 * (width << 3) + inner
    assert n_parameters(vs.models.preresnet(depth, width=width)) == expected


def small(**options: Any) -> torch.nn.Module:
    return vs.models.alternet(34, width=8, n_msa=(0, 1, 1, 2), heads=HEADS, dim_head=16, **options)


def test_the_alternet_of_the_small_profile_costs_what_its_controls_cost() -> None:
    from vitscope.reports.claims.matched_controls import COST_TOLERANCE
    from vitscope.reports.model_costs import count

    ours, control = count(small(), (3, 32, 32)), count(small(mixer="conv"), (3, 32, 32))
    assert None not in (ours.parameters, control.parameters, ours.flops, control.flops)
    assert abs(control.parameters / ours.parameters - 1) < COST_TOLERANCE
    assert abs(control.flops / ours.flops - 1) < COST_TOLERANCE
    assert n_parameters(small(placement="stage_start")) == ours.parameters


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (vs.models.convnet, {"width": 12}, "multiple of 8, received 12: 8 or 16"),
        (vs.models.alternet, {"width": 4}, "multiple of 8, received 4: 8"),
        (vs.models.vit, {"width": 64, "heads": 3}, "multiple of 3 heads, received 64: 63"),
        (vs.models.swin, {"width": 32, "depths": (2, 2)}, "as many stage_heads as stages"),
        (vs.models.swin, {"width": 32, "depths": (2, 2), "stage_heads": (3, 4)}, "divide the width 32 of stage 1"),
        (vs.models.pit, {"width": 33}, "multiple of the 2 heads"),
        (vs.models.pit, {"depths": (2, 2)}, "three stages"),
    ],
)
def test_widths_that_do_not_fit_are_refused(build: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_narrow_networks_have_units_and_gradients() -> None:
    nets = [
        vs.models.convnet(18, width=8),
        vs.models.convit(width=32, heads=2, depth=2, kernel_size=3),
        vs.models.swin(width=16, depths=(1, 2, 1), stage_heads=(1, 2, 4), patch_size=2),
        vs.models.pit(width=16, depths=(1, 1, 1), stage_heads=(2, 4, 8), patch_size=4),
    ]
    for net in nets:
        assert vs.structure(net).is_complete
        net(torch.randn(2, 3, 32, 32)).square().sum().backward()
        assert all(p.grad is not None for p in net.parameters())


def test_a_width_that_is_not_set_leaves_the_identity_of_a_run_as_it_was() -> None:
    without = configuration("swin", 0)
    unset = configuration("swin", 0, model__width=None, model__depths=None, model__stage_heads=None)
    narrow = configuration("swin", 0, model__width=32)
    assert identity(without) == identity(unset) != identity(narrow)
    hashes = [config_hash(OmegaConf.create(cfg)) for cfg in (without, unset, narrow)]
    assert hashes[0] == hashes[1] != hashes[2]
