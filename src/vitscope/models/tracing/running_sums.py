"""Read or change what is added, and read sums that no module returns, by their number among the additions of a module's call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitscope.models.structure.execution import function_name, tensors
from vitscope.models.structure.residual_structure import Read
from vitscope.models.tracing.additions import ADDITIONS
from vitscope.runtime.errors import StructureError

#: a module, the number of its call in a pass, the number of its calls in a pass, that of the addition in the call, and that
#: of the operand, None for the sum
SumPlace = tuple[nn.Module, int, int, int, int | None]
#: function of a sum or operand; it may return the tensor that takes the place of an operand
SumFunction = Callable[[Tensor], Tensor | None]
_IN_PLACE = ("__iadd__", "add_")


def sum_place(read: Read) -> SumPlace:
    """Return the key of a sum or of its operand."""
    return (read.module, read.call, read.n_calls, read.number, read.operand)


class SumReader(TorchFunctionMode):
    """Call functions with sums as they are computed, and with their operands before.

    Args:
        places: The function of each sum or operand by its place.
    """

    def __init__(self, places: Mapping[SumPlace, SumFunction]) -> None:
        super().__init__()
        self.readers: dict[tuple[nn.Module, int, int], list[tuple[int | None, SumFunction]]] = {}
        for (module, call, _, number, operand), fn in places.items():
            self.readers.setdefault((module, call, number), []).append((operand, fn))
        self.calls_of_pass = {module: n_calls for module, _, n_calls, *_ in places}
        self.counts: dict[nn.Module, int] = {}
        self.running: list[list[Any]] = []  # module, number of its call, additions so far
        self.is_paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count no additions inside: what reads a tensor in a hook of the model may compute sums that are not the model's."""
        was_paused, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = was_paused

    def following(self, model: nn.Module) -> ExitStack:
        """Follow which modules run while the returned context is open."""
        stack = ExitStack()
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(self._begin).remove)
            stack.callback(module.register_forward_hook(self._end, always_call=True).remove)
        return stack

    def _begin(self, module: nn.Module, args: Any) -> None:
        number = self.counts.get(module, 0)
        self.counts[module] = number + 1
        self.running.append([module, number % self.calls_of_pass.get(module, 1), 0])

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.running:  # an error in a hook of the module may have come before the module counted as running
            self.running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if not self.running or self.is_paused or function_name(func) not in ADDITIONS:
            return func(*args, **options)
        module, call, number = self.running[-1]
        readers = self.readers.get((module, call, number), [])
        for operand, fn in readers:
            if operand is not None:
                args, options = _with_operand(module, operand, fn, func, args, options)
        result = func(*args, **options)
        if isinstance(result, Tensor):
            self.running[-1][2] += 1
            for operand, fn in readers:
                if operand is None:
                    fn(result)
        return result


def _with_operand(
    module: nn.Module, operand: int, fn: SumFunction, func: Any, args: Any, options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Call a function with one of the two tensors of an addition; return the arguments with what it gives instead.

    Raises:
        StructureError: The addition is not one of two tensors of one shape, as in the pass that has shown it.
    """
    values = list(tensors((args, options)))
    if len(values) != 2 or values[0].shape != values[1].shape:
        shapes = ", ".join(str(tuple(value.shape)) for value in values)
        raise StructureError(
            type(module).__name__,
            f"its forward adds other tensors, of shapes {shapes}, than in the pass that has shown its residual additions",
            "measure in eval mode with images of the same size, or pass units=[...] by hand",
        )
    value = values[operand]
    replacement = fn(value)
    if replacement is None:
        return args, options
    if operand == 0 and function_name(func) in _IN_PLACE:  # the sum overwrites this operand
        value.copy_(replacement)
        return args, options
    changed = [replacement if argument is value else argument for argument in args]
    return changed, {key: replacement if argument is value else argument for key, argument in options.items()}
