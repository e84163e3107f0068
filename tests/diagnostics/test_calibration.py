from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.functional.classification import multiclass_calibration_error

from tests.fixtures.configs.configurations import composed
from vitscope import Objective, Probe
from vitscope.analyses import context, runner, spec
from vitscope.config import factories
from vitscope.core.evaluation import confidence_bins, evaluate
from vitscope.diagnostics.calibration import _bins
from vitscope.diagnostics.calibration.calibration import calibration
from vitscope.diagnostics.calibration.plot import calibration as draw
from vitscope.runs import run_dir
from vitscope.training.calibration_metric import ExpectedCalibrationError
from vitscope.training.lightning_module import Classifier


class Logits(nn.Module):
    """Takes images that are logits already, (B, K, 1, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("like", torch.zeros((), dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


def probe_of(logits: torch.Tensor, labels: torch.Tensor, size: int = 50) -> Probe:
    batches = list(zip(logits.double()[:, :, None, None].split(size), labels.split(size)))
    return Probe(Logits(), batches)


def drawn(n: int = 400, classes: int = 7, scale: float = 2.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial((logits / 2).softmax(dim=1), 1, generator=generator).squeeze(1)
    return logits, labels


@pytest.mark.parametrize("n_bins", [1, 10, 15])
def test_ece_equals_torchmetrics(n_bins: int) -> None:
    logits, labels = drawn()
    # torchmetrics sums in float32
    expected = multiclass_calibration_error(logits.softmax(1), labels, num_classes=7, n_bins=n_bins, norm="l1").item()
    assert calibration(probe_of(logits, labels), n_bins=n_bins).ece == pytest.approx(expected, abs=1e-6)


def test_scores_equal_closed_forms() -> None:
    p = torch.tensor([[0.75, 0.15, 0.1], [0.1, 0.35, 0.55]], dtype=torch.float64)
    result = calibration(probe_of(p.log(), torch.tensor([0, 1])))
    assert result.nll == pytest.approx(-(np.log(0.75) + np.log(0.35)) / 2, abs=1e-12)
    assert result.brier == pytest.approx((0.25**2 + 0.15**2 + 0.1**2 + 0.1**2 + 0.65**2 + 0.55**2) / 2, abs=1e-12)
    assert result.accuracy == 0.5
    assert result.ece == pytest.approx((0.25 + 0.55) / 2, abs=1e-12)  # each image alone in its bin
    assert result.signed_error == pytest.approx((-0.25 + 0.55) / 2, abs=1e-12)


@pytest.mark.parametrize(("right", "expected"), [(True, 0.0), (False, 1.0)])
def test_saturated_predictions_are_counted(right: bool, expected: float) -> None:
    logits = torch.zeros(20, 4)
    logits[:, 0] = 1000.0  # the softmax is exactly one-hot
    result = calibration(probe_of(logits, torch.zeros(20, dtype=torch.long) + (0 if right else 2)))
    assert result.bin_count.tolist() == [0] * 9 + [20]
    assert result.ece == result.adaptive_ece == expected
    assert result.nll == pytest.approx(0.0 if right else 1000.0, abs=1e-12)


def test_official_bins_lose_a_confidence_of_one() -> None:
    logits = torch.zeros(20, 4)
    logits[:, 0] = 1000.0
    result = calibration(probe_of(logits, torch.zeros(20, dtype=torch.long)), binning="official")
    assert result.ece == pytest.approx(1.0, abs=1e-6)


def test_confidences_on_an_edge_belong_to_the_lower_bin() -> None:
    bins = _bins.equal_width(np.array([0.1, 0.3, 0.7, 1.0]), np.ones(4), 10)
    assert np.flatnonzero(bins.count).tolist() == [0, 2, 6, 9]


def test_equal_mass_bins_hold_equally_many_images() -> None:
    rng = np.random.default_rng(0)
    confidence, correct = rng.uniform(0.2, 1, 103), rng.integers(0, 2, 103).astype(float)
    bins = _bins.equal_mass(confidence, correct, 10)
    assert set(bins.count.tolist()) <= {10.0, 11.0}
    assert bins.count.sum() == 103
    groups = np.array_split(np.argsort(confidence), np.cumsum(bins.count).astype(int)[:-1])
    expected = sum(abs(confidence[g].mean() - correct[g].mean()) * len(g) for g in groups) / 103
    assert bins.error == pytest.approx(expected, abs=1e-12)


def test_equal_mass_does_not_tear_ties_apart() -> None:
    confidence, correct = np.ones(100), np.repeat([1.0, 0.0], 50)
    assert (
        _bins.equal_mass(confidence, correct, 10).error == 0.5
    )  # torn apart it would be 0.5 as well as 0 or 1 by order
    assert _bins.equal_mass(confidence, correct[::-1], 10).count.tolist() == [100.0]


def test_temperature_minimizes_the_validation_likelihood() -> None:
    logits, labels = drawn(seed=1)
    result = calibration(probe_of(*drawn()), validation=probe_of(logits, labels))
    assert result.temperature is not None
    beta = torch.tensor(1 / result.temperature, dtype=torch.float64, requires_grad=True)
    nll = nn.functional.cross_entropy(beta * logits, labels)
    (slope,) = torch.autograd.grad(nll, beta)
    assert abs(slope.item()) < 1e-8  # Brent's tolerance of 1e-10 on log T times a curvature of order one
    assert 1.5 < result.temperature < 2.6  # the labels were drawn at temperature 2
    assert result.scaled_nll is not None
    assert result.scaled_nll < result.nll
    assert result.scaled_ece is not None
    assert result.scaled_ece < result.ece
    assert result.n_validation == 400


def test_an_analysis_fits_the_temperature_on_the_validation_split(tmp_path: Path) -> None:
    arguments = ["model=vit", "model.depth=1", "model.patch_size=8", "data=digits", "analysis=[calibration]"]
    cfg = composed("train", *arguments, "analysis.calibration.probe.n_images=60", f"paths.runs={tmp_path}")
    network, data = factories.model(cfg).eval(), factories.data(cfg)
    x, y = (torch.cat(parts) for parts in zip(*data.probe_batches("val", batch_size=64)))
    with torch.no_grad():  # a head that knows something, but not everything: then there is a best temperature
        features = network.forward_head(network.forward_features(x), pre_logits=True)
        onehot = nn.functional.one_hot(y, 10).float()
        network.head.weight.zero_()
        network.head.weight[:, :6].copy_(torch.linalg.lstsq(features[:, :6], onehot).solution.T)
        logits = network(x).double()
    place = context.AnalysisContext(cfg, run_dir.create(cfg, "train"), network, data, "end")
    result = runner.perform(spec.parse(cfg.analysis)[0], place)
    assert (result.n_images, result.n_validation) == (60, len(data.split("val")))
    beta = torch.tensor(1 / result.temperature, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(nn.functional.cross_entropy(beta * logits, y), beta)
    assert abs(slope.item()) < 1e-5  # the network's logits are float32, in batches of another size


@pytest.mark.filterwarnings("ignore:the outputs of:UserWarning")  # logits that sum to 1
def test_temperature_without_optimum_is_held_and_said() -> None:
    logits = torch.eye(4).repeat(5, 1)
    labels = torch.arange(4).repeat(5)
    with pytest.warns(RuntimeWarning, match="every image is classified rightly"):
        assert calibration(probe_of(logits, labels), validation=probe_of(logits, labels)).temperature == 1e-3
    with pytest.warns(RuntimeWarning, match="better than chance"):
        assert calibration(probe_of(logits, labels), validation=probe_of(-logits, labels)).temperature == 1e3


def test_cutoff_shares() -> None:
    p = torch.tensor([[0.95, 0.05], [0.97, 0.03], [0.6, 0.4], [0.3, 0.7]], dtype=torch.float64)
    result = calibration(probe_of(p.log(), torch.tensor([0, 1, 0, 0])))
    assert result.confident_accuracy == 0.5
    assert result.confident_frequency == 0.5
    assert result.unconfidence == 0.5
    even = calibration(probe_of(torch.zeros(3, 2), torch.tensor([0, 1, 0])), cutoff=0.5)
    assert even.bin_confidence.max() == 0.5
    assert (even.confident_frequency, even.confident_accuracy) == (0.0, None)  # above the cutoff, not at it


def test_batch_size_soft_targets_and_smoothing_do_not_matter() -> None:
    logits, labels = drawn()
    a = calibration(probe_of(logits, labels, 400))
    b = calibration(probe_of(logits, labels, 7))
    soft = nn.functional.one_hot(labels, 7).double() * 0.9 + 0.1 / 7
    batches = [(logits[:, :, None, None], soft)]
    c = calibration(Probe(Logits(), batches))
    d = calibration(Probe(Logits(), [(logits[:, :, None, None], labels)], Objective(label_smoothing=0.1)))
    for other in (b, c, d):
        assert other.scalars() == pytest.approx(a.scalars(), abs=1e-12)


def test_intervals_contain_the_estimate_and_are_reproducible() -> None:
    probe = probe_of(*drawn())
    a, b = calibration(probe, seed=3), calibration(probe, seed=3)
    assert a.intervals == b.intervals
    for name in ("accuracy", "nll", "brier"):
        assert a.intervals[f"{name}_lower"] < getattr(a, name) < a.intervals[f"{name}_upper"]


def test_refusals() -> None:
    logits, labels = drawn()
    with pytest.raises(ValueError, match="binning to be one of equal_width, official, received 'width'"):
        calibration(probe_of(logits, labels), binning="width")
    with pytest.raises(ValueError, match="n_bins >= 1"):
        calibration(probe_of(logits, labels), n_bins=0)
    logits[60, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity in batch 1"):
        calibration(probe_of(logits, labels))


def test_plot_shows_every_result_and_its_scaling() -> None:
    probe = probe_of(*drawn())
    results = {"a": calibration(probe, validation=probe), "b": calibration(probe)}
    (legend,) = draw(results).legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert len(labels) == 3
    assert labels[0] == f"a: {100 * results['a'].ece:.1f}%"


def test_one_definition_of_the_error_where_confidence_is_exactly_one() -> None:
    generator = torch.Generator().manual_seed(0)
    on_edges = torch.tensor([0.5, 0.7, 0.8] * 20)
    anywhere = 0.5 + 0.35 * torch.rand(60, generator=generator)
    confidence = torch.cat([torch.ones(40), torch.full((40,), 0.95), on_edges, anywhere])
    probabilities = torch.stack([confidence, 1 - confidence], dim=1).double()
    labels = (torch.rand(len(confidence), generator=generator) < 0.3).long()
    labels[:40], labels[40:80] = 1, 0  # the certain ones wrong, those of the same bin right: gaps of opposite signs
    logits = probabilities.log()  # minus infinity where the confidence is 1: as far below as matters
    logits = logits.clamp_min(-1000.0)
    ours = calibration(probe_of(logits, labels)).ece
    shared = evaluate(lambda x: x.flatten(1), [(logits[:, :, None, None], labels)]).ece
    metric = ExpectedCalibrationError()
    for part, target in zip(probabilities.split(33), labels.split(33)):
        metric.update(part, target)
    right = (labels == 0).double()
    sure = confidence.double()
    # by hand, in bins (a, b]
    member = (np.searchsorted(np.arange(11) / 10, sure.numpy(), side="left") - 1).clip(0, 9)
    expected = sum(abs((sure - right).numpy()[member == b].sum()) for b in range(10)) / len(sure)
    assert ours == pytest.approx(expected, abs=1e-12)
    assert shared == pytest.approx(expected, abs=1e-12)
    assert metric.compute().item() == pytest.approx(expected, rel=1e-6)  # returned in float32
    theirs = multiclass_calibration_error(probabilities, labels, num_classes=2, n_bins=10, norm="l1").item()
    assert abs(theirs - expected) > 0.01  # torchmetrics puts a confidence of 1 into a bin of its own
    for n_bins in (1, 3, 7, 10, 15):
        edges = np.arange(n_bins + 1) / n_bins
        values = np.concatenate([edges, sure.numpy()])
        by_search = np.clip(np.searchsorted(edges, values, side="left") - 1, 0, n_bins - 1)
        np.testing.assert_array_equal(confidence_bins(torch.from_numpy(values), n_bins), by_search)
        np.testing.assert_array_equal(_bins.bin_of(values, edges), by_search)


def test_training_logs_the_error_of_the_diagnostics() -> None:
    metrics = Classifier(nn.Identity(), num_classes=2, optimizer=torch.optim.SGD).metrics["test_metrics"]["scores"]
    assert isinstance(metrics["ece"], ExpectedCalibrationError)


def test_intervals_hold_both_errors_and_zero_for_a_calibrated_model() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2000, 5, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    result = calibration(probe_of(logits, labels, 500))
    assert result.intervals["ece_lower"] == 0.0
    assert result.ece <= result.intervals["ece_upper"]
    assert 0 <= result.ece_debiased < result.ece
    wrong = calibration(probe_of(3 * logits, labels, 500))
    assert 0 < wrong.intervals["ece_lower"] < wrong.ece_debiased <= wrong.intervals["ece_upper"]
    assert wrong.ece_debiased == pytest.approx(wrong.ece, rel=0.05)  # far from zero there is hardly any bias
    few = calibration(probe_of(logits[:60], labels[:60]))
    assert np.isnan(few.intervals["ece_lower"])
    assert np.isnan(few.intervals["ece_upper"])
    perfect = calibration(probe_of(torch.eye(5).repeat(20, 1) * 50, torch.arange(5).repeat(20)))
    assert perfect.intervals["accuracy_upper"] == 1.0
    assert perfect.intervals["accuracy_lower"] == pytest.approx(
        0.025 ** (1 / 100), rel=1e-9
    )  # the exact one, not [1, 1]
    assert np.isnan([perfect.intervals[f"{name}_lower"] for name in ("nll", "brier")]).all()  # no wrong answer


def test_the_card_states_the_loss_that_is_measured() -> None:
    """Labels are never smoothed, and of soft targets the most probable class counts: the card does not state the objective's."""
    logits, labels = drawn()
    images = logits[:, :, None, None]
    smoothed = calibration(Probe(Logits(), [(images, labels)], Objective(label_smoothing=0.1)))
    assert smoothed.card is not None
    assert smoothed.card.loss == "cross entropy, label smoothing 0"
    soft = calibration(Probe(Logits(), [(images, logits.softmax(1))]))
    assert soft.card is not None
    assert soft.card.loss == "cross entropy, most probable class of soft targets"


def test_validation_images_without_a_label_are_not_counted() -> None:
    logits, labels = drawn()
    partly = labels.clone()
    partly[:100] = -100
    result = calibration(probe_of(logits, labels), validation=probe_of(logits, partly))
    assert result.n_validation == 300
    same = calibration(probe_of(logits, labels), validation=probe_of(logits[100:], labels[100:]))
    assert result.temperature == same.temperature
    with pytest.raises(ValueError, match="every label is ignored"):
        calibration(probe_of(logits, labels), validation=probe_of(logits, torch.full_like(labels, -100)))
