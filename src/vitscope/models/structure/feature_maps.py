"""Convert the output of a module to a feature map (B, C, h, w); the grid of tokens is observed in the forward pass.

Convolutions and pooling layers show which maps a pass has. Tokens are a map only where one of these maps has as many
positions as there are tokens: neither the grid that a model was built for nor a factorization of their number is proof.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from vitscope.core.batches.batch_inputs import BatchInputs
from vitscope.core.guard.eager_execution import eager_execution, unwrapped
from vitscope.core.tap import Layout, TokenOrder
from vitscope.runtime.errors import StructureError

#: modules whose outputs are maps (B, C, h, w)
SPATIAL = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


class ForwardPass:
    """Observations of the forward pass in progress.

    Attributes:
        number: Number of passes that have begun, 0 before the first.
        n_images: Images of this pass; None where the model was not called with one tensor of images in front.
        image_size: (H, W) of its images; None likewise.
        sizes: (h, w) of the maps that were seen in this pass.
        order: The names that `ran` was told in this pass, in that order.
    """

    def __init__(self) -> None:
        self.number = 0
        self.n_images: int | None = None
        self.image_size: tuple[int, int] | None = None
        self.sizes: set[tuple[int, int]] = set()
        self.order: list[str] = []

    def begin(self, args: tuple[Any, ...]) -> None:
        """Forget the pass before; ``args`` are those of the model."""
        self.number += 1
        images = args[0] if args else None
        has_rows = isinstance(images, BatchInputs) or (isinstance(images, Tensor) and images.ndim > 0)
        self.n_images = len(images) if images is not None and has_rows else None
        self.image_size = None
        if isinstance(images, Tensor) and images.ndim == 4:
            self.image_size = (int(images.shape[-2]), int(images.shape[-1]))
        self.sizes.clear()
        self.order.clear()

    def see(self, value: Any) -> None:
        """Take note of a map (B, C, h, w)."""
        if isinstance(value, Tensor) and value.ndim == 4:
            self.sizes.add((int(value.shape[2]), int(value.shape[3])))

    def ran(self, name: str) -> None:
        """Take note that a module was read.

        Raises:
            ValueError: It was read before in the same pass, so that its maps would count as more images.
        """
        if self.number and name in self.order:
            raise ValueError(
                f"Expected {name!r} to run once in a forward pass, received a second call: it has no one feature map; pass "
                "taps=[...] (or units=[...]) without it."
            )
        self.order.append(name)

    def check_complete(self, names: Collection[str]) -> None:
        """Raise ValueError where a pass came to its end and one of ``names`` was not read in it."""
        missing = [name for name in names if name not in self.order] if self.number else []
        if missing:
            raise ValueError(
                f"Expected {missing[0]!r} to run in the forward pass, received a model that does not call it: pass taps=[...] "
                "(or units=[...]) without it."
            )


@contextmanager
def observed_pass(model: nn.Module, names: Collection[str] = ()) -> Iterator[ForwardPass]:
    """Observe the forward passes inside, uncompiled; each must read all of ``names``.

    Raises:
        ValueError: A name that was not read in a pass that came to its end.
    """
    model = unwrapped(model)
    forward_pass = ForwardPass()
    handles = [model.register_forward_pre_hook(lambda _, args: forward_pass.begin(args))]
    handles.append(model.register_forward_hook(lambda *_: forward_pass.check_complete(names)))
    handles += [
        module.register_forward_hook(lambda _, args, output: forward_pass.see(output))
        for module in model.modules()
        if isinstance(module, SPATIAL)
    ]
    try:
        with eager_execution(model):
            yield forward_pass
    finally:
        for handle in handles:
            handle.remove()


#: whether what runs is computed from values of a pass and no part of it
_is_outside: ContextVar[bool] = ContextVar("is_outside_of_pass", default=False)


@contextmanager
def outside_of_pass() -> Iterator[None]:
    """State that what runs inside is computed from values of a pass in progress and no part of the model."""
    token = _is_outside.set(True)
    try:
        yield
    finally:
        _is_outside.reset(token)


def is_outside_of_pass() -> bool:
    """Return whether what runs is no part of the model, so that function modes that follow the model pass it on."""
    return _is_outside.get()


def to_map(
    value: Tensor,
    name: str,
    layout: Layout,
    n_prefix: int,
    grid: tuple[int, int] | None,
    forward_pass: ForwardPass,
    order: TokenOrder | str | None = None,
) -> Tensor:
    """Bring a tensor of the given layout into (B, C, h, w), without prefix tokens.

    Args:
        value: The tensor.
        name: Name of the tap or unit, for errors.
        layout: Meaning of the tensor's axes.
        n_prefix: Tokens in front that are no part of the map.
        grid: Rows and columns of the tokens as a user declares them; None to find them among the maps of the pass.
        forward_pass: The pass in which it was read.
        order: Order of the tokens of an unknown layout or grid, or why it is not certain.

    Raises:
        StructureError: A layout that is not known.
        ValueError: A tensor of another number of axes, tokens whose grid is not certain, or not one map per image.
    """
    if isinstance(order, TokenOrder):
        return _ordered_map(value, name, forward_pass, order)
    if layout == "unknown":
        reason = f": {order}" if order else ""
        raise StructureError(
            name,
            f"its tensor is no map whose axes the forward pass shows{reason}",
            "pass taps=[...] or units=[...] without it",
        )
    expected_ndim = 4 if layout in ("NCHW", "NHWC") else 3
    if value.ndim != expected_ndim:
        raise ValueError(f"tap {name!r} reads a tensor of shape {tuple(value.shape)}, not a {layout} map.")
    if layout == "LNC":
        value = value.transpose(0, 1)  # (N, B, C) to (B, N, C)
    if forward_pass.n_images is not None and len(value) != forward_pass.n_images:
        raise ValueError(
            f"tap {name!r} reads {len(value)} maps of {forward_pass.n_images} images; pass taps=[...] without it."
        )
    if expected_ndim == 4:
        value = value if layout == "NCHW" else value.permute(0, 3, 1, 2)  # (B, H, W, C) to (B, C, H, W)
        forward_pass.see(value)
        return value
    if layout in ("NLC", "LNC"):
        value = value.transpose(1, 2)  # (B, N, C) to (B, C, N)
    h, w = token_grid(name, value.shape[-1], n_prefix, grid, forward_pass.sizes, order or "")
    return value[:, :, n_prefix:].reshape(*value.shape[:2], h, w)  # (B, C, h * w) before


def _ordered_map(value: Tensor, name: str, forward_pass: ForwardPass, order: TokenOrder) -> Tensor:
    """Bring tokens in another order than that of rows into (B, C, h, w)."""
    if forward_pass.image_size != order.image_size:
        received = "x".join(map(str, forward_pass.image_size or ())) or "other inputs"
        expected = "x".join(map(str, order.image_size))
        raise StructureError(
            name,
            f"the order of its tokens was found for images of {expected}, received {received}",
            "find taps for them: vitscope.taps(model, images)",
        )
    tokens = value.movedim(order.channel, -1)  # (..., C)
    tokens = tokens.reshape(-1, order.n_tokens, tokens.shape[-1])  # (B, n_tokens, C)
    if len(tokens) != forward_pass.n_images:
        raise StructureError(
            name,
            f"it holds {len(tokens)} maps of {forward_pass.n_images} images",
            "pass taps=[...] or units=[...] without it",
        )
    rows = tokens[:, order.index.flatten().to(tokens.device)]  # (B, h * w, C)
    return rows.transpose(1, 2).unflatten(2, tuple(order.index.shape))  # (B, C, h, w)


def prefix_tokens(value: Tensor, layout: Layout, n_prefix: int, order: TokenOrder | str | None = None) -> Tensor | None:
    """Return the class, distillation and register tokens in a tensor of a tap, ``(B, n_prefix, C)``; None where there is none.

    Args:
        value: The tensor, from which `to_map` makes a map.
        layout: Meaning of the tensor's axes.
        n_prefix: Tokens in front of the grid.
        order: Order of the tokens of an unknown layout or grid, in which they may stand behind the grid: those without a
            position, where these are ``n_prefix``, and otherwise those before the first one with a position.
    """
    if isinstance(order, TokenOrder):
        tokens = value.movedim(order.channel, -1)  # (..., C)
        tokens = tokens.reshape(-1, order.n_tokens, tokens.shape[-1])  # (B, n_tokens, C)
        is_of_map = torch.zeros(order.n_tokens, dtype=torch.bool).index_fill_(0, order.index.flatten().cpu(), True)
        if 0 < n_prefix == int((~is_of_map).sum()):
            return tokens[:, (~is_of_map).to(tokens.device)]
        n_prefix = int(order.index.min())
    elif layout == "NLC":
        tokens = value
    elif layout == "NCL":
        tokens = value.transpose(1, 2)  # (B, C, N) to (B, N, C)
    elif layout == "LNC":
        tokens = value.transpose(0, 1)  # (N, B, C) to (B, N, C)
    else:
        return None
    return tokens[:, :n_prefix] if n_prefix else None


def token_grid(
    name: str,
    n_tokens: int,
    n_prefix: int,
    grid: tuple[int, int] | None,
    sizes: Collection[tuple[int, int]],
    reason: str = "",
) -> tuple[int, int]:
    """Return rows and columns of the tokens: those declared, else the one map of the pass with as many positions.

    Args:
        name: Name of the tap or unit, for errors.
        n_tokens: Tokens of the sequence.
        n_prefix: Those of them in front of the grid.
        grid: Rows and columns that a user declared.
        sizes: (h, w) of the maps that the pass has shown.
        reason: Why the order of the tokens is not certain, where it was sought.

    Raises:
        ValueError: No such map, several, or a declared grid of another size.
    """
    n = n_tokens - n_prefix
    fitting = [grid] if grid is not None else sorted(sizes)
    fitting = [size for size in fitting if size[0] * size[1] == n]
    if len(fitting) == 1:
        return fitting[0]
    received = f"{n_tokens} tokens, {n_prefix} of them declared as prefix tokens,"
    if grid is not None:
        explanation = f"and a declared grid of {grid[0]}x{grid[1]}"
    elif fitting:
        explanation = f"which fit several maps of the forward pass ({', '.join(f'{h}x{w}' for h, w in fitting)})"
    else:
        shapes = ", ".join(f"{h}x{w}" for h, w in sorted(sizes)[-4:]) or "none"
        explanation = (
            f"while no convolution or pooling of the forward pass has a map of {n} positions (maps seen: {shapes})"
        )
    if reason and grid is None:
        explanation += f" and {reason}"
    raise ValueError(
        f"Expected at {name!r} tokens of a known grid, received {received} {explanation}; declare them: "
        f"taps=[vitscope.Tap({name!r}, ..., n_prefix=..., grid=(rows, columns))]."
    )
