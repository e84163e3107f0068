"""``make doctor``: test what works on this machine."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vitscope.config import loading
from vitscope.core.objective import Objective
from vitscope.core.probe import Probe
from vitscope.linalg.basis_memory import free_memory
from vitscope.runs import wandb_mirror

_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "pytorch-lightning",
    "hydra-core",
    "omegaconf",
    "torchmetrics",
    "wandb",
    "numpy",
)
_MODELS = ("resnet18", "vit_tiny_patch16_224")


def main() -> None:
    """Print the table; exit 1 where a Hessian-vector product failed."""
    table = Table("check", "result", title="vitscope doctor", title_justify="left")
    for row in [*_versions(), *_machine(), *_tracking(), *_data()]:
        table.add_row(*row)
    failed = False
    for name in _MODELS:
        text, good = _product(name)
        failed |= not good
        table.add_row(f"Hessian-vector product, timm {name}", text)
    Console().print(table)
    sys.exit(int(failed))


def _versions() -> list[tuple[str, str]]:
    rows = [("Python", platform.python_version())]
    for package in _PACKAGES:
        try:
            rows.append((package, version(package)))
        except PackageNotFoundError:
            rows.append((package, "missing: pip install -e ."))
    return rows


def _machine() -> list[tuple[str, str]]:
    page = os.sysconf("SC_PAGE_SIZE") / 2**30
    free, total = free_memory(torch.device("cpu")) / 2**30, os.sysconf("SC_PHYS_PAGES") * page
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    gpu_names = ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in gpus) or "none"
    return [
        ("CPU cores, threads used", f"{os.cpu_count()}, {torch.get_num_threads()}"),
        ("memory free", f"{free:.1f} of {total:.1f} GiB"),
        ("disk free here", f"{shutil.disk_usage('.').free / 2**30:.0f} GiB"),
        ("GPUs", gpu_names),
    ]


def _tracking() -> list[tuple[str, str]]:
    mode = os.environ.get("WANDB_MODE") or ("online" if wandb_mirror.has_key() else "offline (no key configured)")
    return [("W&B", mode)]


def _data() -> list[tuple[str, str]]:
    root = Path(os.environ.get("VITSCOPE_DATA", "data"))
    built_in = "photos, photographs, digits, shapes"
    names = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    return [
        ("data sets built in", built_in),
        (f"in {root}/", ", ".join(names) or "nothing (VITSCOPE_DATA names the folder)"),
        (
            "configuration",
            f"{len(loading.options('analysis'))} analyses, {len(loading.options('experiment'))} experiments",
        ),
    ]


def _product(name: str) -> tuple[str, bool]:
    """Return how one double-backward product on a timm model went."""
    import timm

    size: dict[str, Any] = {"img_size": 32, "patch_size": 8} if name.startswith("vit") else {}
    try:
        model = timm.create_model(name, num_classes=10, **size)
        probe = Probe(model, [(torch.randn(4, 3, 32, 32), torch.arange(4))], Objective(weight_decay=0.05))
        started = time.perf_counter()
        with probe.guard(second_order=True):
            weights = list(probe.parameters().values())
            ((x, y),) = probe.iter_batches()
            gradients = torch.autograd.grad(probe.objective(model, x, y), weights, create_graph=True)
            direction = [torch.ones_like(w) for w in weights]
            product = torch.autograd.grad(gradients, weights, direction)
        size_of = sum(float(p.double().square().sum()) for p in product) ** 0.5
        return f"works, {time.perf_counter() - started:.2f} s, |Hv| = {size_of:.3g}", True
    except Exception as error:  # whatever it is, the user should see it here
        return f"FAILED: {type(error).__name__}: {error}", False
