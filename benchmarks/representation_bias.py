"""Bias of the estimators of representations on drawn features, whose true values are known (docs/representation.md).

``ranks``: effective rank and participation ratio of vectors that vary equally along all directions.
``similarity``: values of independent features, whose similarity is 0.
``collapse``: neural collapse of class means in noise, over the images of a class.
``dimension``: the intrinsic dimension of normal vectors.

    python benchmarks/representation_bias.py [--only ranks similarity collapse dimension]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from vitscope.diagnostics.cka._comparisons import COMPARISONS, Pair
from vitscope.diagnostics.cka._hsic import gram, hsic
from vitscope.diagnostics.cka._representations import FeatureStore
from vitscope.diagnostics.depth_probes._intrinsic_dimension import intrinsic_dimension
from vitscope.diagnostics.depth_probes._neural_collapse import NAMES, LabeledFeatures, neural_collapse
from vitscope.diagnostics.rank.effective_rank import _ranks


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ranks() -> None:
    """Print both ranks of n vectors of C equal variances, whose true value is C."""
    print("| C | n | participation ratio | C / (1 + C / n) | effective rank |\n|" + " - |" * 5)
    for channels, n in ((64, 64), (64, 256), (64, 1024), (192, 512)):
        rows = []
        for seed in range(10):
            values = torch.linalg.eigvalsh(torch.cov(normal(n, channels, seed=seed).T)).flip(0).numpy()
            rank, ratio, _ = _ranks(values)
            rows.append((ratio, rank))
        ratio, rank = np.mean(rows, axis=0)
        print(f"| {channels} | {n} | {ratio:.1f} | {channels / (1 + channels / n):.1f} | {rank:.1f} |")


def similarity() -> None:
    """Print the similarities of independent features of n images by every measure, and CKA with the biased HSIC."""
    names = list(COMPARISONS)
    print("| n | features | " + " | ".join(names) + " | cka | cka, biased HSIC |\n|" + " - |" * (len(names) + 4))
    for n, width in ((128, 16), (128, 64), (128, 512), (512, 64), (512, 192)):
        x, y = normal(n, width, seed=0), normal(n, width, seed=1)
        store = FeatureStore(["x", "y"], n, float("inf"))
        store.add(0, [x, y])
        first, second = store.representations()
        pair, order = Pair([first], [second], within=False), torch.arange(n)
        values = [float(COMPARISONS[name](10).similarities(pair, [order])[0, 0, 0]) for name in names]
        grams = torch.stack([gram(x), gram(y)])
        cells = [*values, ratio(hsic(grams, grams)), ratio(torch.einsum("aij,bij->ab", grams, grams))]
        print(f"| {n} | {width} | " + " | ".join(f"{value:.3f}" for value in cells) + " |")


def ratio(values: Tensor) -> float:
    """Return the similarity of two representations from the matrix of their HSIC ``(2, 2)``."""
    return float(values[0, 1] / (values[0, 0] * values[1, 1]).sqrt())


def collapse(n_classes: int = 10, width: int = 128) -> None:
    """Print neural collapse of class means of unequal variances in noise of unit variance, over the images of a class."""
    print("| images of a class | " + " | ".join(NAMES) + " |\n|" + " - |" * (len(NAMES) + 1))
    scales = 0.4 * 0.7 ** torch.arange(n_classes - 1, dtype=torch.float64)
    means = (normal(n_classes, n_classes - 1, seed=0) * scales) @ normal(n_classes - 1, width, seed=1)
    weight = means - means.mean(0)
    for n in (5, 20, 100, 2000):
        labels = torch.arange(n_classes).repeat_interleave(n)
        rows = []
        for seed in range(3):
            x = means[labels] + normal(len(labels), width, seed=10 + seed)
            rows.append(neural_collapse(LabeledFeatures(x, labels, labels, x, weight)))
        print(f"| {n} | " + " | ".join(f"{value:.2g}" for value in np.mean(rows, axis=0)) + " |")


def dimension() -> None:
    """Print the intrinsic dimension of normal vectors, whose true value is their number of entries."""
    print("| dimension | n | estimate |\n| - | - | - |")
    for width, n in ((5, 512), (20, 512), (20, 2048), (50, 512)):
        print(f"| {width} | {n} | {intrinsic_dimension(normal(n, width, seed=0))[0]:.1f} |")


PARTS: dict[str, Callable[[], None]] = {
    "ranks": ranks, "similarity": similarity, "collapse": collapse, "dimension": dimension,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=list(PARTS))
    torch.set_num_threads(1)
    for name in parser.parse_args().only:
        PARTS[name]()


if __name__ == "__main__":
    main()
