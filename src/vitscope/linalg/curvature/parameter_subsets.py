"""Parameters by what they belong to: attention against convolutions, one stage, one layer, or queries, keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import get_args

import torch
from torch import Tensor, nn

from vitscope.core.tap import Kind
from vitscope.linalg.curvature.attention_rows import AttentionParts, attention_parts
from vitscope.linalg.curvature.attention_trace import LayerCall
from vitscope.linalg.curvature.row_slices import RowSlice, row_slice, sliced_parameters

Subset = str | list[str] | None
Images = Callable[[], Tensor | None]

#: values of ``part:``: of attention and of units of kind ``mlp``
PARTS = ("q", "k", "v", "proj", "mlp_in", "mlp_out")
#: a larger share of trainable values counts as the whole network: fixed position embeddings and the like are the rest
LARGEST_TRAINABLE_SHARE = 0.9


@dataclass(frozen=True)
class Selection:
    """The part of one parameter that a subset has.

    Attributes:
        rows: Ascending numbers of rows along the first axis; None for the whole parameter.
        parts: The names of parts that they are, for the slice's own name.
    """

    rows: Tensor | None
    parts: tuple[str, ...] = ()


def select_parameters(
    model: nn.Module, parameters: Mapping[str, Tensor], subset: Subset, images: Images | None = None
) -> dict[str, Selection]:
    """Return which of ``parameters``, and which of their rows, ``subset`` names, in the model's order.

    Args:
        model: The model of the parameters, in eval mode.
        parameters: The parameters by name.
        subset: None for all; else one or several of ``kind:msa`` (``stem conv msa mlp pool head``), ``stage:2``,
            ``layer:blocks.3.attn`` (a module's own and its children's), ``part:q`` (``q k v proj mlp_in mlp_out``), or a pattern
            such as ``*.qkv.weight``. Several are united.
        images: Function that returns the (B, C, H, W) that the model takes; called for ``kind:``, ``stage:`` and ``part:`` alone.

    Raises:
        ValueError: Nothing matches, with what there is; attention whose queries, keys and values are not certain, by name.
    """
    if subset is None or subset == "all":
        return {name: Selection(None) for name in parameters}
    united: dict[str, Selection] = {}
    parts = _Parts(model, images)
    for rule in [subset] if isinstance(subset, str) else subset:
        for name, selection in _matching(model, parameters, rule, parts).items():
            united[name] = _union(united[name], selection, len(parameters[name])) if name in united else selection
    return {name: united[name] for name in parameters if name in united}


@contextmanager
def analyzed_parameters(
    model: nn.Module, parameters: Mapping[str, Tensor], subset: Subset, images: Images | None = None
) -> Iterator[dict[str, Tensor]]:
    """Yield the parameters of a subset as leaves of the graph: rows of one are a leaf of their own while the context is open.

    Args:
        model: The guarded model.
        parameters: The parameters by name.
        subset: The subset, as for `select_parameters`.
        images: The images, as for `select_parameters`.

    Raises:
        ValueError: As `select_parameters`.
    """
    selected = select_parameters(model, parameters, subset, images)
    analyzed: dict[str, Tensor] = {}
    slices: dict[str, RowSlice] = {}
    for name, selection in selected.items():
        if selection.rows is None:
            analyzed[name] = parameters[name]
        else:
            slice_name = f"{name}[{','.join(selection.parts)}]"
            slices[slice_name] = row_slice(name, parameters[name], selection.rows)
            analyzed[slice_name] = slices[slice_name]
    with sliced_parameters(model, slices):
        yield analyzed


def check_subset(model: nn.Module, subset: Subset) -> None:
    """Check the words and patterns of a subset as far as that takes no forward pass, see `select_parameters`.

    Raises:
        ValueError: An unknown kind, part or stage, or a pattern or layer without a parameter that requires gradients.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for rule in [subset] if isinstance(subset, str) else subset or ():
        what, _, value = rule.partition(":")
        if what == "part":
            _check_part(value, rule)
        elif what == "kind" and value and value not in get_args(Kind):
            raise ValueError(f"Expected a kind to be one of {', '.join(get_args(Kind))}, received {rule!r}.")
        elif what == "stage" and value and not value.isdigit():
            raise ValueError(f"Expected the number of a stage, 0 for the stem, received {rule!r}.")
        elif what not in ("kind", "stage") and rule != "all":
            _matching(model, trainable, rule, _Parts(model, None))


def part_sizes(model: nn.Module, parameters: Mapping[str, Tensor], images: Images) -> dict[str, int]:
    """Return the number of entries of each part that has any among ``parameters``, in the order of `PARTS`.

    Raises:
        ValueError: Attention whose queries, keys and values are not certain, by name.
    """
    observed = _Parts(model, images)
    sizes = {}
    for part in PARTS:
        rows = {name: r for name, r in observed.rows(part).items() if name in parameters}
        sizes[part] = sum(len(r) * parameters[name][:1].numel() for name, r in rows.items())
    return {part: size for part, size in sizes.items() if size}


def _union(one: Selection, other: Selection, n_rows: int) -> Selection:
    if one.rows is None or other.rows is None:
        return Selection(None)
    rows = torch.cat((one.rows, other.rows)).unique()
    parts = tuple(part for part in PARTS if part in (*one.parts, *other.parts))
    return Selection(None if len(rows) == n_rows else rows, parts)


class _Parts:
    """The parts of a model's parameters, observed when they are first asked for."""

    def __init__(self, model: nn.Module, images: Images | None) -> None:
        self.model, self._images = model, images

    @cached_property
    def images(self) -> Tensor:
        if self.known_images is None:
            raise ValueError("Expected images of the model's size to tell parts apart, received None.")
        return self.known_images

    @cached_property
    def known_images(self) -> Tensor | None:
        """The images; None where there are none."""
        return self._images() if self._images is not None else None

    @cached_property
    def attention(self) -> AttentionParts:
        return attention_parts(self.model, self.images[:1])

    def rows(self, part: str) -> dict[str, Tensor]:
        """Return the rows of a part by name.

        Raises:
            ValueError: Attention in which it is not certain.
        """
        if part.startswith("mlp"):
            return self._of_mlps(part)
        for name, reason in self.attention.unclear.items():
            raise ValueError(
                f"Expected attention whose rows of queries, keys and values are certain for part:{part}, received {name!r}: "
                f"{reason}; choose parameters by layer:{name} or a name pattern."
            )
        return self.attention.rows[part]

    def _of_mlps(self, part: str) -> dict[str, Tensor]:
        from vitscope.models.structure.parameter_groups import parameter_kinds

        kinds = parameter_kinds(self.model, self.images)
        layers = [layer for layer in self.attention.layers if kinds.get(layer.weight) == "mlp"]
        rows: dict[str, Tensor] = {}
        for group in _mlps(layers):
            first, last = group[0], group[-1]
            ends = [layer for layer in group if layer.input is first.input] if part == "mlp_in" else [last]
            if last.input is first.input:  # one layer alone, or several side by side: neither the way in nor out
                continue
            for layer in ends:
                names = [layer.weight, *(n for n, p in self.model.named_parameters() if p is layer.bias)]
                rows.update({name: torch.arange(layer.output.shape[layer.channels]) for name in names})
        return rows


def _mlps(layers: list[LayerCall]) -> list[list[LayerCall]]:
    """Return the layers of each MLP in the order of their calls: those that share the innermost module that holds several."""
    weights = {layer.weight for layer in layers}
    groups: dict[str, list[LayerCall]] = {}
    for layer in layers:
        path = layer.weight.rpartition(".")[0].rpartition(".")[0]
        while path and sum(weight.startswith(f"{path}.") for weight in weights) < 2:
            path = path.rpartition(".")[0]
        groups.setdefault(path, []).append(layer)
    return list(groups.values())


def _matching(model: nn.Module, parameters: Mapping[str, Tensor], rule: str, parts: _Parts) -> dict[str, Selection]:
    """Return what a rule selects, by parameter name; a rule that selects nothing is refused."""
    what, _, value = rule.partition(":")
    if what == "part":
        return _rows_of_part(parameters, value, rule, parts)
    names = list(parameters)
    if what in ("kind", "stage") and value:
        from vitscope.models.structure.parameter_groups import parameter_kinds, parameter_stages

        find_groups = parameter_kinds if what == "kind" else parameter_stages
        groups = find_groups(model, parts.known_images)
        matches = {name for name in names if str(groups.get(name)) == value}
        candidates = sorted({str(groups.get(name)) for name in names})
    elif what == "layer" and value:
        matches = {name for name in names if name == value or name.startswith(value + ".")}
        candidates = sorted({name.rpartition(".")[0] for name in names})
    else:
        matches = {name for name in names if fnmatchcase(name, rule)}
        candidates = names
    if not matches:
        listed = ", ".join(candidates[:12]) + (", ..." if len(candidates) > 12 else "")
        raise ValueError(f"Expected a parameter subset that matches something, received {rule!r}; there are: {listed}.")
    return {name: Selection(None) for name in names if name in matches}


def _check_part(part: str, rule: str) -> None:
    if part not in PARTS:
        raise ValueError(f"Expected a part to be one of {', '.join(PARTS)}, received {rule!r}.")


def _rows_of_part(parameters: Mapping[str, Tensor], part: str, rule: str, parts: _Parts) -> dict[str, Selection]:
    """Return the rows of parameters that belong to a part of attention or MLPs; None stands for all rows."""
    _check_part(part, rule)
    rows = parts.rows(part)
    selections = {}
    for name, p in parameters.items():
        if name in rows:
            is_whole = len(rows[name]) == len(p)
            selections[name] = Selection(None if is_whole else rows[name], (part,))
    if not selections:
        where = "attention" if not part.startswith("mlp") else "layers of units of kind mlp"
        raise ValueError(
            f"Expected a model with {where} among its trainable parameters for {rule!r}, received one without."
        )
    return selections


def subset_name(model: nn.Module, subset: Subset = None) -> str:
    """Return the analyzed parameters as the objective card writes them: the subset, and whether much of the network is frozen.

    No measure analyzes frozen parameters. A network with many of them (`LARGEST_TRAINABLE_SHARE`) has the card ``trainable`` in
    place of ``all``, and another subset is followed by that word.
    """
    if subset is None:
        name = "all"
    elif isinstance(subset, str):
        name = subset
    else:
        name = ", ".join(subset)
    n_values = sum(p.numel() for p in model.parameters())
    n_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not n_trainable or n_trainable > LARGEST_TRAINABLE_SHARE * n_values:
        return name
    return "trainable" if name == "all" else f"{name} (trainable)"
