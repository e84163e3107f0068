from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from vitscope import runs
from vitscope.reports import evidence
from vitscope.reports.costs import Cost, Costs, count


class Attention(nn.Module):
    """One head of attention over the pixels, to count by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, dim=-1)  # (B, n, 8)
        return nn.functional.scaled_dot_product_attention(q, k, v)


def test_operations_by_hand() -> None:
    conv = nn.Conv2d(3, 5, 3, padding=1, bias=False)
    assert count(conv, (3, 4, 6)) == Cost(3 * 5 * 9, 2 * 3 * 5 * 9 * 4 * 6)
    n = 4 * 6
    assert count(Attention(), (8, 4, 6)) == Cost(8 * 24, 2 * n * 8 * 24 + 2 * (2 * n * n * 8))


def test_a_run_s_model_is_counted_once_and_kept(make_run: Callable, tmp_path: Path) -> None:
    make_run("alternet", model__depth=18, data__num_classes=100, model__num_classes=100)
    (entry,) = evidence.collect(runs.every(tmp_path / "runs"))
    costs = Costs(tmp_path / "costs.json")
    assert costs.of(entry).parameters == 9_499_063  # PAPER.md section 3
    costs.save()
    (key,) = json.loads((tmp_path / "costs.json").read_text())
    (tmp_path / "costs.json").write_text(json.dumps({key: {"parameters": 1, "flops": 2}}))
    assert Costs(tmp_path / "costs.json").of(entry) == Cost(1, 2)
    (tmp_path / "costs.json").write_text("{")
    assert Costs(tmp_path / "costs.json").of(entry).parameters == 9_499_063


def test_a_model_that_cannot_be_built_says_why(make_run: Callable, tmp_path: Path) -> None:
    make_run("vit", model__patch_size=7)
    (entry,) = evidence.collect(runs.every(tmp_path / "runs"))
    cost = Costs().of(entry)
    assert (cost.parameters, cost.flops) == (None, None)
    assert "7" in cost.why
