"""Check what a measure is given, once and before anything expensive: batches, weights, and what the model returns.

A batch is a pair ``(x, y)``. Images ``x``: a floating-point tensor ``(B, C, H, W)``, or ``(B, features)`` for a network of
vectors, at least one. Targets ``y``: class indices ``(B,)`` of any integer type, from 0 to K - 1, or -100 for an image without
a label; or soft targets ``(B, K)``, floating-point, each row a distribution. The model returns logits ``(B, K)``, K at least 2;
measures of feature maps alone take any output. Everything else is a ValueError that says what was expected, what was received,
and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

#: the class index that torch's losses leave out
IGNORED = -100
_INTEGERS = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip
#: what torch says where a derivative is asked of an output that no differentiable operation leads to
_NO_GRADIENT = ("does not require grad", "does not have a grad_fn", "Inference tensors cannot be saved")
_WRAP = (
    "wrap it in a module that returns the tensor alone, e.g. class Logits(nn.Module) with "
    "forward(self, x): return self.model(x){access}"
)


class InputChecks:
    """What is known about the batches and outputs of one probe: each batch is checked once."""

    def __init__(self) -> None:
        self.n_classes: int | None = None
        self._checked: set[int] = set()
        self._highest: tuple[int, int] = (-1, 0)  # class index, batch

    def batch(self, index: int, batch: Any) -> tuple[Tensor, Tensor]:
        """Return ``(x, y)``, class indices as int64.

        Raises:
            ValueError: see this module.
        """
        x, y = _pair(index, batch)
        if index in self._checked or x.is_meta or y.is_meta:  # without values; the probe refuses the device
            return x, _as_indices(y)
        _check_images(index, x)
        y = _as_indices(y)
        highest = _check_targets(index, x, y)
        self._highest = max(self._highest, (highest, index))
        self._check_range()
        self._checked.add(index)
        return x, y

    def output(self, x: Any, output: Any) -> None:
        """Check what the model returned for ``x`` and that no class index lies beyond its logits."""
        check_logits(output, len(x) if isinstance(x, Tensor) and x.ndim else None)
        if self.n_classes is None:
            self.n_classes = int(output.shape[1])
            self._check_range()

    def _check_range(self) -> None:
        highest, index = self._highest
        if self.n_classes is not None and highest >= self.n_classes:
            raise ValueError(
                f"Expected class indices from 0 to {self.n_classes - 1}, for the model gives {self.n_classes} logits, received "
                f"{highest} in batch {index}: number the classes from 0, or build the model with num_classes={highest + 1}."
            )

    @contextmanager
    def of_outputs(self, model: nn.Module, logits: bool = True) -> Iterator[None]:
        """Check what the model returns in every pass inside; an error of the model on its first images is a ValueError.

        Args:
            model: the model.
            logits: whether it must return logits; with False whatever it returns is good.
        """
        if logits and getattr(model, "num_classes", None) == 0:
            raise ValueError(
                "Expected a model that returns logits (B, K) with K at least 2, received one built with num_classes=0, which "
                "returns features: build it with num_classes=K."
            )
        passed = False
        running: list[Any] = []  # the images of a pass that has not come to its end

        def begin(_: nn.Module, args: tuple[Any, ...]) -> None:
            running[:] = [args[0] if args else None]

        def end(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            nonlocal passed
            running.clear()
            passed = True
            if logits:
                self.output(args[0] if args else None, output)

        handles = [model.register_forward_pre_hook(begin), model.register_forward_hook(end)]
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, AttributeError, LookupError, AssertionError) as error:
            if any(words in str(error) for words in _NO_GRADIENT):
                raise ValueError(
                    "Expected logits that depend on the parameters by differentiable operations, received an output without a "
                    "gradient: take detach(), no_grad and inference_mode out of the model's forward, and let its parameters "
                    "require gradients."
                ) from error
            if not running or passed:
                raise
            raise ValueError(_on_failure(running[0], error)) from error
        finally:
            for handle in handles:
                handle.remove()


class CheckedBatches:
    """The batches of a probe, each checked when it is gone through."""

    def __init__(self, batches: Any, checks: InputChecks) -> None:
        self.source = batches.source if isinstance(batches, CheckedBatches) else batches
        if not isinstance(self.source, Iterable) or isinstance(self.source, Tensor | Mapping | str):
            raise ValueError(
                f"Expected batches [(x, y), ...], received {_described(self.source)}: pass a list of pairs of tensors."
            )
        self._checks = checks

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(x, y)``, class indices as int64."""
        return (self._checks.batch(index, batch) for index, batch in enumerate(self.source))

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.source) if isinstance(self.source, Sized) else sum(1 for _ in self.source)


def check_logits(output: Any, n_images: int | None) -> None:
    """Raise ValueError where a model's output is not a tensor of logits ``(n_images, K)``, K at least 2."""
    if not isinstance(output, Tensor):
        raise ValueError(
            f"Expected a model that returns logits (B, K), received {_described(output)}: {_wrapper(output)}."
        )
    shape, fix = tuple(output.shape), ""
    if output.layout is not torch.strided:
        kind = str(output.layout).removeprefix("torch.")
        raise ValueError(
            f"Expected a model that returns a dense tensor of logits (B, K), received {kind} {shape}: return output.to_dense()."
        )
    if not output.is_floating_point():
        kind = str(output.dtype).removeprefix("torch.")
        raise ValueError(
            f"Expected a model that returns floating-point logits (B, K), received {kind} {shape}: return logits, before "
            "any argmax."
        )
    if (output.ndim == 2 and shape[1] == 1) or output.ndim == 1:
        fix = "for two classes return two logits, torch.stack([0 * z, z], 1) of one logit z"
    elif output.ndim == 2 and shape[1] == 0:
        fix = "the model has no classifier: build it with num_classes=K"
    elif output.ndim == 2 and n_images not in (None, shape[0]):
        fix = f"there are {n_images} images: return one row of logits an image"
    elif output.ndim != 2:
        fix = "return one row of logits an image, e.g. pool over positions with .mean((2, 3))"
    if fix:
        raise ValueError(f"Expected a model that returns logits (B, K) with K at least 2, received {shape}: {fix}.")


def check_weights(model: nn.Module) -> None:
    """Raise ValueError for parameters or buffers that no measure can work with: inference, complex or without storage."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_inference():
            raise ValueError(
                f"Expected ordinary parameters, received {name!r} made under torch.inference_mode: build or load the model "
                "outside of it, or pass copy.deepcopy(model)."
            )
        if tensor.is_complex():
            raise ValueError(f"Expected real parameters, received {name!r} of type {tensor.dtype}: use a real model.")
        if tensor.device.type == "meta":
            raise ValueError(
                f"Expected parameters with values, received {name!r} on the device meta: load weights first."
            )


def _pair(index: int, batch: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        fix = "make pairs, [(x, y) for x, y, *_ in batches]"
        if isinstance(batch, Mapping):
            names = list(batch)
            fix = f"make pairs, [(b[{names[0]!r}], b[{names[-1]!r}]) for b in batches]" if names else "make pairs"
        raise ValueError(f"Expected batch {index} to be a pair (x, y), received {_described(batch)}: {fix}.")
    for name, value in zip(("images x", "targets y"), batch):
        if not isinstance(value, Tensor):
            raise ValueError(
                f"Expected {name} of batch {index} to be a tensor, received {_described(value)}: use torch.as_tensor."
            )
    return batch[0], batch[1]


def _check_images(index: int, x: Tensor) -> None:
    received = f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
    expected = f"Expected images (B, C, H, W) of a floating-point type in batch {index}, received {received}"
    if not x.is_floating_point():
        fix = "drop the imaginary part" if x.is_complex() else "scale and normalize them, x.float() / 255 for 8 bits"
        raise ValueError(f"{expected}: {fix}.")
    if x.ndim not in (2, 4):
        fix = (
            "add the missing axis, x[None] for one image, x[:, None] for one channel" if x.ndim == 3 else "reshape them"
        )
        raise ValueError(f"{expected}: {fix}.")
    if x.numel() == 0:
        raise ValueError(f"{expected}: it is empty, leave it out.")


def _as_indices(y: Tensor) -> Tensor:
    return y.long() if y.ndim == 1 and y.dtype in _INTEGERS else y


def _check_targets(index: int, x: Tensor, y: Tensor) -> int:
    """Return the highest class index, -1 for soft targets."""
    received = f"{str(y.dtype).removeprefix('torch.')} {tuple(y.shape)}"
    expected = f"Expected class indices (B,) or soft targets (B, K) in batch {index}, received {received}"
    if y.ndim not in (1, 2):
        raise ValueError(f"{expected}: give one class index an image.")
    if len(x) != len(y):
        raise ValueError(f"Expected as many targets as images in batch {index}, received {len(x)} and {len(y)}.")
    if y.ndim == 1:
        if y.dtype not in _INTEGERS:
            fix = "y.long() if these are class indices" if y.is_floating_point() else "y.long() for classes 0 and 1"
            raise ValueError(f"{expected}: use {fix}.")
        if bool(((y < 0) & (y != IGNORED)).any()):
            low = int(y[(y < 0) & (y != IGNORED)].min())
            raise ValueError(
                f"Expected class indices of at least 0 in batch {index}, received {low}: number the classes from 0 (-100 leaves "
                "an image out of the loss)."
            )
        return int(y.max())
    if y.shape[1] == 1:
        raise ValueError(f"{expected}: use y[:, 0].long() for class indices.")
    if not y.is_floating_point():
        raise ValueError(
            f"{expected}: one-hot targets become class indices by y.argmax(1), or soft targets by y.float()."
        )
    if not bool((y >= 0).all()) or not bool(y.isfinite().all()):
        raise ValueError(f"{expected} with negative or infinite values or NaN: each row is a distribution, at least 0.")
    error = float((y.double().sum(1) - 1).abs().max())
    # entries rounded to their type a few times (softmax, mixing, smoothing), divided by a float32 sum of K terms
    if not error <= 8 * torch.finfo(y.dtype).eps + y.shape[1] * torch.finfo(torch.float32).eps:
        raise ValueError(f"{expected} whose rows sum to 1 with an error of {error:.2g}: divide each row by its sum.")
    return -1


def _described(value: Any) -> str:
    """Return a value's type, and what tells it apart, in a few words."""
    name = type(value).__name__
    if isinstance(value, Mapping):
        return f"a {name} with keys {', '.join(map(str, list(value)[:6]))}"
    if isinstance(value, tuple | list):
        return f"a {name} of {len(value)} ({', '.join(type(v).__name__ for v in value[:4])})"
    fields = getattr(type(value), "__dataclass_fields__", None)
    return f"a {name} with fields {', '.join(list(fields)[:6])}" if fields else f"a {name}"


def _wrapper(output: Any) -> str:
    """Return how to wrap a model that gives ``output``; no entry is chosen for the user but one that is named logits."""
    names = list(output) if isinstance(output, Mapping) else list(getattr(type(output), "__dataclass_fields__", ()))
    if isinstance(output, Mapping):
        access = "['logits']" if "logits" in names else f"[{names[0]!r}]" if names else "[...]"
    elif names:
        access = ".logits" if "logits" in names else f".{names[0]}"
    else:
        access = "[0]" if isinstance(output, tuple | list) else ".logits"
    return _WRAP.format(access=access)


def _on_failure(x: Any, error: Exception) -> str:
    what = (
        f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
    )
    line = (str(error).strip().splitlines() or [""])[0][:200].rstrip(".")
    return (
        f"Expected images that the model takes, received {what}, on which it fails ({type(error).__name__}: {line}): "
        "check their channels and size against the model's."
    )
