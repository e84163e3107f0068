"""Memory of curvature measures in several processes: bytes of the Lanczos basis on each rank, and equal eigenvalues.

Each row runs `vs.hessian_eigenvalues` of one network with 1, 2 and 4 gloo ranks on this machine, float64, and counts the bytes
that hold the rows of the basis. Eigenvalues must agree with one process's to 1e-10 of the largest.

Then math attention against attention by blocks at 64 to 1,025 tokens, 6 heads of 64: bytes that the graph of the gradient keeps,
and the time of a product with the second derivative. Both are timed in turns; the table has the ratio of the shortest times and
the median of the ratios of neighbors.

    python benchmarks/scale.py [--ranks 1 2 4] [--products 16] [--basis auto] [--tokens 64 197 577 1025]
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.multiprocessing.spawn import start_processes
from torch.nn.attention import SDPBackend, sdpa_kernel

import vitscope as vs
from vitscope.linalg.basis_memory import PLACEMENTS, BasisBuffer
from vitscope.linalg.curvature import blockwise_attention
from vitscope.runtime import progress

#: relative to the largest eigenvalue, float64: sums over images and columns in another order
ALLOWED = 1e-10


def network() -> torch.nn.Module:
    """Return a tiny ViT for 32x32 images with random weights, in float64."""
    torch.manual_seed(0)
    return vs.models.vit(size="tiny", patch_size=8, num_classes=10, image_size=32).double()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return four batches of two random images."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64),
            torch.randint(10, (2,), generator=generator),
        )
        for _ in range(4)
    ]


def measure(rank: int, world: int, products: int, basis: str, folder: str) -> None:
    """Measure as one of ``world`` ranks, and write what was counted to ``folder``."""
    torch.set_num_threads(1)
    progress.enabled = False
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{world}", rank=rank, world_size=world)
    stored: list[int] = []
    rows = BasisBuffer.rows

    def counted(self: BasisBuffer, capacity: int, like: torch.Tensor) -> torch.Tensor:
        given = rows(self, capacity, like)
        stored.append(given.untyped_storage().nbytes())
        return given

    BasisBuffer.rows = counted
    result = vs.hessian_eigenvalues(vs.Probe(network(), batches()), k=2, tol=1e-12, max_products=products, basis=basis)
    placement = result.card.solver["basis"] if result.card else "unknown"
    torch.save((result.eigenvalues, max(stored), placement), f"{folder}/{world}-{rank}.pt")
    dist.destroy_process_group()


def attention_graph(attention: Callable[..., torch.Tensor], n_tokens: int) -> tuple[int, Callable[[], None]]:
    """Return the bytes that the graph of the gradient keeps, and a product with the second derivative to be timed."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 6, n_tokens, 64, generator=generator, requires_grad=True) for _ in range(3)]
    storages: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with sdpa_kernel(SDPBackend.MATH), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        gradient = torch.autograd.grad(attention(*inputs).square().sum(), inputs, create_graph=True)
    return sum(storages.values()), lambda: torch.autograd.grad(gradient, inputs, gradient, retain_graph=True) and None


def attention_table(tokens: Sequence[int]) -> None:
    """Print bytes and times of math attention and of attention by blocks, whose products are timed in turns."""
    torch.set_num_threads(1)
    blockwise_attention.FEWEST_KEYS = 1
    print("\n| tokens | MiB kept, math | MiB kept, blocks | ratio | time of a product over math's: shortest | median |")
    print("|---|---|---|---|---|---|")
    for n in tokens:
        graphs = [
            attention_graph(f, n) for f in (F.scaled_dot_product_attention, blockwise_attention.blockwise_attention)
        ]
        times = np.array([[seconds(product) for _, product in graphs] for _ in range(max(8, 20_000 // n))])[1:]
        (math_bytes, _), (block_bytes, _) = graphs
        shortest, median = times.min(0), np.median(times[:, 1] / times[:, 0])
        print(
            f"| {n} | {math_bytes / 2**20:.1f} | {block_bytes / 2**20:.1f} | {block_bytes / math_bytes:.3f} | "
            f"{shortest[1] / shortest[0]:.2f} | {median:.2f} |",
            flush=True,
        )


def seconds(product: Callable[[], None]) -> float:
    """Return the time of a call."""
    start = time.perf_counter()
    product()
    return time.perf_counter() - start


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--products", type=int, default=16)
    parser.add_argument("--basis", choices=PLACEMENTS, default="auto")
    parser.add_argument("--tokens", type=int, nargs="*", default=[64, 197, 577, 1025])
    options = parser.parse_args()
    attention_table(options.tokens)
    size = sum(p.numel() for p in network().parameters())
    print(f"{size:,} parameters, float64, {options.products} products, {options.products + 1} rows")
    print("| ranks | basis | MiB a rank | of one process | largest difference |\n|---|---|---|---|---|")
    reference: tuple[np.ndarray, int] | None = None
    with tempfile.TemporaryDirectory() as folder:
        for world in options.ranks:
            start_processes(
                measure, (world, options.products, options.basis, folder), nprocs=world, start_method="spawn"
            )
            results = [torch.load(Path(folder) / f"{world}-{rank}.pt", weights_only=False) for rank in range(world)]
            values, n_bytes, placement = results[0][0], max(result[1] for result in results), results[0][2]
            reference = reference or (values, n_bytes)
            difference = max(float(np.abs(result[0] - reference[0]).max()) for result in results)
            relative = difference / float(np.abs(reference[0]).max())
            share = n_bytes / reference[1]
            print(f"| {world} | {placement} | {n_bytes / 2**20:.1f} | {share:.4f} | {relative:.1e} |", flush=True)
            assert relative <= ALLOWED, f"{world} ranks differ by {relative:.1e}"


if __name__ == "__main__":
    main()
