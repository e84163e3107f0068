"""Search for trainable parameters on which a network's outputs do not depend."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitscope.core.batches.batch_inputs import Inputs
from vitscope.core.checks.outside_tensors import outside_tensors
from vitscope.core.guard.pass_comparison import output_tensors
from vitscope.core.guard.substituted_call import substituted_call

#: parameters that take the place of masked patches in pretraining and are read only when a mask is given
MASK_TOKENS = frozenset({"mask_token", "mask_tokens"})


def parameter_owners(model: nn.Module) -> dict[str, nn.Module]:
    """Return the module that holds each parameter, by all of its names."""
    return {
        f"{path}.{key}".strip("."): module
        for path, module in model.named_modules()
        for key, _ in module.named_parameters(recurse=False, remove_duplicate=False)
    }


class ParameterUse(NamedTuple):
    """Trainable parameters without an effect on the outputs, and trainable tensors with one that are no parameters.

    Attributes:
        cut_off: Names of parameters that may be cut off.
        unused: Names of unused parameters.
        outside: Shapes of tensors that require gradients, such as those of layers in a Python list.
    """

    cut_off: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()


def ineffective_parameters(model: nn.Module, x: Inputs, values: bool) -> ParameterUse:
    """Return the trainable parameters without an effect on the outputs.

    The pass is given copies of the parameters. A table that was made before, or that is made where autograd does not see it,
    is no function of these copies: a parameter of a module that runs counts as cut off. It is unused if its module does not run,
    if the module's own output is computed from it while the network's outputs keep their values when it moves (a norm or pooler
    whose result is not returned or not selected), or if it is a mask token.

    Args:
        model: The model inside a guard, in eval mode.
        x: Images (B, C, H, W).
        values: Whether a parameter counts as effective too where only the outputs' values depend on it (as in a table that is
            made from it by ``detach()`` in every pass), each of those is then moved and the model evaluated.
    """
    moved = {name: p for name, p in model.named_parameters() if p.requires_grad}
    copies = {name: p.detach().clone().requires_grad_() for name, p in moved.items()}
    # the nodes of autograd's graph at which each module's outputs were computed
    running: dict[nn.Module, list[Any]] = {}
    with ExitStack() as stack, torch.enable_grad():
        for module in model.modules():
            has_parameters = next(module.parameters(recurse=False), None) is not None
            if has_parameters and not isinstance(module, torch.jit.ScriptModule):
                stack.callback(module.register_forward_hook(lambda m, _, out: _note_outputs(running, m, out)).remove)
        outputs = output_tensors(substituted_call(model, copies, x))
        ends = [t.sum() for t in outputs if t.requires_grad]
    if not ends and not values:
        # no parameter stands out: a measure that needs gradients refuses the outputs themselves
        return ParameterUse()
    outside = outside_tensors(ends, [*copies.values(), *model.parameters()])
    gradients = torch.autograd.grad(ends, list(copies.values()), allow_unused=True) if ends else [None] * len(copies)
    ineffective = [name for name, gradient in zip(copies, gradients) if gradient is None]
    if values:
        ineffective = [name for name in ineffective if not _is_effective(model, moved[name], x)]
    owners = parameter_owners(model)

    def is_cut_off(name: str) -> bool:
        owner = owners[name]
        if owner not in running or name.rpartition(".")[2] in MASK_TOKENS:
            return False
        if not _depends(running[owner], copies[name]):
            return True
        # nobody reads the output that the module computes from it, unless the network's outputs move with its values
        return not values and _is_effective(model, moved[name], x)

    cut_off = tuple(name for name in ineffective if is_cut_off(name))
    shapes = tuple(str(tuple(t.shape)) for t in outside)
    return ParameterUse(cut_off, tuple(name for name in ineffective if name not in cut_off), shapes)


def _note_outputs(running: dict[nn.Module, list[Any]], module: nn.Module, output: Any) -> None:
    """Take note of the graph nodes of a module's outputs; the tensors themselves are not held."""
    running.setdefault(module, []).extend(t.grad_fn for t in output_tensors(output) if t.grad_fn is not None)


def _depends(nodes: Collection[Any], leaf: Tensor) -> bool:
    """Return whether any of the nodes of autograd's graph was computed from ``leaf``."""
    waiting, visited = list(nodes), set(nodes)
    while waiting:
        node = waiting.pop()
        if getattr(node, "variable", None) is leaf:
            return True
        parents = {parent for parent, _ in node.next_functions if parent is not None} - visited
        visited |= parents
        waiting.extend(parents)
    return False


@torch.no_grad()
def _is_effective(model: nn.Module, p: Tensor, x: Inputs) -> bool:
    """Return whether the outputs for ``x (B, C, H, W)`` change with the values of ``p``, which is given back as it was."""
    before, original_value = [t.clone() for t in output_tensors(model(x))], p.detach().clone()
    noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(0)).to(p)
    try:
        p.add_(noise, alpha=float(original_value.double().square().mean().sqrt()) or 1.0)
        after = output_tensors(model(x))
    finally:
        p.copy_(original_value)
    return len(before) != len(after) or not all(torch.equal(a, b) for a, b in zip(before, after))
