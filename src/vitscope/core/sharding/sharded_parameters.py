"""Read a model of sharded weights without the hooks of ``fully_shard``, which no second derivative passes.

``fully_shard`` (FSDP2) keeps each parameter as a ``DTensor`` and gathers it in hooks outside of autograd: its gradients carry no
graph, and `torch.autograd.grad` does not find the sharded parameters. Here the hooks are switched off for a time and modules read
plain weights: whole ones, which every rank then holds, or ones that are gathered from the ranks' shards wherever a module reads
them (`vitscope.core.sharding.differentiable_gather`), so that a rank holds its shards alone between the passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vitscope.core.sharding.differentiable_gather import ShardLayout, gather
from vitscope.runtime import distributed
from vitscope.runtime.torch_internals import (
    forward_hook_registries,
    is_dtensor,
    is_fully_shard_hook,
    parameter_registry,
    unsharded_class,
)


class LocalShard(nn.Parameter):
    """This rank's rows of a sharded parameter, as a leaf of the graph that shares their memory.

    Attributes:
        layout_of_whole: Place of the rows in the whole parameter.
    """

    layout_of_whole: ShardLayout


def is_sharded(model: nn.Module) -> bool:
    """Tell whether a model has parameters that are sharded over ranks."""
    return any(is_dtensor(p) for p in model.parameters())


def whole_shape(p: Tensor) -> torch.Size:
    """Return the shape of the whole parameter that ``p`` is, or is a shard of."""
    return p.layout_of_whole.shape if isinstance(p, LocalShard) else p.shape


def local_part(whole: Tensor, p: Tensor) -> Tensor:
    """Return of a tensor in the whole parameter's shape the part that belongs to ``p``, as a view."""
    return p.layout_of_whole.local_part(whole) if isinstance(p, LocalShard) else whole


def pad_to_whole(part: Tensor, p: Tensor) -> Tensor:
    """Return a tensor in the whole parameter's shape: ``part`` in the place of ``p``, zeros elsewhere."""
    if not isinstance(p, LocalShard):
        return part
    whole = part.new_zeros(p.layout_of_whole.shape)
    p.layout_of_whole.local_part(whole).copy_(part)
    return whole


@contextmanager
def plain_weights(model: nn.Module, *, keeps_shards: bool = False) -> Iterator[None]:
    """Let a model of sharded weights read plain ones; modules, parameters and hooks are given back as they were.

    Whole weights are copies. Any other model is left alone.

    Args:
        model: The model; all ranks enter together.
        keeps_shards: Whether to gather weights where modules read them, in place of once: ``named_parameters`` then gives
            `LocalShard`s.

    Raises:
        ValueError: A layout other than shards along one axis over all ranks.
    """
    if not is_sharded(model):
        yield
        return
    for module in model.modules():
        reshard = getattr(module, "reshard", None)
        if callable(reshard) and unsharded_class(module) is not None:
            reshard()  # what a pass without a gradient has left gathered
    plain: dict[int, nn.Parameter] = {}
    for name, p in model.named_parameters():
        plain[id(p)] = _local_shard(name, p) if keeps_shards and is_dtensor(p) else _whole(p)
    with _without_shard_hooks(model), _reading_plain(model, plain):
        yield


@contextmanager
def _without_shard_hooks(model: nn.Module) -> Iterator[None]:
    """Take away the hooks in which ``fully_shard`` gathers parameters; give all hooks back in their order."""
    registries = [registry for module in model.modules() for registry in forward_hook_registries(module)]
    hooks = [(registry, dict(registry)) for registry in registries]
    try:
        for registry, entries in hooks:
            for key, hook in entries.items():
                if is_fully_shard_hook(hook):
                    del registry[key]
        yield
    finally:
        for registry, entries in hooks:
            registry.clear()
            registry.update(entries)


@contextmanager
def _reading_plain(model: nn.Module, plain: Mapping[int, nn.Parameter]) -> Iterator[None]:
    """Let modules read plain parameters, given by the id of their own ones; classes and parameters are given back."""
    changed: list[tuple[nn.Module, type, dict[str, nn.Parameter | None]]] = []
    try:
        for module in model.modules():
            registry = parameter_registry(module)
            changed.append((module, type(module), dict(registry)))
            _read_plain(module, {key: plain[id(p)] for key, p in registry.items() if p is not None})
        yield
    finally:
        for module, kind, parameters in changed:
            module.__class__ = kind
            registry = parameter_registry(module)
            registry.clear()
            registry.update(parameters)


def _read_plain(module: nn.Module, places: Mapping[str, nn.Parameter]) -> None:
    """Give a module plain parameters by name; attributes of those that are shards return the gathered weight.

    A property has to stand in the class, so the module gets a subclass of its own class without the sharding.
    """
    kind = unsharded_class(module) or type(module)
    properties = {key: _gathered(key, p.layout_of_whole) for key, p in places.items() if isinstance(p, LocalShard)}
    parameter_registry(module).update(places)
    if properties:
        kind = type(kind.__name__, (kind,), {**properties, "__module__": kind.__module__})
    module.__class__ = kind


def _gathered(key: str, layout: ShardLayout) -> property:
    """Return a property of the whole weight, gathered from what the module's registry holds under ``key``."""

    def whole(module: nn.Module) -> Tensor:
        shard = parameter_registry(module)[key]
        assert shard is not None
        return gather(shard, layout)

    return property(whole)


def _whole(p: nn.Parameter) -> nn.Parameter:
    """Return a copy of a sharded parameter as a whole; any other one itself."""
    if not is_dtensor(p):
        return p
    whole: Any = p.detach()
    return nn.Parameter(whole.full_tensor().clone(), requires_grad=p.requires_grad)


def _local_shard(name: str, p: Any) -> nn.Parameter:
    """Return this rank's rows of a sharded parameter, which share its memory; a replicated one as it is.

    Raises:
        ValueError: Shards of another layout than equal numbers of rows along one axis over all ranks.
    """
    mesh, (placement, *others) = p.device_mesh, p.placements
    if others or not (placement.is_shard() or placement.is_replicate()) or mesh.size() != distributed.world_size():
        raise ValueError(
            f"Expected weights that are sharded along one axis over all ranks, received {name!r} with placements "
            f"{tuple(p.placements)} on a mesh of shape {tuple(mesh.shape)}."
        )
    local = p.detach().to_local()
    if placement.is_replicate():
        return nn.Parameter(local, requires_grad=p.requires_grad)
    shard = LocalShard(local, requires_grad=p.requires_grad)
    shard.layout_of_whole = ShardLayout(p.shape, placement.dim, mesh.get_local_rank(), mesh.size(), mesh.get_group())
    if tuple(local.shape) != tuple(shard.layout_of_whole.local_part(torch.empty(p.shape, device="meta")).shape):
        raise ValueError(
            f"Expected shards of equal numbers of rows, received {tuple(local.shape)} of {name!r} {tuple(p.shape)}."
        )
    return shard
