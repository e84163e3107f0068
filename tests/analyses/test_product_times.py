"""The time of an analysis of many products is predicted from one of them, when it starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fixtures.configs.configurations import composed
from vitscope.analyses import spec
from vitscope.analyses.prediction import cost_prediction, time_prediction
from vitscope.config import factories
from vitscope.core.cost.measure_cost import Count
from vitscope.linalg.curvature import product_cost

DIGITS = ["model=vit", "data=digits", "model.depth=1", "model.patch_size=16", "probe.n_images=48"]


def predicted(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Mapping[str, Count]:
    """Return the predicted seconds where the clock goes on by 1 s whenever it is read: then a piece of work takes 1 s."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(cost_prediction, "clock", lambda: float(next(ticks)))
    cfg = composed("analyze", *DIGITS, *overrides)
    network, data = factories.model(cfg), factories.data(cfg)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    seconds = cost_prediction.predict_times(cfg, spec.parse(cfg.analysis), network, data)
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    return seconds


def test_products_times_the_time_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = predicted(monkeypatch, "analysis=[hessian,fourier]")
    assert list(seconds) == ["hessian"]  # Fourier analyses make no products
    # three batches of 16: the expected products of a search for five values, beside one gradient or its graph for each batch
    # and the checks before them
    products = 3 * product_cost.expected_search_products(5)
    assert products + 3 <= seconds["hessian"].expected <= products + 3 + 5
    assert 3 * 200 + 3 <= seconds["hessian"].high <= 3 * 200 + 3 + 5  # max_products


def test_few_products_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert predicted(monkeypatch, "analysis=[hessian]", "analysis.hessian.max_products=6") == {}
    seconds = predicted(monkeypatch, "analysis=[hessian]", "analysis.hessian.max_products=7")  # 21 products
    assert list(seconds) == ["hessian"]


def test_a_limit_bounds_the_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = predicted(monkeypatch, "analysis=[hessian]", "analysis.hessian.budget_s=20")
    assert seconds["hessian"] == Count(20.0, 20.0, 20.0)


@pytest.mark.parametrize(("expected", "hint"), [(30.0, ""), (170.0, "; analysis.hessian.budget_s=60 sets a limit")])
def test_a_long_time_is_said_with_the_key_that_shortens_it(expected: float, hint: str) -> None:
    cfg = composed("analyze", *DIGITS, "analysis=[hessian,fourier]")

    def time_products(analyses: Any) -> dict[str, Count]:
        assert [analysis.name for analysis in analyses] == ["hessian", "fourier"]
        return {"hessian": Count(expected, 10.0, 1800.0)}

    prediction = time_prediction.predict(
        spec.parse(cfg.analysis), factories.model(cfg), factories.data(cfg), (), time_products
    )
    said = {30.0: "30 s", 170.0: "3 min"}[expected]
    assert str(prediction) == (
        f"predicted time (one product timed): hessian {said} (at most 30 min{hint}); no prediction for fourier"
    )


def test_analyze_says_the_predicted_time_of_products(call, tmp_path: Path, capsys) -> None:
    arguments = [*DIGITS, "analysis=[hessian]", "analysis.hessian.n_top=1", "analysis.hessian.max_products=8"]
    assert call("analyze", *arguments, f"paths.runs={tmp_path}/runs") == 0
    printed = capsys.readouterr()
    device = next(line for line in printed.err.splitlines() if line.startswith("device: "))
    assert "; predicted time (one product timed): hessian " in device
    figure = printed.out.splitlines()[-1].removeprefix("figures (PDF and CSV beside each): ")
    assert Path(figure).name == "hessian-end.png"
    assert all(Path(figure).with_suffix(ending).is_file() for ending in (".png", ".pdf", ".csv"))
