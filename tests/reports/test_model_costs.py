from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from tests.fixtures.runs.report_runs import configuration
from vitscope.config import factories, instantiate, model_facts
from vitscope.reports import run_index
from vitscope.reports.model_costs import Cost, Costs, count
from vitscope.runs import run_search


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


def test_a_model_s_facts_are_those_of_the_paper(tmp_path: Path) -> None:
    cfg = configuration("alternet", 0, data__num_classes=100, model__num_classes=100)
    facts = model_facts.of_model(OmegaConf.create(cfg))
    assert (facts["parameters"], facts["family"], facts["why"]) == (9_499_063, "alternet", "")  # the paper's count
    assert facts["flops"] > 0


def test_a_model_that_cannot_be_built_says_why() -> None:
    facts = model_facts.of_model(OmegaConf.create(configuration("vit", 0, model__patch_size=7)))
    assert (facts["parameters"], facts["flops"]) == (None, None)
    assert "7" in facts["why"]


@pytest.mark.parametrize(
    ("noted", "cost"),
    [
        ({"parameters": 10, "flops": 20}, Cost(10, 20)),
        ({"parameters": None, "flops": None, "why": "no"}, Cost(None, None, "no")),
        ({"parameters": "10", "flops": 20}, Cost(None, None, "its provenance holds no count")),
        ({"parameters": -1, "flops": 2.5}, Cost(None, None, "its provenance holds no count")),
        (5, Cost(None, None, model_facts.UNRECORDED)),
    ],
)
def test_a_report_reads_costs_from_provenance(
    noted: object, cost: Cost, make_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No model is built from a run's configuration, which may be a stranger's."""

    def built(*args: object, **kwargs: object) -> None:
        raise AssertionError("a report built a model")

    monkeypatch.setattr(factories, "model", built)
    monkeypatch.setattr(instantiate, "instantiate", built)
    make_run("vit", facts={"model": noted}, model___target_="vitscope.models.timm_model", model__name="local-dir:x")
    (entry,) = run_index.collect(run_search.every(tmp_path / "runs"))
    assert Costs().of(entry) == cost
    assert entry.kin == "local-dir:x"
