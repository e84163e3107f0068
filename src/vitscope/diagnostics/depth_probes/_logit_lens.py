"""Logit lens: the model's own head on the maps of earlier layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitscope.core.batches.batch_inputs import Inputs
from vitscope.core.tap import Tap
from vitscope.models.structure.taps import reading

#: ways in which a head makes one vector of a map or of tokens, beside modules that do it
POOLINGS = ("none", "mean of positions", "first token", "mean of tokens", "flatten")

#: largest difference of a head's logits from the model's, relative to their magnitude
_TOLERANCE = 1e-4
#: exceptions of modules that do not fit to what they are given
_MISFITS = (RuntimeError, IndexError, TypeError, ValueError, AssertionError, NotImplementedError)


@dataclass(frozen=True)
class Head:
    """The modules of a forward pass after the last tap, in order, with one pooling among them.

    Attributes:
        modules: The head's outermost modules that have weights or buffers of their own, or no submodules.
        place: Number of these modules that run before the pooling.
        pooling: One of `POOLINGS`.
        tap: The last tap.
        channels: Number of channels of its map.
        positions: (h, w) of its map.
    """

    modules: tuple[nn.Module, ...]
    place: int
    pooling: str
    tap: Tap
    channels: int
    positions: tuple[int, ...]

    @property
    def classifier(self) -> nn.Linear | None:
        """The linear layer that gives the logits; None where another module does."""
        with_weights = [module for module in self.modules if any(True for _ in module.parameters(recurse=False))]
        return with_weights[-1] if with_weights and isinstance(with_weights[-1], nn.Linear) else None

    def null_reason(self, tap: Tap, x: Tensor) -> str | None:
        """Return why the head cannot take the map ``(B, C, h, w)`` of a tap; None where it can."""
        if x.shape[1] != self.channels:
            return f"logit lens: the head takes {self.channels} channels"
        if tap.n_prefix != self.tap.n_prefix:
            return "logit lens: its tokens are not those of the last layer"
        if tuple(x.shape[2:]) != self.positions and self._flattened(x) != self._flattened(x, self.positions):
            return "logit lens: the head takes maps of one size"
        return None

    def _flattened(self, like: Tensor, positions: tuple[int, ...] | None = None) -> list[tuple[int, ...]] | None:
        """Return the shapes of what the head flattens of a map like ``(B, C, h, w)``, of other positions where they are given.

        None where the head does not run on it.
        """
        x = like.new_zeros(1, like.shape[1], *(like.shape[2:] if positions is None else positions))
        prefix = x.new_zeros(1, self.tap.n_prefix, x.shape[1]) if self.tap.n_prefix else None
        shapes: list[tuple[int, ...]] = []
        try:
            self.apply(x, prefix, shapes)
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
            return None
        return shapes

    def apply(
        self, x: Tensor, prefix: Tensor | None, flattened: list[tuple[int, ...]] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return logits ``(B, K)`` and what the classifier takes, ``(B, C')``, of a map and its prefix tokens.

        The shapes of values that are flattened are added to ``flattened``.
        """
        value = _in_layout(x, prefix, self.tap)
        head_input = None
        for index, module in enumerate((*self.modules, None)):
            is_flattening = isinstance(module, nn.Flatten) or (index == self.place and self.pooling == "flatten")
            if is_flattening and flattened is not None:
                flattened.append(tuple(value.shape))
            if index == self.place:
                value = _pooled(value, self.pooling, self.tap)
            if module is None:
                break
            if module is self.classifier:
                head_input = value.flatten(1)
            value = module.forward(value)  # no hooks: the tap may be read at this very module
        return value, head_input


def find_head(model: nn.Module, images: Inputs, taps: list[Tap]) -> Head | None:
    """Return the model's head, verified to give the model's own logits; None where no such sequence of modules does.

    Args:
        model: A guarded model.
        images: The inputs of a batch.
        taps: Taps of the model, the last of which the head follows.
    """
    last = len(taps) - 1
    calls = _Calls()
    read: dict[str, Tensor] = {}

    def note(index: int, tap: Tap, x: Tensor) -> None:
        if index == last:
            calls.begin()
            read["map"] = x.clone()

    def note_prefix(index: int, tap: Tap, tokens: Tensor) -> None:
        if index == last:
            read["prefix"] = tokens.clone()

    with reading(model, taps, note, note_prefix), calls.of(model):
        logits = model(images)
    if "map" not in read or not isinstance(logits, Tensor) or not bool(torch.isfinite(logits).all()):
        return None
    x, modules = read["map"], calls.modules
    for place in range(len(modules) + 1):
        for pooling in POOLINGS:
            head = Head(tuple(modules), place, pooling, taps[last], x.shape[1], tuple(x.shape[2:]))
            try:
                head_logits = head.apply(x, read.get("prefix"))[0]
            except _MISFITS:
                continue
            if head_logits.shape == logits.shape and _is_close(head_logits, logits):
                return head
    return None


def _is_close(head_logits: Tensor, logits: Tensor) -> bool:
    return bool((head_logits - logits).abs().max() <= _TOLERANCE * logits.abs().max())


class _Calls:
    """Outermost modules that compute something themselves, in the order of their calls.

    Such a module has parameters or buffers of its own, or no submodules. What it calls is part of it, as the activation is in
    timm's ``BatchNormAct2d``.

    Attributes:
        modules: The modules that were called since `begin`.
    """

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self._running: nn.Module | None = None

    def begin(self) -> None:
        """Forget the calls so far, also one that is still running: a part of what it calls comes after the last tap."""
        self.modules.clear()
        self._running = None

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Follow the calls of a model; hooks of taps at the inputs of modules run before."""
        with ExitStack() as stack:
            for module in model.modules():
                if _computes(module):
                    stack.callback(module.register_forward_pre_hook(self._enter).remove)
                    stack.callback(module.register_forward_hook(self._leave).remove)
            yield

    def _enter(self, module: nn.Module, args: object) -> None:
        if self._running is None:
            self.modules.append(module)
            self._running = module

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        if self._running is module:
            self._running = None


def _computes(module: nn.Module) -> bool:
    own_tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return bool(own_tensors) or next(module.children(), None) is None


def _in_layout(x: Tensor, prefix: Tensor | None, tap: Tap) -> Tensor:
    """Return a map ``(B, C, h, w)`` in the axes of the tap's own tensor."""
    if tap.layout == "NHWC":
        return x.permute(0, 2, 3, 1)
    if tap.layout not in ("NLC", "NCL", "LNC"):
        return x
    tokens = x.flatten(2).transpose(1, 2)  # (B, h * w, C)
    tokens = tokens if prefix is None else torch.cat([prefix, tokens], dim=1)
    if tap.layout == "LNC":
        return tokens.transpose(0, 1)
    return tokens if tap.layout == "NLC" else tokens.transpose(1, 2)


def _pooled(value: Tensor, pooling: str, tap: Tap) -> Tensor:
    if pooling == "none":
        return value
    if pooling == "flatten":
        return value.flatten(1)
    if value.ndim == 3:
        swapped = {"NCL": (1, 2), "LNC": (0, 1)}.get(tap.layout)
        tokens = value if swapped is None else value.transpose(*swapped)  # (B, L, C)
        if pooling == "first token":
            return tokens[:, 0]
        return tokens[:, tap.n_prefix if pooling == "mean of positions" else 0 :].mean(dim=1)
    if pooling != "mean of positions" or value.ndim != 4:
        raise ValueError("no tokens")
    return value.mean(dim=(1, 2) if tap.layout == "NHWC" else (2, 3))
