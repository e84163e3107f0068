"""Predicted costs: the formula of each measure against what the measure does, counted by hooks and by its own result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import vitscope as vs
from vitscope.core.cost.image_passes import tap_sizes
from vitscope.core.cost.measure_cost import Count, MeasureCost, Workload, cost_of, workload_of
from vitscope.runtime import progress

PIXELS: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3}

#: a measure, options, and whether its formula knows the bytes of the result
CASES: list[tuple[str, dict[str, Any], bool]] = [
    ("evaluation", {}, False),
    ("loss_landscape", {"n": 3}, True),
    ("loss_landscape", {"n": 2, "bn": "recalibrate"}, True),
    ("loss_landscape", {"n": 3, "dtype": "bfloat16"}, True),
    ("loss_landscape", {"n": 2, "directions": "gradient"}, True),
    ("loss_slice", {"n": 3, "n_directions": 2}, True),
    ("sharpness", {"radii": [0.05, 0.1, 1.0], "n_pairs": 2, "n_steps": 2}, True),
    ("hessian_max_eigenvalue_spectrum", {"n_top": 2, "max_products": 12}, True),
    ("hessian_max_eigenvalue_spectrum", {"n_top": 1, "n_ends": 1, "max_products": 8, "micro_batch": 2}, True),
    ("hessian_eigenvalues", {"k": 2, "max_products": 12}, True),
    ("hessian_eigenvalues", {"k": 1, "max_products": 12, "which": "both", "micro_batch": 2}, True),
    ("hessian_trace", {"n_vectors": 3}, True),
    ("hessian_trace", {"n_vectors": 7, "method": "hutch++"}, True),
    ("spectral_density", {"n_vectors": 2, "n_steps": 4}, True),
    ("hessian_diagonal", {"n_vectors": 3}, True),
    ("corruption", {"types": ["fog", "pixelate"], "severities": [1, 2], **PIXELS}, True),
    ("fourier_heatmap", {"n": 3, **PIXELS}, True),
    ("frequency_noise_robustness", {"n_bands": 3, **PIXELS}, False),
    ("input_filter", {"cutoffs": [0.5]}, True),
    ("relative_log_amplitude", {}, True),
    ("cka", {"n_permutations": 10}, True),
    ("feature_map_variance", {}, True),
    ("effective_rank", {}, False),
    ("token_norms", {}, False),
    ("oversmoothing", {}, False),
    ("patch_pca", {}, False),
    ("similarity", {}, False),
]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "enabled", False)


def convnet() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(16, 4),
    ).eval()  # fmt: skip


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return vs.models.vit(size="tiny", patch_size=8, depth=1, num_classes=4, image_size=16).eval()


def batches(n_images: int, batch_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(n_images, 3, 16, 16, generator=generator), torch.randint(4, (n_images,), generator=generator)
    return list(zip(x.split(batch_size), y.split(batch_size)))


def counted(
    model: nn.Module, measure: Callable[..., Any], options: dict[str, Any], n_images: int, batch_size: int
) -> tuple[int, Any]:
    """Return the number of images that a measure sends through a model, and its result."""
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    result = measure(vs.Probe(model, batches(n_images, batch_size)), **options)
    return sum(seen), result


def workload(model: nn.Module, n_images: int, batch_size: int) -> Workload:
    sizes = tap_sizes(vs.Probe(model, batches(2, 2)))
    return workload_of(model, batch_size, n_images, (16, 16), sizes)


def array_bytes(value: object) -> int:
    if isinstance(value, np.ndarray):
        return value.nbytes
    return sum(map(array_bytes, value)) if isinstance(value, tuple) else 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "options", "knows_bytes", "n_images", "batch_size"),
    # one batch matters where its graph is kept
    [*((*case, 10, 4) for case in CASES), *((*case, 8, 8) for case in CASES if case[0].startswith("hessian"))],
)
def test_the_formula_counts_what_the_measure_does(
    name: str, options: dict[str, Any], knows_bytes: bool, n_images: int, batch_size: int
) -> None:
    make = transformer if name in ("token_norms", "oversmoothing", "cka") else convnet
    measure = getattr(vs, name)
    cost = cost_of(measure, options, workload(make(), n_images, batch_size))
    assert cost is not None
    n_seen, result = counted(make(), measure, options, n_images, batch_size)
    # the passes of the guard's search for tables are the only part that only the model tells; these models have none
    forward = cost.forward_images
    is_search = name in ("sharpness", "hessian_eigenvalues", "hessian_trace") or options.get("micro_batch")
    if is_search or options.get("dtype"):
        assert n_seen in forward
    else:
        assert n_seen == forward.expected == forward.low
    n_products = int(np.sum(getattr(result, "n_products", 0)))
    assert n_products in cost.products
    if not is_search and name != "hessian_max_eigenvalue_spectrum":
        assert n_products == cost.products.expected
    n_bytes = sum(array_bytes(getattr(result, field.name)) for field in dataclasses.fields(result))
    assert cost.result_bytes == (n_bytes if knows_bytes else None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("n_images", [8, 12])
def test_attention_maps_reads_the_shown_images_again(n_images: int) -> None:
    measure = vs.attention_maps
    cost = cost_of(measure, {"images": 6}, workload(transformer(), n_images, 4))
    assert cost is not None
    n_seen, _ = counted(transformer(), measure, {"images": 6}, n_images, 4)
    assert n_seen == cost.forward_images.expected


@pytest.mark.filterwarnings("ignore")
def test_products_of_a_search_are_near_the_expected_number_on_a_trained_like_spectrum() -> None:
    """The number taken for the prediction, 1.27 (5 + 2k), against searches on matrices whose top stands out."""
    from vitscope.linalg.curvature.product_cost import expected_search_products
    from vitscope.linalg.eigensolver import extreme_eigenvalues

    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(400, 400, generator=generator, dtype=torch.float64))[0]
    values = torch.cat([10 * 0.7 ** torch.arange(12), 0.02 * torch.randn(388, generator=generator)]).double()
    matrix = basis @ torch.diag(values) @ basis.T
    for k in (2, 5):
        start = torch.randn(400, generator=generator, dtype=torch.float64)
        pairs = extreme_eigenvalues(lambda v: matrix @ v, start, k)
        # the spectrum decides; a factor of two is what a prediction before the search can claim
        assert 0.5 < pairs.n_products / expected_search_products(k) < 2.0


def test_a_measure_without_a_formula_is_unknown() -> None:
    work = Workload(8, 4, (16, 16), 100, 400)
    assert cost_of(vs.trajectory, {}, work) is None
    assert cost_of(vs.hessian_eigenvalues, {"solver": "power"}, work) is None
    assert cost_of(vs.hessian_diagonal, {"method": "exact"}, work) is None
    assert cost_of(vs.sharpness, {"adaptive": ["elementwise_linf"]}, work) is None
    assert cost_of(vs.corruption, {"root": "somewhere"}, work) is None
    assert cost_of(vs.cka, {"other": object()}, work) is None


def test_counts_add_up_and_know_their_bounds() -> None:
    total = Count(2, 1, 4) + Count.exactly(3).times(2)
    assert total == Count(8, 7, 10)
    assert 7 in total
    assert 11 not in total
    assert MeasureCost([]).forward_images == Count.exactly(0)


def test_a_budget_is_kept_beside_the_counts() -> None:
    work = Workload(8, 4, (16, 16), 100, 400)
    cost = cost_of(vs.hessian_max_eigenvalue_spectrum, {"budget_s": 3.0}, work)
    assert cost is not None
    assert cost.limit_s == 3.0
