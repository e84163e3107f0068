"""Positions of the queries and keys of an attention map in the image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitscope.models.structure.attention_units import AttentionUnit

#: the mode of `torch.cdist` in which a position is at distance 0 of itself, and not at the root of a rounding error
_EXACT = "donot_use_mm_for_euclid_dist"


@dataclass(frozen=True)
class Geometry:
    """The places of one unit's tokens.

    Attributes:
        distance: (Q, K) pixels between the places of query and key; 0 where one of them has no place. In shifted windows
            (n_windows, 1, Q, K), as a window that is wrapped around holds positions of opposite edges of the map.
        queries: (n_windows, Q) True for queries that lie in the map: no class token, no padding.
        keys: (n_windows, K) the same for keys.
        uniform: Mean over queries of the mean distance of the keys on the map, or in a window that is not shifted: what
            equal weights would give.
    """

    distance: Tensor
    queries: Tensor
    keys: Tensor
    uniform: float


def geometry(
    n_queries: int,
    n_keys: int,
    n_windows: int,
    *,
    grid: tuple[int, int],
    window: tuple[int, int] | None,
    n_prefix: int,
    image: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
) -> Geometry:
    """Return the places of queries and keys.

    Args:
        n_queries: Rows of one attention map.
        n_keys: Number of columns; those beyond the tokens (a padding key) have no place.
        n_windows: Attention maps an image; 1 without windows.
        grid: Rows and columns of the feature map.
        window: Rows and columns of a window; None for attention over the whole map.
        n_prefix: Tokens without a place in front.
        image: Height and width in pixels.
        shift: Rows and columns by which the map is rolled up and left before it is padded and cut into windows.

    Raises:
        ValueError: Numbers that do not fit together.
    """
    h, w = window if window is not None else grid
    prefix = n_prefix if window is None else 0
    tokens = prefix + h * w
    if n_queries != tokens or n_keys < tokens:
        raise ValueError(
            f"Expected attention maps of {tokens} queries, received {n_queries} queries and {n_keys} keys."
        )
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    place = torch.zeros(n_keys, 2, dtype=torch.float64)
    pitch = torch.tensor([image[0] / grid[0], image[1] / grid[1]], dtype=torch.float64)
    place[prefix:tokens] = torch.stack([rows.flatten(), columns.flatten()], dim=1) * pitch
    is_on_map = torch.zeros(n_keys, dtype=torch.bool)
    is_on_map[prefix:tokens] = True
    both_on_map = is_on_map[:n_queries, None] & is_on_map
    distance = torch.cdist(place[:n_queries], place, compute_mode=_EXACT) * both_on_map  # (queries, keys)
    inside = _inside(grid, window, n_windows) if window is not None else torch.ones(1, h * w, dtype=torch.bool)
    keys = is_on_map.repeat(n_windows, 1)
    keys[:, prefix:tokens] &= inside
    queries = keys[:, :n_queries]
    pairs = (queries[:, :, None] & keys[:, None, :]).double()  # (n_windows, Q, K)
    by_query = (pairs * distance).sum(dim=-1) / pairs.sum(dim=-1).clamp_min(1)  # (n_windows, Q)
    uniform = float(by_query[queries].mean())
    if window is not None and any(shift):
        places = _shifted_places(grid, window, shift) * pitch  # (n_windows, area, 2)
        distance = torch.zeros(n_windows, 1, n_queries, n_keys, dtype=torch.float64)
        distance[..., :tokens, :tokens] = torch.cdist(places, places, compute_mode=_EXACT)[:, None]
    return Geometry(distance, queries, keys, uniform)


def geometry_of_tokens(unit: AttentionUnit) -> Geometry:
    """Return the places of the queries and keys of global attention as a forward pass has shown them.

    Tokens without a place may stand anywhere, and keys may be of a coarser grid.

    Args:
        unit: Attention in one window, the whole map.
    """
    places = []
    for tokens, grid in ((unit.queries[0], unit.query_grid), (unit.keys[0], unit.key_grid)):
        pitch = torch.tensor([side / cells for side, cells in zip(unit.image_size, grid)], dtype=torch.float64)
        places.append((tokens + 0.5) * pitch)  # (tokens, 2) centers of the positions
    queries, keys = unit.queries[..., 0] >= 0, unit.keys[..., 0] >= 0  # (1, tokens)
    pairs = queries[0, :, None] & keys[0]
    distance = torch.cdist(*places, compute_mode=_EXACT) * pairs
    by_query = distance.sum(dim=-1) / pairs.sum(dim=-1).clamp_min(1)
    return Geometry(distance, queries, keys, float(by_query[queries[0]].mean()))


def _shifted_places(grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """Return row and column on the map of each position of each shifted window ``(n_windows, area, 2)``; 0 for padding."""
    sides = []
    for size, side, step in zip(grid, window, shift):
        rolled = torch.zeros(-(-size // side) * side, dtype=torch.float64)
        rolled[:size] = torch.arange(size).roll(-step)
        sides.append(rolled.reshape(-1, side))  # (windows along this side, side)
    rows = sides[0][:, None, :, None].expand(-1, len(sides[1]), -1, window[1])  # (down, right, rows, columns)
    columns = sides[1][None, :, None, :].expand(len(sides[0]), -1, window[0], -1)
    return torch.stack([rows, columns], dim=-1).reshape(-1, window[0] * window[1], 2)


def _inside(grid: tuple[int, int], window: tuple[int, int], n_windows: int) -> Tensor:
    """Return which positions of each window lie in the map: padding is at the bottom and right, ``(n_windows, area)``."""
    down, right = -(-grid[0] // window[0]), -(-grid[1] // window[1])
    if down * right != n_windows:
        raise ValueError(f"Expected {down * right} windows of {window} in a map of {grid}, received {n_windows}.")
    inside = torch.zeros(down * window[0], right * window[1], dtype=torch.bool)
    inside[: grid[0], : grid[1]] = True
    cut = inside.reshape(down, window[0], right, window[1]).transpose(1, 2)  # (down, right, rows, columns)
    return cut.reshape(n_windows, -1)
