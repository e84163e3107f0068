"""Check what a measure is given, once and before anything expensive: batches, weights, and what the model returns.

A batch has one of the forms of `vitscope.core.batches.batch_format`. Images: a floating-point tensor ``(B, C, H, W)``, or
``(B, features)`` for a network of vectors, at least one. Targets and outputs depend on the loss:

- ``cross_entropy``: targets are class indices ``(B,)`` of any integer type, from 0 to K - 1, or -100 for an image without a
  label; or soft targets ``(B, K)``, floating-point, each row a distribution: non-negative, with a sum of 1 to within 8 eps of
  their type + K * 1.2e-7. Outputs are logits ``(B, K)``, K at least 2.
- ``mse``: targets are finite values of the outputs' shape ``(B, ...)``, or class indices for outputs ``(B, K)``.
- ``bce``: the same with values in [0, 1].
- ``dense_cross_entropy``: class indices ``(B, H, W)``, -100 for a pixel without a label; logits ``(B, C, H, W)``.
- a callable: any tensor of B rows; any output.

Measures of feature maps alone take any output. Everything else is a ValueError that says what was expected, what was received,
and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vitscope.core.batches.batch_format import BatchFormat
from vitscope.core.batches.batch_inputs import BatchInputs, Inputs
from vitscope.core.losses.output_checks import check_output, described_value
from vitscope.core.losses.target_checks import as_indices, check_targets
from vitscope.core.losses.targets import IGNORED_LABEL

#: the error of torch where a derivative is asked of an output that no differentiable operation leads to
_NO_GRADIENT = ("does not require grad", "does not have a grad_fn", "Inference tensors cannot be saved")


class InputChecks:
    """Checks of the batches and outputs of one probe; each batch is checked once.

    Args:
        loss: The objective's.
        batch_format: Form of the batches; by default pairs ``(x, y)``.
    """

    def __init__(
        self, loss: str | Callable[..., Any] = "cross_entropy", batch_format: BatchFormat | None = None
    ) -> None:
        self.loss, self.format = loss, batch_format or BatchFormat()
        self.n_classes: int | None = None
        self._checked: set[int] = set()
        self._highest: tuple[int, int] = (-1, 0)  # class index, batch

    def batch(self, index: int, batch: Any) -> tuple[Inputs, Tensor]:
        """Return inputs and targets ``(x, y)``, class indices as int64.

        Raises:
            ValueError: See this module.
        """
        x, y = self.format.split(index, batch)
        y = as_indices(self.loss, y)
        tensors = [x, y] if isinstance(x, Tensor) else [*x.tensors, y]
        if index in self._checked or any(t.is_meta for t in tensors):  # without values; the probe refuses the device
            return x, y
        if isinstance(x, Tensor):
            _check_images(index, x)
        highest = check_targets(self.loss, index, len(x), y)
        self._highest = max(self._highest, (highest, index))
        self._check_range()
        self._checked.add(index)
        return x, y

    def output(self, x: Any, output: Any) -> None:
        """Check what the model returned for ``x`` and that no class index lies beyond its logits."""
        n_images = len(x) if isinstance(x, BatchInputs) or (isinstance(x, Tensor) and x.ndim) else None
        n_classes = check_output(self.loss, output, n_images)
        if self.loss == "bce" and n_classes is None and self._highest[0] > 1:
            raise ValueError(
                f"Expected targets 0 and 1 for one logit an image with loss='bce', received {self._highest[0]} in batch "
                f"{self._highest[1]}: return one logit per class (B, K)."
            )
        if self.n_classes is None and n_classes is not None:
            self.n_classes = n_classes
            self._check_range()

    def _check_range(self) -> None:
        highest, index = self._highest
        if self.n_classes is not None and highest >= self.n_classes:
            fix = f"number the classes from 0, or build the model with num_classes={highest + 1}"
            if self.loss == "dense_cross_entropy" and highest == 255:
                fix = f"mark pixels without a label by {IGNORED_LABEL}, y.masked_fill(y == 255, {IGNORED_LABEL})"
            raise ValueError(
                f"Expected class indices from 0 to {self.n_classes - 1}, as the model has {self.n_classes} logits, received "
                f"{highest} in batch {index}: {fix}."
            )

    @contextmanager
    def of_outputs(self, model: nn.Module, logits: bool = True) -> Iterator[None]:
        """Check what the model returns in every pass inside; an error of the model on its first images is a ValueError.

        Args:
            model: The model.
            logits: Whether it must return what the loss takes; with False any output is good.
        """
        if logits and self.loss == "cross_entropy" and getattr(model, "num_classes", None) == 0:
            raise ValueError(
                "Expected a model that returns logits (B, K) with K at least 2, received one built with num_classes=0, which "
                "returns features: build it with num_classes=K."
            )
        has_passed = False
        running: list[Any] = []  # the inputs of a pass that has not come to its end

        def begin(_: nn.Module, args: tuple[Any, ...]) -> None:
            if not self.format.is_calling:
                running[:] = [args[0] if args else None]

        def end(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            nonlocal has_passed
            if self.format.is_calling:
                return
            running.clear()
            has_passed = True
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
            if not running or has_passed:
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
            fix = "pass a list of pairs of tensors"
            if hasattr(self.source, "__getitem__") and hasattr(self.source, "__len__"):
                fix = "a data set of single images needs a loader, torch.utils.data.DataLoader(dataset, batch_size=...)"
            raise ValueError(f"Expected batches [(x, y), ...], received {described_value(self.source)}: {fix}.")
        self._checks = checks

    @property
    def format(self) -> BatchFormat:
        """How batches are read and outputs selected."""
        return self._checks.format

    @property
    def reads_by_index(self) -> bool:
        """Whether one batch can be read without those before it; batches say so with an attribute of this name."""
        return bool(getattr(self.source, "reads_by_index", False))

    @property
    def is_read_again(self) -> bool:
        """Whether each pass reads and decodes the images; batches say so with an attribute of this name."""
        return bool(getattr(self.source, "is_read_again", False))

    def at(self, indices: Iterable[int]) -> Iterator[tuple[int, tuple[Any, Tensor]]]:
        """Yield the number of a batch and the batch for each of some numbers; no other is read."""
        return ((index, self._checks.batch(index, self.source[index])) for index in indices)

    def targets(self) -> Iterator[Tensor] | None:
        """Return the targets of each batch, class indices as int64; None where they are not at hand without the images."""
        if not hasattr(self.source, "target_batches"):
            return None
        return (as_indices(self._checks.loss, y) for y in self.source.target_batches())

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        """Yield ``(x, y)``, class indices as int64."""
        return (self._checks.batch(index, batch) for index, batch in enumerate(self.source))

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.source) if isinstance(self.source, Sized) else sum(1 for _ in self.source)


def check_weights(model: nn.Module) -> None:
    """Raise ValueError for weights that no measure can work with: made in inference mode, complex, or without storage.

    Buffers may be complex, as tables of rotations are (rotary position embeddings): nothing is differentiated by them.
    """
    for name, p in model.named_parameters():
        if p.is_complex():
            raise ValueError(
                f"Expected real parameters, received {name!r} of type {p.dtype}: store torch.view_as_real(...) of it, and use "
                "torch.view_as_complex of the parameter in the forward."
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_inference():
            raise ValueError(
                f"Expected ordinary parameters, received {name!r} made under torch.inference_mode: build or load the model "
                "outside of it, or pass copy.deepcopy(model)."
            )
        if tensor.device.type == "meta":
            raise ValueError(
                f"Expected parameters with values, received {name!r} on the device meta: load weights first."
            )


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


def _on_failure(x: Any, error: Exception) -> str:
    what = (
        f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
    )
    if isinstance(x, BatchInputs):
        what = f"the entries {', '.join(map(str, x.entries)) if isinstance(x.entries, dict) else f'0 to {len(x.entries) - 1}'}"
    line = (str(error).strip().splitlines() or [""])[0][:200].rstrip(".")
    if isinstance(error, NotImplementedError):  # of an operation, whatever the images are
        return (
            f"Expected a network whose operations run here, received one that fails ({type(error).__name__}: {line}): choose "
            "another operation, as attn_implementation='sdpa' in transformers, or another device."
        )
    return (
        f"Expected images that the model takes, received {what}, on which it fails ({type(error).__name__}: {line}): "
        "check their channels and size against the model's."
    )
