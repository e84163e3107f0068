"""Share of searches for the top eigenvalues that miss one, against dense Hessians of small networks in float64.

Two kinds of network, trained for 60 to 220 steps on photographs, one mini-batch of 16 each. A network counts where one of its
five values is off by more than the tolerance.

    python benchmarks/passed_over.py [--networks 300] [--confirmations 10]
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from hessian import data
from torch import Tensor, nn

import vitscope as vs
from vitscope.linalg import eigensolver
from vitscope.runtime import progress

K = 5
TOLERANCES = (1e-2, 1e-3, 1e-4)


def network(seed: int, x: Tensor, y: Tensor) -> nn.Module:
    """Return a small ConvNet (even seeds) or mixer of patches (odd), trained on ``x (N, 3, 16, 16)``."""
    torch.manual_seed(seed)
    if seed % 2 == 0:
        body = [nn.Conv2d(3, 5, 3, 2), nn.ReLU(), nn.Conv2d(5, 6, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 16)]
    else:
        mixing = [nn.LayerNorm(16), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 8)]
        body = [nn.Conv2d(3, 6, 4, 4), nn.Flatten(2), *mixing, nn.Flatten(), nn.Linear(48, 16)]
    model = nn.Sequential(*body)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60 + 40 * (seed // 2 % 5)):
        rows = torch.randint(0, len(x), (64,))
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.double()


def dense_top(model: nn.Module, x: Tensor, y: Tensor) -> np.ndarray:
    """Return the K eigenvalues of largest magnitude of the Hessian, made row by row, ascending by magnitude."""
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    rows = [torch.autograd.grad(flat, parameters, e, retain_graph=True) for e in torch.eye(len(flat)).to(flat)]
    matrix = torch.stack([torch.cat([h.reshape(-1) for h in row]) for row in rows]).numpy()
    return np.sort(np.abs(np.linalg.eigvalsh((matrix + matrix.T) / 2)))[-K:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=300)
    parser.add_argument(
        "--confirmations", type=int, default=eigensolver.SMALL_CONFIRMATIONS, help="products that confirm"
    )
    arguments = parser.parse_args()
    n, eigensolver.SMALL_CONFIRMATIONS = arguments.networks, arguments.confirmations
    progress.enabled = False
    x, y = data(1024, torch.device("cpu"))
    x = nn.functional.avg_pool2d(x, 2)
    missed, products = dict.fromkeys(TOLERANCES, 0), dict.fromkeys(TOLERANCES, 0)
    for seed in range(n):
        model = network(seed, x, y)
        rows = torch.randint(0, len(x), (16,))
        batch = (x[rows].double(), y[rows])
        true = dense_top(model, *batch)
        for tol in TOLERANCES:
            found = vs.hessian_max_eigenvalue_spectrum(vs.Probe(model, [batch]), n_top=K, tol=tol)
            values = np.sort(np.abs(found.eigenvalues[0]))
            missed[tol] += int(np.max(np.abs(values - true) / true) > tol)
            products[tol] += int(np.sum(found.n_products))
    print("| tol | networks with a value off by more | products a network |\n| - | - | - |")
    for tol in TOLERANCES:
        print(f"| {tol:.0e} | {missed[tol]} of {n} | {products[tol] / n:.1f} |")


if __name__ == "__main__":
    main()
