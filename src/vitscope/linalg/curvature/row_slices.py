"""Some rows of a parameter as a parameter of their own, so that derivatives are taken by these rows alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class RowSlice(nn.Parameter):
    """Rows of a parameter as a leaf of the graph: the weights of the network are made from it at every pass.

    Attributes:
        whole_name: Name of the whole parameter.
        whole: Values of the whole parameter.
        rows: Numbers of the rows along the first axis, ascending.
    """

    whole_name: str
    whole: Tensor
    rows: Tensor


def row_slice(name: str, whole: Tensor, rows: Tensor) -> RowSlice:
    """Return rows of a parameter as a leaf.

    Args:
        name: Name of the whole parameter.
        whole: The parameter ``(n, ...)``.
        rows: Ascending numbers of some of the ``n`` rows.
    """
    rows = rows.to(whole.device)
    part = RowSlice(whole.detach()[rows].clone())
    part.whole_name, part.whole, part.rows = name, whole.detach(), rows
    return part


def rows_of(values: Tensor, parameter: Tensor) -> Tensor:
    """Return of ``values``, in the shape of a whole parameter, those that belong to ``parameter``: all, or the slice's rows."""
    return values[parameter.rows.to(values.device)] if isinstance(parameter, RowSlice) else values


def whole_of(parameter: Tensor) -> Tensor:
    """Return the whole parameter's values, without a graph."""
    return parameter.whole if isinstance(parameter, RowSlice) else parameter.detach()


def whole_name(name: str, parameter: Tensor) -> str:
    """Return the name of the whole parameter."""
    return parameter.whole_name if isinstance(parameter, RowSlice) else name


def whole_point(point: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``point`` with the whole parameter in place of each slice.

    Args:
        point: Tensors by name, those of slices among them.
        parameters: The analyzed parameters, some of them slices, by the same names.
    """
    merged = dict(point)
    for name, p in parameters.items():
        if isinstance(p, RowSlice):
            merged[p.whole_name] = p.whole.index_copy(0, p.rows, merged.pop(name))
    return merged


@contextmanager
def sliced_parameters(model: nn.Module, slices: Mapping[str, RowSlice]) -> Iterator[None]:
    """Let a model read its weights from slices: they stand in ``named_parameters`` in place of the whole parameters.

    Modules and parameters are given back as they were.

    Args:
        model: The model.
        slices: The slices by name, which is that of the whole parameter with an ending that is no attribute's.
    """
    by_whole = {part.whole_name: (name.rpartition(".")[2], part) for name, part in slices.items()}
    originals = {id(p): by_whole[name] for name, p in model.named_parameters() if name in by_whole}
    changed: list[tuple[nn.Module, type, dict[str, nn.Parameter | None]]] = []
    try:
        for module in model.modules():
            places = {key: originals[id(p)] for key, p in module._parameters.items() if id(p) in originals}
            if places:
                changed.append((module, type(module), dict(module._parameters)))
                _read_from_slices(module, places)
        yield
    finally:
        for module, kind, parameters in changed:
            module.__class__ = kind
            module._parameters.clear()
            module._parameters.update(parameters)


def _read_from_slices(module: nn.Module, places: Mapping[str, tuple[str, RowSlice]]) -> None:
    """Replace parameters of a module by slices, and its attributes by what is put together from them."""
    kind = type(module)
    properties = {attribute: _property(key, part) for attribute, (key, part) in places.items()}
    ordered = [(places[key][0], places[key][1]) if key in places else (key, p) for key, p in module._parameters.items()]
    module._parameters.clear()
    module._parameters.update(ordered)
    module.__class__ = type(kind.__name__, (kind,), {**properties, "__module__": kind.__module__})


def _property(key: str, part: RowSlice) -> property:
    """Return a property of the whole weight, put together from the module's slice ``key`` and the other rows."""
    n = len(part.whole)
    is_other = torch.ones(n, dtype=torch.bool, device=part.rows.device)
    is_other[part.rows] = False
    others = part.whole[is_other]
    # from rows of the slice, followed by the others, to those of the whole
    order = torch.cat((part.rows, is_other.nonzero()[:, 0])).argsort()

    def whole(module: nn.Module) -> Tensor:
        current = module._parameters[key]
        assert current is not None
        return torch.cat((current, others)).index_select(0, order)

    return property(whole)
