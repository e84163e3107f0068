"""Taps: where a model's feature maps are read, after every residual addition, and how to read them in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from vitscope.core.guard.eager_execution import unwrapped
from vitscope.core.tap import Kind, Tap
from vitscope.models.structure.coverage import warn_body_outside, warn_doubts, warn_missing_units
from vitscope.models.structure.feature_maps import observed_pass, outside_of_pass, prefix_tokens, to_map
from vitscope.models.structure.found_structure import FoundStructure, find_structure
from vitscope.models.structure.residual_structure import ModelComponent, Read
from vitscope.models.tracing.running_sums import SumFunction, SumPlace, SumReader
from vitscope.models.tracing.token_orders import with_orders


def taps(model: nn.Module, images: Tensor | None = None) -> list[Tap]:
    """The taps of a model from the stem to the last block, found by module type.

    One after the stem (with position embeddings), one after each residual addition (attention and MLP
    halves apart: in a pre-norm block the map after the attention is ``norm2``'s input, in a post-norm block
    what the next half adds to, the output of the norm behind the addition), one after each pooling layer
    between stages. The head is left out, as in the paper's figures.

    A warning names attention that the model has outside of its known units, after which no map is read.

    Args:
        model: The model.
        images: (B, C, H, W) that the model takes, of which the first shows where the model attends; None to try the sizes
            that the model states.

    Raises:
        ValueError: If the model has neither a known block nor a convolution; says how to pass taps.
    """
    model_structure = find_structure(unwrapped(model), images)
    warn_missing_units(model, [*model_structure.missing, *_without_tap(model_structure)])
    warn_doubts(model, model_structure.doubts)
    if model_structure.places is not None:
        warn_body_outside(unwrapped(model), {name: kind for name, (kind, _) in model_structure.places.items()})
    return _taps(unwrapped(model), model_structure, images)


def known_taps(model: nn.Module, images: Tensor | None = None) -> list[Tap]:
    """Return the taps as `taps` does, without a warning of attention outside of the known units."""
    return _taps(unwrapped(model), find_structure(unwrapped(model), images), images)


def missing_units(model: nn.Module, images: Tensor | None = None) -> list[tuple[str, str]]:
    """Return a text about each part of a model that no unit covers, and the class of the block around it if it is known.

    Arguments and errors are those of `taps`.
    """
    return find_structure(unwrapped(model), images).missing


def units_without_tap(model: nn.Module, images: Tensor | None = None) -> list[tuple[str, str]]:
    """Return a text about each unit after which no module returns or takes the map, in pairs as `missing_units` gives."""
    return _without_tap(find_structure(unwrapped(model), images))


def _without_tap(model_structure: FoundStructure) -> list[tuple[str, str]]:
    units = [piece for piece in model_structure.components if piece.part.is_residual and piece.part.after is None]
    return [(f"unit {piece.name}, whose sum is no module's input or output", "") for piece in units]


def _taps(model: nn.Module, model_structure: FoundStructure, images: Tensor | None) -> list[Tap]:
    pieces = [
        piece for piece in model_structure.components if piece.part.after is not None and piece.part.after.has_map
    ]
    places: list[tuple[str, Kind, int, Read, ModelComponent]] = []
    first = next((p for p in pieces if p.part.branch_in is not None), None)
    if first is not None and first.part.branch_in is not None:
        stream = replace(first.part.branch_in, module=first.block, at="input")
        # the pass has shown where the stream is, also before layers in front of the first unit
        if first.parameters is not None:
            stream = pieces[0].part.stream or first.part.stream or stream
        places.append(("stem", "stem", 0, stream, first))
    places.extend((p.name, p.part.kind, p.stage, p.part.after, p) for p in pieces if p.part.after is not None)
    last = max(len(places) - 1, 1)
    reads = with_orders(model, [read for *_, read, _ in places], images)
    return [
        Tap(
            name, kind, stage, i / last, read.module, read.at, read.layout,
            piece.n_prefix if read.n_prefix is None else read.n_prefix, call=read.call, n_calls=read.n_calls,
            subsamples=kind != "stem" and piece.part.subsamples, order=read.order, number=read.number,
        )
        for i, ((name, kind, stage, _, piece), read) in enumerate(zip(places, reads)) if read is not None
    ]  # fmt: skip


@contextmanager
def reading(
    model: nn.Module,
    taps: Sequence[Tap],
    fn: Callable[[int, Tap, Tensor], None],
    prefix_fn: Callable[[int, Tap, Tensor], None] | None = None,
) -> Iterator[None]:
    """Call ``fn(index, tap, feature_map)`` for each tap as its map (B, C, h, w) appears in a forward pass.

    Run ``model(images)`` inside; it runs uncompiled. Nothing is kept here; the map may be changed in place by the model once
    ``fn`` has returned, so ``fn`` reduces or copies it.

    Args:
        model: The model.
        taps: The network's taps.
        fn: Function of the maps.
        prefix_fn: Function of the class, distillation and register tokens ``(B, n_prefix, C)``, called before ``fn`` at the
            taps that have such tokens; None to drop them.

    Raises:
        ValueError: In the forward pass: a map that is no map, tokens whose grid is not certain, a tap that runs more than
            once, or a stem that runs after another tap.

    Example:
        ``with reading(model, taps(model), lambda i, tap, x: total[i].add_(x.mean())): model(images)``
    """
    with ExitStack() as stack:
        forward_pass = stack.enter_context(observed_pass(model))

        sums: dict[SumPlace, SumFunction] = {}
        reader: SumReader | None = None

        def read(index: int, tap: Tap, value: Tensor) -> None:
            with outside_of_pass(), nullcontext() if reader is None else reader.paused():
                read_map(index, tap, value)

        def read_map(index: int, tap: Tap, value: Tensor) -> None:
            if tap.kind == "stem" and forward_pass.order:
                raise ValueError(
                    f"Expected the stem {tap.name!r} to run first, received {forward_pass.order[0]!r} before it: "
                    "pass taps=[...] in the order of execution."
                )
            forward_pass.ran(tap.name)
            feature_map = to_map(value, tap.name, tap.layout, tap.n_prefix, tap.grid, forward_pass, tap.order)
            if prefix_fn is not None:
                prefix = prefix_tokens(value, tap.layout, tap.n_prefix, tap.order)
                if prefix is not None:
                    prefix_fn(index, tap, prefix)
            fn(index, tap, feature_map)

        for i, tap in enumerate(taps):

            def fn_of_tap(value: Tensor, i: int = i, tap: Tap = tap) -> None:
                read(i, tap, value)

            if tap.at == "sum":
                place = (tap.module, tap.call, tap.n_calls, tap.number, None)
                sums[place] = _in_turn(sums[place], fn_of_tap) if place in sums else fn_of_tap  # units side by side
            else:
                attach(stack, Read(tap.module, tap.at, tap.layout, tap.call, tap.n_calls), fn_of_tap)
        if sums:
            reader = SumReader(sums)
            stack.enter_context(reader.following(unwrapped(model)))
            stack.enter_context(reader)
        yield


def _in_turn(first: SumFunction, second: SumFunction) -> SumFunction:
    def both(value: Tensor) -> None:
        first(value)
        second(value)

    return both


def attach(stack: ExitStack, read: Read, fn: Callable[[Tensor], None]) -> None:
    """Call ``fn`` with the tensor that ``read`` names, at every forward pass while the stack is open."""

    def first(value: Any) -> Tensor:
        while isinstance(value, tuple | list) and value:
            value = value[0]
        if not isinstance(value, Tensor):
            raise ValueError(
                f"Expected a {type(read.module).__name__} whose {read.at} is a tensor, received {type(value).__name__}: pass "
                "taps=[...] (or units=[...]) at a module that gives one."
            )
        return value

    is_read = counted_calls(read)

    def on_input(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        if is_read():
            fn(first((*args, *options.values())))

    def on_output(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if is_read():
            fn(first(output))

    if read.at == "input":
        handle = read.module.register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        handle = read.module.register_forward_hook(on_output)
    stack.callback(handle.remove)


def counted_calls(read: Read) -> Callable[[], bool]:
    """Return a function, to be called at each call of the module, that tells whether it is the one to be read."""
    calls = 0

    def is_read() -> bool:
        nonlocal calls
        calls += 1
        return (calls - 1) % read.n_calls == read.call

    return is_read
