"""Divisions of a model's trainable parameters into blocks of the Hessian."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from vitscope.core.probe import Probe
from vitscope.linalg.curvature.curvature_options import CurvatureOptions
from vitscope.linalg.curvature.operator_factory import curvatures
from vitscope.linalg.curvature.parameter_subsets import part_sizes
from vitscope.models.structure.parameter_groups import KIND_ORDER, kinds_of_probe, parameter_kinds, parameter_stages
from vitscope.models.structure.structure_table import structure

Subset = str | list[str]


def parameter_blocks(
    probe: Probe, blocks: str | Sequence[str] | Mapping[str, str | Sequence[str]], options: CurvatureOptions
) -> dict[str, Subset]:
    """Return each block's subset of the parameters, as ``parameters=`` takes it, by the block's name.

    Args:
        probe: The model and its images.
        blocks: Kind of blocks, see `vitscope.hessian_block_densities`.
        options: Options of the operators, whose guard the parts of attention are read in.

    Raises:
        ValueError: An unknown division.
        StructureError: Units or kinds that are not known.
    """
    if isinstance(blocks, Mapping):
        return {str(name): _subset(subset) for name, subset in blocks.items()}
    if not isinstance(blocks, str):
        return {str(subset): _subset(subset) for subset in blocks}
    parameters = probe.parameters()
    if blocks == "layer":
        return _layers(parameters)
    if blocks == "unit":
        with probe.calling():
            units = structure(probe.model, probe.first_images()).units
        trainable = {unit.name: [name for name in unit.parameters if name in parameters] for unit in units}
        return {name: _exact(names) for name, names in trainable.items() if names}
    if blocks == "part":
        with curvatures(probe, options) as operators:
            return {
                part: f"part:{part}" for part in part_sizes(operators.model, operators.parameters, probe.first_images)
            }
    if blocks in ("kind", "stage"):
        with probe.calling():
            find = parameter_kinds if blocks == "kind" else parameter_stages
            places = find(probe.model, probe.first_images())
        groups = {str(places[name]) for name in parameters}
        ordered = sorted(groups, key=lambda group: KIND_ORDER.index(group) if blocks == "kind" else int(group))
        return {group: f"{blocks}:{group}" for group in ordered}
    raise ValueError(
        f"Expected blocks to be layer, unit, kind, stage or part, a list of subsets or a mapping of them, received {blocks!r}."
    )


def n_uncovered(sizes: Mapping[str, int], blocks: Sequence[Mapping[str, int]]) -> int:
    """Return the number of trainable parameters in no block; blocks may overlap.

    Args:
        sizes: Numbers of entries of all trainable parameters, by name.
        blocks: Sizes by name in each block; rows of a parameter are ``name[part]``.
    """
    covered = {name: size for block in blocks for name, size in block.items()}
    rest = dict(sizes)
    for name, size in covered.items():
        parameter = name if name in sizes else name.rpartition("[")[0]
        rest[parameter] = max(0, rest[parameter] - size)
    return sum(rest.values())


def kinds_of_blocks(probe: Probe, names: Sequence[Collection[str]]) -> tuple[str, ...]:
    """Return the kind that most parameters of each block have; empty texts for a model whose units are not known.

    Args:
        probe: The model and its images.
        names: Names of each block's parameters; rows of one are ``name[part]``.
    """
    sizes = {name: p.numel() for name, p in probe.model.named_parameters()}
    blocks = [[name if name in sizes else name.rpartition("[")[0] for name in block] for block in names]
    parameters = list(dict.fromkeys(name for block in blocks for name in block))
    kinds = dict(zip(parameters, kinds_of_probe(probe, parameters, "hessian_block_densities", unknown="")))
    block_kinds = []
    for block in blocks:
        counts: dict[str, int] = {}
        for name in block:
            counts[kinds[name]] = counts.get(kinds[name], 0) + sizes.get(name, 0)
        block_kinds.append(max(counts, key=lambda kind: counts[kind]))
    return tuple(block_kinds)


def _layers(parameters: Mapping[str, Tensor]) -> dict[str, Subset]:
    """Return a block for each matrix or kernel, with the bias that its module has for it."""
    blocks: dict[str, Subset] = {}
    for name, p in parameters.items():
        if p.ndim < 2 or p.numel() == max(p.shape):  # a vector: of a norm, a class token, a scale of channels
            continue
        module, _, key = name.rpartition(".")
        bias = f"{module}.{key.replace('weight', 'bias')}".lstrip(".")
        names = [name, bias] if bias != name and bias in parameters else [name]
        blocks[module if key == "weight" and module else name] = _exact(names)
    return blocks


def _exact(names: Sequence[str]) -> list[str]:
    """Return patterns that match these names alone."""
    return [name.replace("[", "[[]") for name in names]


def _subset(subset: str | Sequence[str]) -> Subset:
    return subset if isinstance(subset, str) else list(subset)
