"""Notices of the first pass: probabilities or features in place of logits, raw pixels, coupled images, new running statistics."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitscope as vs
from vitscope.core.checks.unlikely_input import UnlikelyInputWarning

GENERATOR = torch.Generator().manual_seed(0)
IMAGES, LABELS = torch.randn(6, 3, 4, 4, generator=GENERATOR), torch.arange(6) % 3
BYTES = (100 + 40 * IMAGES).clamp(0, 255).round()


class Small(nn.Module):
    """A convolution, a norm, mean pooling and a classifier, then ``end``."""

    def __init__(self, end: Callable[[Tensor], Tensor] = lambda z: z) -> None:
        super().__init__()
        self.conv, self.norm, self.fc, self.end = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(5, 3), end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.fc(self.norm(self.conv(x)).mean((2, 3))))


def notices(model: nn.Module, measure: str, x: Tensor = IMAGES, y: Tensor = LABELS, **objective) -> list[str]:
    """Return the notices of one measure, each of which is given once by a probe."""
    probe = vs.Probe(model, [(x, y), (x.flip(0), y)], vs.Objective(**objective))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with probe.guard(
                second_order=measure == "hessian", moves_weights=measure == "moves", logits=measure != "maps"
            ) as inside:
                inside(x)
    return [str(w.message) for w in caught if issubclass(w.category, UnlikelyInputWarning)]


@pytest.mark.parametrize("measure", ["hessian", "accuracy"])
def test_probabilities_in_place_of_logits_are_noticed_once(measure: str) -> None:
    (text,) = notices(Small(lambda z: z.softmax(1)), measure)
    assert "outputs of Small are probabilities" in text
    assert "before the softmax" in text
    (text,) = notices(Small(torch.sigmoid), measure, y=F.one_hot(LABELS).float(), loss="bce")
    assert "loss='bce' takes their sigmoid again" in text
    (text,) = notices(Small(lambda z: z.sigmoid().flatten(1)), measure, loss=nn.CrossEntropyLoss())
    assert "loss='cross_entropy' takes their softmax again" in text
    assert notices(Small(lambda z: z.softmax(1)), "maps") == []


def test_logits_log_probabilities_and_values_between_0_and_1_are_no_probabilities() -> None:
    assert notices(Small(), "hessian") == []
    assert notices(Small(lambda z: z.log_softmax(1)), "hessian") == []
    assert notices(Small(lambda z: z * 0), "hessian") == []
    assert notices(Small(lambda z: z.softmax(1)), "hessian", loss="mse") == []
    gate = Small(lambda z: z * z.sigmoid())
    assert notices(gate, "hessian", y=F.one_hot(LABELS).float(), loss="bce") == []


def test_features_behind_an_identity_in_place_of_the_classifier_are_noticed() -> None:
    model = Small()
    model.fc = nn.Identity()
    (text,) = notices(model, "accuracy")
    assert "'fc' is an nn.Identity" in text
    assert "logits of 5 classes" in text
    assert notices(model, "maps") == []
    model.end = nn.Linear(5, 3)  # the classifier has another name
    assert notices(model, "accuracy") == []


def test_raw_pixels_are_noticed_where_the_network_does_not_scale_them() -> None:
    (text,) = notices(Small(), "accuracy", x=BYTES)
    assert "whole numbers up to" in text
    assert "(x / 255 - mean) / std" in text

    class Scaled(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x / 255)

    assert notices(Scaled(), "accuracy", x=BYTES) == []
    assert notices(Small(), "accuracy", x=BYTES / 255) == []


@pytest.mark.parametrize("measure", ["hessian", "moves"])
def test_outputs_that_depend_on_the_other_images_are_noticed(measure: str) -> None:
    (text,) = notices(Small(lambda z: z - z.mean(0)), measure)
    assert "depend on the other images of its batch:" in text
    assert "other 4" in text
    model = Small()
    model.norm = nn.BatchNorm2d(5, track_running_stats=False)
    (text,) = notices(model, measure)
    assert "('norm' has no running statistics): those of 2 images" in text
    for measure_of_outputs in ("accuracy", "maps"):
        (text,) = notices(model, measure_of_outputs)
        assert "('norm' has no running statistics); the results hold" in text


def test_batch_statistics_that_were_asked_for_are_not_noticed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with vs.Probe(Small(), [(IMAGES, LABELS)]).guard(bn="batch") as model:
            model(IMAGES)


def test_trained_norms_with_new_statistics_are_noticed() -> None:
    model = Small()
    assert notices(model, "accuracy") == []  # an untrained network
    nn.init.normal_(model.norm.weight, generator=GENERATOR)
    (text,) = notices(model, "accuracy")
    assert "BatchNorm 'norm' of Small has trained weights" in text
    model.train()(IMAGES)  # has statistics now
    assert notices(model, "accuracy") == []
