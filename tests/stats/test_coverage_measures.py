"""Intervals of measures hold the truth at their nominal rate over images drawn from what the measures read of a trained network.

A small ResNet learns handwritten digits; each measure runs once on all of thousands of shifted digits that it did not learn from,
and what it adds up an image is recorded. These are the population: its mean is the truth, and subsets of it are what a user has.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from scipy.stats import binom
from sklearn.datasets import load_digits
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

import vitscope as vs
from vitscope.core.running_mean import RunningMean, estimates
from vitscope.core.undefined_values import NullWarning
from vitscope.stats.intervals import LEAST_EVENTS, where_enough_wrong

pytestmark = pytest.mark.slow

DRAWS = 2000


class RecordedMean(RunningMean):
    """A running mean that keeps what it is given; ``every`` holds all of them in the order of their making."""

    every: list[RecordedMean]

    def __init__(self, answers: bool = False) -> None:
        super().__init__(answers)
        self.rows: list[Tensor] = []
        type(self).every.append(self)

    def add(self, values: Tensor) -> None:
        super().add(values)
        self.rows.append(values.detach().double().reshape(len(values), -1))

    @property
    def values(self) -> np.ndarray:
        """All rows, ``(n_images, n_numbers)``; of no number where the measure gave none."""
        return torch.cat(self.rows).numpy() if self.rows else np.empty((0, 0))


@dataclass
class Recorder:
    """The network, its images, and what each measure added up for them."""

    probe: vs.Probe
    known: dict[str, list[RecordedMean]] = field(default_factory=dict)

    def means(self, measure: str, **options: object) -> list[RecordedMean]:
        """Return a measure's running means over the whole population, in the order of their making."""
        if measure not in self.known:
            RecordedMean.every = []
            function = getattr(vs, measure)  # imports the measure's modules
            modules = [
                module
                for name, module in sys.modules.items()
                if name.startswith("vitscope.diagnostics.") and vars(module).get("RunningMean") is RunningMean
            ]
            with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
                warnings.simplefilter("ignore", NullWarning)  # a tap's map of one position
                for module in modules:
                    patch.setattr(module, "RunningMean", RecordedMean)
                function(self.probe, **options)
            assert RecordedMean.every, f"{measure} adds nothing up"
            self.known[measure] = RecordedMean.every
        return self.known[measure]


def shifted(x: Tensor, y: Tensor, copies: int) -> tuple[Tensor, Tensor]:
    """Return ``copies`` of images ``(n, 3, 8, 8)``, each moved by -1, 0 or 1 pixels both ways."""
    moves = torch.randint(-1, 2, (copies * len(x), 2)).tolist()
    images = [image.roll((down, right), (1, 2)) for image, (down, right) in zip(x.repeat(copies, 1, 1, 1), moves)]
    return torch.stack(images), y.repeat(copies)


@pytest.fixture(scope="module")
def recorder() -> Recorder:
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(np.asarray(pixels)).float().view(-1, 1, 8, 8).expand(-1, 3, -1, -1) / 8 - 1
    y, order = torch.from_numpy(np.asarray(labels)).long(), torch.randperm(len(labels))
    x, y = x[order], y[order]
    model = ResNet(BasicBlock, (2, 1, 1, 1), num_classes=10, channels=(8, 16, 16, 16))
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1), nn.Identity()
    seen, answers = shifted(x[:900], y[:900], 4)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(400):
        chosen = torch.randint(0, len(seen), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(seen[chosen]), answers[chosen]).backward()
        optimizer.step()
    model.eval()
    images, truths = shifted(x[900:], y[900:], 5)
    batches = list(zip(images.split(299), truths.split(299)))
    with torch.no_grad():
        accuracy = (torch.cat([model(part) for part, _ in batches]).argmax(1) == truths).double().mean()
    assert 0.7 < accuracy < 0.98  # a network worth measuring, that is not always right either
    return Recorder(vs.Probe(model, batches, taps=vs.taps(model, images[:2])))


def check(values: np.ndarray, images: int, answers: bool, wrong: np.ndarray | None = None) -> int:
    """Assert the coverage of each column's mean ``(n_images, n_numbers)`` over draws; return how many were judged.

    Where nearly every draw has an interval it holds the truth in 92 to 98 %; everywhere at most 8 % of all draws print one that
    misses. Both give or take what the number of draws leaves open at 1 in 10,000.

    Args:
        values: Values of the population.
        images: Indices of the images of a draw.
        answers: Whether they are right or wrong answers.
        wrong: An array of the same shape: images that were answered wrong; for losses.
    """
    rng = np.random.default_rng(17)
    judged = 0
    for column in range(values.shape[1]):
        truth = values[:, column].mean()
        if not np.isfinite(truth) or np.ptp(values[:, column]) <= 1e-9 * abs(truth):
            continue  # constant: the first bin of a relative curve
        place = rng.integers(0, len(values), (images, DRAWS))
        mean = RunningMean(answers)
        mean.add(torch.from_numpy(values[place, column]))  # one column a draw
        (found,) = estimates([mean])
        half = found.half_width if wrong is None else where_enough_wrong(found.half_width, wrong[place, column].sum(0))
        given = np.isfinite(half)
        held = int((np.abs(found.mean - truth) <= half)[given].sum())
        missed = int(given.sum()) - held
        assert missed <= binom.ppf(1 - 1e-4, DRAWS, 0.08), f"number {column}: {missed} of {DRAWS} miss"
        if given.mean() > 0.95:
            judged += 1
            assert held <= binom.ppf(1 - 1e-4, given.sum(), 0.98), f"number {column}: {held} of {given.sum()} hold"
    return judged


@pytest.mark.parametrize("images", [128, 512, 2048])
def test_changes_by_lesions_cover(recorder: Recorder, images: int) -> None:
    losses, correct, wrong = (mean.values for mean in recorder.means("lesion"))
    assert check(losses[:, 1:], images, False, wrong[:, 1:]) >= 4
    assert check(correct[:, 1:], images, True) >= (4 if images > 128 else 1)


@pytest.mark.parametrize("images", [128, 512, 2048])
def test_changes_by_band_noise_cover(recorder: Recorder, images: int) -> None:
    means = recorder.means("frequency_noise_robustness", n_bands=6, std=(0.5,) * 3)
    _, nll, contrast, _, accuracy, wrong, contrasted = (mean.values for mean in means)
    assert check(nll, images, False, wrong) >= 4
    judged = check(accuracy, images, True)
    assert judged >= 4 or images < 2048
    assert ((contrast != 0) == contrasted).all()
    judged = check(contrast, images, False, contrasted)  # at least as many images as wrong answers for losses
    assert judged == 1 or images * contrasted.mean() < 3 * LEAST_EVENTS


@pytest.mark.parametrize("images", [128, 512, 2048])
def test_accuracies_of_filtered_images_cover(recorder: Recorder, images: int) -> None:
    _, correct = (mean.values for mean in recorder.means("input_filter", cutoffs=(0.25, 0.5, 0.75)))
    assert check(correct, images, True) >= 4


@pytest.mark.parametrize("images", [128, 512])
def test_variances_of_feature_maps_and_their_ratios_cover(recorder: Recorder, images: int) -> None:
    means = recorder.means("feature_map_variance")
    assert sum(check(mean.values, images, False) for mean in means) >= 5


@pytest.mark.parametrize("images", [128, 512])
def test_relative_log_amplitudes_cover(recorder: Recorder, images: int) -> None:
    means = recorder.means("relative_log_amplitude", path="radial")
    n = len(recorder.probe.taps)
    curves, changes = means[:n], means[2 * n :]  # between them are powers, which have no interval
    assert sum(check(mean.values, images, False) for mean in curves) >= 8
    assert sum(check(mean.values, images, False) for mean in changes) >= 1
