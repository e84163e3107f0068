"""Hooks that change what modules return and what additions add, for the time in which units are removed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from vitscope.models.structure.residual_structure import Read
from vitscope.models.structure.taps import counted_calls
from vitscope.models.tracing.running_sums import SumReader, sum_place


def changed_output(stack: ExitStack, place: Read, change: Callable[[Any, Any], Any]) -> list[bool]:
    """Let a module return ``change(args, output)`` while the stack is open; the list grows with each changed call.

    A module that writes its result over its input, as ``nn.SiLU(inplace=True)``, may be called for this alone: the tensor that it
    wrote to gets the changed values too.
    """
    ran: list[bool] = []
    versions: list[int | None] = []
    is_read = counted_calls(place)

    def before(_: nn.Module, args: Any) -> None:
        versions.append(_version(args[0]) if args else None)

    def hook(_: nn.Module, args: Any, output: Any) -> Any:
        version = versions.pop()
        if not is_read():
            return None
        ran.append(True)
        changed = change(args, output)
        if args and output is args[0] and _version(output) != version:
            output.copy_(changed)
        return changed

    stack.callback(place.module.register_forward_pre_hook(before).remove)
    stack.callback(place.module.register_forward_hook(hook).remove)
    return ran


def changed_operand(stack: ExitStack, place: Read) -> list[bool]:
    """Let an addition get zeros for an operand while the stack is open; the list grows with each changed addition."""
    ran: list[bool] = []

    def zeros(value: Tensor) -> Tensor:
        ran.append(True)
        return value.new_zeros(value.shape)

    reader = SumReader({sum_place(place): zeros})
    stack.enter_context(reader.following(place.module))
    stack.enter_context(reader)
    return ran


def zeros_of(_: Any, output: Any) -> Any:
    """Return the output with zeros for its first tensor, which is what a branch adds (attention may return weights too)."""
    if isinstance(output, tuple | list) and output:
        entries = [zeros_of(None, output[0]), *output[1:]]
        return type(output)(*entries) if hasattr(output, "_fields") else type(output)(entries)  # a named tuple
    if not isinstance(output, Tensor):
        raise ValueError(f"Expected a branch that returns a tensor, received {type(output).__name__}.")
    return output.new_zeros(output.shape)


def check_ran(calls: Mapping[str, Sequence[bool]]) -> None:
    """Raise ValueError where a unit's list is empty, so that nothing of it was changed."""
    for name, ran in calls.items():
        if not ran:
            raise ValueError(
                f"Expected the branch of unit {name!r} to run in the forward pass, received a model that does not call its "
                "modules: pass units=[...] without it."
            )


def _version(value: Any) -> int | None:
    """Return the number of times that a tensor was written to; None where that is not counted."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else None
