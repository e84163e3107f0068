"""Comparison of two passes over the same images: difference of the outputs, share of rounding in it, modules that cause it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitscope.core.batches.batch_inputs import BatchInputs, Inputs, tensors_of
from vitscope.core.guard.fingerprints import Fingerprint, dense_parts, fingerprint


def compare_passes(
    model: nn.Module, first: Sequence[Tensor], second: Sequence[Tensor], drew: bool, x: Inputs
) -> tuple[float, float]:
    """Return the largest relative difference between two lists of tensors, and what rounding explains of it.

    Two runs of one program differ by rounding only where sums are made in another order (atomic additions, alignment of
    memory). A sum of n terms then changes by about sqrt(n) * eps of its size, in each of L layers and forwards as well as
    backwards: ``2 * L * sqrt(n) * eps``, with n the largest number of terms that a layer or a weight's gradient sums. Where
    the passes drew random numbers, nothing is put down to rounding.

    Args:
        model: Model that gives L and the layers' numbers of inputs.
        first: Tensors of one pass.
        second: Tensors of the other pass.
        drew: Whether random numbers were drawn.
        x: The images (B, C, H, W).
    """
    worst = max((_relative(a, b) for a, b in zip(first, second)), default=0.0)
    if len(first) != len(second) or any(a.shape != b.shape for a, b in zip(first, second)):
        worst = float("inf")
    if drew or not first:
        return worst, 0.0
    weights = [p for p in model.parameters() if p.ndim > 1]
    counts = [t[:, 0].numel() if t.ndim > 1 else t.numel() for t in tensors_of(x)]
    terms = max([*counts, *(p.shape[1:].numel() for p in weights)])
    eps = max((torch.finfo(t.dtype).eps for t in first if t.is_floating_point()), default=0.0)
    return worst, 2 * max(1, len(weights)) * terms**0.5 * eps


def _relative(a: Tensor, b: Tensor) -> float:
    """Return the norm of the difference over the larger norm; 0 for equal bits, NaN counting as equal to NaN."""
    if a.shape != b.shape:
        return float("inf")
    if a.layout != torch.strided:
        parts = zip(dense_parts(a), dense_parts(b))
        return max(_relative(x, y) for x, y in parts)
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0
    a, b = a.double(), b.double()
    size = max(float(a.norm()), float(b.norm()))
    distance = float((a - b).norm())
    return distance / size if np.isfinite(size) and size > 0 else float("inf")


def output_tensors(value: Any) -> list[Tensor]:
    """Return the tensors in a network's output: a tensor, or tuples, lists, mappings and dataclasses of them."""
    if isinstance(value, Tensor | BatchInputs):
        return tensors_of(value)
    if isinstance(value, Mapping):
        return [t for entry in value.values() for t in output_tensors(entry)]
    if isinstance(value, tuple | list):
        return [t for entry in value for t in output_tensors(entry)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [t for f in dataclasses.fields(value) for t in output_tensors(getattr(value, f.name))]
    return []


@torch.no_grad()
def random_modules(model: nn.Module, x: Inputs) -> tuple[str, ...]:
    """Return the innermost modules that give other outputs for the same inputs in two passes over ``x (B, C, H, W)``.

    A module is named by its path and class; the model itself where no single module shows it.
    """
    first, second = (list(_calls(model, x)) for _ in range(2))
    random_names: dict[str, None] = {}
    for (name, before, after), (other, before_, after_) in zip(first, second):
        if name != other:
            break  # the passes took different ways; what came before counts
        # children end before their parents: a parent of a module that was found is not another cause
        if before == before_ and after != after_ and not any(_inside(child, name) for child in random_names):
            random_names[name] = None
    modules = dict(model.named_modules())
    names = [f"{name or 'model'} ({type(modules[name]).__name__})" for name in random_names]
    return tuple(names) or (f"model ({type(model).__name__})",)


def _inside(child: str, parent: str) -> bool:
    return parent == "" or child.startswith(f"{parent}.")


def _calls(model: nn.Module, x: Inputs) -> Iterator[tuple[str, list[Fingerprint], list[Fingerprint]]]:
    """Yield each module call of one pass, in the order in which calls end: name, fingerprints of inputs and of outputs."""
    calls: list[tuple[str, list[Fingerprint], list[Fingerprint]]] = []
    waiting: list[list[Fingerprint]] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        waiting.append([fingerprint(t) for t in output_tensors((args, kwargs))])

    def after(name: str, output: Any) -> None:
        calls.append((name, waiting.pop(), [fingerprint(t) for t in output_tensors(output)]))

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # takes no hooks
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(lambda _, __, output, name=name: after(name, output)).remove)
        model(x)
    return iter(calls)
