"""Attention that tokens receive: put back in place from windows, on single tokens, and beside padding."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitscope.diagnostics.tokens._attention_sinks import AttentionSinks, sink_fields
from vitscope.models.structure.attention_units import AttentionUnit


def unit_of(keys: Tensor, queries: Tensor, n_prefix: int = 0) -> AttentionUnit:
    unit: Any = SimpleNamespace(name="b", n_prefix=n_prefix, depth=0.5)
    grids = [(int(side[..., 0].max()) + 1, int(side[..., 1].max()) + 1) for side in (queries, keys)]
    return AttentionUnit(unit, nn.Identity(), 1, queries, keys, *grids, (32, 32), False, torch.arange(len(keys)))


def test_attention_received_in_windows_is_put_back_in_place_without_padding() -> None:
    cells = torch.tensor([[[0, 0], [0, 1]], [[0, 2], [-1, -1]]])  # a map of 1 x 3 in windows of 1 x 2
    sinks = AttentionSinks(unit_of(cells, cells), None)
    nan = float("nan")
    first = torch.tensor([[[0.9, 0.1], [0.7, 0.3]], [[0.5, 0.5], [nan, nan]]])  # (windows, queries, keys)
    second = torch.tensor([[[0.2, 0.8], [0.2, 0.8]], [[1.0, 0.0], [nan, nan]]])
    weights = torch.stack((first, second))[:, :, None].expand(2, 2, 3, 2, 2)  # (images, windows, heads, ...)
    sinks.add(weights.flatten(0, 1))
    sinks.patch.close(0)
    fields = sink_fields([sinks], ["a", "b"], [np.array([[False, True, False], [True] * 3]), np.zeros((2, 3))], 0, 0.95)
    expected = np.array([[1.6, 0.4, 1.0], [0.4, 1.6, 2.0]])
    np.testing.assert_allclose(fields["attention_received"][0], expected, rtol=1e-6)
    np.testing.assert_allclose(fields["sink_ratio"], [(1.6 + 2.0) / 2], rtol=1e-6)
    np.testing.assert_allclose(fields["attention_artefacts"], [(0.4 + 0.4 + 1.6 + 2.0) / 4], rtol=1e-6)


def test_attention_to_one_token_makes_it_a_sink_and_equal_attention_makes_none() -> None:
    cells = torch.tensor([[[-1, -1], [0, 0], [0, 1], [1, 0], [1, 1]]])
    sinks = AttentionSinks(unit_of(cells, cells, n_prefix=1), None)
    weights = torch.full((2, 2, 5, 5), 0.2)
    weights[1] = 0.0
    weights[1, :, :, 0] = 1.0
    sinks.add(weights)
    sinks.patch.close(0)
    fields = sink_fields([sinks], ["b"], [np.zeros((2, 4), bool)], 2, 0.95)
    np.testing.assert_allclose(fields["attention_received"][0], [[1.0] * 4, [0.0] * 4], rtol=1e-6)
    np.testing.assert_allclose(fields["attention_prefix"], [[3.0, np.nan]], rtol=1e-6)
    np.testing.assert_allclose(fields["sink_ratio"], [3.0], rtol=1e-6)
    assert fields["sink_on_prefix"][0] == 0.5
    assert np.isnan(fields["attention_artefacts"][0])  # no tap before the unit


def test_padding_beside_a_class_token_is_no_prefix_token() -> None:
    cells = torch.tensor([[[-1, -1], [0, 0], [0, 1], [-1, -1]]])  # class token, a map of 1 x 2, padding
    unit = unit_of(cells, cells, n_prefix=1)
    assert unit.prefix_keys.tolist() == unit.prefix_queries.tolist() == [0]
    sinks = AttentionSinks(unit, None)
    sinks.add(torch.tensor([0.7, 0.2, 0.1, 0.0]).expand(2, 3, 4, 4))
    fields = sink_fields([sinks], ["b"], [np.zeros((2, 2), bool)], 1, 0.95)
    np.testing.assert_allclose(fields["attention_prefix"], [[2.8]], rtol=1e-6)
    assert fields["sink_on_prefix"][0] == 1.0
