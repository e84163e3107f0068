"""Check of second derivatives through a ``torch.autograd.Function`` of the network's own."""

from __future__ import annotations

import logging
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vitscope.core.batches.batch_inputs import Inputs
from vitscope.core.guard.substituted_call import substituted_call
from vitscope.core.sharding.sharded_parameters import LocalShard
from vitscope.linalg.differences.kinks import kinked_functions
from vitscope.linalg.differences.second_derivative_errors import not_twice_differentiable
from vitscope.runtime.torch_internals import foreign_functions

_logger = logging.getLogger(__name__)

#: steps of the differences as shares of the length of the weights; rounding leaves shorter ones to float64
_STEPS = {torch.float64: (1e-3, 1e-5), torch.float32: (1e-2, 1e-3)}
#: largest relative difference between a product and differences of gradients that finite steps explain
_LARGEST_GAP = 0.02
#: classes that need no further check
_checked_functions: MutableMapping[type, bool] = WeakKeyDictionary()
#: classes that cannot be checked, by network; in another network they are checked
_unchecked_functions: MutableMapping[nn.Module, set[type]] = WeakKeyDictionary()

Product = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def refuse_wrong_functions(
    model: nn.Module,
    parameters: dict[str, Tensor],
    x: Inputs,
    loss: Tensor,
    loss_of: Callable[[Any], Tensor],
    product: Product,
) -> None:
    """Compare a product with differences of gradients where the graph holds functions of the network's own, once for each class.

    A backward pass that takes what it has saved for constants has right first derivatives and wrong second ones, without an
    error of autograd. In float32 a network with kinks is not compared: its gradients jump. Weights in shards over ranks are
    not compared either: passes at other weights are a matter of all ranks.

    Args:
        model: The network, inside a guard.
        parameters: The parameters by name.
        x: The model's inputs.
        loss: The loss at the parameters, with its graph.
        loss_of: The loss of the network's outputs.
        product: Product with the loss's Hessian.

    Raises:
        NotTwiceDifferentiableError: They differ.
    """
    unchecked = foreign_functions(loss) - set(_checked_functions) - _unchecked_functions.get(model, set())
    if not unchecked:
        return
    names = ", ".join(sorted(f"{c.__module__}.{c.__qualname__}" for c in unchecked))
    if reason := _hindrance(model, parameters, x, loss):
        _logger.warning("second derivatives through %s are not checked: %s", names, reason)
        _unchecked_functions.setdefault(model, set()).update(unchecked)
        return
    gap = _gap(model, parameters, x, loss_of, product)
    if gap > _LARGEST_GAP:
        raise not_twice_differentiable(
            f"second derivatives through {names} differ by {gap:.0%} from differences of gradients, as of a backward pass "
            "that takes saved values for constants"
        )
    _checked_functions.update(dict.fromkeys(unchecked, True))


def _hindrance(model: nn.Module, parameters: dict[str, Tensor], x: Inputs, loss: Tensor) -> str:
    """Return why differences of gradients show nothing; an empty text where they do."""
    if any(isinstance(p, LocalShard) for p in parameters.values()):
        return "weights in shards over ranks"
    kinks = kinked_functions(model, x[:2]) if loss.dtype != torch.float64 else ()
    return f"the network has kinks ({kinks[0]})" if kinks else ""


def _gap(
    model: nn.Module, parameters: dict[str, Tensor], x: Inputs, loss_of: Callable[[Any], Tensor], product: Product
) -> float:
    """Return the relative difference of a product and the nearest difference of gradients."""
    generator = torch.Generator().manual_seed(0)
    values = list(parameters.values())
    v = [torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p) for p in values]
    for _ in range(2):  # towards the directions of large curvature
        length = _length(v)
        v = [t.detach() / length for t in product(v)] if length > 0 else v
    length = _length(v)
    if length == 0:
        return 0.0
    v = [t / length for t in v]
    exact = [t.detach() for t in product(v)]

    def gradient(shift: float) -> list[Tensor]:
        point = {
            name: torch.add(p.detach(), t, alpha=shift).requires_grad_() for (name, p), t in zip(parameters.items(), v)
        }
        moved_loss = loss_of(substituted_call(model, point, x))
        return list(torch.autograd.grad(moved_loss, list(point.values()), materialize_grads=True))

    gaps = []
    for share in _STEPS[values[0].dtype]:
        step = share * max(_length(values), 1e-3)
        slopes = [(a - b) / (2 * step) for a, b in zip(gradient(step), gradient(-step))]
        size = max(_length(slopes), _length(exact))
        gaps.append(_length([a - b for a, b in zip(slopes, exact)]) / size if size > 0 else 0.0)
    return min(gaps)


def _length(parts: Sequence[Tensor]) -> float:
    return sum(float(t.detach().double().square().sum()) for t in parts) ** 0.5
