"""Window attention through scaled_dot_product_attention against the same written out as two einsums and a softmax.

Forward and backward passes at the maps of AlterNet-18 for 32x32 images, relative-position bias included, both sides with
one module's weights. Correctness first: the gradients of all parameters must agree to 1e-4 of the largest (float32, another
order of sums). Then the sides take turns; a sample during which other processes used more than 0.1 core is left out.

    python benchmarks/attention.py [--batch 32] [--rounds 7]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping

import torch
from landscape import FOREIGN, timed
from torch import Tensor

from vitscope.models.layers.window_attention import WindowAttention, merge, partition

MAPS = ((16, 128, 6), (8, 256, 12), (4, 512, 24))  # side, width, heads of stages 2, 3 and 4
REPEATS = 10


def einsum_attention(self: WindowAttention, x: Tensor) -> Tensor:
    """`WindowAttention.forward` with the products written out, as the official code does."""
    _, h, w, _ = x.shape
    windows = partition(x, self.window_size)
    n, length, _ = windows.shape
    q, k, v = self.qkv(windows).reshape(n, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * self.head_dim**-0.5
    weights = (scores + self.position_bias.flatten(1)[:, self.position_index]).softmax(-1)
    out = torch.einsum("bhij,bhjd->bhid", weights, v)
    return merge(self.proj(out.transpose(1, 2).reshape(n, length, -1)), self.window_size, h, w)


def medians(samples: Mapping[str, list[tuple[float, float]]], n: int, unit: str) -> dict[str, float]:
    """Print each side's median over undisturbed samples beside the first side's; return the medians in seconds.

    Args:
        samples: Wall seconds and foreign load in cores, by side.
        n: How many pieces of work a sample holds.
        unit: What a piece is.
    """
    found: dict[str, float] = {}
    first = next(iter(samples))
    for name, values in samples.items():
        kept = [wall / n for wall, foreign in values if foreign <= FOREIGN]
        if not kept:
            print(f"  {name:14s} no undisturbed sample of {len(values)}: no number given", flush=True)
            continue
        found[name] = statistics.median(kept)
        ratio = f"{found[name] / found[first]:.4f}x {first}" if first in found else ""
        print(f"  {name:14s} {1e3 * found[name]:9.2f} ms {unit} ({1e3 * min(kept):.2f} to {1e3 * max(kept):.2f}, "
              f"{len(kept)} of {len(values)} samples)  {ratio}", flush=True)  # fmt: skip
    return found


def compared(side: int, dim: int, heads: int, options: argparse.Namespace, device: torch.device) -> None:
    """Check and time both attentions on one map."""
    torch.manual_seed(0)
    module = WindowAttention(dim, dim, heads=heads).to(device)
    x = torch.randn(options.batch, side, side, dim, device=device)
    weights = torch.randn_like(x)

    def gradients(forward: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(module, x), list(module.parameters()), weights)

    sides = {"sdpa": WindowAttention.forward, "einsum": einsum_attention}
    pairs = zip(*(gradients(forward) for forward in sides.values()))
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    if error > 1e-4:
        raise SystemExit(f"gradients of the two attentions differ by {error:.1e} of the largest")
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, forward in sides.items():
            samples[name].append(timed(lambda f=forward: [gradients(f) for _ in range(REPEATS)], device))
    print(f"{options.batch} maps of {side}x{side}x{dim}, {heads} heads; gradients within {error:.0e} of the largest")
    medians(samples, REPEATS, "forward and backward")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for shape in MAPS:
        compared(*shape, options, device)


if __name__ == "__main__":
    main()
