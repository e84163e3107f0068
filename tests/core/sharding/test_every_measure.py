"""Every measure of a model that is sharded over two gloo ranks gives one process's numbers, or is refused in one line."""

from __future__ import annotations

import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import vitscope as vs
from tests.core.sharding.test_sharded_weights import OBJECTIVE, network, sharded, whole_state
from tests.fixtures.programs.processes import results_of_ranks
from vitscope.core.sharding.sharded_parameters import is_sharded, plain_weights

PIXELS: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
#: eigenvalues to rounding: the whole Krylov space of few parameters
HEAD: dict[str, Any] = {"parameters": "*head*", "tol": 1e-12, "max_products": 400}
OPTIONS: dict[str, dict[str, Any]] = {
    "adversarial": {"attacks": ("fgsm", "pgd", "square"), "epsilons": (8,), "steps": 2, "queries": 3, **PIXELS},
    "bn_policy": {"n_top": 1, "tol": 1e-12, "parameters": "fc*"},
    "corruption": {"types": ("gaussian_noise",), "severities": (1,), **PIXELS},
    "critical_point": {**HEAD, "parameters": "*norm*", "n_points": 3},
    "curvature_exponents": {"n_singular_values": 4, "parameters": "*head*"},
    "depth_probes": {"n_neighbors": 2},
    "edge_of_stability": {"k": 1, **HEAD},
    "fourier_heatmap": {"n": 2, **PIXELS},
    "frequency_noise_robustness": {"n_bands": 2, **PIXELS},
    "gradient_noise": {"n_hessian_vectors": 1},
    "hessian_block_densities": {"blocks": ["*head*", "*norm*"], "n_vectors": 2, "n_steps": 2, "n_resamples": 2},
    "hessian_by_kind": {"by": "stage", "n_top": 1, "tol": 1e-1, "max_products": 4},
    "hessian_class_structure": {"k": 2, "n_splits": 0, "n_vectors": 2, **HEAD},
    "hessian_diagonal": {"n_vectors": 2},
    "hessian_eigenvalues": {"k": 2, **HEAD},
    "hessian_max_eigenvalue_spectrum": {"n_top": 1, **HEAD},
    "hessian_trace": {"n_vectors": 2},
    "loss_landscape": {"n": 3},
    "loss_slice": {"n": 3},
    "nep_stability": {
        "ks": (1,),
        "k": 1,
        "batch_sizes": (4,),
        "tols": (1e-12,),
        "mixup": False,
        "parameters": "*head*",
    },
    "normalized_hessian": {"k": 1, "tol": 1e-6, "max_products": 400},
    "preconditioned_sharpness": {**HEAD},
    "rayleigh_split": {"k": 1, "n_ends": 0, **HEAD},
    "shape_bias": {"texture": [0, 1, 2] * 4},
    "sharpness": {
        "n_pairs": 2,
        "radii": (0.1,),
        "n_steps": 2,
        "n_starts": 1,
        "adaptive": ["elementwise_l2"],
        "m_images": 2,
    },
    "spectral_density": {"n_vectors": 1, "n_steps": 3},
}
#: of weights that are not those of the optimizer, or of an extra package, see tests/diagnostics/test_kronecker_factors.py
LEFT_OUT = ("kronecker_factors",)


def batches() -> list[tuple[Tensor, Tensor]]:
    """Return three batches of four images, the fewest for CKA; one rank has two of them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 3, 8, 8, generator=generator, dtype=torch.float64)
    return list(zip(x.split(4), torch.randint(3, (12,), generator=generator).split(4)))


def checkpoints() -> list[tuple[str, dict[str, Tensor]]]:
    state = network("vit").state_dict()
    return [(str(factor), {key: t * factor for key, t in state.items()}) for factor in (0.9, 1.02)]


def measured(name: str, model: nn.Module) -> Any:
    options = dict(OPTIONS.get(name, {}))
    if name in ("linear_interpolation", "loss_barrier", "trajectory"):
        options |= {"checkpoints": checkpoints(), "n": 3}
    probe = vs.Probe(model, batches(), OBJECTIVE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few images, undefined accuracies
        return getattr(vs, name)(probe, **options)


def kind_of(name: str) -> str:
    return "convnet" if name == "bn_policy" else "vit"


def numbers(result: Any) -> dict[str, list[np.ndarray]]:
    """Return the fields of a result that are real numbers; residuals and errors are rounding alone."""
    values = {}
    for field in fields(result):
        value = getattr(result, field.name)
        arrays = [np.asarray(v) for v in (value if isinstance(value, tuple) else (value,))]
        if "residual" not in field.name and "error" not in field.name and all(a.dtype.kind in "fi" for a in arrays):
            values[field.name] = [array.astype(np.float64) for array in arrays]
    return values


def numbers_on_rank(names: list[str]) -> dict[str, Any]:
    models = {kind: sharded(kind) for kind in {kind_of(name) for name in names}}
    before = {kind: whole_state(model) for kind, model in models.items()}
    received = {}
    for name in names:
        try:
            received[name] = numbers(measured(name, models[kind_of(name)]))
        except Exception as error:
            received[name] = repr(error)
        dist.barrier()
    for kind, model in models.items():
        assert is_sharded(model)
        after = whole_state(model)
        assert all(torch.equal(after[key], before[kind][key]) for key in after)
    return received


def check(names: list[str], folder: Path) -> None:
    torch.set_num_threads(1)
    ranks = results_of_ranks(lambda: numbers_on_rank(names), folder)
    differences = []
    for name in names:
        expected = numbers(measured(name, network(kind_of(name))))
        assert expected
        for rank, received in enumerate(ranks):
            if isinstance(received[name], str):
                differences.append(f"{name}: refused on rank {rank}: {received[name]}")
                continue
            if received[name].keys() != expected.keys():
                differences.append(f"{name}: other fields on rank {rank}: {received[name].keys() ^ expected.keys()}")
                continue
            for field, arrays in expected.items():
                for a, b in zip(received[name][field], arrays, strict=True):
                    scale = np.nanmax(
                        np.abs(np.where(np.isfinite(b), b, 0)), initial=1e-4
                    )  # of what is zero but for rounding
                    if a.shape != b.shape or not np.allclose(a, b, rtol=1e-10, atol=1e-10 * scale, equal_nan=True):
                        largest = np.nanmax(np.abs(a - b)) / scale if a.shape == b.shape else "other shapes"
                        differences.append(f"{name}.{field} on rank {rank}: {largest}")
    assert differences == [], "\n".join(differences)


def test_measures_that_move_weights_have_one_process_s_numbers(tmp_path: Path) -> None:
    check(["loss_slice", "sharpness"], tmp_path)


@pytest.mark.slow
def test_every_measure_has_one_process_s_numbers(tmp_path: Path) -> None:
    check([name for name in vs.measures() if name not in LEFT_OUT], tmp_path)


def test_a_measure_that_moves_weights_gives_back_the_model() -> None:
    model = network("vit")
    parameters = list(model.parameters())
    with plain_weights(model):
        assert all(a is b for a, b in zip(parameters, model.parameters()))
