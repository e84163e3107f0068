"""Trainable parameters without an effect on the outputs are refused or named."""

from __future__ import annotations

import functools
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.fixtures.networks.weight_tables import (
    InDictionary,
    InNewAttribute,
    Net,
)
from vitscope.core.guard.repeatability import UnusedParametersWarning


class OutOfReach(Net):
    """Keep a table where no attribute shows it, or in a form that no pass makes again."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.filled, cells = where, False, []

        def closure() -> Tensor:
            if not cells:
                cells.append(self.make())
            return cells[0]

        self.closure = closure
        self.register_buffer("given", torch.zeros(1, 4, dtype=torch.float64))
        self.plain, self.array = torch.zeros(1), None

    def table(self) -> Tensor:
        if self.where == "closure":
            return self.closure()
        if self.where == "cached function":
            return cached_table(self)
        if not self.filled and self.where == "buffer":
            self.given.copy_(self.make().detach())
        if not self.filled and self.where == "attribute behind a flag":
            self.plain = self.make()
        if self.array is None and self.where == "array":
            self.array = self.make().detach().numpy()
        self.filled = True
        return {"buffer": self.given, "array": torch.as_tensor(self.array) if self.where == "array" else None}.get(
            self.where, self.plain
        )


@functools.lru_cache
def cached_table(net: Net) -> Tensor:
    return net.make()


@pytest.mark.parametrize("graph", [False, True], ids=["no graph", "graph"])
@pytest.mark.parametrize("where", ["closure", "cached function", "buffer", "attribute behind a flag", "array"])
def test_tables_out_of_reach_are_refused(where: str, graph: bool, mlp_batches: list) -> None:
    model = OutOfReach(where).eval()
    with torch.set_grad_enabled(graph):
        model(mlp_batches[0][0])  # the table is there before the probe
    for measure in (lambda p: vs.loss_slice(p, n=3), lambda p: vs.hessian_eigenvalues(p, k=1)):
        with pytest.raises(ValueError, match="'scale' without an effect"):
            measure(vs.Probe(model, mlp_batches))
    assert np.isfinite(vs.evaluation(vs.Probe(model, mlp_batches)).nll)  # weights that stay need no table made again


def test_derivatives_of_a_table_that_autograd_does_not_see_are_refused(mlp_batches: list) -> None:
    probe = vs.Probe(InNewAttribute(), mlp_batches)
    assert np.isfinite(vs.loss_slice(probe, n=3).nll).all()  # made again at every point
    with pytest.raises(ValueError, match="'scale' without an effect"):
        vs.hessian_eigenvalues(probe, k=1)


def test_data_parallel_models_are_looked_into(mlp_batches: list) -> None:
    model = OutOfReach("closure").eval()
    model(mlp_batches[0][0])
    with pytest.raises(ValueError, match=r"'scale' without an effect"):
        vs.loss_slice(vs.Probe(nn.DataParallel(model), mlp_batches), n=3)
    assert np.isfinite(vs.loss_slice(vs.Probe(nn.DataParallel(InDictionary()), mlp_batches), n=3).nll).all()


def test_unused_parameters_are_named(mlp_batches: list) -> None:
    class WithOthers(Net):
        def table(self) -> Tensor:
            return self.make()

    model = WithOthers()
    model.second_head = nn.Linear(6, 4, dtype=torch.float64)
    with pytest.warns(UnusedParametersWarning, match="second_head.weight, second_head.bias"):
        value = vs.hessian_eigenvalues(vs.Probe(model, mlp_batches), k=1).eigenvalues
    model.second_head.requires_grad_(False)
    model.token = nn.Parameter(torch.ones(1, dtype=torch.float64))  # of a module that runs
    with pytest.raises(ValueError, match="'token' without an effect"):
        vs.hessian_eigenvalues(vs.Probe(model, mlp_batches), k=1)
    model.token.requires_grad_(False)
    with warnings.catch_warnings(action="error", category=UnusedParametersWarning):
        assert vs.hessian_eigenvalues(vs.Probe(model, mlp_batches), k=1).eigenvalues == pytest.approx(
            value, rel=2e-3
        )  # two searches, each to tol=1e-3


class WithPooler(Net):
    """Compute a second result that only a table, or nothing, uses."""

    def __init__(self, use: str) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.use, self.norm = use, nn.LayerNorm(6, dtype=torch.float64)
        self.mask_token = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def table(self) -> Tensor:
        return self.make()

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        logits, pooled = super().forward(x), self.norm(x.flatten(1)[:, :6])
        if self.use == "cut off":
            return logits + pooled[:, :4].detach()
        return {"logits": logits, "pooled": pooled} if self.use == "another entry" else logits


@pytest.mark.parametrize("use", ["nothing", "another entry"])
def test_results_that_are_not_selected_and_mask_tokens_are_named(use: str, mlp_batches: list) -> None:
    probe = vs.Probe(WithPooler(use), mlp_batches)
    with pytest.warns(UnusedParametersWarning, match="not depend on mask_token, norm.weight, norm.bias:"):
        value = vs.hessian_eigenvalues(probe, k=1).eigenvalues
    with pytest.warns(UnusedParametersWarning, match="not depend on mask_token"):
        vs.loss_slice(vs.Probe(WithPooler(use), mlp_batches), n=3)
    model = WithPooler(use)
    for name in ("mask_token", "norm.weight", "norm.bias"):
        model.get_parameter(name).requires_grad_(False)
    frozen = vs.hessian_eigenvalues(vs.Probe(model, mlp_batches), k=1).eigenvalues
    assert value == pytest.approx(frozen, rel=2e-3)  # two searches, each to tol=1e-3


def test_values_that_are_used_without_their_derivatives_are_refused(mlp_batches: list) -> None:
    with pytest.raises(ValueError, match="'norm.weight' without an effect"):
        vs.hessian_eigenvalues(vs.Probe(WithPooler("cut off"), mlp_batches), k=1)
