"""A measure that fails on one rank alone fails on all of them: none waits for another, or goes on with other sums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import vitscope as vs
from tests.core.sharding.test_every_measure import LEFT_OUT, batches, kind_of, measured
from tests.core.sharding.test_sharded_weights import network, sharded
from tests.fixtures.programs.processes import results_of_ranks

#: a measure that reads the first batch alone, and one whose images are made anew, so that none equals the batch's
WITHOUT_OWN_BATCH = ("tap_table", "corruption")


def refuse_own_batch(_: nn.Module, args: tuple[Any, ...]) -> None:
    """Fail where rank 1 computes the batch that it alone has."""
    (x,) = args
    own_image = batches()[1][0][0]
    if dist.get_rank() == 1 and isinstance(x, Tensor) and torch.allclose(x[0].double(), own_image, atol=1e-3):
        raise ValueError("unreadable image")


def errors_on_rank(names: list[str]) -> dict[str, str]:
    """Return the error of each measure, which are taken one after the other by the same ranks."""
    errors = {}
    for name in names:
        model = network(kind_of(name))
        model.register_forward_pre_hook(refuse_own_batch)
        try:
            measured(name, model)
            errors[name] = "none"
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
    return errors


def check(names: list[str], folder: Path) -> None:
    first, second = results_of_ranks(lambda: errors_on_rank(names), folder)
    assert second == dict.fromkeys(names, "ValueError: unreadable image")
    expected = {"ValueError: another rank failed: rank 1: unreadable image", "ValueError: unreadable image"}
    assert {name: text for name, text in first.items() if text not in expected} == {}


def test_some_measures_fail_together(tmp_path: Path) -> None:
    """One of each kind of sum: of an evaluation, of a pass for feature maps, of products, of rows, of lesions."""
    check(["evaluation", "feature_map_variance", "hessian_trace", "loss_slice", "lesion"], tmp_path)


@pytest.mark.slow
def test_every_measure_fails_together(tmp_path: Path) -> None:
    check([name for name in vs.measures() if name not in (*LEFT_OUT, *WITHOUT_OWN_BATCH)], tmp_path)


def error_of_sharded_weights() -> str:
    model = sharded("vit")
    model.register_forward_pre_hook(refuse_own_batch)
    try:
        measured("hessian_trace", model)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def test_a_rank_with_sharded_weights_fails_alone(tmp_path: Path) -> None:
    """Others wait for its share of the weights in the middle of a pass, where no other message may come: they lose it."""
    first, second = results_of_ranks(error_of_sharded_weights, tmp_path)
    assert second == "ValueError: unreadable image"
    assert first.startswith(("RuntimeError", "DistBackendError"))
