"""The objective against formulas written out by hand, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import vitscope as vs
from vitscope.core.objective import hard_targets, target_entropy

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.0, 3.0]], dtype=torch.float64)


def by_hand(targets: np.ndarray) -> float:
    logits = LOGITS.numpy()
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return float(-(targets * log_p).sum(1).mean())


def test_index_and_soft_targets_agree() -> None:
    index = vs.Objective().data_loss(LOGITS, torch.tensor([0, 2]))
    soft = vs.Objective().data_loss(LOGITS, torch.eye(3, dtype=torch.float64)[[0, 2]])
    assert index.item() == pytest.approx(by_hand(np.eye(3)[[0, 2]]), abs=1e-14)
    assert soft.item() == pytest.approx(index.item(), abs=1e-14)


def test_smoothing_of_index_targets() -> None:
    smoothed = np.eye(3)[[0, 2]] * 0.9 + 0.1 / 3
    loss = vs.Objective(label_smoothing=0.1).data_loss(LOGITS, torch.tensor([0, 2]))
    assert loss.item() == pytest.approx(by_hand(smoothed), abs=1e-14)


def test_soft_targets_are_not_smoothed_twice() -> None:
    with pytest.raises(ValueError, match=r"label_smoothing=0\.1, received soft targets"):
        vs.Objective(label_smoothing=0.1).data_loss(LOGITS, torch.full((2, 3), 1 / 3))


def test_reductions() -> None:
    y = torch.tensor([0, 2])
    each = vs.Objective().data_loss(LOGITS, y, "none")
    assert each.shape == (2,)
    torch.testing.assert_close(each.mean(), vs.Objective().data_loss(LOGITS, y), rtol=0, atol=1e-14)


@pytest.mark.parametrize("y", [torch.tensor([0]), torch.zeros(2, 4)])
def test_shapes_that_do_not_match(y: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="Expected logits"):
        vs.Objective().data_loss(LOGITS, y)


def test_l2_forms() -> None:
    weights = {"a": torch.tensor([3.0, 4.0], dtype=torch.float64), "b": torch.tensor([[2.0]], dtype=torch.float64)}
    assert vs.Objective(0.1).l2_term(weights).item() == pytest.approx(0.05 * 29)
    assert vs.Objective(0.1, "sum_norm").l2_term(weights).item() == pytest.approx(0.1 * 7)
    assert vs.Objective(0.1, "none").l2_term(weights).item() == 0.0
    scale = {"a": torch.tensor([1.0, 2.0], dtype=torch.float64), "b": torch.tensor([[5.0]], dtype=torch.float64)}
    adamw = vs.Objective(0.1, "adamw", decay_scale=scale).l2_term(weights)
    assert adamw.item() == pytest.approx(0.05 * (9 + 2 * 16 + 5 * 4))


def test_sum_norm_of_a_zero_tensor_has_zero_derivatives() -> None:
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    u = torch.ones(2, dtype=torch.float64, requires_grad=True)
    term = vs.Objective(0.1, "sum_norm").l2_term({"w": w, "u": u})
    first = torch.autograd.grad(term, [w, u], create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in first), [w, u])
    assert first[0].tolist() == [0.0] * 3
    assert second[0].tolist() == [0.0] * 3
    torch.testing.assert_close(first[1], torch.full((2,), 0.1 / math.sqrt(2), dtype=torch.float64))


def test_sum_norm_hessian_matches_its_closed_form() -> None:
    w = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    objective = vs.Objective(0.3, "sum_norm")
    hessian = torch.autograd.functional.hessian(lambda v: objective.l2_term({"w": v}), w)
    unit = w / w.norm()
    expected = 0.3 * (torch.eye(3, dtype=torch.float64) - torch.outer(unit, unit)) / w.norm()
    torch.testing.assert_close(hessian, expected, rtol=0, atol=1e-14)


def test_tied_parameters_count_once() -> None:
    layer = nn.Linear(3, 3, bias=False).double()
    model = nn.Sequential(nn.Flatten(), layer, layer)
    objective = vs.Objective(weight_decay=2.0)
    x, y = torch.randn(2, 3, dtype=torch.float64), torch.tensor([0, 1])
    expected = objective.data_loss(model(x), y) + layer.weight.square().sum()
    torch.testing.assert_close(objective(model, x, y), expected)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"l2": "l1"}, "Expected l2 to be one of"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"weight_decay": float("nan")}, "weight_decay"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"weight_decay": 0.1, "l2": "adamw"}, "decay_scale"),
    ],
)
def test_bad_values(arguments: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        vs.Objective(**arguments)


def test_targets() -> None:
    soft = torch.tensor([[0.7, 0.3, 0.0], [0.1, 0.1, 0.8]])
    assert hard_targets(soft).tolist() == [0, 2]
    assert target_entropy(torch.tensor([0, 1])).tolist() == [0.0, 0.0]
    expected = [-(0.7 * math.log(0.7) + 0.3 * math.log(0.3)), -(0.2 * math.log(0.1) + 0.8 * math.log(0.8))]
    torch.testing.assert_close(target_entropy(soft), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-7)
