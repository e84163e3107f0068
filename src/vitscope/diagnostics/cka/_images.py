"""Whether two models' batches show the same images in the same order, each preprocessed for its own model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: operations between a pixel and a normalized input in either data pipeline, each rounded once
_ROUNDED = 8
#: side of the thumbnails by which images of other sizes or interpolations are recognized
_THUMBNAIL = 8
#: thumbnails of one image are at least this much correlated
_ALIKE = 0.5


def image_relation(first: Tensor, second: Tensor) -> str:
    """Return how the images of two batches ``(B, C, H, W)`` are related: equal, other normalization or other preprocessing.

    A normalization is an affine map of each channel: ``second = a * first + b`` with one a > 0 and b for each channel of the
    batch, up to the rounding of the arithmetic. Where that fails (another size, crop or interpolation), every image's
    thumbnail must be more correlated with its counterpart's than with any other image's.

    Raises:
        ValueError: The images differ, or come in another order.
    """
    if first.shape == second.shape and torch.equal(first.cpu(), second.cpu()):
        return "equal"
    if first.shape == second.shape and first.ndim > 1 and _is_normalization(first, second):
        return "equal but for each channel's normalization"
    if first.ndim == second.ndim == 4 and len(first) == len(second):
        similar = _thumbnails(first) @ _thumbnails(second).T  # (B, B)
        diagonal = similar.diagonal()
        # a duplicate of an image in the batch is as much alike: equal is enough
        best = torch.minimum(diagonal - similar.amax(0), diagonal - similar.amax(1)) >= -1e-9
        if bool((best & (diagonal >= _ALIKE)).all()):
            return "recognized by thumbnails: other sizes, crops or interpolations"
        wrong = int((~(best & (diagonal >= _ALIKE))).nonzero()[0])
        what = f"image {wrong} of a batch differs from its counterpart"
        if bool(best.logical_not().any()):
            other = int(similar[wrong].argmax())
            what += f" (it is most like the other's image {other})" if other != wrong else ""
    else:
        what = f"batches of shapes {tuple(first.shape)} and {tuple(second.shape)}"
    raise ValueError(
        f"Expected the same images in the same batches of both probes, received {what}: use loaders without shuffling and "
        "with the same split."
    )


def _is_normalization(first: Tensor, second: Tensor) -> bool:
    eps = max(2.0**-23, *(torch.finfo(t.dtype).eps for t in (first, second) if t.is_floating_point()))
    for channel in range(first.shape[1]):
        x, y = (t[:, channel].detach().cpu().double().reshape(-1) for t in (first, second))
        dx, dy = x - x.mean(), y - y.mean()
        square = float(dx @ dx)
        slope = float(dx @ dy) / square if square > 0 else 1.0
        residual = float((dy - slope * dx).abs().max())
        size = slope * float(x.abs().max()) + float(y.abs().max()) + abs(float(y.mean()) - slope * float(x.mean()))
        if not (slope > 0 and residual <= _ROUNDED * eps * size):
            return False
    return True


def _thumbnails(x: Tensor) -> Tensor:
    """Return each image's gray thumbnail (B, 64) without its mean and of length 1."""
    small = F.adaptive_avg_pool2d(x.detach().cpu().double().mean(1, keepdim=True), _THUMBNAIL).flatten(1)
    return F.normalize(small - small.mean(1, keepdim=True), dim=1)
