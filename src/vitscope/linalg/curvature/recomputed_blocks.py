"""Blocks of a model that keep their inputs alone for second derivatives, and are computed again where derivatives are taken.

Activation checkpoints of PyTorch drop the activations of the forward pass, but the graph of the gradient keeps them again, so
that a product with the Hessian would save little. Here a block is one function of its inputs and parameters: its first derivative
computes the block again and keeps no graph, and its second derivative computes the block and its gradient again. Of all blocks
the graph holds the inputs and the output's gradient, and one block at a time has its graph. A product then costs about one
gradient more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vitscope.core.guard.fingerprints import version
from vitscope.core.guard.substituted_call import call_with
from vitscope.linalg.curvature.double_backward import BilinearConvDoubleBackward
from vitscope.linalg.curvature.row_slices import RowSlice
from vitscope.models.structure.execution import tensors as tensors_in
from vitscope.models.structure.structure_table import structure

Call = Callable[[Sequence[Tensor]], Tensor]


def block_modules(model: nn.Module, images: Any = None) -> dict[str, nn.Module]:
    """Return the modules that hold the units of a model's structure, by name: for each unit the smallest that has its parameters.

    Args:
        model: The model.
        images: Images with which to see where a model of unknown blocks adds, see `vitscope.structure`.

    Raises:
        ValueError: No unit is inside a module of its own.
    """
    names: set[str] = set()
    for unit in structure(model, images).units:
        paths = [name.split(".")[:-1] for name in unit.parameters]
        common = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths))
        names.add(".".join(parts[0] for parts in common))
    modules = {name: module for name, module in model.named_modules() if name in names and name}
    outermost = {n: m for n, m in modules.items() if not any(n.startswith(f"{other}.") for other in modules)}
    if not outermost:
        raise ValueError(
            "Expected a model with residual units for checkpoint_blocks, received one without any: set "
            "checkpoint_blocks=False, or a smaller micro_batch."
        )
    return outermost


@contextmanager
def recomputed_blocks(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Let blocks keep their inputs alone, for derivatives up to the second; their ``forward`` is restored.

    Args:
        modules: The modules by name; each returns one tensor, and does not call another of them.

    Raises:
        ValueError: Rows of a parameter are analyzed as a parameter of their own; inside, a block that changes its inputs, or
            whose output depends on other weights than its own and those before its arguments.
    """
    for name, module in modules.items():
        if any(isinstance(p, RowSlice) for p in module.parameters()):
            raise ValueError(
                f"Expected whole parameters with checkpoint_blocks, received parts of those of {name!r}: set "
                "checkpoint_blocks=False with parameters='part:...'."
            )
    originals = [(module, "forward" in vars(module), module.forward) for module in modules.values()]
    try:
        for name, module in modules.items():
            module.forward = _RecomputedForward(name, module)
        yield
    finally:
        for module, is_own, forward in originals:
            if is_own:
                module.forward = forward
            else:
                del module.forward


class _RecomputedForward:
    """A function that takes the place of a module's ``forward`` and keeps its inputs alone for derivatives.

    Args:
        name: The module's name, for errors.
        module: The module.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self._name, self._module, self._forward = name, module, module.forward
        self._is_inside = False
        self._is_checked = False

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._is_inside or not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        parameters = {key: p for key, p in self._module.named_parameters() if p.requires_grad}
        places = [i for i, value in enumerate(args) if isinstance(value, Tensor)]
        others = [value for i, value in enumerate(args) if i not in places]
        if any(t.requires_grad for t in tensors_in((others, tuple(kwargs.values())))):  # they would count as constants
            return self._forward(*args, **kwargs)

        def call(tensors: Sequence[Tensor]) -> Tensor:
            values = list(args)
            for place, tensor in zip(places, tensors[len(parameters) :]):
                values[place] = tensor
            with self._refusing_changes(tensors):
                out = self._substituted(dict(zip(parameters, tensors)), tuple(values), kwargs)
            if not self._is_checked and out.grad_fn is not None:
                _check_sources(self._name, out, tensors)
                self._is_checked = True
            return out

        return _Block.apply(call, *parameters.values(), *(args[place] for place in places))

    def _substituted(
        self, parameters: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Tensor:
        """Return the module's output with other tensors in the place of its parameters."""
        self._is_inside = True
        try:
            # derivatives on a GPU are taken by threads without the modes of this one
            with BilinearConvDoubleBackward():
                out = call_with(self._module, parameters, args, kwargs)
        finally:
            self._is_inside = False
        if not isinstance(out, Tensor):
            raise ValueError(
                f"Expected blocks that return one tensor with checkpoint_blocks, received {type(out).__name__} from "
                f"{self._name!r}: set checkpoint_blocks=False."
            )
        return out

    @contextmanager
    def _refusing_changes(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Refuse a block that changes its tensors: the next derivative would start from changed values."""
        versions = [version(tensor) for tensor in tensors]
        yield
        if versions != [version(tensor) for tensor in tensors]:
            raise ValueError(
                f"Expected blocks that leave their inputs as they are with checkpoint_blocks, received {self._name!r}, which "
                "changes one in place: set checkpoint_blocks=False."
            )


def _check_sources(name: str, out: Tensor, leaves: Sequence[Tensor]) -> None:
    """Raise ValueError where an output depends on other weights than ``leaves``: their derivatives would be lost."""
    leaf_ids = {id(leaf) for leaf in leaves}
    waiting, visited = [out.grad_fn], {out.grad_fn}
    while waiting:
        node = waiting.pop()
        assert node is not None
        variable = getattr(node, "variable", None)  # of a leaf
        if variable is not None and id(variable) not in leaf_ids:
            raise ValueError(
                f"Expected blocks that read their own parameters and arguments alone with checkpoint_blocks, received {name!r}, "
                f"which reads another weight of shape {tuple(variable.shape)}: set checkpoint_blocks=False."
            )
        parents = {parent for parent, _ in node.next_functions if parent is not None} - visited
        visited |= parents
        waiting.extend(parents)


def _leaves(tensors: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    return [t.detach().requires_grad_(is_needed) for t, is_needed in zip(tensors, needed)]


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.call = call
        return call(tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        needed = ctx.needs_input_grad[1:]
        return None, *_Backward.apply(ctx.call, needed, g, *ctx.saved_tensors)


class _Backward(torch.autograd.Function):
    """The first derivatives of a block; None for those that are not needed."""

    @staticmethod
    def forward(ctx: Any, call: Call, needed: Sequence[bool], g: Tensor, *tensors: Tensor) -> Any:
        ctx.save_for_backward(g, *tensors)
        ctx.call, ctx.needed = call, needed
        ctx.set_materialize_grads(False)
        with torch.enable_grad():
            leaves = _leaves(tensors, needed)
            out = call(leaves)
            gradients = torch.autograd.grad(out, [t for t in leaves if t.requires_grad], g, allow_unused=True)
        rest = iter(gradients)
        return tuple(next(rest) if is_needed else None for is_needed in needed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *vectors: Tensor | None) -> Any:
        g, *tensors = ctx.saved_tensors
        with torch.enable_grad():
            inputs = _leaves(tensors, ctx.needed)
            leaves = [t for t in inputs if t.requires_grad]
            g_leaf = g.detach().requires_grad_()
            out = ctx.call(inputs)
            first = torch.autograd.grad(out, leaves, g_leaf, create_graph=True, allow_unused=True)
            gradients, propagated = [], []
            needed_vectors = [vector for vector, is_needed in zip(vectors, ctx.needed) if is_needed]
            for gradient, vector in zip(first, needed_vectors):
                if gradient is not None and gradient.requires_grad and vector is not None:
                    gradients.append(gradient)
                    propagated.append(vector)
            second: Sequence[Tensor | None] = [None] * (1 + len(leaves))
            if gradients:
                second = torch.autograd.grad(gradients, [g_leaf, *leaves], propagated, allow_unused=True)
        rest = iter(second[1:])
        return None, None, second[0], *(next(rest) if is_needed else None for is_needed in ctx.needed)
