"""Repeatability of a network: whether two passes over the same images give the same outputs, loss and gradient.

Derivatives, Lanczos iterations and surfaces need a loss that is a function of the weights. A network that draws random
numbers in eval mode (functional dropout, noise), or whose answer depends on earlier passes, has none.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitscope.core.batches.batch_inputs import Inputs
from vitscope.core.checks.cut_gradients import CutValues, is_large_gap, slope_gap
from vitscope.core.checks.unlikely_input import UnlikelyInputWarning
from vitscope.core.guard.fingerprints import Fingerprint, fingerprint
from vitscope.core.guard.module_state import pure_forward
from vitscope.core.guard.parameter_use import ineffective_parameters
from vitscope.core.guard.pass_comparison import compare_passes, output_tensors, random_modules
from vitscope.core.guard.random_states import RandomStates
from vitscope.core.objective import Objective


@dataclasses.dataclass(frozen=True)
class Repeatability:
    """Comparison of two passes over the same images.

    Attributes:
        random: Modules whose outputs differ between the passes, innermost ones; empty where both passes agree.
        difference: The largest relative difference of an output, the loss or the gradient.
        bound: Largest difference that another order of summation explains.
        written: Parameters that a pass writes to.
        unread: Trainable parameters of modules that run, from which the outputs may be cut off.
        unused: Trainable parameters that the outputs in eval mode do not use.
        outside: Shapes of tensors that require gradients, count in the outputs, and are no parameters of the model.
        drew: Whether these passes drew random numbers, seen in their outputs or not.
        cut: Modules that use values without their derivatives, where the loss's slope shows it.
        gap: Difference between the slope of the loss along its gradient and the gradient's length, as a share.
    """

    random: tuple[str, ...] = ()
    difference: float = 0.0
    bound: float = 0.0
    written: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    drew: bool = False
    cut: tuple[str, ...] = ()
    gap: float = 0.0

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
            warnings.warn(
                f"the outputs in eval mode do not depend on {_first_names(self.unused)}: "
                "they count as weights without curvature (call requires_grad_(False) to leave them out)",
                UnusedParametersWarning,
                stacklevel=4,
            )
        if self.outside:
            warnings.warn(
                f"the outputs depend on tensors that require gradients and are no parameters of the model, of shapes "
                f"{_first_names(self.outside)}: no derivative is taken by them and they are never moved; keep layers in "
                "an nn.ModuleList and tensors in an nn.Parameter, or call requires_grad_(False) on them",
                UnlikelyInputWarning,
                stacklevel=4,
            )
        if self.cut:
            warnings.warn(
                f"the loss depends on the weights also through values that are cut off from autograd (detach(), no_grad) in "
                f"{_first_names(self.cut)}: its slope along the gradient differs by {self.gap:.1%} from the gradient's "
                "length, and gradients and curvature are those of autograd",
                CutGradientsWarning,
                stacklevel=4,
            )

    def warn(self) -> None:
        """Warn of outputs that change between passes: each number is then one draw."""
        if self.random:
            warnings.warn(
                f"the outputs change by {self.difference:.2g} of their size between two passes over the same images in eval "
                f"mode, first in {', '.join(self.random)}: the results hold for one random draw",
                RandomOutputsWarning,
                stacklevel=4,
            )


def _first_names(names: Sequence[str]) -> str:
    """Return the first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def worst_of(checks: Sequence[Repeatability]) -> Repeatability:
    """Return the first that saw randomness, else the first that saw weights being written, else the first."""
    return max(checks, key=lambda one: (bool(one.random), bool(one.written)))


class RandomOutputsWarning(UserWarning):
    """The network is random in eval mode; the text names the modules."""


def warn_of_draws(names: Sequence[str]) -> None:
    """Warn of a pass that drew random numbers although those over the first batch did not."""
    warnings.warn(
        f"a later pass in eval mode drew random numbers, which those over the first batch did not, in {', '.join(names)}: the "
        "results hold for one random draw",
        RandomOutputsWarning,
        stacklevel=4,
    )


class CutGradientsWarning(UserWarning):
    """The loss depends on the weights in ways that autograd does not see; the text names the modules."""


class UnusedParametersWarning(UserWarning):
    """Trainable parameters that the forward pass in eval mode does not use; the text names them."""


def examine(
    model: nn.Module, x: Inputs, y: Tensor, objective: Objective | None, moves_weights: bool = False
) -> Repeatability:
    """Evaluate the model twice on one batch and compare outputs, and loss and gradient where an objective is given.

    Two evaluations where both agree; two more, to find the modules, where they do not. With an objective or
    ``moves_weights`` two images more, to find out which parameters the outputs depend on.

    Args:
        model: The model inside a guard, in eval mode.
        x: Images (B, C, H, W), or the batch of a network that takes more.
        y: Targets of the images.
        objective: The objective whose data term is differentiated; None compares outputs alone.
        moves_weights: Whether the model will be evaluated at other weights.
    """
    weights = _identities(model)
    states = RandomStates(x.device, model)
    unread, unused, outside = (), (), ()
    with pure_forward(model):
        if objective is not None or moves_weights:
            try:
                unread, unused, outside = ineffective_parameters(model, x[:2], values=objective is None)
            except Exception:
                model(x)  # where the whole batch fails too, its error names the shape that the user knows
                raise
        if unread:
            return Repeatability(unread=unread)
        with CutValues(model) as cut:
            first = _evaluated(model, x, y, objective)
        second = _evaluated(model, x, y, objective)
        drew = states.moved()
        difference, bound = compare_passes(model, first, second, drew, x)
        written = tuple(name for name, identity in _identities(model).items() if weights.get(name) != identity)
        names = random_modules(model, x) if difference > bound else ()
        has_gradient = len(first) > 1 and first[-1].ndim == 1
        gap = 0.0
        if objective is not None and has_gradient and cut.names and not names and not written:
            gap = slope_gap(model, x, y, objective, first[-1])
    cut_modules = tuple(cut.names) if is_large_gap(gap) else ()
    return Repeatability(names, difference, bound, written, unread, unused, outside, drew, cut_modules, gap)


def _evaluated(model: nn.Module, x: Inputs, y: Tensor, objective: Objective | None) -> list[Tensor]:
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
