"""The loss that training minimises and that the diagnostics differentiate.

``objective = mean over images of the cross entropy + one L2 term over all parameters``. The forms of the L2 term are
those of Park & Kim (ICLR 2022), their released code, and AdamW's decoupled decay; they give different curvatures and
different surfaces, so every result names the one in force.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitscope.runtime.value_ranges import NonNegativeFloat, ShareBelowOne

L2_FORMS = ("half_sq", "sum_norm", "adamw", "none")

#: the class index of an image without a label, as `torch.nn.functional.cross_entropy` has it: it counts in no mean
IGNORED_LABEL = -100


def labeled(y: Tensor) -> Tensor:
    """Return which targets count ``(B,)``, booleans: every soft target, and every class index but ``IGNORED_LABEL``."""
    return y != IGNORED_LABEL if y.ndim == 1 else torch.ones(len(y), dtype=torch.bool, device=y.device)


def n_labeled(y: Tensor) -> int:
    """Return the number of targets that count: what a mean over images divides by."""
    return int(labeled(y).sum()) if y.ndim == 1 else len(y)


def hard_targets(y: Tensor) -> Tensor:
    """Return class indices ``(B,)``: ``y`` itself, or the most probable class of soft targets ``(B, C)``."""
    return y.argmax(dim=1) if y.ndim == 2 else y


def target_entropy(y: Tensor) -> Tensor:
    """Return the entropy in nats of each image's target ``(B,)``; 0 for class indices.

    It is the least value that the cross entropy on ``y`` can take.
    """
    if y.ndim == 1:
        return torch.zeros(y.shape[0], dtype=torch.float64, device=y.device)
    return torch.special.entr(y.double()).sum(dim=1)


@dataclass(frozen=True)
class Objective:
    """Cross entropy averaged over images, plus one L2 term.

    Attributes:
        weight_decay: the factor wd of the L2 term, at least 0.
        l2: ``half_sq`` wd/2 * sum of squares; ``sum_norm`` wd * sum of the un-squared tensor norms (the released code of
            Park & Kim); ``adamw`` wd/2 * sum of (sqrt(v) + eps) w^2 with v frozen from the optimizer's state, whose
            gradient vanishes together with AdamW's step; ``none``.
        label_smoothing: of index targets, in [0, 1). Soft targets are never smoothed again.
        decay_scale: for ``adamw`` only: sqrt(v) + eps for each parameter by name.

    Raises:
        ValueError: an unknown form, a negative or non-finite factor, or ``adamw`` without ``decay_scale``.
    """

    weight_decay: NonNegativeFloat = 0.0
    l2: str = "half_sq"
    label_smoothing: ShareBelowOne = 0.0
    decay_scale: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        """Refuse values that no objective can have."""
        if self.l2 not in L2_FORMS:
            raise ValueError(f"Expected l2 to be one of {', '.join(L2_FORMS)}, received {self.l2!r}.")
        if not 0.0 <= self.weight_decay < float("inf"):
            raise ValueError(f"Expected weight_decay to be finite and at least 0, received {self.weight_decay}.")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"Expected label_smoothing in [0, 1), received {self.label_smoothing}.")
        if self.l2 == "adamw" and self.weight_decay > 0 and self.decay_scale is None:
            raise ValueError("Expected decay_scale (sqrt(v) + eps by parameter name) with l2='adamw', received None.")

    def data_loss(self, logits: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        """Return the cross entropy in nats of ``logits (B, C)`` against indices ``(B,)`` or soft targets ``(B, C)``.

        An image whose index is ``IGNORED_LABEL`` has loss 0 and counts in no mean; a mean over no image is NaN.

        Raises:
            ValueError: soft targets together with smoothing, or shapes that do not match.
        """
        if y.ndim == 2 and self.label_smoothing > 0:
            raise ValueError(
                f"Expected index targets with label_smoothing={self.label_smoothing}, received soft targets "
                f"{tuple(y.shape)}: they would be smoothed twice. Set label_smoothing=0."
            )
        if logits.ndim != 2 or y.shape[0] != logits.shape[0] or (y.ndim == 2 and y.shape != logits.shape):
            raise ValueError(
                f"Expected logits (B, C) and targets (B,) or (B, C), received {tuple(logits.shape)} and {tuple(y.shape)}."
            )
        if y.ndim == 2:
            y = y.to(logits.dtype)
        return F.cross_entropy(logits, y, label_smoothing=self.label_smoothing, reduction=reduction)

    def l2_half_sq(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return wd/2 * the sum of squares over all parameters."""
        return 0.5 * self.weight_decay * _total(p.square().sum() for p in parameters.values())

    def l2_sum_norm(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return wd * the sum of the tensors' norms.

        A tensor that is exactly zero contributes zero and has zero derivatives of every order, though mathematically it
        has none there.
        """
        norms = (_safe_norm(p) for p in parameters.values())
        return self.weight_decay * _total(norms)

    def l2_adamw(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return wd/2 * the sum of (sqrt(v) + eps) w^2, v frozen (see the class)."""
        assert self.decay_scale is not None
        scale = self.decay_scale
        missing = [name for name in parameters if name not in scale]
        if missing:
            raise ValueError(f"Expected decay_scale for every parameter, received none for {missing[0]!r}.")
        terms = (p.square().mul(scale[name].to(p)).sum() for name, p in parameters.items())
        return 0.5 * self.weight_decay * _total(terms)

    def l2_term(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the L2 term in the form that `l2` names, its factor included; a scalar tensor."""
        if self.l2 == "none" or self.weight_decay == 0.0 or not parameters:
            like = next(iter(parameters.values()), torch.zeros(()))
            return torch.zeros((), dtype=like.dtype, device=like.device)
        forms = {"half_sq": self.l2_half_sq, "sum_norm": self.l2_sum_norm, "adamw": self.l2_adamw}
        return forms[self.l2](parameters)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the whole objective on one batch; tied parameters count once."""
        return self.data_loss(model(x), y) + self.l2_term(dict(model.named_parameters()))


def _total(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()


def _safe_norm(p: Tensor) -> Tensor:
    # the square root's derivative at 0 is infinite, and 0 * inf is NaN: a zero tensor takes another branch altogether
    square = p.square().sum()
    zero = square == 0
    return torch.where(zero, torch.zeros_like(square), torch.where(zero, torch.ones_like(square), square).sqrt())
