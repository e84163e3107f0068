"""Names, order and colors of the results of one figure, as `vs.plot` takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.colors import is_color_like

from vitscope.plotting.style import KIND_COLORS


def named_results(
    results: Any, labels: Sequence[str] | Mapping[str, str] | None = None, order: Sequence[str] | None = None
) -> dict[str, Any]:
    """Return the results of a figure by the names in its legend, in the order of drawing.

    Args:
        results: One result, a sequence of them, or a mapping from names to results.
        labels: A name for each result, or a mapping from its name to another; None for the names of ``results``: ``result 1``,
            ``result 2`` of a sequence, no name of a single one.
        order: Names, as they stand after ``labels``, of those drawn first; the others follow.

    Raises:
        ValueError: No result, labels that are not one a result or not unique, or a name in ``order`` that no result has.
    """
    named = _mapping(results)
    if not named:
        raise ValueError("Expected at least one result, received none.")
    names = list(named)
    if isinstance(labels, Mapping):
        _check_names("labels", labels, names)
        names = [str(labels.get(name, name)) for name in names]
    elif labels is not None:
        labels = [labels] if isinstance(labels, str) else list(labels)
        if len(labels) != len(names):
            raise ValueError(f"Expected as many labels as results ({len(names)}), received {len(labels)}.")
        names = [str(label) for label in labels]
    if len(set(names)) < len(names):
        raise ValueError(f"Expected labels that differ, received {', '.join(names)}.")
    renamed = dict(zip(names, named.values()))
    first_names = [order] if isinstance(order, str) else list(order or ())
    _check_names("order", first_names, names)
    return {name: renamed[name] for name in dict.fromkeys([*first_names, *names])}


def chosen_colors(colors: Any, names: Sequence[str], cycle: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return a color for each result and those of kinds of units, as ``colors=`` of `vs.plot` states them.

    Args:
        colors: A color, one a result in their order, or a mapping from names of results or kinds to colors; None for none.
        names: Names of the results.
        cycle: Colors of the results that a mapping does not name.

    Raises:
        ValueError: No color of matplotlib, fewer colors than results, or a name that no result and no kind has.
    """
    if colors is None:
        return [], {}
    if isinstance(colors, Mapping):
        _check_names("colors", colors, [*names, *KIND_COLORS])
        pairs = {str(name): _checked(color) for name, color in colors.items()}
        result_colors = [pairs.get(name, cycle[i % len(cycle)]) for i, name in enumerate(names)]
        return (result_colors if any(name in pairs for name in names) else []), {
            kind: pairs[kind] for kind in KIND_COLORS if kind in pairs
        }
    listed = [colors] if is_color_like(colors) else colors
    if isinstance(listed, str):
        return [_checked(listed)], {}
    listed = [_checked(color) for color in listed]
    if len(listed) < len(names):
        raise ValueError(f"Expected a color for each of the {len(names)} results, received {len(listed)}.")
    return listed, {}


def _mapping(results: Any) -> dict[str, Any]:
    if isinstance(results, Mapping):
        return {str(name): result for name, result in results.items()}
    if isinstance(results, list | tuple):
        return {"" if len(results) == 1 else f"result {i}": result for i, result in enumerate(results, start=1)}
    return {"": results}


def _check_names(option: str, received: Any, names: Sequence[str]) -> None:
    if unknown := [str(name) for name in received if name not in names]:
        expected = ", ".join(repr(name) for name in names)
        raise ValueError(f"Expected {option} to name some of {expected}, received {', '.join(map(repr, unknown))}.")


def _checked(color: Any) -> str:
    if not is_color_like(color):
        raise ValueError(
            f"Expected colors of matplotlib such as '#0072B2', 'tab:blue' or (0.1, 0.2, 0.5), received {color!r}."
        )
    return color
