"""Predicted costs: the formula of each measure against what the measure does, counted by hooks and by its own result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

import vitscope as vs
from vitscope.core.cost.image_passes import tap_sizes
from vitscope.core.cost.measure_cost import Count, MeasureCost, UnknownCost, Workload, cost_of, stated_cost, workload_of
from vitscope.linalg.curvature.curvature_operator import Curvature
from vitscope.linalg.per_example_gradients import PerExampleGradients
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
    ("adversarial", {"epsilons": [1, 8], "steps": 3, "restarts": 2, **PIXELS}, True),
    (
        "adversarial",
        {"attacks": ["suite"], "epsilons": [0], "iterations": 3, "queries": 4, "n_targets": 9, **PIXELS},
        True,
    ),
    (
        "adversarial",
        {"attacks": ["square", "apgd_dlr"], "epsilons": [8], "iterations": 3, "queries": 4, **PIXELS},
        True,
    ),
    ("attention_distance", {}, False),
    ("hessian_block_densities", {"n_vectors": 1, "n_steps": 2}, True),
    ("hessian_block_densities", {"blocks": "kind", "n_vectors": 2, "n_steps": 3}, True),
    ("calibration", {}, False),
    ("hessian_class_structure", {"k": 3, "n_vectors": 2, "max_products": 20}, False),
    ("critical_point", {"n_points": 5, "max_products": 12}, True),
    ("depth_probes", {"n_neighbors": 2}, False),
    ("branch_transfer", {"n_resamples": 4}, False),
    ("shape_bias", {"texture": [0] * 10}, False),
    ("gradient_noise", {}, False),
    ("gradient_noise", {"n_hessian_vectors": 2}, False),
    ("bn_policy", {"n_top": 1, "max_products": 8}, True),
    ("hessian_by_kind", {"n_top": 1, "max_products": 8}, False),
    ("hessian_by_kind", {"by": "part", "n_top": 1, "max_products": 8}, False),
    ("nep_stability", {"ks": [1, 2], "k": 1, "batch_sizes": [8, 12], "tols": [0.1, 0.01], "max_products": 9}, True),
    ("rayleigh_split", {"k": 2, "n_ends": 1, "max_products": 12}, False),
    ("curvature_exponents", {"n_singular_values": 4}, False),
    ("lesion", {}, True),
    ("lesion", {"cache": False, "removals": ["head"]}, True),
    ("lesion", {"bn": "recalibrate"}, True),
    ("edge_of_stability", {"k": 1, "max_products": 12}, True),
    ("normalized_hessian", {"k": 2, "max_products": 12}, True),
    ("normalized_hessian", {"k": 1, "which": "both", "max_products": 12}, True),
    ("preconditioned_sharpness", {"k": 2, "max_products": 12}, True),
    ("effective_receptive_field", {"taps": "all"}, False),
    ("tap_table", {}, False),
]
#: those that need residual units
OF_TRANSFORMER = (
    "token_norms", "oversmoothing", "cka", "attention_distance", "branch_transfer", "lesion", "hessian_by_kind",
    "hessian_block_densities", "depth_probes", "effective_receptive_field",
)  # fmt: skip
#: those that search, or attack only images that withstand
WITH_BOUNDS = (
    "sharpness", "hessian_eigenvalues", "hessian_trace", "hessian_class_structure", "critical_point", "hessian_by_kind",
    "rayleigh_split", "curvature_exponents", "edge_of_stability", "normalized_hessian", "preconditioned_sharpness",
    "nep_stability", "bn_policy",
)  # fmt: skip


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "enabled", False)


def convnet() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(16, 4),
    ).eval()  # fmt: skip


def convnet_of_seed(seed: int) -> nn.Module:
    model = convnet()
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return vs.models.vit(size="tiny", patch_size=8, depth=1, num_classes=4, image_size=16).eval()


def batches(n_images: int, batch_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(n_images, 3, 16, 16, generator=generator), torch.randint(4, (n_images,), generator=generator)
    return list(zip(x.split(batch_size), y.split(batch_size)))


def counted(
    model: nn.Module, measure: Callable[..., Any], options: dict[str, Any], n_images: int, batch_size: int
) -> tuple[int, int, Any]:
    """Return the number of images that a measure sends through a model, that of products with curvatures, and its result."""
    seen: list[int] = []
    operators: list[Curvature] = []
    make_operator, by_vmap = Curvature.__init__, PerExampleGradients._vmapped

    def make_noted_operator(self: Curvature, *args: Any, **kwargs: Any) -> None:
        make_operator(self, *args, **kwargs)
        operators.append(self)

    def count_images(self: PerExampleGradients, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        n_before = len(seen)
        gradients = by_vmap(self, x, y)
        seen[n_before:] = [len(x)]  # a pass of the vectorized model counts as one image
        return gradients

    model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    with (
        mock.patch.object(Curvature, "__init__", make_noted_operator),
        mock.patch.object(PerExampleGradients, "_vmapped", count_images),
    ):
        result = measure(vs.Probe(model, batches(n_images, batch_size)), **options)
    return sum(seen), sum(operator.n_products for operator in operators), result


def workload(model: nn.Module, n_images: int, batch_size: int) -> Workload:
    sizes = tap_sizes(vs.Probe(model, batches(2, 2)))
    probe = vs.Probe(model, batches(2, 2))
    return dataclasses.replace(workload_of(model, batch_size, n_images, (16, 16), sizes), probe=probe)


def array_bytes(value: object) -> int:
    if isinstance(value, np.ndarray):
        return value.nbytes
    return sum(map(array_bytes, value)) if isinstance(value, tuple) else 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "options", "knows_bytes", "n_images", "batch_size"),
    # one batch matters where its graph is kept
    [
        *((*case, 10, 4) for case in CASES),
        *((*case, 8, 8) for case in CASES if case[0].startswith("hessian") or case[0] in WITH_BOUNDS),
    ],
)
def test_the_formula_counts_what_the_measure_does(
    name: str, options: dict[str, Any], knows_bytes: bool, n_images: int, batch_size: int
) -> None:
    make = transformer if name in OF_TRANSFORMER else convnet
    measure = getattr(vs, name)
    cost = cost_of(measure, options, workload(make(), n_images, batch_size))
    assert cost is not None
    n_seen, n_products, result = counted(make(), measure, options, n_images, batch_size)
    # the passes of the guard's search for tables are the only part that only the model tells; these models have none
    forward = cost.forward_images
    is_search = name in WITH_BOUNDS or options.get("micro_batch") or options.get("iterations")
    if is_search or options.get("dtype"):
        assert n_seen in forward
    else:
        assert n_seen == forward.expected == forward.low
    assert n_products in cost.products
    assert int(np.sum(getattr(result, "n_products", n_products))) == n_products
    if not is_search and name != "hessian_max_eigenvalue_spectrum":
        assert n_products == cost.products.expected
    n_bytes = sum(array_bytes(getattr(result, field.name)) for field in dataclasses.fields(result))
    assert cost.result_bytes == (n_bytes if knows_bytes else None)


def check_pass_count(make: Callable[[], nn.Module], name: str, options: dict[str, Any]) -> MeasureCost:
    """Check that a measure of ten images makes as many passes and products as its formula says, and return the cost."""
    measure = getattr(vs, name)
    cost = cost_of(measure, options, workload(make(), 10, 4))
    assert cost is not None
    n_seen, n_products, result = counted(make(), measure, options, 10, 4)
    assert n_seen in cost.forward_images
    assert n_products in cost.products
    if cost.result_bytes is not None:
        assert cost.result_bytes == sum(
            array_bytes(getattr(result, field.name)) for field in dataclasses.fields(result)
        )
    return cost


@pytest.mark.filterwarnings("ignore")
def test_the_formula_counts_passes_over_validation_and_training_images() -> None:
    model, others = convnet(), batches(7, 4)
    cost = check_pass_count(lambda: model, "calibration", {"validation": vs.Probe(model, others)})
    assert cost.forward_images.expected == 10 + 7 + 2 * 2 * 4
    model = transformer()
    generator = torch.Generator().manual_seed(2)
    train = vs.Probe(model, [(torch.randn(8, 3, 16, 16, generator=generator), torch.arange(8) % 4)])
    check_pass_count(lambda: model, "depth_probes", {"n_neighbors": 2, "train": train})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["branch_transfer", "effective_receptive_field"])
def test_the_formula_counts_the_passes_of_the_model_before_training(name: str) -> None:
    initial, seen = transformer(), []
    initial.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    options: dict[str, Any] = {"initial": initial} | ({"n_resamples": 4} if name == "branch_transfer" else {})
    cost = cost_of(getattr(vs, name), options, workload(transformer(), 10, 4))
    assert cost is not None
    n_seen, _, _ = counted(transformer(), getattr(vs, name), options, 10, 4)
    assert n_seen + sum(seen) == cost.forward_images.expected


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("n", [0, 2])
def test_the_formula_counts_the_points_of_a_trajectory(n: int) -> None:
    states = []
    for seed in range(3):
        states.append((f"step {seed}", convnet_of_seed(seed + 1).state_dict()))
    check_pass_count(convnet, "trajectory", {"checkpoints": states, "n": n})
    check_pass_count(convnet, "trajectory", {"checkpoints": states, "n": n, "labels": ["step 0", "step 2"]})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_the_formula_counts_the_searches_in_the_metric_of_an_optimizer(optimizer: type[torch.optim.Optimizer]) -> None:
    model = convnet()
    state = optimizer(model.parameters(), lr=0.01)
    model(batches(4, 4)[0][0]).square().mean().backward()
    state.step()
    state.zero_grad(set_to_none=True)
    for name in ("edge_of_stability", "preconditioned_sharpness"):
        cost = check_pass_count(lambda: model, name, {"k": 1, "max_products": 12, "optimizer": state})
        is_scaled = name == "edge_of_stability" and optimizer is torch.optim.AdamW
        assert cost.products.high == (24 if is_scaled else 12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
def test_the_formula_counts_the_pass_of_kronecker_factors(fisher: str) -> None:
    pytest.importorskip("curvlinops")
    check_pass_count(convnet, "kronecker_factors", {"fisher": fisher})


def test_products_of_a_part_are_timed_with_its_own_parameters() -> None:
    """The pieces of work of two parts are not one, and those of one part in two analyses are."""
    work = workload(transformer(), 10, 4)
    cost = cost_of(vs.hessian_by_kind, {"n_top": 1}, work)
    assert cost is not None
    names = {w.unit.name for w in cost.works if w.unit.is_product}
    assert names == {f"product, kind:{kind}" for kind in ("stem", "msa", "mlp", "head")}
    again = cost_of(vs.hessian_by_kind, {"n_top": 1}, work)
    assert again is not None
    assert [w.unit.key({}) for w in cost.works] == [w.unit.key({}) for w in again.works]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("n_images", [8, 12])
def test_attention_maps_reads_the_shown_images_again(n_images: int) -> None:
    measure = vs.attention_maps
    cost = cost_of(measure, {"images": 6}, workload(transformer(), n_images, 4))
    assert cost is not None
    n_seen, _, _ = counted(transformer(), measure, {"images": 6}, n_images, 4)
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
    with pytest.raises(UnknownCost, match="number of checkpoints"):
        stated_cost(vs.trajectory, {}, work)
    with pytest.raises(UnknownCost, match="parts of the model"):
        stated_cost(vs.hessian_by_kind, {}, work)
    with pytest.raises(UnknownCost, match="no formula"):
        stated_cost(vs.hessian_eigenvalues, {"solver": "power"}, work)
    assert cost_of(vs.hessian_eigenvalues, {"solver": "power"}, work) is None
    assert cost_of(vs.hessian_diagonal, {"method": "exact"}, work) is None
    assert cost_of(vs.sharpness, {"adaptive": ["elementwise_linf"]}, work) is None
    assert cost_of(vs.corruption, {"root": "somewhere"}, work) is None
    assert cost_of(vs.cka, {"other": object()}, work) is None


def test_every_measure_has_a_formula() -> None:
    assert [name for name in vs.measures() if not hasattr(getattr(vs, name), "cost_formula")] == []


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
