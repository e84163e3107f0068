"""Read sums that no module returns or takes, by their number among the additions of a module's call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitscope.models.tracing.additions import ADDITIONS
from vitscope.models.tracing.recorder import function_name

#: a module, the number of its call in a pass, the number of its calls in a pass, and that of the addition in the call
SumPlace = tuple[nn.Module, int, int, int]


class SumReader(TorchFunctionMode):
    """Call functions with sums as they are computed.

    Args:
        places: The function of each sum by its place.
    """

    def __init__(self, places: Mapping[SumPlace, Callable[[Tensor], None]]) -> None:
        super().__init__()
        self.readers = {(module, call, number): fn for (module, call, _, number), fn in places.items()}
        self.calls_of_pass = {module: n_calls for module, _, n_calls, _ in places}
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
        result = func(*args, **(kwargs or {}))
        if self.running and not self.is_paused and isinstance(result, Tensor) and function_name(func) in ADDITIONS:
            module, call, number = self.running[-1]
            self.running[-1][2] += 1
            reader = self.readers.get((module, call, number))
            if reader is not None:
                reader(result)
        return result
