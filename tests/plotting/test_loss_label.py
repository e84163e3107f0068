"""Labels of losses: NLL in nats is said of cross entropies alone."""

from __future__ import annotations

import warnings

import pytest

import vitscope as vs
from tests.fixtures.networks import forms_of_batches as forms
from vitscope.core.objective_card import ObjectiveCard
from vitscope.diagnostics.landscape.plot import loss_slice as draw_slice
from vitscope.plotting.loss_label import loss_label


class Result:
    def __init__(self, loss: str | None) -> None:
        self.card = ObjectiveCard(loss=loss) if loss is not None else None


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        (["cross entropy, label smoothing 0"], "NLL (nats)"),
        (["cross entropy of pixels, label smoothing 0", None], "NLL (nats)"),
        (["cross entropy, label smoothing 0", "mean squared error over outputs, targets as given"], "loss"),
        (["own loss mylab.focal (00000000)"], "loss"),
    ],
)
def test_labels(losses: list[str | None], expected: str) -> None:
    assert loss_label("NLL (nats)", map(Result, losses)) == expected


@pytest.mark.parametrize(("form", "expected"), [("mse", "loss"), ("dict output", "NLL (nats)")])
def test_a_figure_names_its_loss(form: str, expected: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # undefined accuracies
        result = vs.loss_slice(forms.probe(form), n=3)
    assert draw_slice({"": result}).axes[0].get_ylabel() == expected
