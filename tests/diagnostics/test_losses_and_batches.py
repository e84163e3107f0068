"""Every measure under every form of loss, output and batch: it gives the right value, or one line that names it and its need."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.func import functional_call

import vitscope as vs
from tests.fixtures.networks import forms_of_batches as forms
from tests.fixtures.runs.analysis_runs import MISSING

#: the forms that have a loss of their own, and those whose numbers are the default's of a network with the same outputs
LOSSES, SAME = ("mse", "bce", "dense", "own loss"), ("dict output", "dict batch", "triple")
#: measures of feature maps alone, which are those of any loss
MAPS = {
    "attention_distance", "attention_maps", "branch_transfer", "cka", "effective_rank", "effective_receptive_field",
    "feature_map_variance", "oversmoothing", "patch_pca", "relative_log_amplitude", "similarity", "tap_table",
    "token_norms",
}  # fmt: skip
#: measures that take long: most of their forms are tested among the slow tests
EXPENSIVE = {
    "bn_policy", "critical_point", "hessian_by_kind", "nep_stability", "normalized_hessian", "rayleigh_split", "sharpness",
    "trajectory",
}  # fmt: skip
#: the forms that a measure refuses, beside the words of its need
CLASSES = dict.fromkeys(LOSSES, r"{name} needs logits \(B, K\) and one class per image")
IMAGES = {"triple": r"{name} changes images and needs batches of images and targets alone"}
REFUSED: dict[str, dict[str, str]] = {
    **dict.fromkeys(("calibration", "depth_probes", "evaluation", "hessian_class_structure", "shape_bias"), CLASSES),
    "kronecker_factors": CLASSES | {"triple": r"{name} needs batches of images and targets alone"},
    **dict.fromkeys(
        ("adversarial", "corruption", "fourier_heatmap", "frequency_noise_robustness", "input_filter"), CLASSES | IMAGES
    ),
    "effective_receptive_field": IMAGES,
    "gradient_noise": {
        "dense": r"gradient_noise compares the losses of images and needs a label for every pixel, received 14 ignored"
    },
    "lesion": {"dense": r"lesion compares the losses of images and needs a label for every pixel, received 14 ignored"},
    "rayleigh_split": {"own loss": r"rayleigh_split needs the Gauss-Newton matrix, which a loss of your own"},
}
#: beginnings of the fields without values where a batch holds more than images, which are shown or by which attention is found
WITHOUT_ATTENTION = {
    "oversmoothing": ("attention", "nmi", "head", "layer"),
    "patch_pca": ("images",),
    "token_norms": ("attention", "sink"),
}
HEAD = {"parameters": "*head*", "tol": 1e-6}
OPTIONS: dict[str, dict[str, Any]] = {
    "adversarial": {"attacks": ("fgsm",), "epsilons": (1,)},
    "bn_policy": {"n_top": 1, **HEAD},
    "corruption": {"types": ("gaussian_noise",), "severities": (1,)},
    "critical_point": {**HEAD, "n_points": 3},
    "curvature_exponents": {"n_singular_values": 4, "parameters": "*head*"},
    "depth_probes": {"n_neighbors": 2},
    "edge_of_stability": {"k": 1, **HEAD},
    "fourier_heatmap": {"n": 2},
    "frequency_noise_robustness": {"n_bands": 2},
    "hessian_block_densities": {"blocks": ["*head*", "*norm*"], "n_vectors": 2, "n_steps": 2, "n_resamples": 2},
    "hessian_by_kind": {"n_top": 1, "tol": 1e-1, "max_products": 8},
    "hessian_class_structure": {"k": 2, "n_splits": 0, "n_vectors": 2, **HEAD},
    "hessian_diagonal": {"n_vectors": 2, "parameters": "*head*"},
    "hessian_eigenvalues": {"k": 2, **HEAD},
    "hessian_max_eigenvalue_spectrum": {"n_top": 1, **HEAD},
    "hessian_trace": {"n_vectors": 2, "parameters": "*head*"},
    "loss_landscape": {"n": 3},
    "loss_slice": {"n": 3},
    "nep_stability": {"ks": (1,), "k": 1, "batch_sizes": (8,), "tols": (1e-3,), "mixup": False, "parameters": "*head*"},
    "normalized_hessian": {"k": 1, "tol": 1e-6},
    "preconditioned_sharpness": {"parameters": "*head*"},
    "rayleigh_split": {"k": 1, "n_ends": 0, **HEAD},
    "similarity": {"measure": ["procrustes", "mutual_knn", "rsa", "linear_regression", "cka"], "n_neighbors": 2},
    "sharpness": {"n_pairs": 2, "radii": (0.1,), "n_steps": 1, "n_starts": 1},
    "spectral_density": {"n_vectors": 1, "n_steps": 3, "parameters": "*head*"},
    "shape_bias": {"texture": [0, 1] * 4},
}


def cells(names: Iterable[str], fast: dict[str, bool]) -> list[Any]:
    """Return the pairs of a measure and a form; ``fast`` says whether expensive measures of a form are fast tests."""
    pairs = [(name, form) for name in sorted(names) if name not in MISSING for form in fast]
    return [
        pytest.param(*pair, marks=pytest.mark.slow if pair[0] in EXPENSIVE and not fast[pair[1]] else ())
        for pair in pairs
    ]


def checkpoints(model: nn.Module) -> list[tuple[str, dict[str, torch.Tensor]]]:
    state = {key: t.clone() for key, t in model.state_dict().items()}
    moved = [{k: t * f if t.is_floating_point() else t for k, t in state.items()} for f in (0.9, 0.95)]
    return [
        ("a", moved[0]),
        ("b", {k: t + 0.01 if t.is_floating_point() else t for k, t in moved[1].items()}),
        ("c", state),
    ]


def measured(name: str, probe: vs.Probe) -> Any:
    options = dict(OPTIONS.get(name, {}))
    if name in ("linear_interpolation", "loss_barrier", "trajectory"):
        options |= {"checkpoints": checkpoints(probe.model), "n": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few images, undefined accuracies
        return getattr(vs, name)(probe, **options)


def assert_same_numbers(result: Any, expected: Any, rtol: float, empty: tuple[str, ...] = ()) -> None:
    """Compare all fields but the card; numbers to within rounding, for two ways to write one network."""
    for field in fields(expected):
        a, b = getattr(result, field.name), getattr(expected, field.name)
        if empty and field.name.startswith(empty):
            assert len(a) == 0
            assert len(b) > 0
            continue
        if field.name == "card":
            assert a.loss.startswith(b.loss)
        elif "residual" in field.name:
            continue  # rounding alone
        elif isinstance(b, np.ndarray | float) and np.asarray(b).dtype.kind == "f":
            scale = np.nanmax(np.abs(np.where(np.isfinite(b), b, 0)), initial=0.0)
            np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * max(scale, 1e-9), err_msg=field.name)


@functools.cache
def reference_result(name: str, form: str) -> Any:
    return measured(name, forms.reference(form))


@pytest.mark.parametrize(("name", "form"), cells(vs.measures(), dict.fromkeys(SAME, False)))
def test_other_outputs_and_batches_give_the_numbers_of_pairs(name: str, form: str) -> None:
    probe = forms.probe(form)
    if text := REFUSED.get(name, {}).get(form):
        with pytest.raises(ValueError, match=text.format(name=name)) as error:
            measured(name, probe)
        assert "\n" not in str(error.value)
        return
    # of the triple the network itself is written another way, in float64
    assert_same_numbers(
        measured(name, probe),
        reference_result(name, form if form == "triple" else "pairs"),
        1e-6 if form == "triple" else 1e-12,
        WITHOUT_ATTENTION.get(name, ()) if form == "triple" else (),
    )


@pytest.mark.parametrize(
    ("name", "form"), cells(set(vs.measures()) - MAPS, {"mse": True, "bce": False, "dense": False, "own loss": False})
)
def test_a_measure_works_under_a_loss_or_names_its_need(name: str, form: str) -> None:
    if text := REFUSED.get(name, {}).get(form):
        with pytest.raises(ValueError, match=text.format(name=name)) as error:
            measured(name, forms.probe(form))
        assert "\n" not in str(error.value)
        return
    probe = forms.probe(form)
    result = measured(name, probe)
    loss, curvature = expected_numbers(probe, form)
    if hasattr(result, "nll_by_direction"):  # loss_slice
        assert result.nll[1] == pytest.approx(loss, rel=1e-12)
    elif name == "loss_landscape":
        assert result.nll[1, 1] == pytest.approx(loss, rel=1e-12)
    elif name in ("linear_interpolation", "loss_barrier") or name == "trajectory":
        assert result.nll[-1] == pytest.approx(loss, rel=1e-12)
    elif name == "lesion":
        assert result.nll == pytest.approx(loss, rel=1e-12)
    elif name == "sharpness":
        assert result.nll_center == pytest.approx(loss, rel=1e-12)
    elif name == "critical_point":
        assert result.slice_loss[1] == pytest.approx(loss, rel=1e-12)
        assert result.largest_eigenvalue[-1] == pytest.approx(curvature[-1], rel=1e-6)
    elif name in ("hessian_eigenvalues", "rayleigh_split"):
        top = curvature[np.abs(curvature).argmax()]
        assert result.eigenvalues[0] == pytest.approx(top, rel=1e-5)
    elif name == "spectral_density":
        assert curvature[0] - 1e-9 <= result.nodes.min() <= result.nodes.max() <= curvature[-1] + 1e-9
    if hasattr(result, "accuracy"):
        assert np.isnan(result.accuracy).all() == (form != "dense")
    assert result.card.loss != forms.reference("pairs").card().loss


def expected_numbers(probe: vs.Probe, form: str) -> tuple[float, np.ndarray]:
    """Return the loss on all images by PyTorch's own mean, and the Hessian's eigenvalues of the head's parameters."""
    x = forms.images()
    y = {
        "mse": forms.values(),
        "bce": forms.several_labels(),
        "dense": forms.pixel_labels(),
        "own loss": forms.values(),
    }[form]
    function = {
        "mse": nn.functional.mse_loss,
        "bce": nn.functional.binary_cross_entropy_with_logits,
        "dense": nn.functional.cross_entropy,
        "own loss": nn.functional.huber_loss,
    }[form]
    head = {name: p.detach() for name, p in probe.model.named_parameters() if "head" in name}
    sizes = [p.numel() for p in head.values()]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = {name: t.view_as(p) for (name, p), t in zip(head.items(), flat.split(sizes))}
        return function(functional_call(probe.model, parts, (x,)), y)

    point = torch.cat([p.detach().reshape(-1) for p in head.values()])
    hessian: Any = torch.autograd.functional.hessian(loss, point)
    return float(loss(point).detach()), torch.linalg.eigvalsh(hessian).numpy()


class WithRegisters(nn.Module):
    """A vision transformer with register tokens that is called by name and returns an object, as DINOv2 of transformers."""

    def __init__(self, returns_object: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = VisionTransformer(
            img_size=8, patch_size=2, embed_dim=8, depth=2, num_heads=2, mlp_ratio=2, num_classes=3, reg_tokens=2
        )
        self.returns_object = returns_object
        self.double().eval()

    def forward(self, pixel_values: torch.Tensor) -> Any:
        logits = self.backbone(pixel_values)
        return forms.ModelOutput(logits) if self.returns_object else logits


def test_a_transformer_with_registers_and_an_object_as_output() -> None:
    x, y = torch.randn(8, 3, 8, 8, generator=forms.drawn(), dtype=torch.float64), forms.labels()
    batches = [{"pixel_values": a, "labels": b} for a, b in forms.in_batches(x, y)]
    for name in ("relative_log_amplitude", "hessian_trace", "loss_landscape"):
        options = {"hessian_trace": {"n_vectors": 1}, "loss_landscape": {"n": 3}}.get(name, {})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few images
            result = getattr(vs, name)(vs.Probe(WithRegisters(True), batches), **options)
            expected = getattr(vs, name)(vs.Probe(WithRegisters(False), forms.in_batches(x, y)), **options)
        assert_same_numbers(result, expected, 1e-12)
