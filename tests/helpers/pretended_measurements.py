"""Measurements on the pretended accelerator beside the same on the CPU; a program that prints one JSON line for each.

    python -m tests.helpers.pretended_measurements NAME...

Each line has ``name``, ``faults``, ``error`` (of the measurement on the accelerator, empty where it ran), ``difference`` (the
largest relative difference of a number), ``changed`` (names of weights and buffers that are not as before) and ``reads`` (of the
accelerator by the host, by kind and line).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vitscope as vs
from tests.helpers import pretended_accelerator as pretended
from vitscope.core.objective import Objective
from vitscope.data.augment.mixup import mix
from vitscope.runtime import progress
from vitscope.training.optimizers.muon import MuonAdamW
from vitscope.training.sam import SAM

Batches = list[tuple[Tensor, Tensor]]
#: pixels of the images that noise, corruptions and attacks are defined on
PIXELS: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
ACTIVE: dict[str, Any] = {"parameters": "*head*", "max_products": 10, "tol": 1e-1}


def convnet() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(16, 4),
    ).eval()  # fmt: skip


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return VisionTransformer(img_size=8, patch_size=4, num_classes=4, embed_dim=24, depth=2, num_heads=3).eval()


def batches() -> Batches:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8) % 4
    return list(zip(x.split(4), y.split(4)))


def call(name: str, **options: Any) -> Callable[[vs.Probe], Any]:
    """Return a measurement by name."""
    return lambda probe: getattr(vs, name)(probe, **options)


def _checkpoints(model: nn.Module) -> list[tuple[str, dict[str, Tensor]]]:
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    moved = {name: value * 0.9 if value.is_floating_point() else value for name, value in state.items()}
    return [("a", moved), ("b", state)]


def _interpolated(probe: vs.Probe) -> Any:
    return vs.linear_interpolation(probe, checkpoints=_checkpoints(probe.model), n=3)


def _trained(make: Callable[..., torch.optim.Optimizer]) -> Callable[[vs.Probe], Any]:
    """Return three training steps with mixup; the result is the sum of squares of each weight."""

    def train(probe: vs.Probe) -> dict[str, Any]:
        model = probe.model.train()
        before = {name: value.detach().clone() for name, value in model.state_dict().items()}
        optimizer = make([p for p in model.parameters() if p.requires_grad], network=model)
        losses = []
        for step, (x, y) in enumerate([*probe.batches, *probe.batches][:3]):
            mixed, soft = mix(x, y, num_classes=4, mixup=0.8, cutmix=1.0, seed=(0, step))

            def closure(mixed: Tensor = mixed, soft: Tensor = soft) -> Tensor:
                optimizer.zero_grad()
                loss = Objective(weight_decay=0.05).data_loss(model(mixed), soft)
                loss.backward()
                return loss

            losses.append(float(optimizer.step(closure)))
        squares = [float(p.detach().square().sum()) for p in model.parameters()]
        model.load_state_dict(before)
        model.eval()
        return {"losses": losses, "squares": squares}

    return train


def _sgd(parameters: list[Tensor], network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def _adamw(parameters: list[Tensor], network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def _sam(parameters: list[Tensor], network: nn.Module) -> torch.optim.Optimizer:
    return SAM(parameters, torch.optim.SGD, rho=0.05, lr=0.1)


def _muon(parameters: list[Tensor], network: nn.Module) -> torch.optim.Optimizer:
    return MuonAdamW(parameters, network=network, lr=0.01)


def _of_objective(**options: Any) -> Callable[[vs.Probe], Any]:
    def measure(probe: vs.Probe) -> Any:
        other = vs.Probe(probe.model, probe.batches, Objective(weight_decay=0.05, **options))
        return vs.hessian_eigenvalues(other, k=2, max_products=12)

    return measure


#: networks by the first word of a case's name
NETWORKS: Mapping[str, Callable[[], nn.Module]] = {"convnet": convnet, "transformer": transformer}

#: what is measured on one of the networks, by name
CASES: Mapping[str, Callable[[vs.Probe], Any]] = {
    "convnet: steps of SGD": _trained(_sgd),
    "convnet: steps of SAM": _trained(_sam),
    "transformer: steps of AdamW": _trained(_adamw),
    "transformer: steps of Muon": _trained(_muon),
    "convnet: evaluation": call("evaluation"),
    "convnet: calibration": call("calibration"),
    "convnet: products": call("hessian_eigenvalues", k=2, max_products=12),
    "convnet: products, sum_norm": _of_objective(l2="sum_norm"),
    "convnet: products, smoothing": _of_objective(label_smoothing=0.1),
    "convnet: ggn": call("hessian_eigenvalues", k=2, operator="ggn", max_products=12),
    "convnet: fisher_mc": call("hessian_eigenvalues", k=2, operator="fisher_mc", max_products=12),
    "convnet: fisher_empirical": call("hessian_eigenvalues", k=2, operator="fisher_empirical", max_products=12),
    "convnet: power": call("hessian_eigenvalues", k=1, solver="power"),
    "convnet: micro-batches": call("hessian_eigenvalues", k=2, micro_batch=2, max_products=12),
    "convnet: basis in host memory": call("hessian_eigenvalues", k=2, max_products=12, basis="cpu"),
    "transformer: products": call("hessian_eigenvalues", k=1, max_products=6),
    "transformer: recomputed blocks": call("hessian_eigenvalues", k=1, max_products=6, checkpoint_blocks=True),
    "convnet: spectrum of batches": call("hessian_max_eigenvalue_spectrum", n_top=1, max_products=8, batches_at_once=1),
    "convnet: hutch++": call("hessian_trace", method="hutch++", n_vectors=6),
    "convnet: spectral_density": call("spectral_density", n_vectors=2, n_steps=6, n_grid=16),
    "convnet: hessian_diagonal": call("hessian_diagonal", n_vectors=2),
    "convnet: hessian_diagonal, exact": call("hessian_diagonal", method="exact"),
    "convnet: rayleigh_split": call("rayleigh_split", k=1, n_ends=1, max_products=12),
    "convnet: critical_point": call("critical_point", n_points=3, max_products=12),
    "convnet: gradient_noise": call("gradient_noise"),
    "convnet: curvature_exponents": call("curvature_exponents", n_singular_values=4),
    "convnet: hessian_class_structure": call("hessian_class_structure", k=2, n_splits=0, n_vectors=2, max_products=12),
    "convnet: hessian_block_densities": call(
        "hessian_block_densities", blocks=["0.*", "6.*"], n_vectors=2, n_steps=3, n_resamples=2
    ),
    "convnet: normalized_hessian": call("normalized_hessian", k=1, max_products=12),
    "convnet: loss_landscape": call("loss_landscape", n=3),
    "convnet: loss_landscape, recalibrated": call("loss_landscape", n=2, bn="recalibrate"),
    "convnet: loss_landscape, gradient": call("loss_landscape", n=2, directions="gradient"),
    "convnet: loss_slice": call("loss_slice", n=3, n_directions=2),
    "convnet: linear_interpolation": _interpolated,
    "convnet: sharpness": call("sharpness", radii=[0.05], n_pairs=2, n_steps=2),
    "convnet: sharpness, adaptive": call(
        "sharpness", radii=[0.05], n_pairs=1, n_steps=0, n_starts=1, adaptive=["elementwise_linf", "filter_average"],
        linf_radii=[0.002], average_radii=[0.05], m_images=4, ascent_steps=3,
    ),
    "convnet: adversarial": call("adversarial", steps=2, epsilons=(2,), **PIXELS),
    "convnet: adversarial, suite": call("adversarial", attacks=("suite",), iterations=3, n_targets=2, queries=5,
                                        epsilons=(4,), **PIXELS),
    "convnet: corruption": call("corruption", types=["fog", "pixelate"], severities=[1], **PIXELS),
    "convnet: frequency_noise_robustness": call("frequency_noise_robustness", n_bands=3, **PIXELS),
    "convnet: fourier_heatmap": call("fourier_heatmap", n=2, **PIXELS),
    "convnet: input_filter": call("input_filter", cutoffs=[0.5]),
    "transformer: relative_log_amplitude": call("relative_log_amplitude"),
    "transformer: branch_transfer": call("branch_transfer"),
    "transformer: feature_map_variance": call("feature_map_variance"),
    "transformer: effective_rank": call("effective_rank"),
    "transformer: cka": call("cka", n_permutations=5),
    "transformer: similarity": call(
        "similarity", measure=["procrustes", "mutual_knn", "rsa", "linear_regression", "cka"], n_neighbors=2
    ),
    "transformer: depth_probes": call("depth_probes", n_neighbors=2),
    "transformer: lesion": call("lesion"),
    "transformer: attention_distance": call("attention_distance"),
    "transformer: attention_maps": call("attention_maps", images=2),
    "transformer: token_norms": call("token_norms"),
    "transformer: patch_pca": call("patch_pca"),
    "transformer: oversmoothing": call("oversmoothing"),
    "transformer: effective_receptive_field": call("effective_receptive_field"),
}  # fmt: skip


def _numbers(value: Any) -> Iterator[float]:
    """Yield the floating-point numbers of a result in the order of its fields."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        skipped = ("card", "residuals", "errors", "asymmetry", "resolution")  # rounding alone
        for field in dataclasses.fields(value):
            if not field.name.endswith(skipped):
                yield from _numbers(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _numbers(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, np.ndarray) and value.dtype.kind == "f":
        yield from value.reshape(-1).tolist()
    elif isinstance(value, float):
        yield value


def difference(result: Any, expected: Any) -> float:
    """Return the largest difference of two results' numbers, relative to the largest of them or to 1e-3."""
    a, b = np.array(list(_numbers(result))), np.array(list(_numbers(expected)))
    if a.shape != b.shape or (np.isfinite(a) != np.isfinite(b)).any():
        return float("inf")
    finite = np.isfinite(a)
    return float((np.abs(a - b) / np.maximum(np.abs(b), 1e-3))[finite].max(initial=0.0))


def _on_host(name: str) -> Any:
    return CASES[name](vs.Probe(NETWORKS[name.partition(":")[0]](), batches()))


def run(name: str, fault: contextlib.AbstractContextManager[Any] | None = None) -> dict[str, Any]:
    """Return what is printed of a case; ``fault`` is a context that plants one."""
    expected, error, off, changed = _on_host(name), "", float("nan"), []
    with fault or contextlib.nullcontext(), pretended.accelerator() as seen:
        model = pretended.put_module(NETWORKS[name.partition(":")[0]]())
        on_device = [(pretended.put(x), pretended.put(y)) for x, y in batches()]
        before = {key: t.values.clone() for key, t in model.state_dict().items()}
        seen.clear()
        try:
            result = CASES[name](vs.Probe(model, on_device))
            off = difference(result, expected)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        after = model.state_dict()
        changed = [key for key, old in before.items() if not torch.equal(after[key].values, old)]
    reads = sorted(([*where, count] for where, count in seen.reads.items()), key=lambda row: -row[2])
    return {
        "name": name, "faults": list(seen.faults), "error": error, "difference": off, "changed": changed, "reads": reads,
    }  # fmt: skip


def planted_faults() -> Mapping[str, tuple[str, contextlib.AbstractContextManager[Any]]]:
    """Return cases with a tensor that stays in host memory, by a name for the fault."""
    from vitscope.diagnostics.landscape import _axes
    from vitscope.linalg import solvers
    from vitscope.linalg.curvature import curvature_operator

    def directions(parameters: Mapping[str, Tensor], *_: Any, **__: Any) -> dict[str, Tensor]:
        return {name: torch.randn(p.shape) for name, p in parameters.items()}

    def start(operator: Any, seed: int = 0) -> Tensor:
        return operator.gradient() + torch.randn(operator.size)

    def split(self: Any, v: Tensor) -> list[Tensor]:
        return [part.cpu().view(shape) for part, shape in zip(v.split(self._sizes), self._shapes)]

    return {
        "a start vector": ("convnet: products", mock.patch.object(solvers, "start_vector", start)),
        "a product's vector": ("convnet: products", mock.patch.object(curvature_operator.Curvature, "split", split)),
        "directions": ("convnet: loss_landscape", mock.patch.object(_axes, "random_direction", directions)),
    }


def main(names: list[str]) -> None:
    """Run cases and planted faults by name, all without any."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    progress.enabled = False
    faults = planted_faults()
    for name in names or [*CASES, *faults]:
        if name in faults:
            case, fault = faults[name]
            print(json.dumps(run(case, fault) | {"name": name}), flush=True)
        else:
            print(json.dumps(run(name)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
