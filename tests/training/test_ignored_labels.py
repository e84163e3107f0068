"""Images whose class index is -100 count in no mean: numbers equal those of torch's cross entropy, or of the others alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import vitscope as vs
from vitscope.core.evaluation import evaluate
from vitscope.core.objective import Objective, labeled
from vitscope.core.probe import Probe
from vitscope.data.augment.mixup import mix
from vitscope.linalg.curvature.operator_factory import curvatures
from vitscope.training.lightning_module import Classifier

#: two roundings of float64 for each of some thousand terms of size one
TIGHT = {"rtol": 1e-11, "atol": 1e-11}


@pytest.fixture
def batches(mlp_batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Return batches of 4, 7 and 2 images of which 2, 4 and none have a label."""
    ignored = [(0, 3), (1, 4, 6), (0, 1)]
    for (_, y), places in zip(mlp_batches, ignored):
        y[list(places)] = -100
    return mlp_batches


def joined(batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def only_labeled(batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    x, y = joined(batches)
    return [(x[labeled(y)], y[labeled(y)])]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_evaluation(mlp: nn.Module, batches: Any, smoothing: float) -> None:
    x, y = joined(batches)
    got = evaluate(mlp, batches, Objective(label_smoothing=smoothing), per_image=True)
    with torch.no_grad():
        assert got.nll == pytest.approx(float(F.cross_entropy(mlp(x), y, label_smoothing=smoothing)), abs=1e-14)
    others = evaluate(mlp, only_labeled(batches), Objective(label_smoothing=smoothing))
    assert (got.accuracy, got.n_images) == (others.accuracy, 6)
    assert got.ece == pytest.approx(others.ece, abs=1e-14)
    assert len(got.losses) == len(got.correct) == 6


def test_no_label_at_all(mlp: nn.Module, mlp_batches: Any) -> None:
    nothing = [(x, torch.full_like(y, -100)) for x, y in mlp_batches]
    with pytest.raises(ValueError, match="at least one image with a label"):
        evaluate(mlp, nothing)
    for measure in (vs.hessian_trace, vs.hessian_eigenvalues):
        with pytest.raises(ValueError, match="at least one image with a label"):
            measure(Probe(mlp, nothing))


@pytest.mark.parametrize(
    ("product", "micro_batch", "smoothing"),
    [
        ("reverse", None, 0.0),
        ("reverse", None, 0.2),
        ("reverse", 3, 0.0),
        ("reverse", 3, 0.2),
        pytest.param("linearize", None, 0.0, marks=pytest.mark.slow),
        ("linearize", None, 0.2),
    ],
)
def test_gradient_and_hessian(mlp: nn.Module, batches: Any, smoothing: float, product: str, micro_batch: Any) -> None:
    x, y = joined(batches)
    names = [name for name, _ in mlp.named_parameters()]

    def loss(*parameters: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(mlp, dict(zip(names, parameters)), (x,)), y, label_smoothing=smoothing)

    point = tuple(p.detach() for p in mlp.parameters())
    blocks = torch.autograd.functional.hessian(loss, point)
    sizes = [p.numel() for p in point]
    hessian = torch.cat(
        [torch.cat([b.reshape(n, m) for b, m in zip(row, sizes)], dim=1) for row, n in zip(blocks, sizes)]
    )
    leaves = [p.clone().requires_grad_() for p in point]
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss(*leaves), leaves)])
    probe = Probe(mlp, batches, Objective(label_smoothing=smoothing))
    with curvatures(probe, product=product, micro_batch=micro_batch) as made:
        operator = made.mean()
        torch.testing.assert_close(operator.gradient(), gradient, **TIGHT)
        v = torch.linspace(-1, 1, operator.size, dtype=torch.float64)
        got = operator(v)
    torch.testing.assert_close(got, hessian @ v, **TIGHT)


@pytest.mark.parametrize("kind", ["ggn", "fisher_empirical", "fisher_mc"])
def test_other_curvatures(mlp: nn.Module, batches: Any, kind: str) -> None:
    """They are means over the images with a label: those of a probe without the others."""
    x, y = joined(batches)
    keep = labeled(y)
    order = torch.cat([keep.nonzero().squeeze(1), (~keep).nonzero().squeeze(1)])  # draws depend on an image's number
    products = []
    for pair in [(x[order], y[order]), (x[keep], y[keep])]:
        with curvatures(Probe(mlp, [pair]), operator=kind) as made:
            operator = made.mean()
            v = torch.linspace(-1, 1, operator.size, dtype=torch.float64)
            products.append(operator(v))
    torch.testing.assert_close(*products, **TIGHT)
    assert products[0].norm() > 0


def test_spectrum_of_each_batch(mlp: nn.Module, batches: Any) -> None:
    """A batch's Hessian is that of its images with a label, one after another or side by side."""
    largest = []
    for pairs in (batches[:2], [only_labeled([batch])[0] for batch in batches[:2]]):
        result = vs.hessian_max_eigenvalue_spectrum(Probe(mlp, pairs), n_top=2, tol=1e-10)
        largest.append(result.eigenvalues)
    np.testing.assert_allclose(*largest, rtol=1e-6)  # both searches stop at residuals of 1e-10 of the largest


def images(n: int = 6) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(4)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6)
    )
    y = torch.tensor([0, 1, -100, 2, -100, 5])
    return network.eval(), [(torch.rand(n, 3, 8, 8), y)]


@pytest.mark.parametrize(
    ("measure", "options"),
    [
        (vs.evaluation, {}),
        (vs.calibration, {}),
        (vs.adversarial, {"attacks": ["fgsm"], "epsilons": [4.0], "mean": [0.5] * 3, "std": [0.5] * 3}),
        (vs.critical_point, {}),
        (vs.loss_slice, {"n": 3}),
        (vs.sharpness, {"n_pairs": 2, "radii": [0.1]}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_measures(measure: Any, options: dict) -> None:
    """Each number is that of the images with a label alone."""
    network, batches = images()
    with_ignored, others = (
        measure(Probe(network, pairs), **options).scalars() for pairs in (batches, only_labeled(batches))
    )
    assert with_ignored.keys() == others.keys()
    for name, value in others.items():
        # float32 sums of a few terms in another order, amplified by the eigenvalue search
        assert with_ignored[name] == pytest.approx(value, rel=1e-3, abs=1e-5, nan_ok=True), name


def test_validation_metrics() -> None:
    """Batches of 4 images of which 3, 1 and none have a label: every metric is that of the four."""
    torch.manual_seed(5)
    logits, y = torch.randn(12, 7), torch.tensor([0, 6, -100, 2, -100, -100, 5, -100, -100, -100, -100, -100])
    y[0] = logits[0].argsort(descending=True)[4]  # right among five, not among four
    module = Classifier(nn.Identity(), num_classes=7, optimizer=torch.optim.SGD, label_smoothing=0.1)
    module.log = lambda *_, **__: None
    for part in range(3):
        module.validation_step((logits[4 * part : 4 * part + 4], y[4 * part : 4 * part + 4]), part)
    metrics: Any = module.metrics["val_metrics"]
    keep = y != -100
    expected = evaluate(lambda x: x, [(logits[keep], y[keep])])
    assert float(metrics["nll"].compute()) == pytest.approx(expected.nll, rel=1e-6)
    smoothed = F.cross_entropy(logits, y, label_smoothing=0.1)
    assert float(metrics["loss"].compute()) == pytest.approx(float(smoothed), rel=1e-6)
    scores = metrics["scores"].compute()
    assert float(scores["accuracy"]) == pytest.approx(expected.accuracy)
    assert float(scores["ece"]) == pytest.approx(expected.ece, abs=1e-6)
    in_top = [float((logits[keep].topk(k).indices == y[keep][:, None]).any(1).float().mean()) for k in (4, 5, 6)]
    assert float(scores["accuracy_top5"]) == pytest.approx(in_top[1])
    assert in_top[0] < in_top[1] <= in_top[2]
    p = logits[keep].softmax(1)
    brier = (p - F.one_hot(y[keep], 7)).square().sum(1).mean()
    assert float(metrics["brier"].compute()) == pytest.approx(float(brier), rel=1e-6)


@pytest.mark.parametrize("mixup", [0.0, 1.0])
def test_mixing_takes_no_ignored_label(mixup: float) -> None:
    with pytest.raises(ValueError, match="a label for every image"):
        mix(torch.rand(2, 3, 4, 4), torch.tensor([1, -100]), num_classes=3, mixup=mixup, seed=(0,))


@pytest.mark.parametrize("measure", [vs.evaluation, vs.calibration, vs.critical_point, vs.loss_slice])
def test_batches_without_a_label_are_one_line(measure: Any) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    batches = [(torch.randn(4, 3, 2, 2), torch.full((4,), -100))] * 2
    with pytest.raises(ValueError, match=r"Expected at least one image with a label.*received") as caught:
        measure(vs.Probe(model, batches, vs.Objective()))
    assert "\n" not in str(caught.value)
