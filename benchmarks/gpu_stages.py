"""The stages of `gpu.py`: each yields the rows of a table, whose title is the first line of its docstring."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import timm
import torch
from gpu_bench import Bench, Row
from hessian import reference, trained
from hessian_peers import Batch, sides_of, slq
from landscape import forward
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from training import STRONG, WARM, lightning, plain

import vitscope as vs
from vitscope.data import DataModule
from vitscope.linalg.curvature.operator_factory import curvatures

FOUR_MEASURES = ("relative_log_amplitude", "feature_map_variance", "effective_rank", "cka")


def ceilings(bench: Bench) -> Iterator[Row]:
    """Rates that bound everything else: matrix products, memory, transfers, kernel launches."""
    n = 512 if bench.is_rehearsal else 8192
    matmul = torch.backends.cuda.matmul
    earlier = matmul.fp32_precision
    for label, dtype, precision in (
        ("float32", torch.float32, "ieee"),
        ("TF32", torch.float32, "tf32"),
        ("bfloat16", torch.bfloat16, "ieee"),
        ("float64", torch.float64, "ieee"),
    ):
        matmul.fp32_precision = precision
        a = torch.randn(n, n, device=bench.device).to(dtype)
        wall, _ = bench.timed(lambda a=a: a @ a)
        yield {"rate": f"{label} matrix products", "value": 2 * n**3 / wall / 1e12, "unit": "TFLOP/s"}
    matmul.fp32_precision = earlier
    size = 1 << (20 if bench.is_rehearsal else 28)
    source, target = torch.empty(size, device=bench.device), torch.empty(size, device=bench.device)
    wall, _ = bench.timed(lambda: target.copy_(source))
    yield {"rate": "copies, read and write", "value": 8 * size / wall / 1e9, "unit": "GB/s"}
    hosts = {"pageable": torch.empty(size // 4)}
    if bench.device.type == "cuda":
        hosts["pinned"] = hosts["pageable"].pin_memory()
    for label, host in hosts.items():
        wall, _ = bench.timed(lambda host=host: target[: size // 4].copy_(host, non_blocking=True))
        yield {"rate": f"{label} memory to the device", "value": size / wall / 1e9, "unit": "GB/s"}
    small = torch.zeros(64, device=bench.device)
    wall, _ = bench.timed(lambda: [small.add_(1.0) for _ in range(2000)])
    yield {"rate": "a kernel launch", "value": wall / 2000 * 1e6, "unit": "us"}


def eigenvalues(bench: Bench) -> Iterator[Row]:
    """Top-5 eigenvalues of ResNet-50 and ViT-B at 224 pixels against the peers."""
    k = 1 if bench.is_rehearsal else 5
    for name in ("resnet50", "vit_base_patch16_224"):
        model, batch = bench.large_model(name)
        with sdpa_kernel(SDPBackend.MATH):  # other kernels have no second derivative
            expected = reference(model, [batch], k)
        own = None
        for side, work in sides_of(model, [batch], bench.peers, k).items():
            results: list[np.ndarray] = []
            facts = {"model": name, "images": len(batch[1]), "k": k, "side": side}
            try:
                with contextlib.redirect_stderr(io.StringIO()), sdpa_kernel(SDPBackend.MATH):
                    wall, memory = bench.timed(lambda work=work, results=results: results.append(work()))
            except Exception as error:  # a peer that fails on a new card does not end the comparison
                yield facts | {"failed": f"{type(error).__name__}: {str(error)[:150]}"}
                continue
            own = own or wall
            worst = float(np.max(np.abs(results[-1] - expected) / np.abs(expected)))
            yield facts | {"error": worst, "s": wall, "against vitscope": wall / own, "GiB": memory}
        yield from _product(bench, name, model, batch)


def _product(bench: Bench, name: str, model: nn.Module, batch: Batch) -> Iterator[Row]:
    """Yield the cost of a Hessian-vector product in gradients."""
    parameters = list(model.parameters())

    def gradient() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            torch.autograd.grad(nn.functional.cross_entropy(model(batch[0]), batch[1]), parameters)

    with curvatures(vs.Probe(model, [batch])) as operators:
        operator = operators.mean()
        v = torch.randn(operator.size, device=bench.device)
        product, memory = bench.timed(lambda: operator.unshifted(v), 5)
        operator.release()
    one, memory_of_gradient = bench.timed(gradient, 5)
    yield {"model": name, "images": len(batch[1]), "side": "a product", "s": product, "in gradients": product / one,
           "GiB": memory, "GiB of a gradient": memory_of_gradient}  # fmt: skip


def densities(bench: Bench) -> Iterator[Row]:
    """The spectral density of ResNet-50 at 224 pixels by stochastic Lanczos quadrature."""
    model, batch = bench.large_model("resnet50")
    steps, vectors = (4, 1) if bench.is_rehearsal else (30, 2)
    own = None
    for side, work in slq(model, batch, steps, vectors, tuple(p for p in bench.peers if p == "pyhessian")).items():
        facts = {"model": "resnet50", "vectors": vectors, "steps": steps, "side": side}
        try:
            wall, memory = bench.timed(work, 1)
        except Exception as error:  # as above
            yield facts | {"failed": f"{type(error).__name__}: {str(error)[:150]}"}
            continue
        own = own or wall
        yield facts | {"s": wall, "against vitscope": wall / own, "GiB": memory}


def side_by_side(bench: Bench) -> Iterator[Row]:
    """Spectra of 64 mini-batches of 16 images, several of them at once under vmap."""
    size, counts = (4, (1, 2)) if bench.is_rehearsal else (16, (1, 4, 16, 64, None))
    x, y = bench.crops(2 * size if bench.is_rehearsal else 64 * size, 32)
    batches = list(zip(x.split(size), y.split(size)))
    models = {"ViT-Ti/4": lambda: vs.models.vit(num_classes=16, patch_size=4, depth=1 if bench.is_rehearsal else None)}
    if not bench.is_rehearsal:
        models |= {
            "ResNet-18": lambda: vs.models.convnet(num_classes=16),
            "AlterNet-18": lambda: vs.models.alternet(num_classes=16),
        }
    for name, build in models.items():
        torch.manual_seed(0)
        model = trained(build(), bench.device, 2 if bench.is_rehearsal else 60, size)
        first: tuple[float, np.ndarray] | None = None
        for count in counts:
            results: list[np.ndarray] = []
            probe = vs.Probe(model, batches)

            def measure(
                probe: vs.Probe = probe, count: int | None = count, results: list[np.ndarray] = results
            ) -> None:
                result = vs.hessian_max_eigenvalue_spectrum(probe, n_top=2, batches_at_once=count)
                results.append(result.eigenvalues)

            wall, memory = bench.timed(measure, 1)
            first = first or (wall, results[-1])
            difference = float(np.max(np.abs(results[-1] - first[1]) / np.abs(first[1])))
            yield {"model": name, "batches": len(batches), "at once": count or "automatic", "s": wall,
                   "speedup": first[0] / wall, "difference": difference, "GiB": memory}  # fmt: skip


def landscapes(bench: Bench) -> Iterator[Row]:
    """A 7x7 loss landscape of ResNet-50 at 224 pixels against its bare forward passes, float32 and bfloat16."""
    model, _ = bench.large_model("resnet50")
    images, size, n = (4, 32, 3) if bench.is_rehearsal else (1024, 224, 7)
    x, y = bench.crops(images, size)
    batches = list(zip(x.split(128), y.split(128)))
    center = float(nn.functional.cross_entropy(torch.cat([_outputs(model, part) for part, _ in batches]), y))
    for dtype in (None, "bfloat16"):
        cast = torch.autocast(bench.device.type, torch.bfloat16, enabled=dtype is not None)

        def bare(cast: Any = cast) -> None:
            with cast:
                forward(model, batches, n)

        results: list[Any] = []
        base, _ = bench.timed(bare, 1)
        wall, memory = bench.timed(
            lambda dtype=dtype, results=results: results.append(
                vs.loss_landscape(vs.Probe(model, batches), n=n, dtype=dtype)
            ),
            1,
        )
        error = abs(float(results[-1].nll[n // 2, n // 2]) - center)
        yield {"images": images, "points": n * n, "precision": dtype or "float32", "s": wall,
               "against forward passes": wall / base, "error at the center": error, "GiB": memory}  # fmt: skip


@torch.no_grad()
def _outputs(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model(images)


def representation(bench: Bench) -> Iterator[Row]:
    """Four measures of the feature maps in one pass against the forward pass, at 224 pixels."""
    for name in ("resnet50", "vit_base_patch16_224"):
        model, (x, y) = bench.large_model(name)
        batch = 4 if bench.is_rehearsal else 8
        probe = vs.Probe(model, list(zip(x.split(batch), y.split(batch))))

        def bare(probe: vs.Probe = probe) -> None:
            with probe.guard() as guarded:
                for _, (images, _) in probe.local_batches():
                    guarded(images)

        base, _ = bench.timed(bare)
        for measures in (*((measure,) for measure in FOUR_MEASURES), FOUR_MEASURES):
            wall, memory = bench.timed(
                lambda measures=measures, probe=probe: vs.one_pass(probe, {m: {} for m in measures})
            )
            yield {
                "model": name,
                "measures": ", ".join(measures),
                "s": wall,
                "against forward pass": wall / base,
                "GiB": memory,
            }


def memory(bench: Bench) -> Iterator[Row]:
    """Peak memory and time of a Hessian-vector product by model, batch and micro-batch."""
    names = ["vit_tiny_patch16_224"] if bench.is_rehearsal else [
        "resnet50", "vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224"]  # fmt: skip
    sizes = ((2, None),) if bench.is_rehearsal else ((4, None), (16, None), (64, None), (64, 8))
    for name in names:
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=16).to(bench.device).eval()
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        for images, micro_batch in sizes:
            facts = {"model": name, "million parameters": millions, "images": images, "micro_batch": micro_batch}
            x = torch.randn(images, 3, 224, 224, device=bench.device)
            y = torch.arange(images, device=bench.device) % 16
            try:
                with curvatures(vs.Probe(model, [(x, y)]), micro_batch=micro_batch) as operators:
                    operator = operators.mean()
                    v = torch.randn(operator.size, device=bench.device)
                    wall, peak = bench.timed(lambda operator=operator, v=v: operator.unshifted(v), 1)
                    operator.release()
            except torch.OutOfMemoryError:
                yield facts | {"failed": "out of memory"}
                continue
            yield facts | {"s": wall, "GiB": peak, "MiB an image": 1024 * peak / (micro_batch or images)}


def training(bench: Bench) -> Iterator[Row]:
    """Training steps of the Lightning module against the plain loop, on batches that are there."""
    makers: Mapping[str, Callable[[], nn.Module]] = {
        "AlterNet-50": lambda: vs.models.alternet(depth=50, num_classes=16),
        "ResNet-50": lambda: vs.models.convnet(depth=50, num_classes=16),
        "ViT-Ti/2": lambda: vs.models.vit(num_classes=16, patch_size=2),
    }
    batch, n = (4, 2) if bench.is_rehearsal else (96, 60)
    if bench.is_rehearsal:
        makers = {"ViT of one layer": lambda: vs.models.vit(num_classes=16, patch_size=8, depth=1)}
    mix = DataModule(**STRONG).mixed
    one = (torch.randn(batch, 3, 32, 32), torch.randint(16, (batch,)))
    batches = DataLoader([one] * (WARM + n + 1), batch_size=None)
    options = [{}, {"half": True}, {"half": True, "channels_last": True}] if bench.device.type == "cuda" else [{}]
    for name, build in makers.items():
        for flags in options:
            walls, losses = {}, {}
            for side, train in (("plain", plain), ("vitscope", lightning)):
                torch.manual_seed(0)
                results, (wall, _) = train(build(), batches, n, mix, bench.device, **flags)
                walls[side], losses[side] = wall / n, torch.stack([loss.float().cpu() for loss in results])
            gap = float((losses["vitscope"] - losses["plain"]).abs().max())
            yield {"model": name, "options": ", ".join(flags) or "float32", "ms a step": 1e3 * walls["vitscope"],
                   "against plain loop": walls["vitscope"] / walls["plain"], "images/s": batch / walls["vitscope"],
                   "difference of losses": gap}  # fmt: skip


STAGES: Mapping[str, Callable[[Bench], Iterator[Row]]] = {
    stage.__name__: stage
    for stage in (ceilings, eigenvalues, densities, side_by_side, landscapes, representation, memory, training)
}
