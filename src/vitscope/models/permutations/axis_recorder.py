"""Follow the axes of values through one forward pass: the labels of the axes of every tensor."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from vitscope.models.permutations.axis_rules import Axes, check_heads, fix_all, plain
from vitscope.models.permutations.channel_labels import Label
from vitscope.models.structure.execution import function_name, tensors
from vitscope.runtime.errors import StructureError

#: called with each observed tensor, the number of its axis of units and their label
Observer = Callable[[Tensor, int, Label], None]


class AxisRecorder(TorchFunctionMode):
    """Give the axes of all values labels; a subclass has the rules of single functions.

    Args:
        model: The model that runs.
        images: The network's input.
        observe: A function that is called with the input and the output of each linear layer and convolution, and with
            queries and keys.
    """

    def __init__(self, model: nn.Module, images: Tensor, observe: Observer | None = None) -> None:
        super().__init__()
        self.model, self.observe = model, observe
        self.names = {id(p): name for name, p in (*model.named_parameters(), *model.named_buffers())}
        self.saved_names = set(model.state_dict(keep_vars=True))
        self.axes_of_name: dict[str, tuple[Label | None, ...]] = {}
        self.axes_of: MutableMapping[Tensor, Axes] = WeakIdKeyDictionary({images: (None,) * images.ndim})
        self.running: list[str] = []

    def hooks(self) -> ExitStack:
        """Follow which modules run while the returned context is open."""
        stack = ExitStack()
        for name, module in self.model.named_modules():
            before = module.register_forward_pre_hook(lambda *_, name=name: self.running.append(name))
            after = module.register_forward_hook(lambda *_: self.running.pop() and None)
            stack.callback(before.remove)
            stack.callback(after.remove)
        return stack

    def finish(self, output: Any) -> None:
        """Leave the axes of the model's output in place."""
        for tensor in tensors(output):
            fix_all(self._axes(tensor), "the model's output")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op = function_name(func)
        if op == "multi_head_attention_forward":
            kwargs = {**kwargs, "need_weights": kwargs.get("need_weights", True)}
        result = func(*args, **kwargs)
        results = list(tensors(result))
        if results or op == "__setitem__":
            self._note(op, args, kwargs, results)
        return result

    def _note(self, op: str, args: Any, kwargs: Any, results: list[Tensor]) -> None:
        """Store the axes of the results of a call."""
        operands = list(tensors((args, tuple(kwargs.values()))))
        labeled = [t for t in operands if any(self._axes(t))]
        if not labeled:
            for t in results:
                self.axes_of[t] = (None,) * t.ndim
            return
        try:
            axes = self._result_axes(op, args, kwargs, operands, results)
        except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
            raise self._refusal(op) from error
        if axes is None:
            if any(not label.root.fixed for t in labeled for label in plain(self._axes(t)) if label is not None):
                raise self._refusal(op)
            axes = [(None,) * t.ndim for t in results]
        for t, tensor_axes in zip(results, axes):
            self.axes_of[t] = tensor_axes if len(tensor_axes) == t.ndim else self._lost(op, tensor_axes, t)
        for t in (*operands, *results):
            check_heads(self._axes(t), self._place(op))

    def _lost(self, op: str, axes: Axes, result: Tensor) -> Axes:
        """Leave the channels of operands in place where a result has another number of axes than the rule gives."""
        fix_all(axes, self._place(op))
        return (None,) * result.ndim

    def _refusal(self, op: str) -> StructureError:
        fix_text = "use alignment=none, or write that part with layers and functions that can be followed"
        return StructureError(
            type(self.model).__name__, f"its units cannot be followed through {self._place(op)}", fix_text
        )

    def _place(self, op: str) -> str:
        """Return the function and the module that runs, for reasons and errors."""
        return f"{op} in {self.running[-1] or 'the model itself'}" if self.running else op

    def _axes(self, tensor: Tensor) -> Axes:
        """Return the axes of a value, a parameter or a constant."""
        if id(tensor) in self.names:
            return self.named_axes(self.names[id(tensor)], tensor)
        if tensor in self.axes_of:
            return self.axes_of[tensor]
        if tensor.grad_fn is not None:
            raise self._refusal("a function of its own")
        return (None,) * tensor.ndim

    def named_axes(self, name: str, tensor: Tensor) -> tuple[Label | None, ...]:
        """Return the labels of the axes of a parameter or buffer."""
        if name not in self.axes_of_name:
            fixed = "" if name in self.saved_names else f"{name} is not in the state dict"
            origins = [f"{name}, axis {axis}" for axis in range(tensor.ndim)] if tensor.ndim > 1 else [name]
            self.axes_of_name[name] = tuple(
                Label(size, origin, fixed) if size > 1 else None for size, origin in zip(tensor.shape, origins)
            )
        return self.axes_of_name[name]

    @abstractmethod
    def _result_axes(
        self, op: str, args: Any, kwargs: Any, operands: list[Tensor], results: list[Tensor]
    ) -> Sequence[Axes] | None:
        """Return the axes of each result, or None for a function that is not known.

        Args:
            op: Name of the function.
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.
            operands: All tensors among the arguments, at least one of which has labels.
            results: All tensors that the function returned.
        """
