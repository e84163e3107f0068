"""Place the attention of a chosen query on the map of keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitscope.models.structure.attention_units import AttentionUnit

#: parameters that hold a class token
_CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")

Query = str | Sequence[float]


def check_query(query: Query) -> None:
    """Raise ValueError where a query has another form than a word or the row and column of a pixel."""
    is_pixel = isinstance(query, Sequence) and not isinstance(query, str) and len(query) == 2
    if query not in ("auto", "class", "mean") and not (
        is_pixel and all(isinstance(side, int | float) for side in query)
    ):
        raise ValueError(
            f"Expected query to be 'auto', 'class', 'mean' or the row and column of a pixel, received {query!r}; pass "
            "query=[112, 112]."
        )


def resolved_query(model: nn.Module, units: Sequence[AttentionUnit], query: Query) -> Query:
    """Return the query that is drawn: ``auto`` is the class token where all units have it, else the mean.

    Raises:
        ValueError: A class token that some unit does not have.
    """
    has_class = any(isinstance(getattr(m, name, None), Tensor) for m in model.modules() for name in _CLASS_TOKENS)
    lacking = [unit.name for unit in units if not has_class or not len(unit.prefix_queries)]
    if query == "auto":
        return "class" if units and not lacking else "mean"
    if query == "class" and lacking:
        raise ValueError(
            f"Expected a class token for query='class', received {lacking[0]!r} without one; pass query='mean' or the pixel of a "
            "position."
        )
    return query


def selection(unit: AttentionUnit, query: Query) -> Tensor:
    """Return the weights of a unit's queries (n_windows, n_queries), which sum to 1.

    Args:
        unit: The unit and the positions of its tokens.
        query: ``class`` for its class token, ``mean`` for all on the map alike, or row and column of a pixel of the image.

    Raises:
        ValueError: A pixel outside of the image, or a unit without queries on the map.
    """
    on_map = unit.queries[..., 0] >= 0
    shares = torch.zeros(on_map.shape, dtype=torch.float64)
    if query == "class":
        shares[0, unit.prefix_queries[0]] = 1.0  # in front of distillation and register tokens
        return shares
    if not bool(on_map.any()):
        raise ValueError(f"Expected queries on the map, received {unit.name!r}, whose only queries are prefix tokens.")
    if query == "mean":
        shares[on_map] = 1.0
    else:
        sides = list(zip(query, unit.image_size, unit.query_grid))
        if not all(0 <= float(pixel) < size for pixel, size, _ in sides):
            height, width = unit.image_size
            raise ValueError(
                f"Expected query to be a pixel of images of {height}x{width}, received {list(query)}; pass "
                f"query=[{height // 2}, {width // 2}]."
            )
        cell = torch.tensor([int(float(pixel) * cells / size) for pixel, size, cells in sides])
        shares[(unit.queries == cell).all(dim=-1)] = 1.0
    return shares / shares.sum()


def placed(weights: Tensor, unit: AttentionUnit, selected: Tensor) -> tuple[Tensor, Tensor]:
    """Return the attention of the selected queries on the map (B, heads, h, w) and on prefix tokens (B, heads, n_prefix).

    Args:
        weights: (B * n_windows, heads, queries, keys).
        unit: The unit and the positions of its tokens.
        selected: (n_windows, queries) from `selection`.
    """
    windows = weights.unflatten(0, (-1, unit.n_windows))  # (B, n_windows, heads, queries, keys)
    selected = selected.to(weights)
    places = selected.nonzero()
    if len(places) == 1:
        window, query = places[0].tolist()
        by_key = windows.new_zeros(*windows.shape[:3], windows.shape[-1])  # (B, n_windows, heads, keys)
        by_key[:, window] = windows[:, window, :, query]
    else:
        if len(places) < selected.numel():
            # queries that are padding may attend to nothing and be NaN: they are chosen away, not multiplied by zero
            windows = torch.where((selected > 0)[:, None, :, None], windows, 0.0)
        by_key = (selected[:, None, None] @ windows)[..., 0, :]
    by_key = by_key.double().transpose(1, 2)  # (B, heads, n_windows, keys)
    prefix = by_key[:, :, 0, unit.prefix_keys.to(weights.device)]
    height, width = unit.key_grid
    cells = (unit.keys[..., 0] * width + unit.keys[..., 1]).flatten().to(weights.device)
    is_on_map = (unit.keys[..., 0] >= 0).flatten().to(weights.device)
    maps = by_key.new_zeros(*by_key.shape[:2], height * width)
    maps.index_add_(2, cells[is_on_map], by_key.flatten(2)[..., is_on_map])  # by key: (B, heads, n_windows * keys)
    return maps.unflatten(2, (height, width)), prefix
