"""Texts of results and probes for people: what a console and a notebook show of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import torch
from torch import nn

from vitscope.core.objective import Objective
from vitscope.core.objective_card import ObjectiveCard
from vitscope.runtime.text_layout import count_text

#: entries of a tuple of names, and characters of a text, that are shown
N_NAMES = 4
WIDTH = 100


def text_of(title: str, lines: Mapping[str, str]) -> str:
    """Return a title and the facts below it, a line each."""
    width = max((len(name) for name in lines), default=0)
    return "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in lines.items())])


def html_of(title: str, lines: Mapping[str, str]) -> str:
    """Return the same as a table for notebooks."""
    rows = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th><td style="text-align:left">{escape(text)}</td></tr>'
        for name, text in lines.items()
    )
    return f"<table><caption>{escape(title)}</caption>{rows}</table>"


def result_facts(result: Any) -> dict[str, str]:
    """Return what is shown of each field of a result; empty ones and those that are None are left out."""
    lines: dict[str, str] = {}
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        if field.name != "card" and (text := shown(value)):
            lines[field.name] = text
    if (card := getattr(result, "card", None)) is not None:
        lines |= {"measured on": _cut(images_text(card)), "objective": _cut(card_objective_text(card))}
    return lines


def images_text(card: ObjectiveCard) -> str:
    """Return the images of a measurement in one line."""
    shape = "" if card.input_shape == "unknown" else f" ({card.input_shape})"
    data = "" if card.data == "unknown" else f" of {card.data}"
    split = "" if card.split == "unknown" else f", {card.split} split"
    augmentation = "" if card.augmentation in ("unknown", "none") else f", augmentation {card.augmentation}"
    return f"{card.n_images:,} images{shape}{data}{split}{augmentation}"


def card_objective_text(card: ObjectiveCard) -> str:
    """Return the loss, the weight decay and the precision of a measurement in one line."""
    weight_decay = f", weight decay {card.weight_decay:g} ({card.l2})" if card.weight_decay else ""
    return f"{card.loss}{weight_decay}, {card.dtype}"


def objective_text(objective: Objective) -> str:
    """Return an objective's loss and L2 term in one line."""
    loss = objective.loss if isinstance(objective.loss, str) else shown(objective.loss)
    smoothing = f", label smoothing {objective.label_smoothing:g}" if objective.label_smoothing else ""
    return f"{loss}{smoothing}, weight decay {objective.weight_decay:g} ({objective.l2})"


def shown(value: Any) -> str:
    """Return a value as one short text; empty for what holds nothing."""
    if value is None:
        return ""
    if isinstance(value, np.ndarray):
        return _array(value)
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if isinstance(value, float | np.floating):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return _cut(", ".join(f"{key} {shown(item)}" for key, item in value.items()))
    if isinstance(value, tuple | list):
        return _several(value)
    if not isinstance(value, str):
        value = getattr(value, "__qualname__", type(value).__name__)
    return _cut(value)


def _array(array: np.ndarray) -> str:
    if not array.size:
        return ""
    shape = "x".join(map(str, array.shape)) or "1"
    if array.dtype.kind == "b":
        return f"[{shape}] true at {int(array.sum())} of {array.size}"
    if array.dtype.kind not in "fiu":
        return f"[{shape}]"
    if array.ndim == 1 and array.size <= N_NAMES:
        return f"[{shape}] " + ", ".join(f"{number:.4g}" for number in array)
    finite = array[np.isfinite(array)]
    if not finite.size:
        return f"[{shape}] no finite value"
    null = f", {array.size - finite.size} not finite" if finite.size < array.size else ""
    return f"[{shape}] {finite.min():.4g} to {finite.max():.4g}{null}"


def _several(values: tuple[Any, ...] | list[Any]) -> str:
    if not values:
        return ""
    if all(isinstance(value, np.ndarray) for value in values):
        numbers = np.concatenate([value.ravel() for value in values])
        return f"{len(values)} arrays {_array(numbers)}"
    names = ", ".join(shown(value) for value in values[:N_NAMES])
    return _cut(f"[{len(values)}] {names}" + (", ..." if len(values) > N_NAMES else ""))


def _cut(text: str) -> str:
    return text if len(text) <= WIDTH else text[: WIDTH - 3] + "..."


def probe_facts(
    model: nn.Module,
    device: torch.device,
    objective: Objective,
    n_batches: int | None,
    n_images: int | None,
    taps: Sequence[Any] | None,
    about: Mapping[str, Any],
) -> dict[str, str]:
    """Return what the text of a probe says, as far as it is known without a pass.

    Args:
        model: The model.
        device: Device of the model.
        objective: The objective.
        n_batches: Number of batches; None where they have to be counted.
        n_images: Number of images; None where they have to be counted.
        taps: The taps; None before they are looked up.
        about: Further facts of the probe.
    """
    counts = f", {n_images:,} images" if n_images is not None else ""
    batches = count_text(n_batches, "batch", "batches") if n_batches is not None else "counted at the first pass"
    names = "looked up at the first measure" if taps is None else shown([tap.name for tap in taps])
    n_parameters = sum(p.numel() for p in model.parameters())
    return {
        "model": f"{type(model).__name__}, {n_parameters:,} parameters on {device}",
        "batches": batches + counts,
        "objective": objective_text(objective),
        "taps": names or "none",
        **{key: shown(value) for key, value in about.items()},
    }
