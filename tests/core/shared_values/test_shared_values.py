"""Values that measures of one pass share: computed once while they read a map, and right in single precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vitscope.core.shared_values.entropy_terms import entropy_terms, row_entropies
from vitscope.core.shared_values.feature_squares import channel_squares, channel_sums, flat_map, token_squares
from vitscope.core.shared_values.sharing import computed_once, sharing_values

EPS = torch.finfo(torch.float32).eps


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_value_is_computed_once_for_an_object_inside_of_the_context_alone() -> None:
    calls: list[int] = []

    @computed_once
    def length(values: list[int]) -> int:
        calls.append(len(values))
        return len(values)

    one, other = [1], [1]
    assert [length(one), length(one)] == [1, 1]
    assert calls == [1, 1]
    with sharing_values():
        assert [length(one), length(other), length(one)] == [1, 1, 1]
        assert calls == [1] * 4  # equal objects are not the same
        with sharing_values():
            one.append(2)
            assert length(one) == 2
        assert length(one) == 1  # the value of this context
        for size in range(20):
            assert length(list(range(size))) == size  # an object that is gone leaves its identity to no other
    assert length(one) == 2


@pytest.mark.parametrize("layout", ["channels first", "channels last"])
def test_squares_and_sums_of_a_map(layout: str) -> None:
    x = noise(3, 5, 4, 6) + 2
    if layout == "channels last":
        x = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(token_squares(x), x.square().sum(1).flatten(1), rtol=1e-13, atol=0)
    torch.testing.assert_close(channel_squares(x), x.square().sum((2, 3)), rtol=1e-13, atol=0)
    torch.testing.assert_close(channel_sums(x), x.sum((2, 3)), rtol=1e-13, atol=0)
    assert flat_map(x.half()).dtype == torch.float32
    assert channel_sums(x.half()).dtype == torch.float64


def test_entropy_terms_of_zero_and_of_what_is_not_a_number() -> None:
    for dtype in (torch.float32, torch.float64):
        smallest = torch.finfo(dtype).smallest_normal
        terms = entropy_terms(torch.tensor([0.0, 1.0, math.nan, 0.5, smallest / 4], dtype=dtype))
        expected = torch.tensor([0.0, 0.0, math.nan, -0.5 * math.log(2), 0.0], dtype=dtype)
        torch.testing.assert_close(terms, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_row_entropies_in_single_precision(scale: float) -> None:
    p = (scale * noise(4, 3, 50, 785)).softmax(-1).float()
    expected = torch.special.entr(p.double()).sum(-1)
    # Logarithm and product of a term round by an eps each. A row is added up in 64 parts at least, of 13 terms each, whose sums
    # are added in six steps: less than 20 roundings of half an eps.
    assert bool(((row_entropies(entropy_terms(p)) - expected).abs() <= 12 * EPS * expected + 1e-30).all())
