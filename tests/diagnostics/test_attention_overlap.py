"""Masks of attention maps at their bounds: shares that are reached exactly, and positions half of whose pixels are covered."""

from __future__ import annotations

import pytest
import torch

from vitscope.diagnostics.attention._overlap import covered, mass_masks


@pytest.mark.parametrize("n", [3, 6, 7, 10, 12, 49])
def test_a_share_of_k_of_n_equal_positions_takes_k_of_them(n: int) -> None:
    """Sums of 1 / n miss k / n by a rounding, which is no reason for another position."""
    even = torch.full((1, n), 1 / n, dtype=torch.float64)
    counts = [int(mass_masks(even, k / n).sum()) for k in range(1, n + 1)]
    assert counts == list(range(1, n + 1))


def test_a_position_is_covered_where_half_of_its_pixels_are() -> None:
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    mask[0, 0, :2] = True  # 2 of the 4 pixels of the first of 2 x 3 positions
    mask[0, 1, 2] = True  # 1 of 4
    mask[0, 2:, 4:] = True  # all
    assert covered(mask, (2, 3))[0, 0].tolist() == [[True, False, False], [False, False, True]]
