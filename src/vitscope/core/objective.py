"""The loss that training minimizes and that the diagnostics differentiate.

``objective = mean over examples of a loss + one L2 term over all parameters``. The loss is the cross entropy, another one of
`vitscope.core.losses.named_losses`, or a callable. The forms of the L2 term are those of Park & Kim (ICLR 2022), their released
code, and AdamW's decoupled decay; they give different curvatures and different surfaces, so every result names the one in force.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitscope.core.losses import named_losses, own_loss
from vitscope.core.losses.named_losses import LOSSES
from vitscope.core.losses.own_loss import OwnLoss
from vitscope.core.losses.targets import IGNORED_LABEL as IGNORED_LABEL
from vitscope.core.losses.targets import are_indices
from vitscope.core.losses.targets import hard_targets as hard_targets
from vitscope.core.losses.targets import labeled as labeled
from vitscope.core.losses.targets import n_labeled as n_labeled
from vitscope.core.losses.targets import target_entropy as target_entropy
from vitscope.runtime.value_ranges import NonNegativeFloat, ShareBelowOne

L2_FORMS = ("half_sq", "sum_norm", "adamw", "none")


@dataclass(frozen=True)
class Objective:
    """A loss averaged over examples, plus one L2 term.

    Attributes:
        weight_decay: The factor wd of the L2 term, at least 0.
        l2: ``half_sq`` wd/2 * sum of squares; ``sum_norm`` wd * sum of the un-squared tensor norms (the released code of
            Park & Kim); ``adamw`` wd/2 * sum of (sqrt(v) + eps) w^2 with v frozen from the optimizer's state, whose
            gradient vanishes together with AdamW's step; ``none``.
        label_smoothing: Smoothing of index targets, in [0, 1). Soft targets are never smoothed again.
        loss: ``cross_entropy``, ``mse``, ``bce`` or ``dense_cross_entropy``, see `vitscope.core.losses.named_losses`; or a
            callable ``loss(outputs, targets)`` that returns one value per image ``(B,)``, or their mean, a scalar, which a batch
            then weighs by its images. Images whose class index is ``IGNORED_LABEL`` count in neither. A module's parameters are
            constants: they are no part of the network that is measured.
        decay_scale: Scale of the decay, for ``adamw`` only: sqrt(v) + eps for each parameter by name.

    Raises:
        ValueError: An unknown form or loss, a negative or non-finite factor, ``adamw`` without ``decay_scale``, or
            a loss that is a class, or label smoothing of a callable.
    """

    weight_decay: NonNegativeFloat = 0.0
    l2: str = "half_sq"
    label_smoothing: ShareBelowOne = 0.0
    loss: str | OwnLoss = "cross_entropy"
    decay_scale: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        """Refuse values that no objective can have."""
        for name in ("weight_decay", "label_smoothing"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"Expected {name} to be a number, received the text {getattr(self, name)!r}.")
        if isinstance(self.loss, type):
            name = self.loss.__name__
            raise ValueError(
                f"Expected loss to be a function, received the class {name}: pass an object of it, {name}()."
            )
        if self.l2 not in L2_FORMS:
            raise ValueError(f"Expected l2 to be one of {', '.join(L2_FORMS)}, received {self.l2!r}.")
        if not 0.0 <= self.weight_decay < float("inf"):
            raise ValueError(f"Expected weight_decay to be finite and at least 0, received {self.weight_decay}.")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"Expected label_smoothing in [0, 1), received {self.label_smoothing}.")
        if not callable(self.loss) and self.loss not in LOSSES:
            raise ValueError(
                f"Expected loss to be one of {', '.join(LOSSES)}, or a function (outputs, targets) -> (B,), received "
                f"{self.loss!r}."
            )
        if callable(self.loss) and self.label_smoothing > 0:
            raise ValueError(
                f"Expected label_smoothing=0 with a loss of your own, received {self.label_smoothing}: smooth inside the loss."
            )
        if self.l2 == "adamw" and self.weight_decay > 0 and self.decay_scale is None:
            raise ValueError("Expected decay_scale (sqrt(v) + eps by parameter name) with l2='adamw', received None.")

    def data_loss(self, outputs: Any, y: Tensor, reduction: str = "mean") -> Tensor:
        """Return the loss of one batch; for the cross entropy in nats.

        An image or pixel whose index is ``IGNORED_LABEL`` has loss 0 and counts in no mean; a mean over no example is NaN.

        Args:
            outputs: Logits ``(B, C)``, or what the loss takes.
            y: Indices ``(B,)`` or soft targets ``(B, C)``, or what the loss takes.
            reduction: ``mean`` over examples; ``sum`` over them; ``none`` for each image's loss ``(B,)``, the mean over its
                examples.

        Raises:
            ValueError: Soft targets together with smoothing, shapes that do not match, or ``none`` for a callable that returns
                a mean.
        """
        if self.loss == "cross_entropy":
            return self._cross_entropy(outputs, y, reduction)
        if callable(self.loss):
            return own_loss.reduced(self.loss, outputs, y, reduction)
        sums, counts = named_losses.image_sums(self.loss, outputs, y, self.label_smoothing), self.example_counts(y)
        if reduction == "none":
            return sums / counts.clamp(min=1)
        return sums.sum() if reduction == "sum" else sums.sum() / counts.sum()

    def example_counts(self, y: Tensor) -> Tensor:
        """Return the examples that count in each image's targets ``(B,)``: 1 or 0, for dense targets their labeled pixels."""
        return named_losses.example_counts(self.loss if isinstance(self.loss, str) else "", y)

    def n_examples(self, y: Tensor) -> int:
        """Return the examples of a batch that count: what its mean divides by, and what the batch weighs among others."""
        return int(self.example_counts(y).sum())

    def right_counts(self, outputs: Any, y: Tensor) -> Tensor | None:
        """Return how many examples of each image are classified rightly ``(B,)``; None where that is not defined."""
        if not isinstance(outputs, Tensor):
            return None
        return named_losses.right_counts(self.loss if isinstance(self.loss, str) else "", outputs, y)

    def description(self, y: Tensor) -> str:
        """Return the loss as a card states it.

        Args:
            y: Targets of a batch, which say whether they are class indices.
        """
        smoothing = f", label smoothing {self.label_smoothing:g}"
        if self.loss == "cross_entropy":
            return "cross entropy, soft targets as given" if y.ndim == 2 else f"cross entropy{smoothing}"
        if callable(self.loss):
            return f"own loss {own_loss.described(self.loss)}"
        description = named_losses.DESCRIPTIONS[self.loss]
        if self.loss == "dense_cross_entropy":
            return f"{description}{smoothing}"
        return f"{description}, class indices{smoothing}" if are_indices(y) else f"{description}, targets as given"

    def _cross_entropy(self, logits: Tensor, y: Tensor, reduction: str) -> Tensor:
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
        """Return the whole objective on one batch of images; tied parameters count once."""
        return self.data_loss(model(x), y) + self.l2_term(dict(model.named_parameters()))


def _total(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()


def _safe_norm(p: Tensor) -> Tensor:
    # the square root's derivative at 0 is infinite, and 0 * inf is NaN: a zero tensor takes another branch altogether
    square = p.square().sum()
    zero = square == 0
    return torch.where(zero, torch.zeros_like(square), torch.where(zero, torch.ones_like(square), square).sqrt())
