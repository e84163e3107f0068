"""The images whose attention maps are shown: their pixels, and the relevance of their tokens for a class."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitscope.core.batches.batch_inputs import images_of
from vitscope.core.checks.independent_images import refuse_dependent_images
from vitscope.core.input_normalization import stated_pixels
from vitscope.core.probe import Probe
from vitscope.diagnostics.attention._placement import Query
from vitscope.diagnostics.attention._rollout import UnknownClassError, relevance, row_maps
from vitscope.models.structure.attention_units import AttentionUnit
from vitscope.runtime import distributed
from vitscope.runtime.progress import track

#: number of a batch; pixels, relevance and classes of its images
ShownBatch = tuple[int, np.ndarray, "np.ndarray | None", "np.ndarray | None"]


@dataclass(frozen=True)
class ShownImages:
    """The first images of a probe.

    Attributes:
        pixels: (n_shown, H, W, 3) 0 to 255.
        relevance: (n_shown, h, w) of the gradients for a class; None where it was not asked for or is refused.
        classes: (n_shown,) their class; empty without any.
        refusal: Why there is no relevance that was asked for.
    """

    pixels: np.ndarray
    relevance: np.ndarray | None
    classes: np.ndarray
    refusal: str = ""


def shown_images(
    probe: Probe,
    n_shown: int,
    units: Sequence[AttentionUnit],
    query: Query,
    class_index: int | None,
    differentiates: bool,
) -> ShownImages:
    """Return the first images of all ranks; with ``differentiates`` one backward pass gives their relevance for a class."""
    local, refusal = [], ""
    with distributed.failing_together():
        try:
            local = _local_images(probe, n_shown, units, query, class_index, differentiates)
        except UnknownClassError:
            raise
        except ValueError as not_logits:  # of the guard, about outputs of another form
            if not differentiates:
                raise
            refusal = str(not_logits).splitlines()[0].rstrip(".")
            local = _local_images(probe, n_shown, units, query, class_index, False)
    batches = sorted((batch for share in distributed.gather_objects(local) for batch in share), key=lambda b: b[0])
    if not batches:
        return ShownImages(np.zeros((0, 1, 1, 3), np.uint8), None, np.zeros(0, dtype=int))
    pixels = np.concatenate([batch[1] for batch in batches])[:n_shown]
    maps = [batch[2] for batch in batches if batch[2] is not None]
    if not maps:
        refusal = refusal or ("the model's outputs are no logits of classes" if differentiates else "")
        return ShownImages(pixels, None, np.zeros(0, dtype=int), refusal)
    classes = np.concatenate([batch[3] for batch in batches if batch[3] is not None])[:n_shown]
    return ShownImages(pixels, np.concatenate(maps)[:n_shown], classes)


def _local_images(
    probe: Probe,
    n_shown: int,
    units: Sequence[AttentionUnit],
    query: Query,
    class_index: int | None,
    differentiates: bool,
) -> list[ShownBatch]:
    """Return number, pixels, relevance and classes of this rank's first batches, as far as they hold ``n_shown`` images."""
    local: list[ShownBatch] = []
    n_seen = 0
    if n_shown == 0:
        return local
    with probe.guard(logits=True) if differentiates else nullcontext(probe.model) as model:
        for number, (x, _) in track(probe.local_batches(), "shown images", None):
            if n_seen >= n_shown:
                break
            x = x[: n_shown - n_seen]
            pixels = _pixels(probe, images_of(x, "attention_maps"))
            maps = classes = None
            if differentiates:
                if number == 0:
                    refuse_dependent_images(model, x[:2], 1, "gradients of attention maps")
                relevances = relevance(model, x, units, class_index)
                if relevances.tokens is not None and relevances.classes is not None:
                    maps = row_maps(relevances.tokens, units[0], query).cpu().numpy()
                    classes = relevances.classes.cpu().numpy()
            local.append((number, pixels, maps, classes))
            n_seen += len(x)
    return local


def _pixels(probe: Probe, x: Tensor) -> np.ndarray:
    """Return images (B, H, W, 3) of 0 to 255, those of unknown normalization from their smallest to their largest value."""
    x = x.detach().double().cpu()
    normalization = None
    with suppress(ValueError):  # none is known
        normalization = stated_pixels(probe)
    if normalization is not None and len(normalization.mean) in (1, x.shape[1]):
        pixels = normalization.to_pixels(x)
    else:
        low, high = (bound(x.flatten(1), dim=1)[:, None, None, None] for bound in (torch.amin, torch.amax))
        pixels = (x - low) / (high - low).clamp_min(1e-12)
    pixels = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
