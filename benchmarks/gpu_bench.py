"""The device and the sizes of a session of `gpu.py`: timing, images and large models."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from hessian_peers import PEERS, Batch
from torch import nn

from vitscope.data.sources import photos

Row = dict[str, Any]


class Bench:
    """Device and sizes of a session on one card."""

    def __init__(self, device: torch.device, is_rehearsal: bool) -> None:
        self.device, self.is_rehearsal = device, is_rehearsal
        self.repetitions = 1 if is_rehearsal else 3
        self.peers = tuple(name for name in PEERS if importlib.util.find_spec(name))

    def timed(self, work: Callable[[], object], repetitions: int | None = None) -> tuple[float, float]:
        """Return the median of the seconds that ``work`` takes after a warming call, and its peak memory in GiB."""
        work()
        held = 0
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        walls = []
        for _ in range(repetitions or self.repetitions):
            self.synchronize()
            start = time.perf_counter()
            work()
            self.synchronize()
            walls.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() - held if self.device.type == "cuda" else float("nan")
        return statistics.median(walls), peak / 2**30

    def synchronize(self) -> None:
        """Wait for the kernels that were launched."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def crops(self, n: int, size: int) -> Batch:
        """Return n crops of photographs at ``size`` pixels, (n, 3, size, size), and which photographs they are of."""
        source = photos.load("train")
        rows = torch.randperm(len(source.labels), generator=torch.Generator().manual_seed(0))[:n]
        images = (source.images[rows].float().to(self.device) - 128) / 42
        if size != images.shape[-1]:
            images = nn.functional.interpolate(images, size=(size, size), mode="bicubic", antialias=True)
        return images, source.labels[rows].to(self.device)

    def large_model(self, name: str) -> tuple[nn.Module, Batch]:
        """Return a model of timm after some steps on crops of 224 pixels, and 16 of them; tiny ones in a rehearsal."""
        torch.manual_seed(0)
        if self.is_rehearsal:
            tiny = {"resnet50": "resnet18", "vit_base_patch16_224": "vit_tiny_patch16_224"}[name]
            options = {} if tiny == "resnet18" else {"img_size": 32, "depth": 1}
            return timm.create_model(tiny, num_classes=16, **options).to(self.device).eval(), self.crops(4, 32)
        model = timm.create_model(name, num_classes=16).to(self.device).train()
        x, y = self.crops(256, 224)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
        for step in range(40):
            rows = torch.arange(32 * step, 32 * step + 32, device=self.device) % len(x)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        return model.eval(), (x[:16], y[:16])
