"""A callable as loss: check the values it returns, and describe it on the objective card."""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitscope.core.checks.outside_tensors import leaves_of
from vitscope.core.guard import probe_guard
from vitscope.core.guard.fingerprints import fingerprint
from vitscope.core.losses.targets import labeled

#: from outputs and targets to one value per image ``(B,)``, or to their mean (a scalar)
OwnLoss = Callable[[Any, Tensor], Tensor]

#: exceptions that a loss function raises for outputs or targets that it does not take
_FAILURES = (RuntimeError, TypeError, AttributeError, LookupError, AssertionError, ValueError)
#: containers are described to this depth
_DEPTH = 6


def values_of(loss: OwnLoss, outputs: Any, y: Tensor) -> Tensor:
    """Return the values of an own loss, ``(B,)`` or a scalar, the mean over the images that have a label.

    Raises:
        ValueError: Anything else.
    """
    try:
        values = loss(outputs, y)
    except torch.OutOfMemoryError:
        raise
    except _FAILURES as error:
        line = (str(error).strip().splitlines() or [""])[0][:200].rstrip(".")
        what = f"outputs {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        raise ValueError(
            f"Expected a loss that takes the outputs and targets, received {described(loss)}, which fails on {what} and targets "
            f"{tuple(y.shape)} ({type(error).__name__}: {line}): check their shapes and types."
        ) from error
    if not isinstance(values, Tensor):
        raise ValueError(
            f"Expected loss(outputs, targets) to return a tensor, received a {type(values).__name__}: return one value an "
            "image (B,), or their mean."
        )
    is_mean = values.ndim == 0
    is_of_images = values.ndim == 1 and len(values) == len(y)
    if not (is_mean or is_of_images) or not values.is_floating_point():
        kind = str(values.dtype).removeprefix("torch.")
        raise ValueError(
            f"Expected loss(outputs, targets) to return one floating-point value per image ({len(y)},), or their mean, received "
            f"{kind} {tuple(values.shape)}: take the mean over the other axes, e.g. .flatten(1).mean(1)."
        )
    return values


def reduced(loss: OwnLoss, outputs: Any, y: Tensor, reduction: str) -> Tensor:
    """Return ``(B,)`` values, 0 without a label, their sum or their mean over the images that have a label.

    Args:
        loss: Function that returns values ``(B,)`` or their mean.
        outputs: Outputs of the network.
        y: Targets.
        reduction: ``none``, ``sum`` or ``mean``.

    Raises:
        ValueError: ``none`` for a loss that returns a mean, or values of another shape.
    """
    values, counts = values_of(loss, outputs, y), labeled(y)
    if values.ndim == 0:
        if reduction == "none":
            raise ValueError(
                "Expected a loss that returns one value per image (B,), as operator='fisher_empirical' and measures of single "
                "images need, received one that returns their mean: pass reduction='none' to it."
            )
        if reduction == "mean":
            return values
        # a mean over no image is NaN
        return torch.where(counts.any(), values * counts.sum(), torch.zeros_like(values))
    values = torch.where(counts, values, torch.zeros_like(values))
    if reduction == "none":
        return values
    return values.sum() if reduction == "sum" else values.sum() / counts.sum()


def check_repeated_values(loss: OwnLoss, outputs: Any, y: Tensor) -> None:
    """Check that a loss gives the same value for the same outputs and targets.

    Raises:
        ValueError: It draws random numbers, or depends on earlier calls.
    """
    with torch.no_grad():
        first, second = (float(reduced(loss, outputs, y, "sum")) for _ in range(2))
    bound = 1e-4 * max(abs(first), abs(second))  # sums on a GPU may be made in another order
    if math.isfinite(first) and not abs(first - second) <= bound:
        raise ValueError(
            f"Expected a loss that is a function of outputs and targets, received {described(loss)}, which gives {first:.6g} and "
            f"then {second:.6g} for the same ones: take its randomness out, or fix its seed inside."
        )


def check_mean_over_images(loss: OwnLoss, outputs: Tensor, y: Tensor) -> None:
    """Check on one batch that a loss is the mean over images of what it is on their parts.

    Batches are split among ranks and into micro-batches, and weigh by their images: a loss that couples images, or that divides
    by anything but their number, would give other numbers for other splits.

    Args:
        loss: Function that returns values ``(B,)`` or their mean.
        outputs: Outputs of the network ``(B, ...)``, B at least 2; without a graph.
        y: Targets of the same images.

    Raises:
        ValueError: It is not.
    """
    middle = len(y) // 2
    with torch.no_grad():
        whole = float(reduced(loss, outputs, y, "sum"))
        parts = [float(reduced(loss, outputs[p], y[p], "sum")) for p in (slice(middle), slice(middle, None))]
    total, size = sum(parts), max(abs(whole), *map(abs, parts))
    if not math.isfinite(size):
        return  # the measure says so with the images' numbers
    if abs(whole - total) > 1e3 * torch.finfo(outputs.dtype).eps * size:
        raise ValueError(
            f"Expected a loss that is a mean over images, received {described(loss)}, whose sum over {len(y)} images is "
            f"{whole:.6g} at once and {total:.6g} in two parts: return one value per image (B,), which depends on "
            "that image alone."
        )


def check_form(loss: OwnLoss, outputs: Any, y: Tensor, model: nn.Module) -> None:
    """Check on one batch that a loss is one of the outputs alone, and that they are what a loss of torch takes them for.

    Args:
        loss: A callable.
        outputs: Outputs of the network, without a graph.
        y: Targets of the same images.
        model: The network.

    Raises:
        ValueError: The loss uses parameters of the network by itself, or takes the outputs for log probabilities, which they are
            not.
    """
    with torch.enable_grad():
        values = values_of(loss, outputs, y)
    leaves = {id(leaf) for leaf in leaves_of([values])}
    names = [name for name, p in model.named_parameters() if id(p) in leaves]
    if names:
        raise ValueError(
            f"Expected a loss of outputs and targets alone, received {described(loss)}, which also uses the model's "
            f"{names[0]!r}: an L2 term is vs.Objective(weight_decay=..., l2=...), and another penalty belongs to what the "
            "model returns."
        )
    is_nll = isinstance(loss, nn.NLLLoss) or loss is F.nll_loss
    if is_nll and isinstance(outputs, Tensor) and outputs.ndim > 1:
        excess = float(outputs.double().logsumexp(1).abs().max())
        if excess > 1e-2:
            raise ValueError(
                f"Expected log probabilities with {described(loss)}, received outputs whose exponentials do not sum to 1 (their "
                f"logarithm differs from 0 by {excess:.2g}): return z.log_softmax(1), or use loss='cross_entropy' with logits z."
            )


@contextmanager
def measured_loss(loss: str | OwnLoss, dtype: torch.dtype) -> Iterator[None]:
    """Cast a loss that is a module for the time inside, in eval mode; its tensors and modes are given back as they were."""
    if not isinstance(loss, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in loss.modules()]
    # outputs in half precision go to a loss in single precision
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    with probe_guard.kept_model(loss, wide, copy_weights=True):
        loss.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def described(function: Callable[..., Any]) -> str:
    """Return a callable's name and a digest of its code and of the values it holds, so that cards tell two of them apart."""
    inner = function.func if isinstance(function, functools.partial) else function
    named = inner if hasattr(inner, "__qualname__") else type(inner)
    name = f"{getattr(named, '__module__', None) or ''}.{named.__qualname__}".lstrip(".")
    digest = hashlib.sha256()
    for piece in _pieces(function, 0):
        digest.update(piece.encode())
        digest.update(b"\0")
    return f"{name} ({digest.hexdigest()[:8]})"


def _pieces(value: Any, depth: int) -> Iterator[str]:
    """Yield texts that tell a value apart from others: its type, code, entries and numbers; no addresses."""
    yield type(value).__qualname__
    if depth > _DEPTH:
        return
    texts, entries = _content(value)
    yield from texts
    for entry in entries:
        yield from _pieces(entry, depth + 1)


def _content(value: Any) -> tuple[list[str], Iterable[Any]]:
    """Return texts that describe a value, and the values that it holds."""
    if isinstance(value, Tensor):
        return [str(fingerprint(value))], []
    if isinstance(value, str | bytes | int | float | complex | bool | None) or value is Ellipsis:
        return [repr(value)], []
    if isinstance(value, types.CodeType):
        return [value.co_code.hex()], [value.co_names, value.co_consts]
    if isinstance(value, types.FunctionType):
        name = f"{value.__module__}.{value.__qualname__}"
        return [name], [value.__code__, value.__defaults__, value.__kwdefaults__, _free_variables(value)]
    if isinstance(value, types.MethodType):
        return [], [value.__func__, value.__self__]
    if isinstance(value, functools.partial):
        return [], [value.func, value.args, value.keywords]
    if isinstance(value, nn.Module):
        public_attributes = {key: entry for key, entry in vars(value).items() if not key.startswith("_")}
        return [repr(value)], [value.state_dict(), public_attributes]
    if isinstance(value, Mapping):
        return [], list(value.items())
    if isinstance(value, set | frozenset):
        return [], sorted(value, key=str)
    if isinstance(value, list | tuple):
        return [], value
    if isinstance(value, type | types.ModuleType | types.BuiltinFunctionType):
        name = getattr(value, "__qualname__", value.__name__)
        return [f"{getattr(value, '__module__', '')}.{name}"], []
    return [], [vars(value)] if hasattr(value, "__dict__") else []


def _free_variables(function: types.FunctionType) -> dict[str, Any]:
    """Return the variables of enclosing functions that a function reads, and the numbers and texts of its module."""
    variables = inspect.getclosurevars(function)
    constants = {k: v for k, v in variables.globals.items() if isinstance(v, str | int | float | Tensor | tuple)}
    return {**constants, **variables.nonlocals}
