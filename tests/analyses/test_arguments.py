"""Inputs that a run supplies to its measures."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from torch import nn

import vitscope as vs
from vitscope.analyses import arguments, spec
from vitscope.analyses.context import AnalysisContext
from vitscope.analyses.prediction.cost_prediction import predict_costs
from vitscope.config import factories
from vitscope.core.run_inputs import FromRun, run_inputs

MEASURES_OF_CHANGE = ["branch_transfer", "effective_receptive_field"]


def test_the_measures_of_a_change_by_training_are_these() -> None:
    takers = [name for name in vs.measures() if FromRun.UNTRAINED in run_inputs(getattr(vs, name)).values()]
    assert sorted(takers) == MEASURES_OF_CHANGE


@pytest.mark.parametrize("name", MEASURES_OF_CHANGE)
def test_a_trained_network_is_compared_with_its_initial_weights(made: AnalysisContext, name: str) -> None:
    initial = _supplied(made, name)
    assert isinstance(initial, nn.Module)
    expected = factories.model(made.cfg).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in initial.state_dict().items())


@pytest.mark.parametrize("name", MEASURES_OF_CHANGE)
def test_a_network_without_training_is_not_compared_with_itself(
    made: AnalysisContext,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    untrained = dataclasses.replace(made, network=factories.model(made.cfg))
    with caplog.at_level(logging.INFO, "vitscope"):
        assert _supplied(untrained, name) is None
    assert f"{name}: these are the initial weights" in caplog.text
    double = dataclasses.replace(made, network=factories.model(made.cfg).double())
    assert _supplied(double, name) is None  # the same numbers in another precision
    with torch.no_grad():
        next(untrained.network.parameters()).view(-1)[0] += 1e-3
    assert _supplied(untrained, name) is not None


def test_the_predicted_cost_has_the_passes_that_are_made(made: AnalysisContext) -> None:
    (analysis,) = [a for a in spec.parse(made.cfg.analysis) if a.name == "branch_transfer"]
    networks = (made.network, factories.model(made.cfg))
    trained, untrained = (predict_costs(made.cfg, [analysis], model, made.datamodule)[0] for model in networks)
    assert trained.forward_passes.expected > 1.5 * untrained.forward_passes.expected


def _supplied(place: AnalysisContext, name: str) -> object:
    (analysis,) = [a for a in spec.parse(place.cfg.analysis) if a.name == name]
    return arguments.options(analysis, place, None, str)["initial"]
