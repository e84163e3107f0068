from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy.stats import norm
from timm.utils import accuracy as timm_accuracy
from torch import nn

from vitscope import Probe
from vitscope.core.checks.unlikely_input import UnlikelyInputWarning
from vitscope.diagnostics.evaluation.evaluation import evaluation
from vitscope.diagnostics.evaluation.plot import evaluation as draw

NAMES = tuple(f"n{i:02d}" for i in range(12))


class Logits(nn.Module):
    """Takes images that are logits already, (B, K, 1, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("like", torch.zeros((), dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


def drawn(n: int = 90, classes: tuple[int, ...] = tuple(range(12))) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor(classes)[torch.arange(n) % len(classes)]
    logits = torch.randn(n, 12, generator=generator, dtype=torch.float64)
    logits[torch.arange(n), labels] += 1
    return logits, labels


def probe_of(logits: torch.Tensor, labels: torch.Tensor, size: int = 40, **about: object) -> Probe:
    return Probe(Logits(), list(zip(logits[:, :, None, None].split(size), labels.split(size))), about=about)


@pytest.mark.parametrize("size", [7, 90])
def test_accuracies_equal_timms(size: int) -> None:
    logits, labels = drawn()
    result = evaluation(probe_of(logits, labels, size))
    top1, top5 = (float(a) / 100 for a in timm_accuracy(logits, labels, topk=(1, 5)))
    assert result.accuracy == pytest.approx(top1, abs=1e-6)  # timm's are float32
    assert result.accuracy_top5 == pytest.approx(top5, abs=1e-6)
    assert result.nll == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-12)
    right = (logits.argmax(1) == labels).double()
    expected = [right[labels == c].mean().item() for c in range(12)]
    np.testing.assert_allclose(result.class_accuracy, expected, rtol=1e-12)
    assert result.mean_class_accuracy == pytest.approx(np.mean(expected), rel=1e-12)
    assert result.class_count.tolist() == labels.bincount().tolist()
    assert (result.n_logits, result.n_images) == (12, 90)


def test_the_interval_is_wilsons() -> None:
    result = evaluation(probe_of(*drawn()))
    z, n, p = norm.ppf(0.975), 90, result.accuracy
    center, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = [(center - half) / (1 + z**2 / n), (center + half) / (1 + z**2 / n)]
    assert [result.accuracy_lower, result.accuracy_upper] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("classes", ["present", [2, 3, 11], ["n03", "n02", "n11"]])
def test_masked_classes_are_as_if_the_model_had_no_others(classes: object) -> None:
    present = (2, 3, 11)
    logits, labels = drawn(classes=present)
    probe = probe_of(logits, labels, class_names=NAMES, present_classes=present)
    result = evaluation(probe, classes=classes)
    place = torch.searchsorted(torch.tensor(present), labels)
    alone = evaluation(probe_of(logits[:, list(present)], place))
    assert result.accuracy == alone.accuracy
    assert result.accuracy > (logits.argmax(1) == labels).double().mean()
    assert result.accuracy_top5 == 1  # three classes
    assert result.nll == pytest.approx(alone.nll, rel=1e-12)
    assert result.classes.tolist() == list(present)
    assert result.class_names == ("n02", "n03", "n11")
    assert result.card is not None
    assert result.card.solver == {"classes": "3 of 12 logits"}
    everything = evaluation(probe_of(logits, labels)).card
    assert everything is not None
    assert result.card.differences(everything) == ["loss", "options.classes", "solver.classes"]


def test_present_classes_are_those_of_the_split_not_of_the_images_at_hand() -> None:
    logits, labels = drawn(3, classes=(4, 5, 6))
    assert evaluation(probe_of(logits, labels), classes="present").classes.tolist() == [4, 5, 6]
    whole = probe_of(logits, labels, present_classes=tuple(range(4, 10)))
    result = evaluation(whole, classes="present")
    assert result.classes.tolist() == list(range(4, 10))
    assert np.isnan(result.class_accuracy[3:]).all()
    assert result.mean_class_accuracy == result.accuracy  # one image a class


def test_absent_classes_that_compete_are_said() -> None:
    with pytest.warns(UserWarning, match="images of 3 of the model's 12 classes and all of them compete"):
        evaluation(probe_of(*drawn(classes=(2, 3, 11)), present_classes=(2, 3, 11)))


def test_a_logit_that_is_not_finite_makes_no_accuracy() -> None:
    logits, labels = drawn()
    logits[3, 5] = float("nan")
    result = evaluation(probe_of(logits, labels))
    assert np.isnan([result.accuracy, result.accuracy_top5, result.accuracy_lower, result.nll]).all()


def test_soft_targets_count_as_their_most_probable_class() -> None:
    logits, labels = drawn()
    soft = 0.9 * nn.functional.one_hot(labels, 12).double() + 0.1 / 12
    assert evaluation(probe_of(logits, soft)).scalars() == evaluation(probe_of(logits, labels)).scalars()


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("absent", "classes to be all, present or a list, received 'absent'"),
        ([0, 12], "among the model's 12, received 12"),
        (["n00", "cat"], "received 'cat'"),
        ([], r"a list, received \[\]"),
        ([0, 1], "Expected images of the 2 classes that count, received one of class 2"),
    ],
)
def test_refusals(classes: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluation(probe_of(*drawn(), class_names=NAMES), classes=classes)


def test_plot_sorts_classes() -> None:
    result = evaluation(probe_of(*drawn()))
    figure = draw({"a": result, "": result})
    (axes,) = figure.axes
    heights = axes.lines[0].get_ydata()
    assert list(heights) == sorted(heights)
    assert figure.legends[0].get_texts()[0].get_text().startswith("a: ")


@pytest.mark.parametrize("shift", [1, 5])
def test_labels_in_another_order_are_noticed(shift: int) -> None:
    logits, labels = drawn(n=120)
    logits[torch.arange(120), labels] += 2
    with pytest.warns(UnlikelyInputWarning, match=r"would be with the classes in another order \(label 0 as logit"):
        evaluation(probe_of(logits, (labels - shift) % 12))
    with pytest.warns(UnlikelyInputWarning, match="label 0 as logit 7, label 1 as logit 8, label 2 as logit 9"):
        evaluation(probe_of(*drawn_of_few(7)))  # a network of 12 classes on three of them, numbered anew


def drawn_of_few(first: int) -> tuple[torch.Tensor, torch.Tensor]:
    logits, labels = drawn(n=120, classes=(first, first + 1, first + 2))
    logits[torch.arange(120), labels] += 2
    return logits, labels - first


def test_other_low_accuracies_are_not_noticed() -> None:
    generator = torch.Generator().manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for strength in (0.0, 1.0, 2.0):  # untrained, weak and fair
            logits = torch.randn(240, 12, generator=generator, dtype=torch.float64)
            labels = torch.arange(240) % 12
            logits[torch.arange(240), labels] += strength
            evaluation(probe_of(logits, labels))
        logits[:, 3] += 10  # always the same answer
        evaluation(probe_of(logits, labels))
        evaluation(probe_of(logits, torch.full_like(labels, 4)))  # of images of one class
