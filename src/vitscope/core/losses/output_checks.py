"""Check of a network's output against the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_WRAP = (
    "wrap it in a module that returns the tensor alone, e.g. class Logits(nn.Module) with "
    "forward(self, x): return self.model(x){access}, or pass output={key} to the probe"
)
#: the outputs of each named loss
_FORMS = {
    "cross_entropy": "logits (B, K)",
    "mse": "outputs (B, ...) of the targets' shape",
    "bce": "logits (B, ...) of the targets' shape",
    "dense_cross_entropy": "logits (B, C, H, W)",
}


def check_output(loss: str | Callable[..., Any], output: Any, n_images: int | None) -> int | None:
    """Check what a network returned.

    Args:
        loss: The objective's; a callable takes any output.
        output: Output of the network.
        n_images: Images that it was given; None where that is not known.

    Returns:
        The number of classes that indices may name; None where there are none.

    Raises:
        ValueError: The output does not fit the loss.
    """
    if callable(loss):
        return None
    _check_tensor(output, _FORMS[loss])
    if loss == "cross_entropy":
        _check_logits(output, n_images)
        return int(output.shape[1])
    shape, form = tuple(output.shape), _FORMS[loss]
    if output.ndim == 0 or n_images not in (None, shape[0]):
        raise ValueError(
            f"Expected a model that returns {form} with loss={loss!r}, received {shape} for {n_images} images: return one row "
            "an image."
        )
    if loss == "dense_cross_entropy" and (output.ndim < 3 or shape[1] < 2):
        raise ValueError(
            f"Expected a model that returns {form} with C at least 2 and loss={loss!r}, received {shape}: use "
            "loss='cross_entropy' for one class per image."
        )
    return int(shape[1]) if output.ndim >= 2 and shape[1] > 1 else None


def _check_tensor(output: Any, form: str) -> None:
    if not isinstance(output, Tensor):
        raise ValueError(
            f"Expected a model that returns {form}, received {described_value(output)}: {_wrapper(output)}."
        )
    kind = str(output.layout if output.layout is not torch.strided else output.dtype).removeprefix("torch.")
    if output.layout is not torch.strided:
        raise ValueError(
            f"Expected a model that returns a dense tensor of {form}, received {kind} {tuple(output.shape)}: return "
            "output.to_dense()."
        )
    if not output.is_floating_point():
        raise ValueError(
            f"Expected a model that returns floating-point {form}, received {kind} {tuple(output.shape)}: return logits, before "
            "any argmax."
        )


def _check_logits(output: Tensor, n_images: int | None) -> None:
    shape, fix = tuple(output.shape), ""
    if (output.ndim == 2 and shape[1] == 1) or output.ndim == 1:
        fix = "for two classes return two logits, torch.stack([0 * z, z], 1) of one logit z, or use loss='bce'"
    elif output.ndim == 2 and shape[1] == 0:
        fix = "the model has no classifier: build it with num_classes=K"
    elif output.ndim == 2 and n_images not in (None, shape[0]):
        fix = f"there are {n_images} images: return one row of logits per image"
    elif output.ndim != 2:
        fix = "return one row of logits per image, e.g. pool over positions with .mean((2, 3))"
        fix += ", or use loss='dense_cross_entropy' for one per pixel" if output.ndim == 4 else ""
    if fix:
        raise ValueError(f"Expected a model that returns logits (B, K) with K at least 2, received {shape}: {fix}.")


def described_value(value: Any) -> str:
    """Return a value's type, and what tells it apart, in a few words."""
    name = type(value).__name__
    if isinstance(value, Mapping):
        return f"a {name} with keys {', '.join(map(str, list(value)[:6]))}"
    if isinstance(value, tuple | list):
        return f"a {name} of {len(value)} ({', '.join(type(v).__name__ for v in value[:4])})"
    fields = getattr(type(value), "__dataclass_fields__", None)
    return f"a {name} with fields {', '.join(list(fields)[:6])}" if fields else f"a {name}"


def _wrapper(output: Any) -> str:
    """Return how to name or wrap an output; no entry is chosen for the user."""
    names = list(output) if isinstance(output, Mapping) else list(getattr(type(output), "__dataclass_fields__", ()))
    key: Any = names[0] if names else "..."
    if isinstance(output, Mapping):
        access = f"[{key!r}]" if names else "[...]"
    elif names:
        access = f".{key}"
    else:
        key = 0 if isinstance(output, tuple | list) else "..."
        access = "[0]" if isinstance(output, tuple | list) else ".logits"
    return _WRAP.format(key=repr(key) if key != "..." else "lambda output: ...", access=access)
