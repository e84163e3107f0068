"""Every measure of a compiled model gives the numbers of the model that was compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vitscope as vs
from vitscope.runtime import progress


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "enabled", False)


def plain() -> nn.Module:
    torch.manual_seed(0)
    model = VisionTransformer(8, 2, num_classes=4, embed_dim=12, depth=2, num_heads=3, mlp_ratio=2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.double().eval()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64)
    return list(zip(x.split(4), torch.tensor([0, 1, 2, 3, 3, 2, 1, 0]).split(4)))


def root(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def parts(model: nn.Module) -> nn.Module:
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    model.blocks[1].compile(backend="eager")
    return model


MEASURES: dict[str, tuple[Callable[..., Any], dict[str, Any], tuple[str, ...]]] = {
    "evaluation": (vs.evaluation, {}, ("nll", "accuracy")),
    "variance": (vs.feature_map_variance, {}, ("variance",)),
    "fourier": (vs.relative_log_amplitude, {}, ("log_amplitude",)),
    "branch transfer": (vs.branch_transfer, {"n_resamples": 5}, ("contrast",)),
    "cka": (vs.cka, {"n_permutations": 5}, ("similarity",)),
    "rank": (vs.effective_rank, {}, ("effective_rank",)),
    "attention": (vs.attention_distance, {}, ("distance", "entropy")),
    "lesion": (vs.lesion, {}, ("nll_change", "accuracy_change")),
    "hessian": (vs.hessian_eigenvalues, {"k": 1}, ("eigenvalues",)),
    "landscape": (vs.loss_slice, {"n": 3}, ("nll",)),
}


# directions of a landscape are drawn by the parameters' names, which change where a part is wrapped
CASES = [
    (name, compiled)
    for name in MEASURES
    for compiled in (root, in_place, parts)
    if (name, compiled) != ("landscape", parts)
]


@pytest.mark.parametrize(("name", "compiled"), CASES)
def test_numbers_are_those_of_the_uncompiled_model(name: str, compiled: Callable[[nn.Module], nn.Module]) -> None:
    measure, options, fields = MEASURES[name]
    model = plain()
    expected = measure(vs.Probe(model, batches()), **options)
    other = compiled(copy.deepcopy(model))
    with torch.no_grad():
        other(batches()[0][0])
    result = measure(vs.Probe(other, batches()), **options)
    for field in fields:
        for a, b in zip(np.atleast_1d(getattr(result, field)), np.atleast_1d(getattr(expected, field))):
            # the same eager operations
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("compiled", [root, in_place])
def test_taps_and_reading_without_a_probe(compiled: Callable[[nn.Module], nn.Module]) -> None:
    from vitscope.models.structure.taps import reading

    model = compiled(plain())
    found = vs.taps(model)
    assert [tap.name for tap in found] == ["stem", "blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"]
    x, read = batches()[0][0], []
    with torch.no_grad():
        model(x)
        with reading(model, found, lambda i, tap, value: read.append(tap.name)):
            model(x)
    assert read == [tap.name for tap in found]


def test_parts_made_by_torch_jit_are_refused() -> None:
    model = nn.Sequential(nn.Flatten(), torch.jit.trace(nn.Linear(12, 3), torch.zeros(1, 12)))
    probe = vs.Probe(model, [(torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 0]))])
    with pytest.raises(
        ValueError, match=r"received '1' made by torch\.jit.* pass the nn\.Module that it was made from"
    ):
        vs.evaluation(probe)
