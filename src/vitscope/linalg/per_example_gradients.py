"""Gradients of single images by ``torch.func.vmap``, some images at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitscope.core.batches.batch_inputs import BatchInputs, Inputs
from vitscope.core.guard.substituted_call import substituted_call
from vitscope.linalg.basis_memory import free_memory
from vitscope.runtime import stop_flag
from vitscope.runtime.torch_internals import BatchNormBase

_logger = logging.getLogger(__name__)

#: images at once without a ``micro_batch``, at most
MOST_IMAGES = 64
#: share of the free memory that gradients of images may take, which exist about three times while they are made
_MEMORY_SHARE = 1 / 8

#: from outputs of one image ``(1, ...)`` and its target ``(1, ...)`` to a scalar
ImageLoss = Callable[[Any, Tensor], Tensor]


class PerExampleGradients:
    """The gradient of a scalar of each image in the parameters.

    Make and use it inside ``Probe.guard(second_order=True)``. The first images are checked against the gradient of their sum;
    where `vmap` does not work on the network, or gives something else, images are differentiated one after the other, with a
    message.

    Args:
        model: The guarded model.
        loss: The scalar of one image.
        parameters: The parameters analyzed, by name.
        micro_batch: Images at once; None for as many as an eighth of the free memory holds, at most `MOST_IMAGES`.

    Raises:
        ValueError: BatchNorm without running statistics, with which an image has no gradient of its own.
    """

    def __init__(
        self, model: nn.Module, loss: ImageLoss, parameters: Mapping[str, Tensor], micro_batch: int | None = None
    ) -> None:
        refuse_batch_statistics(model)
        self.model, self.loss, self.parameters = model, loss, dict(parameters)
        self.size = sum(p.numel() for p in parameters.values())
        like = next(iter(parameters.values()))
        fitting = int(_MEMORY_SHARE * free_memory(like.device) / (3 * self.size * like.element_size()))
        self.micro_batch = micro_batch or max(1, min(MOST_IMAGES, fitting))
        self._by_vmap: bool | None = None

    def __call__(self, x: Inputs, y: Tensor) -> Iterator[Tensor]:
        """Yield the gradients of the images in order, ``(b, size)`` for some at a time.

        Raises:
            ValueError: Images of a batch influence each other.
            Interrupted: A stop was requested.
        """
        for a in range(0, len(x), self.micro_batch):
            stop_flag.check()
            part = slice(a, a + self.micro_batch)
            yield self._gradients(x[part], y[part])

    def _gradients(self, x: Inputs, y: Tensor) -> Tensor:
        if self._by_vmap is None:
            return self._first_gradients(x, y)
        return self._vmapped(x, y) if self._by_vmap else self._one_by_one(x, y)

    def _first_gradients(self, x: Inputs, y: Tensor) -> Tensor:
        """Return the gradients, and find out by which way they are right."""
        expected = self._of_sum(x, y)
        reason = "gives another sum of gradients"
        try:
            gradients = self._vmapped(x, y)
            if _is_close(gradients.sum(0), expected, gradients):
                self._by_vmap = True
                return gradients
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError, IndexError) as error:
            reason = f"fails with {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}"
        gradients = self._one_by_one(x, y)
        if not _is_close(gradients.sum(0), expected, gradients):
            raise ValueError(
                "Expected a network whose output for an image depends on that image alone, received one in which the images of "
                "a batch influence each other: gradients of single images do not add up to that of the batch; leave out layers "
                "that use statistics of the batch."
            )
        self._by_vmap = False
        _logger.warning("gradients of single images are computed one after the other: torch.func.vmap %s", reason)
        return gradients

    def _vmapped(self, x: Inputs, y: Tensor) -> Tensor:
        names = list(self.parameters)
        point = {name: p.detach() for name, p in self.parameters.items()}
        tensors = [x] if isinstance(x, Tensor) else x.cut_tensors

        def image_loss(parameters: dict[str, Tensor], parts: list[Tensor], target: Tensor) -> Tensor:
            image = _rebuilt(x, [part[None] for part in parts])
            return self.loss(substituted_call(self.model, parameters, image), target[None])

        gradients = torch.func.vmap(torch.func.grad(image_loss), in_dims=(None, 0, 0))(point, tensors, y)
        return torch.cat([gradients[name].detach().flatten(1) for name in names], 1)

    def _one_by_one(self, x: Inputs, y: Tensor) -> Tensor:
        rows = torch.empty(len(x), self.size, dtype=next(iter(self.parameters.values())).dtype, device=y.device)
        for i in range(len(x)):
            stop_flag.check()
            rows[i] = self._of_sum(x[i : i + 1], y[i : i + 1])
        return rows

    def _of_sum(self, x: Inputs, y: Tensor) -> Tensor:
        """Return the gradient of the sum over the images of a batch ``(size,)``."""
        outputs = self.model(x)
        losses = [self.loss(_row(outputs, i), y[i : i + 1]) for i in range(len(x))]
        gradient = torch.autograd.grad(
            torch.stack(losses).sum(), list(self.parameters.values()), materialize_grads=True
        )
        return torch.cat([g.reshape(-1) for g in gradient])


def refuse_batch_statistics(model: nn.Module) -> None:
    """Raise ValueError where BatchNorm has no running statistics, so that images share those of their batch."""
    for name, module in model.named_modules():
        if isinstance(module, BatchNormBase) and (module.training or module.running_mean is None):
            raise ValueError(
                "Expected BatchNorm with running statistics, received "
                f"{name or type(module).__name__!r} that uses those of the batch, so that a single image has no gradient of its "
                "own: build it with track_running_stats=True, or use GroupNorm."
            )


def _is_close(total: Tensor, expected: Tensor, rows: Tensor) -> bool:
    """Return whether sums agree to half of the digits of the sum of the rows' lengths, which bounds their rounding."""
    scale = rows.double().norm(dim=1).sum()
    difference = (total.double() - expected.double()).norm()
    return bool(difference <= torch.finfo(rows.dtype).eps ** 0.5 * scale) or not bool(torch.isfinite(scale))


def _row(outputs: Any, i: int) -> Any:
    """Return the output of one image, which keeps the axis of images."""
    if isinstance(outputs, Tensor):
        return outputs[i : i + 1]
    if isinstance(outputs, Mapping):
        return {key: _row(value, i) for key, value in outputs.items()}
    if isinstance(outputs, tuple | list):
        rows = [_row(value, i) for value in outputs]
        return type(outputs)(*rows) if hasattr(outputs, "_fields") else type(outputs)(rows)  # a named tuple
    return outputs


def _rebuilt(x: Inputs, parts: list[Tensor]) -> Inputs:
    """Return the inputs of one image from its parts ``(1, ...)`` of the tensors that are cut along images."""
    if isinstance(x, Tensor):
        return parts[0]
    remaining = iter(parts)

    def part_of(value: Any) -> Any:
        is_cut = isinstance(value, Tensor) and value.ndim and len(value) == x.n_images
        return next(remaining) if is_cut else value

    entries = x.entries
    if isinstance(entries, Mapping):
        return BatchInputs({key: part_of(value) for key, value in entries.items()}, 1)
    return BatchInputs([part_of(value) for value in entries], 1)
