"""Simulations and comparisons behind the numbers of docs/curvature.md.

``outliers``: the rule that counts eigenvalues above the bulk, on random matrices and on independent values.
``noise``: coverage of the intervals of the gradient noise, on gradients whose moments are known.
``differences``: products by differences of small networks against exact ones in float64, with the estimate of their error.
``diagonal``: errors of Hutchinson's diagonal of the Gauss-Newton matrix against its entries.

    python benchmarks/curvature_rules.py [--only outliers noise differences diagonal]
"""

from __future__ import annotations

import argparse
import sys
import unittest.mock
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

import vitscope as vs
from vitscope.diagnostics.class_structure._outlier_count import count_outliers
from vitscope.diagnostics.gradient_noise._noise_statistics import NoiseStatistics, noise_statistics
from vitscope.linalg.curvature import operator_factory
from vitscope.linalg.curvature.curvature_operator import Curvature
from vitscope.linalg.curvature.operator_factory import curvatures
from vitscope.linalg.solvers import solve
from vitscope.runtime import progress

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.fixtures.oracles.hessian_oracle import make

#: eigenvalues that the rule is given, as many as `vs.hessian_class_structure` computes for ten classes
N_VALUES = 30
#: dimension of the simulated gradients
DIMENSION = 50
#: names of the networks
CONVNET, TRANSFORMER = "small ConvNet with tanh, 12 images", "small transformer, 12 images"
VIT, RESNET = "ViT of two blocks, 12 images", "ResNet-10 with ReLU, 16 images"


def wigner(rng: np.random.Generator, n: int = 200) -> np.ndarray:
    """Return a symmetric Gaussian matrix whose spectrum is a semicircle from -2 to 2."""
    a = rng.standard_normal((n, n))
    return (a + a.T) / np.sqrt(2 * n)


def semicircle(rng: np.random.Generator) -> np.ndarray:
    return np.linalg.eigvalsh(wigner(rng))[-N_VALUES:]


def marchenko_pastur(rng: np.random.Generator) -> np.ndarray:
    a = rng.standard_normal((200, 400))
    return np.linalg.eigvalsh(a @ a.T / 400)[-N_VALUES:]


def nine_above_semicircle(rng: np.random.Generator) -> np.ndarray:
    """Return the largest values of a semicircle and nine outliers from 1.3 to 3 times its edge."""
    return np.r_[np.linalg.eigvalsh(wigner(rng))[-N_VALUES + 9 :], 2 * np.linspace(1.3, 3, 9)]


def exponential(rng: np.random.Generator) -> np.ndarray:
    return np.sort(rng.exponential(size=20_000))[-N_VALUES:]


def power_law(rng: np.random.Generator) -> np.ndarray:
    return np.sort(rng.pareto(2.0, size=20_000))[-N_VALUES:]


def outliers() -> None:
    """Print how many sets of values have a count above 0, nine outliers, and three sets in a row with one count."""
    print("| values | sets | with outliers | with nine | three sets agree on a count |\n| - | - | - | - | - |")
    for spectrum in (semicircle, marchenko_pastur, nine_above_semicircle, exponential, power_law):
        rng, n = np.random.default_rng(0), 600 if spectrum in (exponential, power_law) else 200
        counts = np.array([count_outliers(spectrum(rng)).count for _ in range(n)])
        triples = counts[: n // 3 * 3].reshape(-1, 3)
        agree = (triples == triples[:, :1]).all(1) & (triples[:, 0] > 0)
        print(
            f"| {spectrum.__name__} | {n} | {100 * (counts > 0).mean():.1f} % | {(counts == 9).sum()} | "
            f"{100 * agree.mean():.1f} % |"
        )


def statistics_of(g: np.ndarray) -> NoiseStatistics:
    """Return the estimates of one group from gradients ``(n, d)``."""
    unit, mean = g / np.linalg.norm(g, axis=1, keepdims=True), g.mean(0)
    total = unit.sum(0)
    parts = (g**2).sum(1), mean @ mean, g @ mean, total @ total, unit @ total
    return noise_statistics(*(np.array(part)[..., None] for part in parts))


def noise(n_sets: int = 200) -> None:
    """Print the coverage of the intervals for gradients ``r (a e_1 + z)`` with normal z and log-normal lengths r."""
    print(
        "| spread of ln r | signal | n | sets without interval | noise scale | coherence | mean cosine |\n|"
        + " - |" * 7
    )
    for spread in (0.0, 0.7, 1.2):
        for signal in (0.01, 0.1, 1.0, 10.0):
            for n in (128, 256):
                print(f"| {spread} | {signal} | {n} | " + " | ".join(coverage(spread, signal, n, n_sets)) + " |")


def coverage(spread: float, signal: float, n: int, n_sets: int) -> list[str]:
    """Return the share of sets without an interval, and the share of the intervals that contain the truth."""
    rng = np.random.default_rng([int(10 * spread), int(1000 * signal), n])
    mean = np.zeros(DIMENSION)
    mean[0] = np.sqrt(signal)

    def gradients(count: int) -> np.ndarray:
        return np.exp(spread * rng.standard_normal((count, 1))) * (
            mean + rng.standard_normal((count, DIMENSION)) / np.sqrt(DIMENSION)
        )

    square = signal * np.exp(spread**2)  # |E g|^2, with E r^2 = exp(2 spread^2) the square length of a gradient
    total = np.exp(2 * spread**2) * (signal + 1)
    units = gradients(200_000)
    cosine = float(np.square((units / np.linalg.norm(units, axis=1, keepdims=True)).mean(0)).sum())
    truth = {"noise_scale": (total - square) / square, "coherence": square / total, "mean_cosine": cosine}
    ends: dict[str, list[np.ndarray]] = {name: [] for name in truth}
    for _ in range(n_sets):
        result = statistics_of(gradients(n))
        for name, intervals in ends.items():
            intervals.append(getattr(result, f"{name}_interval")[0])
    shares = [f"{100 * np.isnan(np.stack(ends['coherence'])[:, 0]).mean():.0f} %"]
    for name, value in truth.items():
        known = np.stack([e for e in ends[name] if not np.isnan(e).any()] or [np.full(2, np.nan)])
        shares.append(f"{100 * ((known[:, 0] <= value) & (value <= known[:, 1])).mean():.0f} %")
    return shares


def small_resnet() -> tuple[nn.Module, Tensor, Tensor]:
    """Return a ResNet-10 with ReLU and max-pooling, 16 images of 32x32 and their classes."""
    torch.manual_seed(0)
    model = ResNet(BasicBlock, layers=(1, 1, 1, 1), channels=(16, 32, 64, 128), num_classes=10).double()
    return model.eval(), torch.randn(16, 3, 32, 32, dtype=torch.float64), torch.randint(10, (16,))


def small_vit() -> tuple[nn.Module, Tensor, Tensor]:
    """Return a ViT of two blocks, 12 images of 32x32 and their classes."""
    torch.manual_seed(0)
    model = vs.models.vit(num_classes=10, image_size=32, patch_size=8, depth=2, heads=2, dim_head=16).double()
    return model.eval(), torch.randn(12, 3, 32, 32, dtype=torch.float64), torch.randint(10, (12,))


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor]]] = {
    CONVNET: lambda: make("conv"),
    TRANSFORMER: lambda: make("vit"),
    VIT: small_vit,
    RESNET: small_resnet,
}


def differences() -> None:
    """Print the largest error of three products by differences with unit vectors, and the largest estimate."""
    print("| network | type | largest eigenvalue | error | estimate | gradients of the search |\n|" + " - |" * 6)
    for name in (CONVNET, TRANSFORMER, RESNET):
        model, x, y = NETWORKS[name]()
        probe = vs.Probe(model, [(x, y)])
        with curvatures(probe) as operators:
            exact = operators.mean()
            top, vectors = leading_vectors(exact)
            expected = [exact(v) for v in vectors]
        for dtype in ("float64", "float32"):
            numbers = difference_errors(probe, vectors, expected, dtype)
            print(f"| {name} | {dtype} | {top:.3g} | " + " | ".join(numbers) + " |", flush=True)


def leading_vectors(operator: Curvature) -> tuple[float, list[Tensor]]:
    """Return the largest eigenvalue, its eigenvector and two random unit vectors."""
    pairs = solve(operator, k=1, which="LM", vectors=True).pairs
    assert pairs.vectors is not None
    rows = torch.from_numpy(np.random.default_rng(0).standard_normal((2, operator.size)))
    return float(pairs.values[0]), [pairs.vectors[0], *(row / row.norm() for row in rows)]


def size_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def difference_errors(probe: vs.Probe, vectors: list[Tensor], expected: list[Tensor], dtype: str) -> list[str]:
    """Return the largest error of the products, the largest estimate, and the gradients of the search for the step."""
    with (
        unittest.mock.patch.object(
            operator_factory, "_refuse_kinks", return_value=None
        ),  # to show why kinks are refused
        curvatures(probe, product="difference", dtype=dtype) as operators,
    ):
        operator = operators.mean()
        assert operator.differences is not None
        gradients, n_steps = operator.differences.gradients, []
        made = gradients.differences

        def counted(direction: Tensor, steps: Sequence[float]) -> list[Tensor]:
            n_steps.append(len(steps))
            return made(direction, steps)

        gradients.differences = counted
        products = [operator.differences.product(v.to(operator.dtype)) for v in vectors[:1]]
        n_searched = 2 * sum(n_steps)
        products += [operator.differences.product(v.to(operator.dtype)) for v in vectors[1:]]
        error = max(float((p.double() - e).norm()) for p, e in zip(products, expected))
        return [f"{error:.2g}", f"{operator.product_error:.2g}", str(n_searched)]


def diagonal() -> None:
    """Print the share of noise in Hutchinson's diagonal of 100 vectors, and its errors over the sizes of the entries."""
    print("| network | parameters | noise share | median standard error over median entry |\n|" + " - |" * 4)
    for name in (CONVNET, TRANSFORMER, VIT):
        model, x, y = NETWORKS[name]()
        probe = vs.Probe(model, [(x, y)])
        exact = vs.hessian_diagonal(probe, method="exact", operator="ggn")
        estimate = vs.hessian_diagonal(probe, n_vectors=100, operator="ggn")
        ratio = np.median(estimate.standard_error) / np.median(exact.diagonal)
        print(f"| {name} | {size_of(model)} | {estimate.noise_share:.2f} | {ratio:.2g} |", flush=True)


PARTS: dict[str, Callable[[], None]] = {
    "outliers": outliers, "noise": noise, "differences": differences, "diagonal": diagonal,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=list(PARTS))
    progress.enabled = False
    for name in parser.parse_args().only:
        PARTS[name]()


if __name__ == "__main__":
    main()
