"""Means over images, whatever the batches; calibration error right where everything is certain."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from vitscope.core.evaluation import ECE_BINS, bin_sums, confidence_bins, evaluate
from vitscope.runtime import distributed


def test_batches_do_not_matter(mlp, mlp_batches) -> None:
    parts = evaluate(mlp, mlp_batches, per_image=True)
    whole = evaluate(mlp, [(torch.cat([x for x, _ in mlp_batches]), torch.cat([y for _, y in mlp_batches]))])
    assert parts.n_images == whole.n_images == 13
    assert parts.nll == pytest.approx(whole.nll, abs=1e-14)
    assert parts.accuracy == whole.accuracy
    assert parts.ece == pytest.approx(whole.ece, abs=1e-14)
    assert parts.losses.mean() == pytest.approx(parts.nll, abs=1e-14)
    assert parts.correct.mean() == parts.accuracy


def test_calibration_error_equals_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(400, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 5, (400,), generator=generator)
    ours = evaluate(lambda x: logits, [(torch.zeros(400, 1), y)]).ece
    theirs = multiclass_calibration_error(logits.softmax(1), y, num_classes=5, n_bins=ECE_BINS)
    assert ours == pytest.approx(float(theirs), abs=1e-7)  # torchmetrics sums in float32


def test_certain_and_right_is_calibrated() -> None:
    y = torch.tensor([0, 1, 2])
    logits = 1000.0 * torch.eye(3)
    assert evaluate(lambda x: logits, [(torch.zeros(3, 1), y)]).ece == 0.0
    assert evaluate(lambda x: logits.roll(1, 0), [(torch.zeros(3, 1), y)]).ece == 1.0


def test_a_loss_that_is_not_finite_shows() -> None:
    logits = torch.tensor([[float("nan"), 0.0]])
    assert evaluate(lambda x: logits, [(torch.zeros(1, 1), torch.tensor([0]))]).nll != 0.0


def test_logits_that_are_not_finite_have_no_accuracy() -> None:
    """`argmax` would say the first class, which is right for the first image here."""
    logits = torch.tensor([[float("nan"), 0.0], [0.0, 1.0]])
    assert math.isnan(evaluate(lambda x: logits, [(torch.zeros(2, 1), torch.tensor([0, 1]))]).accuracy)


def test_confidences_of_float32_logits_are_computed_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, y = 4 * torch.randn(300, 5, generator=generator), torch.randint(0, 5, (300,), generator=generator)
    narrow, wide = (evaluate(lambda x, z=z: z, [(torch.zeros(300, 1), y)]) for z in (logits, logits.double()))
    assert narrow.ece == wide.ece
    assert narrow.accuracy == wide.accuracy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_half_precision_logits_are_computed_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(50, 5, generator=generator)).to(dtype)
    y = torch.randint(0, 5, (50,), generator=generator)
    expected = F.cross_entropy(logits.double(), y).item()
    # 50 losses of up to 20 in float32
    assert evaluate(lambda x: logits, [(torch.zeros(50, 1), y)]).nll == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n_bins", [3, 7, 10, 15, 49, 100])
def test_a_confidence_of_k_of_n_is_in_the_k_th_bin(n_bins: int) -> None:
    """Edges summed from steps of 1 / n, or counted back from 1, miss some of these quotients by a rounding."""
    confidence = torch.tensor([k / n_bins for k in range(1, n_bins + 1)], dtype=torch.float64)
    assert confidence_bins(confidence, n_bins).tolist() == list(range(n_bins))
    above = torch.nextafter(confidence[:-1], torch.ones(()).double())
    assert confidence_bins(above, n_bins).tolist() == list(range(1, n_bins))


def test_no_images() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        evaluate(lambda x: x, [])


def test_a_rank_without_batches_adds_zeros_on_the_device_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def added_up(sums: torch.Tensor) -> torch.Tensor:  # as if another rank had four images, all right, of loss 2 in sum
        seen.append(sums.device)
        return torch.tensor([4.0, 2.0, 4.0, *[0.0] * (3 * ECE_BINS)], dtype=torch.float64)

    monkeypatch.setattr(distributed, "all_reduce_sum", added_up)
    found = evaluate(lambda x: x, [], device=torch.device("meta"))
    assert seen == [torch.device("meta")]
    assert (found.n_images, found.nll, found.accuracy) == (4, 0.5, 1.0)


@pytest.mark.parametrize("n", [0, 1, 500])
def test_sums_of_bins_are_those_of_each_bins_images(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    confidence = torch.rand(n, generator=generator, dtype=torch.float64)
    right = (torch.rand(n, generator=generator) < 0.5).double()
    sums = bin_sums(confidence, right, 7)
    assert sums.dtype == torch.float64
    member = confidence_bins(confidence, 7)
    for index in range(7):
        inside = member == index
        expected = torch.stack([inside.double().sum(), confidence[inside].sum(), right[inside].sum()])
        torch.testing.assert_close(sums[:, index], expected, rtol=1e-13, atol=0)  # rounding of sums over 500 images
