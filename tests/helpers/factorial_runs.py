"""Run folders of a factorial experiment with chosen effects."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from tests.helpers.report_runs import CARD, rise, spectrum
from vitscope.config import loading
from vitscope.diagnostics.landscape.loss_landscape import LossLandscapeResult
from vitscope.diagnostics.landscape.sharpness import SharpnessResult

PAIRS = np.array([-0.3, 0.1, 0.2])  # what each pair of directions adds everywhere


WD = CARD.weight_decay


def value(model: str, training: str, images: str) -> float:
    """Return the rise: training and images act on the ViT alone, by -3 and -1; the ConvNet stands at 5, the ViT at 6."""
    base = 5.0 if model == "convnet" else 6.0
    return base + (model == "vit") * (-3.0 * (training == "strong") - 1.0 * (images == "augmented"))


def sharp(number: float, model: str, **changes: Any) -> SharpnessResult:
    by_pair = (number + PAIRS)[None]
    l2 = 2.0 if model == "convnet" else 1.0
    fields = {
        "rise_by_pair": by_pair,
        "l2_half_sq_rise_by_pair": np.full_like(by_pair, 0.01 * l2),
        "l2_sum_norm_rise_by_pair": np.full_like(by_pair, 10.0 * l2),
    }
    return dataclasses.replace(rise(number), **{**fields, **changes})


def surface(number: float, model: str) -> LossLandscapeResult:
    """Return a surface that is 0 at its center and ``number`` at its border, with an L2 that rises twice as far for ConvNets."""
    ring = np.ones((3, 3)) - np.eye(3)[1][:, None] * np.eye(3)[1]
    l2 = ring * (2.0 if model == "convnet" else 1.0)
    nothing = np.zeros((3, 3))
    side = np.linspace(-1, 1, 3)
    return LossLandscapeResult(
        x=side, y=side, nll=number * ring, l2_half_sq=l2, l2_sum_norm=5 * l2, accuracy=nothing, ece=nothing,
        directions="random", normalization="filter", preset="", direction_norms=np.ones(2), direction_cosine=0.0,
        weight_norm=1.0, n_nonfinite=0, dtype_error=None, labels=(), path=np.empty((0, 2)), projection_error=np.empty(0),
        card=CARD,
    )  # fmt: skip


def write(make_run: Callable, seeds: int = 1, shift: float = 0.0, change: Callable | None = None) -> None:
    for model in ("convnet", "vit"):
        for training in ("weak", "strong"):
            node = OmegaConf.to_container(OmegaConf.load(loading.folder() / "objective" / f"{training}.yaml"))
            for seed in range(seeds):
                measured: dict[str, Any] = {}
                for images, end in (("clean", "_clean"), ("augmented", "")):
                    number = value(model, training, images) + shift * seed * (model == "vit")
                    measured[f"sharpness{end}"] = sharp(number, model)
                    measured[f"hessian{end}"] = spectrum(ape=100 * number)
                    measured[f"landscape{end}"] = surface(number, model)
                if change is not None:
                    measured = change(measured, model, training)
                make_run(model, seed, objective=node, measured=measured)
