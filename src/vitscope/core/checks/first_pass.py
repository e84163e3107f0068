"""Signs in a first pass that a network, its outputs or its images are not what a measure takes them for.

Each is one warning, since a network may be meant to be so; the numbers are those of the network and the images as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitscope.core.batches.batch_format import BatchFormat
from vitscope.core.batches.batch_inputs import Inputs
from vitscope.core.guard.pass_comparison import compare_passes
from vitscope.runtime.torch_internals import BatchNormBase

#: images of the pass that shows which parameters count; it also shows whether the others of the batch change their outputs
N_ALONE = 2

#: functions whose results are probabilities
_SQUASHING = frozenset({"softmax", "sigmoid", "expit", "sigmoid_", "softmin"})
#: functions of a network's first layer
_LAYERS = frozenset({"conv2d", "linear"})
#: names of the classifier of a network, which becomes an identity where features are read
_CLASSIFIERS = frozenset({"fc", "head", "heads", "classifier", "last_linear"})


class FirstPass(TorchFunctionMode):
    """Watch passes over the first batch, until the context is left.

    Args:
        model: The network that runs inside.
        x: The batch's images, or its inputs.
        batch_format: Format that states when ``forward`` calls the network, whose outputs are then not those that are measured.
        loss: The objective's; None where the outputs go to no loss.
    """

    def __init__(
        self, model: nn.Module, x: Inputs, batch_format: BatchFormat, loss: str | Callable[..., Any] | None
    ) -> None:
        super().__init__()
        self._model, self._x, self._format, self._loss = model, x, batch_format, loss_name(loss)
        self._squashed: Tensor | None = None  # the last result of a function of `_SQUASHING`
        self._identities: dict[str, int] = {}  # the data that a classifier which is an identity returned
        self._expects_pixels = isinstance(x, Tensor) and x.ndim == 4 and _are_bytes(x[:N_ALONE])
        self._has_pixels = False
        self._kind = ""  # of the outputs
        self._together: Tensor | None = None  # outputs of the first images, in the batch and alone
        self._alone: Tensor | None = None
        self._hooks = ExitStack()

    def __enter__(self) -> FirstPass:
        """Return itself, watching."""
        for path, module in self._model.named_modules():
            if isinstance(module, nn.Identity) and path.rpartition(".")[2] in _CLASSIFIERS:
                hook = module.register_forward_hook(lambda _, __, out, path=path: self._note_identity(path, out))
                self._hooks.callback(hook.remove)
        self._hooks.callback(self._model.register_forward_hook(self._end).remove)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.close()
        self._squashed = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if self._expects_pixels and name in _LAYERS and args and isinstance(args[0], Tensor):
            self._expects_pixels, self._has_pixels = False, _are_bytes(args[0])
        result = func(*args, **(kwargs or {}))
        if name in _SQUASHING and isinstance(result, Tensor) and result.ndim <= 2:
            self._squashed = result.detach()  # its data stay in place, so that no other tensor lies there
        return result

    def notices(self) -> list[str]:
        """Return what the passes have shown, one sentence each."""
        name, texts = type(self._model).__name__, []
        if self._has_pixels and isinstance(self._x, Tensor):
            texts.append(
                f"the images of the first batch are whole numbers up to {float(self._x.max()):g} and reach the first layer of "
                f"{name} as they are: most networks take (x / 255 - mean) / std; ignore this if the network takes 0 to 255"
            )
        if self._kind:
            texts.append(f"the outputs of {name} {self._kind}")
        if coupling := self._coupling():
            texts.append(
                f"the outputs of {name} for an image depend on the other images of its batch{coupling}; the results "
                "hold only for batches like these"
            )
        return texts

    def _coupling(self) -> str:
        """Return how the images of a batch influence each other, where they do and no statistics of the batch are asked for."""
        norms = [(path, m) for path, m in self._model.named_modules() if isinstance(m, BatchNormBase)]
        if any(m.training for _, m in norms):
            return ""
        without = [path for path, m in norms if m.running_mean is None]
        reason = f" ({without[0]!r} has no running statistics)" if without else ""
        pair = [t for t in (self._together, self._alone) if t is not None]
        if len(pair) < 2 or pair[0].shape != pair[1].shape or not all(bool(t.isfinite().all()) for t in pair):
            return reason
        difference, _ = compare_passes(self._model, pair[:1], pair[1:], False, self._x)
        if difference <= torch.finfo(pair[1].dtype).eps ** 0.5:
            return ""
        n_others = len(self._x) - N_ALONE
        return (
            f"{reason}: those of {N_ALONE} images change by {difference:.1g} of their size without the other {n_others}"
        )

    def _note_identity(self, path: str, output: Any) -> None:
        if isinstance(output, Tensor):
            self._identities[path] = output.data_ptr()

    @torch.no_grad()
    def _end(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._format.is_calling or not isinstance(output, Tensor) or not output.ndim or not args:
            return
        if not output.is_floating_point() or output.layout != torch.strided or output.is_meta:
            return
        n_images, n = len(output), len(self._x)
        if n_images == n and self._together is None:
            self._together = output[:N_ALONE].clone() if n > N_ALONE else output[:0].clone()
            self._kind = self._kind_of(output)
        elif n_images == N_ALONE and self._alone is None:
            self._alone = output.clone()

    def _kind_of(self, output: Tensor) -> str:
        """Return what the outputs are where they are no logits, and what to do; an empty text for logits."""
        if self._loss in ("cross_entropy", "dense_cross_entropy") and _are_distributions(output):
            return (
                f"are probabilities, which sum to 1, and loss={self._loss!r} takes their softmax once more: return logits, "
                "before the softmax (or log_softmax of them, which gives the same loss)"
            )
        is_squashed = self._squashed is not None and _same_data(self._squashed, output)
        if self._loss in ("cross_entropy", "bce") and is_squashed:
            function = "softmax" if self._loss == "cross_entropy" else "sigmoid"
            return (
                f"are those of a sigmoid or softmax, and loss={self._loss!r} takes their {function} again: return logits, "
                "before it"
            )
        if self._loss == "cross_entropy" and output.ndim == 2 and output.data_ptr() in self._identities.values():
            (path, *_) = [path for path, data in self._identities.items() if data == output.data_ptr()]
            return (
                f"are features (its classifier {path!r} is an nn.Identity), and loss='cross_entropy' takes them for logits "
                f"of {output.shape[1]} classes: measure the network with its classifier"
            )
        return ""


def loss_name(loss: str | Callable[..., Any] | None) -> str:
    """Return the name of a loss of logits, also where it is torch's; an empty text for any other."""
    if isinstance(loss, str):
        return loss
    if isinstance(loss, nn.CrossEntropyLoss) or loss is F.cross_entropy:
        return "cross_entropy"
    if isinstance(loss, nn.BCEWithLogitsLoss) or loss is F.binary_cross_entropy_with_logits:
        return "bce"
    return ""


def untracked_norms(model: nn.Module) -> list[str]:
    """Return a notice of BatchNorm layers that were trained, but whose running statistics are those of a new layer.

    A trained layer has weights that differ from each other; new statistics are exactly 0 and 1. Layers that take the statistics
    of the batch are left out.
    """
    norms = [
        (path, m.running_mean, m.running_var, m.weight)
        for path, m in model.named_modules()
        if isinstance(m, BatchNormBase) and not m.training and m.running_mean is not None and m.weight is not None
    ]
    norms = [norm for norm in norms if norm[1].numel() > 1 and not norm[1].is_meta]
    if not norms:
        return []
    device = norms[0][1].device
    signs = [
        torch.stack([(mean != 0).any() | (var != 1).any(), (weight == weight[0]).all()]).any().to(device)
        for _, mean, var, weight in norms
    ]
    names = [path for (path, *_), is_right in zip(norms, torch.stack(signs).tolist()) if not is_right]
    if not names:
        return []
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [
        f"BatchNorm {names[0]!r}{more} of {type(model).__name__} has trained weights, but running statistics of a new layer "
        "(mean 0, variance 1), as where a checkpoint was loaded without buffers or weights were averaged: load them, update them "
        "(torch.optim.swa_utils.update_bn), or measure with bn='batch' where a measure has it"
    ]


def _are_bytes(x: Tensor) -> bool:
    """Return whether values are whole numbers from 0 to at most 255, some of at least 64."""
    x = x.detach()
    if not x.is_floating_point() or not x.numel():
        return False
    low, high = (float(end) for end in torch.aminmax(x))
    return low >= 0 and 64 <= high <= 255 and bool((x == x.round()).all())


def _are_distributions(output: Tensor) -> bool:
    """Return whether values ``(B, K, ...)`` are at least 0 and sum to 1 over K, to within the rounding of their type."""
    if output.ndim < 2 or output.shape[1] < 2:
        return False
    tolerance = min(1e-2, 8 * output.shape[1] ** 0.5 * torch.finfo(output.dtype).eps)
    return bool((output >= 0).all() & ((output.double().sum(1) - 1).abs() <= tolerance).all())


def _same_data(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and a.data_ptr() == b.data_ptr()
