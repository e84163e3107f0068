"""The tables of ``docs/cost.md``, from the formulas of the measures and from models on torch's ``meta`` device, without weights.

python docs/scripts/cost_tables.py            # print both tables
python docs/scripts/cost_tables.py --write    # put them between the marks of docs/cost.md
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vitscope as vs
from vitscope.analyses.prediction.cost_prediction import UnitCost, combined, model_bytes
from vitscope.core.cost.measure_cost import MeasureCost, Workload, WorkUnit, cost_of, workload_of
from vitscope.core.cost.tensor_memory import peak_bytes
from vitscope.core.objective import Objective
from vitscope.linalg.curvature import blockwise_attention, microbatch

PAGE = Path(__file__).parents[1] / "cost.md"
MODELS = {
    "ResNet-50": "resnet50",
    "ViT-B/16": "vit_base_patch16_224",
    "ViT-L/16": "vit_large_patch16_224",
    "ViT-H/14": "vit_huge_patch14_224",
    "ViT-g/14": "vit_giant_patch14_224",
    "7B": "vit_7b_patch16_dinov3",
}
#: images of a batch of the Hessian spectrum, and memory of a large GPU
BATCH, CAPACITY = 16, 80 * 10**9
#: a workload whose factors are doubled one after the other
BASE = Workload(
    512, 64, (32, 32), 10**6, 4 * 10**6, 100, [(8, 8)] * 10,
    input_sizes={"checkpoints": 10, "validation": 512, "train": 1024, "initial": 1},
)  # fmt: skip
#: options that are doubled, by measure
SIZES = {
    "loss_landscape": ("n", 21), "loss_slice": ("n", 21), "linear_interpolation": ("n", 21), "loss_barrier": ("n", 21),
    "sharpness": ("n_pairs", 20), "hessian_max_eigenvalue_spectrum": ("n_top", 5), "hessian_eigenvalues": ("k", 5),
    "hessian_trace": ("n_vectors", 30), "spectral_density": ("n_steps", 30), "hessian_diagonal": ("n_vectors", 100),
    "fourier_heatmap": ("n", 8), "frequency_noise_robustness": ("n_bands", 4), "cka": ("n_permutations", 1000),
    "adversarial": ("steps", 20), "hessian_block_densities": ("n_steps", 30), "hessian_class_structure": ("k", 30),
    "critical_point": ("n_points", 21), "gradient_noise": ("n_hessian_vectors", 10), "bn_policy": ("n_top", 5),
    "hessian_by_kind": ("n_top", 5), "nep_stability": ("k", 5), "rayleigh_split": ("k", 5),
    "curvature_exponents": ("n_singular_values", 10), "edge_of_stability": ("k", 2), "normalized_hessian": ("k", 5),
    "preconditioned_sharpness": ("k", 1), "trajectory": ("n", 15),
}  # fmt: skip
#: time of a piece of work in forward passes, of a network with four classes and taps, where it is not their number
WEIGHTS = {
    "gradient": 3.0, "gradient with its graph": 3.0, "gradient in the image": 3.0, "gradient of each image": 3.0,
    "product": 6.0, "product over several batches": 9.0, "gradients by class and logit": 9.0,
    "pass with a gradient for each tap": 9.0, "pass with two gradients for each tap": 17.0,
    "Kronecker factors": 9.0, "Kronecker factors and their eigenvalues": 9.0,
}  # fmt: skip
GIVEN: Mapping[str, dict[str, Any]] = {"linear_interpolation": {"checkpoints": ()}, "loss_barrier": {"checkpoints": ()}}


def seconds_and_bytes(cost: MeasureCost, workload: Workload, n_ranks: int = 1) -> tuple[float, float, float]:
    """Return time in gradients of a thousandth of the images, bytes held beside the model, and bytes of the result.

    A forward pass counts 1, a gradient 3, a product by a kept graph 6 and one that makes it anew 9: an operation's
    derivatives take about twice its time.
    """
    units = {work.unit.name: UnitCost(_weight(work.unit), 0.0, 1) for work in cost.works}
    measured = replace(cost, works=[work for work in cost.works if not work.is_check])
    total = combined("", measured, units, workload.n_images, n_ranks)
    assert total.seconds is not None
    assert total.peak_bytes is not None
    return total.seconds.expected, total.peak_bytes, total.result_bytes or 0.0


def _weight(unit: WorkUnit) -> float:
    """Return the time of a piece of work in forward passes; what is no pass is left out."""
    if unit.name.startswith(("classifiers", "comparison", "extents", "features of all", "search for units")):
        return 0.0
    return WEIGHTS.get(unit.name.partition(", ")[0], max(1.0, float(unit.forwards)))


def factor(after: float, before: float) -> str:
    """Return the power of two by which a number grows, in words of the table."""
    if before == after or before <= 0:
        return "-"
    power = math.log2(after / before)
    return f"x {2**power:.2g}"


def base_workload() -> Workload:
    """Return `BASE` with a small network, in which formulas count units, kinds and classes."""
    network = vs.models.vit(size="tiny", patch_size=8, depth=2, num_classes=4, image_size=32)
    batch = (torch.randn(2, 3, 32, 32), torch.arange(2))
    return replace(BASE, probe=vs.Probe(network, [batch]))


def growth_table() -> str:
    """Return how time, memory and result of each measure grow when one factor doubles."""
    base = base_workload()
    head = ("measure", "images", "batch size", "parameters", "taps", "ranks", "its own size")
    rows = [head, ("---",) * len(head)]
    unknown = []
    for name in vs.measures():
        measure = getattr(vs, name)
        options = dict(GIVEN.get(name, {}))
        key, size = SIZES.get(name, ("", 0))
        options |= {key: size} if key else {}
        cost = cost_of(measure, options, base)
        if cost is None:
            unknown.append(f"`{name}`")
            continue
        before = seconds_and_bytes(cost, base)
        changed = {
            "images": replace(base, n_images=2 * base.n_images),
            "batch size": replace(base, batch_size=2 * base.batch_size),
            "parameters": replace(base, n_parameters=2 * base.n_parameters, parameter_bytes=2 * base.parameter_bytes),
            "taps": replace(base, map_sizes=[(8, 8)] * 20),
        }
        cells = []
        for workload in changed.values():
            other = cost_of(measure, options, workload)
            assert other is not None
            cells.append(_cell(seconds_and_bytes(other, workload), before))
        cells.append(_cell(seconds_and_bytes(cost, base, 2), before))
        own = cost_of(measure, options | {key: 2 * size}, base) if key else None
        cells.append("" if own is None else f"`{key}`: {_cell(seconds_and_bytes(own, base), before)}")
        rows.append((f"`{name}`", *cells))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{table}\n\nWithout a formula: {', '.join(unknown)}." if unknown else table


def _cell(after: tuple[float, float, float], before: tuple[float, float, float]) -> str:
    names = ("time", "memory", "result")
    parts = [f"{name} {factor(a, b)}" for name, a, b in zip(names, after, before) if factor(a, b) != "-"]
    return ", ".join(parts) or "-"


def model_table() -> str:
    """Return what the models take, and where an accelerator of 80 GB ends."""
    head = ("", *MODELS)
    columns = [model_facts(name) for name in MODELS.values()]
    rows = [head, ("---",) * len(head), *((label, *(column[label] for column in columns)) for label in columns[0])]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def model_facts(name: str) -> dict[str, str]:
    """Return the rows of a model's column."""
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    size = model.pretrained_cfg["input_size"][-1]
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    n_forward = pass_bytes(model, BATCH, size)
    # affine in the number of images to within 1 %: two numbers tell it
    n_one, n_two = product_bytes(model, 1, size), product_bytes(model, 2, size)
    per_image = n_two - n_one
    fixed = n_one - per_image
    n_product = fixed + BATCH * per_image
    work = workload_of(model, BATCH, 3 * BATCH, (size, size))
    hessian, density = (
        cost_of(measure, {}, work) for measure in (vs.hessian_max_eigenvalue_spectrum, vs.spectral_density)
    )
    plane = cost_of(vs.loss_landscape, {}, work)
    assert hessian is not None
    assert density is not None
    assert plane is not None
    weights, basis = model_bytes(model), hessian.held_bytes
    most = (CAPACITY - weights - basis - fixed) / per_image
    steps = (CAPACITY - weights - n_product) / work.parameter_bytes - 2
    flops = forward_flops(model, size)
    return {
        "image size, pixels": str(size),
        "parameters": f"{work.n_parameters / 1e6:,.0f} M",
        "weights, float32": gigabytes(weights),
        "forward pass, GFLOP an image": f"{flops / 1e9:,.0f}",
        f"forward pass of {BATCH} images": gigabytes(n_forward),
        f"product, {BATCH} images": gigabytes(n_product),
        "a row of a basis": gigabytes(work.parameter_bytes),
        "`hessian`, basis of 19 products": gigabytes(basis),
        "`spectral_density`, basis of 30 steps": gigabytes(density.held_bytes_shared),
        "`landscape`, beside the model": gigabytes(plane.held_bytes),
        "80 GB: images of a batch of `hessian`": f"{int(most)}" if most >= 1 else "does not fit",
        f"80 GB: rows of a basis beside {BATCH} images": f"{int(steps)}" if steps >= 1 else "does not fit",
        "80 GB: ranks for `spectral_density`": ranks_text(work, weights + n_product),
    }


def ranks_text(work: Workload, n_fixed: float) -> str:
    """Return the ranks among which a basis of 30 steps has to be divided; each holds the model and its batch whole."""
    cost = cost_of(vs.spectral_density, {}, work)
    assert cost is not None
    free = CAPACITY - n_fixed
    return str(math.ceil(cost.held_bytes_shared / free)) if free > 0 else "the model and a product do not fit"


def gigabytes(n_bytes: float) -> str:
    """Return bytes in GB with two or three digits."""
    value = n_bytes / 1e9
    return f"{value:.2f} GB" if value < 10 else f"{value:,.0f} GB"


def pass_bytes(model: nn.Module, n_images: int, size: int) -> int:
    """Return the most bytes of the tensors of a forward pass."""
    x = torch.empty(n_images, 3, size, size, device="meta")
    with torch.no_grad():
        return peak_bytes(lambda: model(x), torch.device("cpu"))


def forward_flops(model: nn.Module, size: int) -> int:
    """Return the floating-point operations of an image."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops()


def product_bytes(model: nn.Module, n_images: int, size: int) -> int:
    """Return the most bytes of a product with the Hessian, its kept graph included, as the package computes it."""
    x, y = torch.empty(n_images, 3, size, size, device="meta"), torch.zeros(n_images, dtype=torch.long, device="meta")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    operator = SimpleNamespace(
        model=model, objective=_Loss(), parameters=parameters, kind="hessian", product="reverse", n_images=n_images,
        n_samples=1, seed=0,
    )  # fmt: skip

    def compute() -> object:
        chunk = microbatch.build_chunk(operator, 0, x, y)
        return chunk.product([torch.empty_like(p) for p in parameters.values()])

    with (
        mock.patch.object(microbatch, "_finite", return_value=0.0),  # a tensor on `meta` has no value
        mock.patch.object(blockwise_attention, "CPU_ENTRIES", blockwise_attention.GPU_ENTRIES),  # as on a GPU
    ):
        return peak_bytes(compute, torch.device("cpu"))


class _Loss(Objective):
    """The cross entropy, whose checks would read targets."""

    def data_loss(self, logits: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        """Return the sum of the cross entropies of the images."""
        return nn.functional.cross_entropy(logits, y, reduction="sum" if reduction == "sum" else "mean")


def main() -> None:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write docs/cost.md")
    tables = {"growth": growth_table(), "models": model_table()}
    if not parser.parse_args().write:
        print("\n\n".join(tables.values()))
        return
    text = PAGE.read_text()
    for name, table in tables.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, _, rest = text.partition(start)
        text = f"{before}{start}{table}\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
