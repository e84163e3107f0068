"""Attention over all layers: rollout, and relevance for a class from gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vitscope.diagnostics.attention._placement import Query, placed, selection
from vitscope.models.structure.attention_units import AttentionUnit, reading_attention_units


def rollout_refusal(units: Sequence[AttentionUnit], unread: Mapping[str, str]) -> str:
    """Return why attention cannot be followed through all layers; empty where their tokens are the same."""
    if unread:
        name, reason = next(iter(unread.items()))
        return f"{name}: {reason}"
    if not units:
        return "no attention"
    first = units[0]
    for unit in units:
        if unit.n_windows > 1:
            return f"{unit.name} attends in windows"
        if not torch.equal(unit.queries, unit.keys) or unit.query_grid != unit.key_grid:
            return f"the queries and keys of {unit.name} are different tokens"
        if not torch.equal(unit.queries, first.queries) or unit.query_grid != first.query_grid:
            return f"{unit.name} has other tokens than {first.name}"
    return ""


class Rollout:
    """The product over layers of ``0.5 A + 0.5 I``, A the mean over heads (Abnar and Zuidema 2020, section 3).

    Rows of the factors are divided by their sums, as there; a product's row tells how much a token holds of each token of the
    first layer.
    """

    def __init__(self) -> None:
        self.product: Tensor | None = None

    def follow(self, weights: Tensor) -> None:
        """Go through one more layer with weights (B, heads, n, n), float64."""
        attention = weights.mean(dim=1)
        factor = 0.5 * attention + 0.5 * torch.eye(attention.shape[-1], dtype=attention.dtype, device=attention.device)
        factor = factor / factor.sum(dim=-1, keepdim=True)
        self.product = factor if self.product is None else factor @ self.product


def relevance(model: nn.Module, x: Tensor, units: Sequence[AttentionUnit], class_index: int | None) -> RelevanceResult:
    """Return the relevance of each token of the first layer for each token of the last one, for one class.

    ``R <- R + mean_h(relu(dy/dA * A)) R`` from layer to layer, from ``R = I``, of which the identity is taken away at the end
    (Chefer et al. 2021, "Generic attention-model explainability", self-attention); y is the logit of the class.

    Args:
        model: The model inside a guard.
        x: (B, C, H, W) images.
        units: Units of all layers by depth, whose tokens are the same.
        class_index: The class; None for the class of the largest logit of each image.

    Raises:
        UnknownClassError: A class that the model does not have.
    """
    sources: list[Tensor] = []

    def note(_: int, unit: AttentionUnit, source: Tensor) -> None:
        if not source.requires_grad:  # of a model whose weights are frozen
            source.requires_grad_(True)
        sources.append(source)

    with torch.enable_grad():
        with reading_attention_units(units, note, explicit=True):
            logits = model(x)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            return RelevanceResult(None, None)
        n_classes = logits.shape[1]
        if class_index is not None and not 0 <= class_index < n_classes:
            raise UnknownClassError(f"Expected class_index in 0 .. {n_classes - 1}, received {class_index}.")
        classes = logits.argmax(1) if class_index is None else torch.full_like(logits[:, 0], class_index).long()
        # images do not depend on each other: the sum gives each its own gradient
        gradients = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), sources)
    total = torch.eye(units[0].keys.shape[1], dtype=torch.float64, device=x.device).repeat(len(x), 1, 1)
    identity = total
    for unit, source, gradient in zip(units, sources, gradients):
        weighed = (unit.from_source(source.detach()).double() * unit.from_source(gradient).double()).relu()
        total = total + weighed.mean(dim=1) @ total
    return RelevanceResult(total - identity, classes)


class UnknownClassError(ValueError):
    """A class that the model does not have."""


class RelevanceResult:
    """Relevance (B, n, n), or None where the model's outputs are no logits of classes, and the class (B,) of each image."""

    def __init__(self, tokens: Tensor | None, classes: Tensor | None) -> None:
        self.tokens, self.classes = tokens, classes


def row_maps(tokens: Tensor, unit: AttentionUnit, query: Query) -> Tensor:
    """Return the rows of the chosen query in (B, n, n) as maps (B, h, w), without prefix tokens."""
    return placed(tokens[:, None], unit, selection(unit, query))[0][:, 0]
