"""Taps: where a model's feature maps are read, after every residual addition, and how to read them in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from math import log
from typing import Any, Literal

from torch import Tensor, nn

from vitscope.models import blocks as blocks  # describes timm's and torchvision's blocks
from vitscope.models.anatomy import Kind, Layout, Piece, Read, anatomy


@dataclass(frozen=True)
class Tap:
    """A place where a feature map is read.

    Attributes:
        name: Unique name, such as ``blocks.0.attn``.
        kind: What produced the map: ``stem conv msa mlp pool head``.
        stage: 0 for the stem, then from 1.
        depth: Normalised depth, index / (number of taps - 1), from 0 to 1.
        module: The module whose output or first input is the map.
        at: Which of the two.
        layout: Axes of that tensor: ``NCHW``, ``NHWC``, ``NLC`` (tokens) or ``NCL``.
        n_prefix: Class, distillation and register tokens in front of the grid, dropped from the map.
        grid: Rows and columns of the tokens, where the model states them; else they follow from the image.
        subsamples: Whether the unit made the map smaller (strided blocks, pooling, patch merging).
    """

    name: str
    kind: Kind
    stage: int
    depth: float
    module: nn.Module
    at: Literal["output", "input"] = "output"
    layout: Layout = "NCHW"
    n_prefix: int = 0
    grid: tuple[int, int] | None = None
    subsamples: bool = False


def taps(model: nn.Module) -> list[Tap]:
    """The taps of a model from the stem to the last block, found by module type.

    One after the stem (with position embeddings), one after each residual addition (attention and MLP
    halves apart: in a pre-norm block the map after the attention is ``norm2``'s input), one after each
    pooling layer between stages. The head is left out, as in the paper's figures.

    Raises:
        ValueError: If the model has neither a known block nor a convolution; says how to pass taps.
    """
    pieces = anatomy(model)
    places: list[tuple[str, Kind, int, Read, Piece]] = []
    first = next((p for p in pieces if p.part.branch_in is not None), None)
    if first is not None and first.part.branch_in is not None:
        stream = Read(first.block, "input", first.part.branch_in.layout)
        places.append(("stem", "stem", 0, stream, first))
    places.extend((p.name, p.part.kind, p.stage, p.part.after, p) for p in pieces)
    last = max(len(places) - 1, 1)
    return [
        Tap(
            name, kind, stage, i / last, read.module, read.at, read.layout, piece.n_prefix, piece.grid,
            subsamples=kind != "stem" and piece.part.subsamples,
        )
        for i, (name, kind, stage, read, piece) in enumerate(places)
    ]  # fmt: skip


@contextmanager
def reading(model: nn.Module, taps: Sequence[Tap], fn: Callable[[int, Tap, Tensor], None]) -> Iterator[None]:
    """Call ``fn(index, tap, feature_map)`` for each tap as its map (B, C, h, w) appears in a forward pass.

    Run ``model(images)`` inside. Nothing is kept here; the map may be changed in place by the model once
    ``fn`` has returned, so ``fn`` reduces or copies it. A map that is no map raises ValueError.

    Example:
        ``with reading(model, taps(model), lambda i, tap, x: total[i].add_(x.mean())): model(images)``
    """
    with ExitStack() as stack:
        size = image_size(model, stack)
        for i, tap in enumerate(taps):
            attach(
                stack, Read(tap.module, tap.at, tap.layout),
                lambda value, i=i, tap=tap: fn(
                    i, tap, one_an_image(to_map(value, tap.name, tap.layout, tap.n_prefix, tap.grid, size[:2]), tap.name, size)
                ),
            )  # fmt: skip
        yield


def image_size(model: nn.Module, stack: ExitStack) -> list[int]:
    """A list that holds height, width and number of the last images the model was called with, while the stack is open."""
    size: list[int] = []

    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        size[:] = (*args[0].shape[-2:], len(args[0])) if args and isinstance(args[0], Tensor) else []

    stack.callback(model.register_forward_pre_hook(note).remove)
    return size


def attach(stack: ExitStack, read: Read, fn: Callable[[Tensor], None]) -> None:
    """Call ``fn`` with the tensor that ``read`` names, at every forward pass while the stack is open."""

    def first(value: Any) -> Tensor:
        while isinstance(value, tuple | list):
            value = value[0]
        return value

    if read.at == "input":
        handle = read.module.register_forward_pre_hook(lambda module, args: fn(first(args)))
    else:
        handle = read.module.register_forward_hook(lambda module, args, output: fn(first(output)))
    stack.callback(handle.remove)


def to_map(
    value: Tensor, name: str, layout: Layout, n_prefix: int, grid: tuple[int, int] | None, image: Sequence[int]
) -> Tensor:
    """Bring a tensor of the given layout into (B, C, h, w), without prefix tokens."""
    wanted = 4 if layout in ("NCHW", "NHWC") else 3
    if value.ndim != wanted:
        raise ValueError(f"tap {name!r} reads a tensor of shape {tuple(value.shape)}, not a {layout} map.")
    if layout == "NCHW":
        return value
    if layout == "NHWC":
        return value.permute(0, 3, 1, 2)
    if layout == "NLC":
        value = value.transpose(1, 2)
    value = value[:, :, n_prefix:]  # (B, C, h * w)
    h, w = token_grid(value.shape[-1], grid, tuple(image))
    return value.reshape(*value.shape[:2], h, w)


def one_an_image(value: Tensor, name: str, images: Sequence[int]) -> Tensor:
    """Return the maps (B, C, h, w) if they are as many as the images, as `image_size` gives them; else ValueError.

    Blocks that cut images in windows or patches and stack these as a batch would otherwise count as more images.
    """
    if len(images) == 3 and len(value) != images[2]:
        raise ValueError(f"tap {name!r} reads {len(value)} maps of {images[2]} images; pass taps=[...] without it.")
    return value


@cache
def token_grid(n: int, grid: tuple[int, int] | None, image: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of n tokens: the stated grid if it has n, else the split closest to the image's shape."""
    if grid is not None and grid[0] * grid[1] == n:
        return grid
    height, width = image if len(image) == 2 else (1, 1)
    rows = [h for h in range(1, n + 1) if n % h == 0]
    best = min(rows, key=lambda h: abs(log(h * h / n) - log(height / width)))
    return best, n // best
