"""One small network with attention and BatchNorm, with probes of every form of loss, output and batch that measures meet."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vitscope as vs

N_IMAGES, SIDE, N_CLASSES = 8, 4, 3


class Network(nn.Module):
    """BatchNorm, a vision transformer of two blocks, and a head on its pooled tokens or on every pixel; in float64."""

    def __init__(self, form: Callable[[Tensor], Any] = lambda z: z, dense: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm2d(3)
        self.vit = VisionTransformer(
            img_size=SIDE,
            patch_size=2,
            embed_dim=4,
            depth=1,
            num_heads=2,
            mlp_ratio=2,
            num_classes=0 if dense else N_CLASSES,
        )
        self.form = form
        self.head = nn.Conv2d(4, N_CLASSES, 1) if dense else None
        self.double().eval()

    def forward(self, pixel_values: Tensor, scale: Tensor | None = None) -> Any:
        x = self.norm(pixel_values)
        if scale is not None:
            x = x * scale[:, None, None, None]
        tokens = self.vit.forward_features(x)  # (B, 5, 4)
        if self.head is None:
            return self.form(self.vit.head(tokens[:, 0]))
        maps = tokens[:, 1:].transpose(1, 2).unflatten(2, (SIDE // 2, SIDE // 2))
        return self.form(nn.functional.interpolate(self.head(maps), scale_factor=2, mode="bilinear"))


@dataclass
class ModelOutput:
    """As the outputs of transformers."""

    logits: Tensor
    hidden_states: Tensor | tuple[Tensor, ...] | None = None


def drawn(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images() -> Tensor:
    return torch.randn(N_IMAGES, 3, SIDE, SIDE, generator=drawn(), dtype=torch.float64)


def labels() -> Tensor:
    return torch.randint(0, N_CLASSES, (N_IMAGES,), generator=drawn(2))


def values() -> Tensor:
    return torch.randn(N_IMAGES, N_CLASSES, generator=drawn(3), dtype=torch.float64)


def several_labels() -> Tensor:
    return torch.randint(0, 2, (N_IMAGES, N_CLASSES), generator=drawn(4)).double()


def pixel_labels(ignored: bool = True) -> Tensor:
    y = torch.randint(0, N_CLASSES, (N_IMAGES, SIDE, SIDE), generator=drawn(5))
    if ignored:
        y[0, :3] = y[5, 2:, 1] = -100
    return y


def scales() -> Tensor:
    return 1 + 0.1 * torch.randn(N_IMAGES, generator=drawn(6), dtype=torch.float64)


def _in_batches(*tensors: Tensor, size: int) -> list[tuple[Tensor, ...]]:
    return list(zip(*(t.split(size) for t in tensors)))


in_batches = functools.partial(_in_batches, size=4)


#: what images are normalized by, and what shape_bias and evaluation know of the classes
ABOUT = {"mean": [0.0] * 3, "std": [1.0] * 3, "num_classes": N_CLASSES, "textures": [0] * N_IMAGES}


def own(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return each image's Huber loss."""
    return nn.functional.huber_loss(outputs, targets, reduction="none").mean(1)


def probe(form: str, size: int = 4) -> vs.Probe:
    """Return the probe of a form: its loss, network and batches of ``size`` images."""
    x = images()
    in_batches = functools.partial(_in_batches, size=size)
    if form == "mse":
        return vs.Probe(Network(), in_batches(x, values()), vs.Objective(loss="mse"), about=ABOUT)
    if form == "bce":
        return vs.Probe(Network(), in_batches(x, several_labels()), vs.Objective(loss="bce"), about=ABOUT)
    if form == "dense":
        objective = vs.Objective(loss="dense_cross_entropy")
        return vs.Probe(Network(dense=True), in_batches(x, pixel_labels()), objective, about=ABOUT)
    if form == "own loss":
        return vs.Probe(Network(), in_batches(x, values()), vs.Objective(loss=own), about=ABOUT)
    if form == "dict output":
        network = Network(lambda z: {"loss": z.sum(), "logits": z})
        return vs.Probe(network, in_batches(x, labels()), about=ABOUT)
    if form == "dict batch":
        batches = [{"pixel_values": a, "labels": b} for a, b in in_batches(x, labels())]
        return vs.Probe(Network(ModelOutput), batches, about=ABOUT)
    if form == "triple":
        return vs.Probe(
            Network(),
            in_batches(x, scales(), labels()),
            about=ABOUT,
            targets=2,
            forward=lambda m, batch: m(batch[0], batch[1]),
        )
    raise ValueError(form)


def reference(form: str) -> vs.Probe:
    """Return a probe of pairs and tensors that has the same outputs and the default loss, for the forms that have it."""
    if form != "triple":
        return vs.Probe(Network(), in_batches(images(), labels()), about=ABOUT)

    class Scaled(Network):
        def forward(self, pixel_values: Tensor, scale: Tensor | None = None) -> Any:
            return super().forward(pixel_values[:, :3], pixel_values[:, 3, 0, 0])

    x = torch.cat([images(), scales()[:, None, None, None].expand(-1, 1, SIDE, SIDE)], 1)
    return vs.Probe(Scaled(), in_batches(x, labels()), about=ABOUT)
