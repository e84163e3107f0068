"""Losses: values and means by PyTorch's own reductions, callables, and one line for everything that cannot work."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitscope as vs
from vitscope.core.evaluation import evaluate
from vitscope.core.losses.own_loss import described

G = torch.Generator().manual_seed(0)
Z = torch.randn(6, 4, generator=G, dtype=torch.float64)
MAPS = torch.randn(6, 4, 3, 2, generator=G, dtype=torch.float64)
INDICES = torch.tensor([0, 3, -100, 1, 2, 2])
VALUES = torch.rand(6, 4, generator=G, dtype=torch.float64)
PIXELS = torch.randint(0, 4, (6, 3, 2), generator=G)
PIXELS[1] = PIXELS[2, 0] = -100


def one_hot(smoothing: float) -> Tensor:
    labeled = INDICES[INDICES >= 0]
    return F.one_hot(labeled, 4).double() * (1 - smoothing) + smoothing / 4


CASES: dict[str, tuple[vs.Objective, Tensor, Tensor, Tensor]] = {
    "mse": (vs.Objective(loss="mse"), Z, VALUES, F.mse_loss(Z, VALUES)),
    "mse of one output": (vs.Objective(loss="mse"), Z[:, 0], VALUES[:, 0], F.mse_loss(Z[:, 0], VALUES[:, 0])),
    "mse of maps": (vs.Objective(loss="mse"), MAPS, MAPS**2, F.mse_loss(MAPS, MAPS**2)),
    "mse of classes": (vs.Objective(loss="mse"), Z, INDICES, F.mse_loss(Z[INDICES >= 0], one_hot(0.0))),
    "mse of -100.0": (vs.Objective(loss="mse"), Z[:, 0], VALUES[:, 0] - 100, F.mse_loss(Z[:, 0], VALUES[:, 0] - 100)),
    "bce": (vs.Objective(loss="bce"), Z, VALUES, F.binary_cross_entropy_with_logits(Z, VALUES)),
    "bce of bools": (
        vs.Objective(loss="bce"), Z, VALUES > 0.5, F.binary_cross_entropy_with_logits(Z, (VALUES > 0.5).double()),
    ),
    "bce of one logit": (
        vs.Objective(loss="bce"),
        Z[:, 0],
        INDICES.clamp(0, 1),
        F.binary_cross_entropy_with_logits(Z[:, 0], INDICES.clamp(0, 1).double()),
    ),
    "bce of smoothed classes": (
        vs.Objective(loss="bce", label_smoothing=0.2),
        Z,
        INDICES,
        F.binary_cross_entropy_with_logits(Z[INDICES >= 0], one_hot(0.2)),
    ),
    "dense": (vs.Objective(loss="dense_cross_entropy"), MAPS, PIXELS, F.cross_entropy(MAPS, PIXELS)),
    "smoothed dense": (
        vs.Objective(loss="dense_cross_entropy", label_smoothing=0.1),
        MAPS,
        PIXELS,
        F.cross_entropy(MAPS, PIXELS, label_smoothing=0.1),
    ),
    "own values": (vs.Objective(loss=lambda z, y: (z - y).abs().sum(1)), Z, VALUES, (Z - VALUES).abs().sum(1).mean()),
    "own mean": (vs.Objective(loss=nn.SmoothL1Loss()), Z, VALUES, F.smooth_l1_loss(Z, VALUES)),
    "own mean of labeled images": (vs.Objective(loss=F.cross_entropy), Z, INDICES, F.cross_entropy(Z, INDICES)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_mean_is_pytorchs_over_any_split(case: str) -> None:
    objective, outputs, y, expected = CASES[case]
    assert float(objective.data_loss(outputs, y)) == pytest.approx(float(expected), rel=1e-14)
    for size in (1, 4):
        batches = list(zip(outputs.split(size), y.split(size)))
        assert evaluate(lambda z: z, batches, objective).nll == pytest.approx(float(expected), rel=1e-13)
        parts = [(float(objective.data_loss(*b, "sum")), objective.n_examples(b[1])) for b in batches]
        assert sum(p[0] for p in parts) / sum(p[1] for p in parts) == pytest.approx(float(expected), rel=1e-13)


def test_accuracy_is_that_of_pixels_and_of_class_indices() -> None:
    dense = evaluate(lambda z: z, [(MAPS, PIXELS)], vs.Objective(loss="dense_cross_entropy"))
    right = (MAPS.argmax(1) == PIXELS)[PIXELS >= 0]
    assert dense.accuracy == pytest.approx(float(right.double().mean()), rel=1e-14)
    assert dense.n_images == len(right)
    counts = INDICES >= 0
    for loss in ("mse", "bce", F.cross_entropy):
        result = evaluate(lambda z: z, [(Z, INDICES)], vs.Objective(loss=loss))
        assert result.accuracy == pytest.approx(float((Z.argmax(1) == INDICES)[counts].double().mean()), rel=1e-14)
        assert result.ece != result.ece  # NaN: outputs are no probabilities
    assert evaluate(lambda z: z, [(Z, VALUES)], vs.Objective(loss="mse")).accuracy != 0


def test_images_of_dense_targets_have_means_over_their_own_labeled_pixels() -> None:
    """Image 1 has no label and is left out; image 2 has labels at four of six pixels."""
    targets = PIXELS.clone()
    targets[2, 1, 0] = MAPS[2, :, 1, 0].argmax()
    found = evaluate(lambda z: z, [(MAPS, targets)], vs.Objective(loss="dense_cross_entropy"), per_image=True)
    images = [0, 2, 3, 4, 5]
    losses = [float(F.cross_entropy(MAPS[i : i + 1], targets[i : i + 1])) for i in images]
    right = [float((MAPS[i].argmax(0) == targets[i])[targets[i] >= 0].double().mean()) for i in images]
    assert found.losses == pytest.approx(losses, rel=1e-14)
    assert found.correct == pytest.approx(right, rel=1e-14)
    assert right[1] > 0


def pixel_weights(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, weight=torch.arange(1.0, 5.0).to(z))


def contrastive(z: Tensor, y: Tensor) -> Tensor:
    return (z @ z.T).square().mean()


def noisy(z: Tensor, y: Tensor) -> Tensor:
    return (z - torch.randn_like(z)).square().mean(1)


NETWORK_X = torch.randn(6, 5, generator=G, dtype=torch.float64)
REFUSED: dict[str, tuple[Any, Tensor, str]] = {
    "class weights": (pixel_weights, INDICES.clamp(min=0), r"Expected a loss that is a mean over images, .*pixel_weights"),
    "coupled images": (contrastive, VALUES, r"Expected a loss that is a mean over images"),
    "random": (noisy, VALUES, r"Expected a loss that is a function of outputs and targets, .*noisy"),
    "matrix": (lambda z, y: (z - y).abs(), VALUES, r"one floating-point value per image \(6,\), .* float64 \(6, 4\)"),
    "number": (lambda z, y: 1.0, VALUES, r"to return a tensor, received a float"),
    "failing": (lambda z, y: z @ y, VALUES, r"Expected a loss that takes the outputs and targets, .*RuntimeError"),
    "unknown": ("mae", VALUES, r"Expected loss to be one of cross_entropy, mse, bce, dense_cross_entropy, or a function"),
    "values as soft targets": ("cross_entropy", VALUES, r"divide each row by its sum; use loss='mse' for values"),
    "probabilities": ("bce", VALUES * 2, r"with values from .*: give probabilities or 0 and 1, or use loss='mse'"),
    "shape": ("mse", VALUES[:, :3], r"targets of the shape of the outputs \(6, 4\), received \(6, 3\)"),
    "NaN": ("mse", VALUES * torch.nan, r"with infinite values or NaN"),
    "no maps": ("dense_cross_entropy", INDICES, r"one class index per pixel \(B, H, W\); loss='cross_entropy'"),
    "too high": ("mse", INDICES + 0 * INDICES + (INDICES == 3), r"class indices from 0 to 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_one_line(case: str) -> None:
    loss, y, text = REFUSED[case]
    y = y.where(y != 3, 4) if case == "too high" else y
    with pytest.raises(ValueError, match=text) as error:
        torch.manual_seed(0)
        model = nn.Linear(5, 4).double()
        vs.hessian_trace(vs.Probe(model, [(NETWORK_X, y)], vs.Objective(loss=loss)), n_vectors=1)
    assert "\n" not in str(error.value)


def test_smoothing_of_an_own_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected label_smoothing=0 with a loss of your own, received 0.1"):
        vs.Objective(loss=F.cross_entropy, label_smoothing=0.1)


def scaled(factor: float) -> Any:
    return lambda z, y: factor * (z - y).square().mean(1)


def test_cards_tell_losses_apart() -> None:
    losses = [
        "mse", "bce", scaled(1.0), scaled(2.0), lambda z, y: (z - y).abs().mean(1), nn.HuberLoss(delta=1.0),
        nn.HuberLoss(delta=2.0), functools.partial(F.huber_loss, delta=1.0), functools.partial(F.huber_loss, delta=2.0),
        nn.BCEWithLogitsLoss(pos_weight=torch.ones(4)), nn.BCEWithLogitsLoss(pos_weight=2 * torch.ones(4)),
    ]  # fmt: skip
    texts = [vs.Probe(nn.Identity(), [(Z, VALUES)], vs.Objective(loss=loss)).card().loss for loss in losses]
    assert len(set(texts)) == len(losses)
    assert described(scaled(1.0)) == described(scaled(1.0))
    assert "loss" in vs.Probe(nn.Identity(), [(Z, VALUES)], vs.Objective(loss="mse")).card().conditions()


def test_a_module_as_loss_is_cast_and_given_back() -> None:
    weighted = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    model = nn.Linear(5, 4)
    probe = vs.Probe(model, [(NETWORK_X, VALUES)], vs.Objective(loss=weighted))
    with pytest.warns(UserWarning, match="null for ece"):
        value = vs.loss_slice(probe, n=3, dtype="float64").nll[1]
    double = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 3.0, 4.0]).double())
    expected = double(model.double()(NETWORK_X).detach(), VALUES)
    assert value == pytest.approx(float(expected), rel=1e-12)
    assert weighted.state_dict()["pos_weight"].dtype == torch.float32


def two_heads(outputs: dict[str, Tensor], y: Tensor) -> Tensor:
    return F.cross_entropy(outputs["logits"], y, reduction="none") + outputs["scale"].square().mean(1)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 4).double(), nn.Linear(5, 2).double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.first(x), "scale": self.second(x)}


def test_an_own_loss_takes_several_outputs() -> None:
    y = INDICES.clamp(min=0)
    probe = vs.Probe(TwoHeads(), [(NETWORK_X, y)], vs.Objective(loss=two_heads), output=lambda outputs: outputs)
    expected = float(two_heads(TwoHeads()(NETWORK_X), y).mean().detach())
    with pytest.warns(UserWarning, match=r"null for ece .*; accuracy \(targets are no classes\)"):
        assert vs.loss_slice(probe, n=3).nll[1] == pytest.approx(expected, rel=1e-13)
    # of the second head alone the loss is quadratic, with the Hessian of its mean square
    features = torch.cat([NETWORK_X, torch.ones(6, 1, dtype=torch.float64)], 1)
    largest = torch.linalg.eigvalsh(features.T @ features / 6)[-1]  # 2 / 2 outputs
    result = vs.hessian_eigenvalues(probe, k=1, parameters="layer:second", tol=1e-9)
    assert result.eigenvalues[0] == pytest.approx(float(largest), rel=1e-9)
    with pytest.raises(ValueError, match="one tensor with operator='fisher_empirical', received a dict"):
        vs.hessian_eigenvalues(probe, k=1, operator="fisher_empirical")


def test_randomness_shows_for_one_image_too() -> None:
    probe = vs.Probe(nn.Linear(5, 4).double(), [(NETWORK_X[:1], VALUES[:1])], vs.Objective(loss=noisy))
    with pytest.raises(ValueError, match="Expected a loss that is a function of outputs and targets"):
        vs.loss_slice(probe, n=3)


def test_a_batch_without_any_label_weighs_nothing() -> None:
    model = nn.Conv2d(2, 4, 1).double()
    x = torch.randn(6, 2, 3, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    objective = vs.Objective(loss="dense_cross_entropy")
    ignored = torch.full_like(PIXELS, -100)
    alone = vs.hessian_eigenvalues(vs.Probe(model, [(x, PIXELS)], objective), k=2, tol=1e-9).eigenvalues
    both = vs.hessian_eigenvalues(vs.Probe(model, [(x, ignored), (x, PIXELS)], objective), k=2, tol=1e-9).eigenvalues
    assert both == pytest.approx(alone, rel=1e-9)
    with pytest.raises(ValueError, match="every label is ignored"):
        vs.hessian_eigenvalues(vs.Probe(model, [(x, ignored)], objective), k=2)


def test_labels_that_segmentation_data_sets_use_are_one_line() -> None:
    model, objective = nn.Conv2d(2, 4, 1).double(), vs.Objective(loss="dense_cross_entropy")
    x = torch.randn(6, 2, 3, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"received 255 in batch 0: mark pixels .* y.masked_fill\(y == 255, -100\)"):
        vs.hessian_eigenvalues(vs.Probe(model, [(x, PIXELS.where(PIXELS != 0, 255))], objective), k=1)
    larger = PIXELS.repeat_interleave(2, 1)
    with pytest.raises(ValueError, match=r"resize one to the other, e.g. Probe\(..., output=lambda out: F.interpolate"):
        vs.hessian_eigenvalues(vs.Probe(model, [(x, larger)], objective), k=1)
