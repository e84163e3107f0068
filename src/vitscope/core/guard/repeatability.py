"""Repeatability of a network: whether two passes over the same images give the same outputs, loss and gradient.

Derivatives, Lanczos iterations and surfaces need a loss that is a function of the weights. A network that draws random
numbers in eval mode (functional dropout, noise), or whose answer depends on earlier passes, has none.
"""

from __future__ import annotations

import dataclasses
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from vitscope.core.guard.fingerprints import Fingerprint, dense_parts, fingerprint
from vitscope.core.guard.module_state import pure_forward
from vitscope.core.objective import Objective


@dataclasses.dataclass(frozen=True)
class Repeatability:
    """What two passes over the same images showed.

    Attributes:
        random: modules whose outputs differ between the passes, innermost ones; empty where both passes agree.
        difference: the largest relative difference of an output, the loss or the gradient.
        bound: what another order of summation may make of it.
        written: parameters that a pass writes to.
        unread: trainable parameters of modules that run, on which the outputs do not depend.
        unused: trainable parameters of modules that do not run in eval mode.
        drew: whether these passes drew random numbers, seen in their outputs or not.
    """

    random: tuple[str, ...] = ()
    difference: float = 0.0
    bound: float = 0.0
    written: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    drew: bool = False

    def refuse(self) -> None:
        """Raise ValueError where the loss is no function of the weights, or the weights are not the model's own to move."""
        if self.random:
            raise ValueError(
                f"Expected a network that repeats itself, received one whose outputs or gradient change by "
                f"{self.difference:.2g} of their size between two passes over the same images in eval mode (rounding explains "
                f"{self.bound:.2g}), first in {', '.join(self.random)}: make its randomness follow module.training, or fix "
                "its seed in forward."
            )
        if self.written:
            raise ValueError(
                f"Expected weights that a forward pass only reads, received {self.written[0]!r} that it writes to: compute "
                "the changed weight in forward (torch.nn.utils.parametrize) and leave the parameter alone."
            )
        if self.unread:
            raise ValueError(
                f"Expected outputs that depend on every trainable parameter of the modules that run, received "
                f"{self.unread[0]!r} without an effect: its values or derivatives are cut off by a table that was made from it "
                "before, detach(), no_grad() or NumPy; make the table in forward, or call requires_grad_(False) on a parameter "
                "that is not used."
            )
        if self.unused:
            more = f" and {len(self.unused) - 3} more" if len(self.unused) > 3 else ""
            warnings.warn(
                f"the outputs do not depend on {', '.join(self.unused[:3])}{more}, whose modules do not run in eval mode: "
                "they count as weights without curvature (call requires_grad_(False) to leave them out)",
                UnusedParametersWarning,
                stacklevel=4,
            )

    def warn(self) -> None:
        """Warn of outputs that change between passes: each number is then one draw."""
        if self.random:
            warnings.warn(
                f"the outputs change by {self.difference:.2g} of their size between two passes over the same images in eval "
                f"mode, first in {', '.join(self.random)}: what follows is one draw of them",
                RandomOutputsWarning,
                stacklevel=4,
            )


def worst_of(checks: Sequence[Repeatability]) -> Repeatability:
    """Return the first that saw randomness, else the first that saw weights being written, else the first."""
    return max(checks, key=lambda one: (bool(one.random), bool(one.written)))


class RandomOutputsWarning(UserWarning):
    """The network is random in eval mode; the text names the modules."""


def warn_of_draws(names: Sequence[str]) -> None:
    """Warn of a pass that drew random numbers although those over the first batch did not."""
    warnings.warn(
        f"a later pass in eval mode drew random numbers, which those over the first batch did not, in {', '.join(names)}: what "
        "follows is one draw of its outputs",
        RandomOutputsWarning,
        stacklevel=4,
    )


class UnusedParametersWarning(UserWarning):
    """Trainable parameters that the forward pass in eval mode does not use; the text names them."""


def examine(
    model: nn.Module, x: Tensor, y: Tensor, objective: Objective | None, moves_weights: bool = False
) -> Repeatability:
    """Evaluate the model twice on one batch and compare outputs, and loss and gradient where an objective is given.

    Two evaluations where both agree; two more, to find the modules, where they do not. With an objective or
    ``moves_weights`` two images more, to find out which parameters the outputs depend on.

    Args:
        model: inside a guard, in eval mode.
        x: images (B, C, H, W).
        y: their targets.
        objective: whose data term is differentiated; None compares outputs alone.
        moves_weights: whether the model will be evaluated at other weights.
    """
    weights = _identities(model)
    states = RandomStates(x.device, model)
    unread, unused = (), ()
    with pure_forward(model):
        if objective is not None or moves_weights:
            try:
                unread, unused = ineffective_parameters(model, x[:2], values=objective is None)
            except Exception:
                model(x)  # where the whole batch fails too, its error names the shape that the user knows
                raise
        if unread:
            return Repeatability(unread=unread)
        first, second = (_evaluated(model, x, y, objective) for _ in range(2))
        drew = states.moved()
        difference, bound = compare_passes(model, first, second, drew, x)
        written = tuple(name for name, identity in _identities(model).items() if weights.get(name) != identity)
        names = random_modules(model, x) if difference > bound else ()
    return Repeatability(names, difference, bound, written, unread, unused, drew)


def ineffective_parameters(model: nn.Module, x: Tensor, values: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of trainable parameters without an effect on the outputs: of modules that run, and of those that do not.

    The pass is given copies of the parameters. A table that was made before, or that is made where autograd does not see it,
    is no function of these copies.

    Args:
        model: inside a guard, in eval mode.
        x: images (B, C, H, W).
        values: whether a parameter counts as effective too where only the outputs' values depend on it (as in a table that is
            made from it by ``detach()`` in every pass), each of those is then moved and the model evaluated.
    """
    moved = {name: p for name, p in model.named_parameters() if p.requires_grad}
    copies = {name: p.detach().clone().requires_grad_() for name, p in moved.items()}
    running: set[nn.Module] = set()
    with ExitStack() as stack, torch.enable_grad():
        for module in model.modules():
            has_parameters = next(module.parameters(recurse=False), None) is not None
            if has_parameters and not isinstance(module, torch.jit.ScriptModule):
                stack.callback(module.register_forward_hook(lambda m, *_: running.add(m)).remove)
        outputs = output_tensors(functional_call(model, dict(copies), (x,)))
        ends = [t.sum() for t in outputs if t.requires_grad]
    if (
        not ends and not values
    ):  # no parameter stands out: a measure that needs gradients refuses the outputs themselves
        return (), ()
    gradients = torch.autograd.grad(ends, list(copies.values()), allow_unused=True) if ends else [None] * len(copies)
    without = [name for name, gradient in zip(copies, gradients) if gradient is None]
    if values:
        without = [name for name in without if not _is_effective(model, moved[name], x)]
    owners = {
        f"{path}.{key}".strip("."): m
        for path, m in model.named_modules()
        for key, _ in m.named_parameters(recurse=False, remove_duplicate=False)
    }
    unread = tuple(name for name in without if owners[name] in running)
    return unread, tuple(name for name in without if name not in unread)


@torch.no_grad()
def _is_effective(model: nn.Module, p: Tensor, x: Tensor) -> bool:
    """Return whether the outputs for ``x (B, C, H, W)`` change with the values of ``p``, which is given back as it was."""
    before, original_value = [t.clone() for t in output_tensors(model(x))], p.detach().clone()
    noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(0)).to(p)
    try:
        p.add_(noise, alpha=float(original_value.double().square().mean().sqrt()) or 1.0)
        after = output_tensors(model(x))
    finally:
        p.copy_(original_value)
    return len(before) != len(after) or not all(torch.equal(a, b) for a, b in zip(before, after))


def _evaluated(model: nn.Module, x: Tensor, y: Tensor, objective: Objective | None) -> list[Tensor]:
    outputs = model(x)
    evaluated_outputs = [t.detach().clone() for t in output_tensors(outputs)]
    if objective is None:
        return evaluated_outputs
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = objective.data_loss(outputs, y)
    if not loss.requires_grad or not parameters:
        return [*evaluated_outputs, loss.detach()]
    gradient = torch.autograd.grad(loss, parameters, materialize_grads=True)
    # one vector: a parameter whose gradient is zero but for rounding has no relative difference of its own
    return [*evaluated_outputs, loss.detach(), torch.cat([g.reshape(-1) for g in gradient])]


def _identities(model: nn.Module) -> dict[str, tuple[int, Fingerprint | None]]:
    """Return where each parameter's values lie and their fingerprint."""
    return {
        name: (p.data_ptr() if p.layout == torch.strided else 0, _fingerprint(p))
        for name, p in model.named_parameters()
    }


def _fingerprint(tensor: Tensor) -> Fingerprint | None:
    try:
        return None if tensor.is_meta else fingerprint(tensor)
    except ValueError:  # an opaque layout
        return None


def compare_passes(
    model: nn.Module, first: Sequence[Tensor], second: Sequence[Tensor], drew: bool, x: Tensor
) -> tuple[float, float]:
    """Return the largest relative difference between two lists of tensors, and what rounding explains of it.

    Two runs of one program differ by rounding only where sums are made in another order (atomic additions, alignment of
    memory). A sum of n terms then changes by about sqrt(n) * eps of its size, in each of L layers and forwards as well as
    backwards: ``2 * L * sqrt(n) * eps``, with n the largest number of terms that a layer or a weight's gradient sums. Where
    the passes drew random numbers, nothing is put down to rounding.

    Args:
        model: gives L and the layers' numbers of inputs.
        first: tensors of one pass.
        second: of the other.
        drew: whether random numbers were drawn.
        x: the images (B, C, H, W).
    """
    worst = max((_relative(a, b) for a, b in zip(first, second)), default=0.0)
    if len(first) != len(second) or any(a.shape != b.shape for a, b in zip(first, second)):
        worst = float("inf")
    if drew or not first:
        return worst, 0.0
    weights = [p for p in model.parameters() if p.ndim > 1]
    terms = max([x[:, 0].numel() if x.ndim > 1 else x.numel(), *(p[0].numel() for p in weights)])
    eps = max((torch.finfo(t.dtype).eps for t in first if t.is_floating_point()), default=0.0)
    return worst, 2 * max(1, len(weights)) * terms**0.5 * eps


def _relative(a: Tensor, b: Tensor) -> float:
    """Return the norm of the difference over the larger norm; 0 for equal bits, NaN counting as equal to NaN."""
    if a.shape != b.shape:
        return float("inf")
    if a.layout != torch.strided:
        parts = zip(dense_parts(a), dense_parts(b))
        return max(_relative(x, y) for x, y in parts)
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0
    a, b = a.double(), b.double()
    size = max(float(a.norm()), float(b.norm()))
    distance = float((a - b).norm())
    return distance / size if np.isfinite(size) and size > 0 else float("inf")


def output_tensors(value: Any) -> list[Tensor]:
    """Return the tensors in a network's output: a tensor, or tuples, lists, mappings and dataclasses of them."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for entry in value.values() for t in output_tensors(entry)]
    if isinstance(value, tuple | list):
        return [t for entry in value for t in output_tensors(entry)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [t for f in dataclasses.fields(value) for t in output_tensors(getattr(value, f.name))]
    return []


class RandomStates:
    """The random states at one moment: of Python, NumPy and torch, and of generators on plain attributes of modules.

    Args:
        device: whose state is read, besides the CPU's.
        model: whose modules' attributes are looked at; None for the global states alone.
    """

    def __init__(self, device: torch.device, model: nn.Module | None = None) -> None:
        self._device = device
        modules = model.modules() if model is not None else ()
        self._generators = [
            value for module in modules for value in vars(module).values() if isinstance(value, _GENERATORS)
        ]
        self._states = self._read()

    def moved(self) -> bool:
        """Return whether numbers were drawn since the last reading, this one or the first."""
        before, self._states = self._states, self._read()
        return any(not _equal(a, b) for a, b in zip(before, self._states))

    def read(self) -> None:
        """Read the states again, for the next call of `moved`."""
        self._states = self._read()

    def _read(self) -> list[Any]:
        torch_states = [torch.random.get_rng_state()]
        if self._device.type == "cuda":
            torch_states.append(torch.cuda.get_rng_state(self._device))
        generator_states = [_generator_state(generator) for generator in self._generators]
        # the global state of NumPy is looked at
        return [random.getstate(), np.random.get_state(), *torch_states, *generator_states]  # noqa: NPY002


_GENERATORS = (torch.Generator, np.random.Generator, random.Random)


def _generator_state(generator: torch.Generator | np.random.Generator | random.Random) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return str(generator.bit_generator.state)  # nested dictionaries of numbers and arrays
    return generator.getstate()


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    if isinstance(a, tuple) and any(isinstance(x, np.ndarray) for x in a):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b))
    return bool(a == b)


@torch.no_grad()
def random_modules(model: nn.Module, x: Tensor) -> tuple[str, ...]:
    """Return the innermost modules that give other outputs for the same inputs in two passes over ``x (B, C, H, W)``.

    A module is named by its path and class; the model itself where no single module shows it.
    """
    first, second = (list(_calls(model, x)) for _ in range(2))
    random_names: dict[str, None] = {}
    for (name, before, after), (other, before_, after_) in zip(first, second):
        if name != other:
            break  # the passes took different ways; what came before counts
        # children end before their parents: a parent of a module that was found is not another cause
        if before == before_ and after != after_ and not any(_inside(child, name) for child in random_names):
            random_names[name] = None
    modules = dict(model.named_modules())
    names = [f"{name or 'model'} ({type(modules[name]).__name__})" for name in random_names]
    return tuple(names) or (f"model ({type(model).__name__})",)


def _inside(child: str, parent: str) -> bool:
    return parent == "" or child.startswith(f"{parent}.")


def _calls(model: nn.Module, x: Tensor) -> Iterator[tuple[str, list[Fingerprint], list[Fingerprint]]]:
    """Yield each module call of one pass, in the order in which calls end: name, fingerprints of inputs and of outputs."""
    calls: list[tuple[str, list[Fingerprint], list[Fingerprint]]] = []
    waiting: list[list[Fingerprint]] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        waiting.append([fingerprint(t) for t in output_tensors((args, kwargs))])

    def after(name: str, output: Any) -> None:
        calls.append((name, waiting.pop(), [fingerprint(t) for t in output_tensors(output)]))

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # takes no hooks
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(lambda _, __, output, name=name: after(name, output)).remove)
        model(x)
    return iter(calls)
