"""One small variant of each of timm's modules: kinds are right for all attention, or the model is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from torch import nn

import vitscope as vs
from vitscope.models.structure.parameter_groups import parameter_kinds
from vitscope.models.structure.residual_units import units

#: words of the names of small variants, smallest first
_SMALL = (
    "test_", "nano", "atto", "femto", "pico", "xxs", "xs", "_ti_", "tiny", "050", "18", "26", "mini", "_s", "small", "lite", "b0",
    "_12", "f0", "t0",
)  # fmt: skip
#: the widest projections of a module that attends
_PROJECTIONS = {"qkv", "q", "q_proj", "query", "kv", "in_proj_weight", "to_qkv", "qk"}


def smallest(module: str) -> str | None:
    """The variant of a module with the fewest parameters among those whose names say that they are small."""
    names = timm.list_models(module=module)
    by_word = sorted(names, key=lambda n: next((i for i, word in enumerate(_SMALL) if word in n), len(_SMALL)))
    sizes = {}
    for name in by_word[:4]:
        with torch.device("meta"):
            try:
                sizes[name] = sum(p.numel() for p in timm.create_model(name, num_classes=3).parameters())
            except (RuntimeError, NotImplementedError):  # initial values that are computed from values
                continue
    return min(sizes, key=lambda name: sizes[name]) if sizes else (by_word or [None])[0]


def attention_parameters(model: nn.Module) -> Iterator[str]:
    """Names of the parameters of modules that project queries, but for those that pool in a head or gate positions."""
    names = {id(p): name for name, p in model.named_parameters()}  # a shared module has one name there
    gates = tuple(f"{path}." for path, m in model.named_modules() if type(m).__name__ == "SpatialAttention")  # CSATv2's
    for path, module in model.named_modules():
        children = {name for name, _ in module.named_children()} | set(module._parameters)
        if path.startswith(gates) or type(module).__name__.startswith("AttentionPool"):
            continue
        if children & _PROJECTIONS:
            yield from (names[id(p)] for p in module.parameters())


def answered(find: Callable[[nn.Module], Any], model: nn.Module) -> Any:
    """What the function returns, None where it refuses the model by a ValueError of vitscope's."""
    try:
        return find(model)
    except ValueError as error:
        if "vitscope" not in str(error):
            raise
        return None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:parameters that the forward pass in eval mode does not use")
@pytest.mark.filterwarnings("ignore:one branch holds attention and an MLP")
@pytest.mark.parametrize("module", sorted(set(timm.list_modules())))
def test_all_attention_of_timms_models_is_msa_or_refused(module: str) -> None:
    name = smallest(module)
    if name is None:
        return  # a module of parts, without a model
    model = timm.create_model(name, num_classes=3)
    kinds, found = answered(parameter_kinds, model), answered(units, model)
    attention = list(attention_parameters(model))
    if kinds is not None:
        assert not {n: kinds[n] for n in attention if kinds[n] != "msa"}, name
    if found is not None and attention:
        # layers between units too: LeViT's attention between stages adds to no stream
        inside = {key for unit in vs.structure(model).units if unit.kind == "msa" for key in unit.parameters}
        assert not set(attention) - inside, name
