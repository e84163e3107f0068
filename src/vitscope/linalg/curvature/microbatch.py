"""One chunk of images: its loss, its gradient and the product of its curvature with a vector."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vitscope.core.batches.batch_inputs import Inputs
from vitscope.core.guard.substituted_call import substituted_call
from vitscope.core.objective import Objective
from vitscope.linalg.curvature.double_backward import BilinearConvDoubleBackward
from vitscope.linalg.curvature.logit_curvature import output_curvature
from vitscope.linalg.differences.own_functions import refuse_wrong_functions
from vitscope.linalg.differences.second_derivative_errors import (
    named_second_derivative_errors,
    refuse_once_differentiable,
)
from vitscope.runtime.errors import NumericalError

#: number of the first image of a chunk that counts for nothing
FILLER = -1

Product = Callable[[Sequence[Tensor]], Sequence[Tensor]]
NamedProduct = Callable[[dict[str, Tensor]], dict[str, Tensor]]


class CurvatureSettings(Protocol):
    """The attributes of a curvature operator that decide what one chunk of images gives, see `Curvature`."""

    model: nn.Module
    objective: Objective
    parameters: dict[str, Tensor]
    kind: str
    product: str
    n_images: int
    n_samples: int
    seed: int


class Chunk(NamedTuple):
    """Loss, gradient and products of one pass over some images; sums over its images divided by the operator's ``n_images``.

    Attributes:
        loss: The data term, read from the device once.
        gradient: Gradient of the data term, one tensor a parameter.
        product: Function from one tensor a parameter to the data curvature times it; holds the graph.
    """

    loss: float
    gradient: list[Tensor]
    product: Product


def build_chunk(operator: CurvatureSettings, first_image: int, x: Inputs, y: Tensor) -> Chunk:
    """Evaluate the operator's model on ``x`` and make what products need.

    Raises:
        NumericalError: The loss is not finite.
        ValueError: An output of several tensors with another operator than the Hessian.
    """
    parameters = list(operator.parameters.values())
    reverse = operator.kind == "hessian" and operator.product == "reverse"
    by_differences = operator.kind == "hessian" and operator.product == "difference"
    linearized = operator.kind == "hessian" and operator.product == "linearize"
    with nullcontext() if by_differences else BilinearConvDoubleBackward(convolutions=reverse):
        logits = operator.model(x)
        if operator.kind != "hessian" and not isinstance(logits, Tensor):
            raise ValueError(
                f"Expected an output that is one tensor with operator={operator.kind!r}, received a {type(logits).__name__}: use "
                "operator='hessian'."
            )
        loss = operator.objective.data_loss(logits, y, "sum") * _scale(operator, first_image)
        loss_value = _finite(loss, first_image, len(x))
        with named_second_derivative_errors() if reverse else nullcontext():
            gradient = _gradient(
                loss, parameters, create_graph=reverse, retain_graph=not (linearized or by_differences)
            )
    if by_differences:
        product = _no_product
    elif reverse:
        product = _reverse(gradient, parameters)
        scale = _scale(operator, first_image)
        if scale > 0:

            def loss_of(outputs: Any) -> Tensor:
                return operator.objective.data_loss(outputs, y, "sum") * scale

            refuse_wrong_functions(operator.model, operator.parameters, x, loss, loss_of, product)
    elif linearized:
        product = _linearized(operator, x, y)
    else:
        middle = output_curvature(
            operator.kind,
            logits.detach(),
            y,
            operator.objective,
            first_image=max(first_image, 0),  # that of a filler counts for nothing
            n_samples=operator.n_samples,
            seed=operator.seed,
        )
        product = _sandwich(logits, parameters, middle, _scale(operator, first_image))
    return Chunk(loss_value, [g.detach() for g in gradient], product)


def _scale(operator: CurvatureSettings, first_image: int) -> float:
    return 0.0 if first_image == FILLER else 1 / operator.n_images


def data_gradient(operator: CurvatureSettings, first_image: int, x: Inputs, y: Tensor) -> list[Tensor]:
    """Return the gradient of the data term at the current weights, one tensor a parameter, by the model's own kernels."""
    loss = operator.objective.data_loss(operator.model(x), y, "sum") * _scale(operator, first_image)
    return _gradient(loss, list(operator.parameters.values()), create_graph=False)


def _no_product(v: Sequence[Tensor]) -> Sequence[Tensor]:
    raise AssertionError("products of differences are made from several gradients, not from one graph")


def _gradient(
    loss: Tensor, parameters: list[Tensor], create_graph: bool, retain_graph: bool | None = None
) -> list[Tensor]:
    return list(
        torch.autograd.grad(
            loss, parameters, create_graph=create_graph, retain_graph=retain_graph, materialize_grads=True
        )
    )


def _reverse(gradient: list[Tensor], parameters: list[Tensor]) -> Product:
    """Return H v as the derivative of <gradient, v>, the gradient's graph kept."""
    curved = [i for i, g in enumerate(gradient) if g.requires_grad]  # an unused parameter's gradient is a constant 0
    outputs = [gradient[i] for i in curved]
    refuse_once_differentiable(outputs)

    def product(v: Sequence[Tensor]) -> Sequence[Tensor]:
        if not outputs:
            return [torch.zeros_like(p) for p in parameters]
        vectors = [v[i] for i in curved]
        with named_second_derivative_errors(), BilinearConvDoubleBackward():
            return torch.autograd.grad(outputs, parameters, vectors, retain_graph=True, materialize_grads=True)

    return product


def _linearized(operator: CurvatureSettings, x: Inputs, y: Tensor) -> Product:
    """Return H v as the forward derivative of the gradient, traced once."""
    names = list(operator.parameters)

    def loss(parameters: Mapping[str, Tensor]) -> Tensor:
        logits = substituted_call(operator.model, parameters, x)
        return operator.objective.data_loss(logits, y, "sum") / operator.n_images

    point = {name: p.detach() for name, p in operator.parameters.items()}
    with named_second_derivative_errors(), warnings.catch_warnings():  # torch's own tracing calls a deprecated function
        warnings.filterwarnings("ignore", "`torch.jit.script` is", FutureWarning)
        _, tangent = torch.func.linearize(torch.func.grad(loss), point)

    def with_new_pass(vectors: dict[str, Tensor]) -> dict[str, Tensor]:
        return torch.func.jvp(torch.func.grad(loss), (point,), (vectors,))[1]

    return _checked_product(names, tangent, with_new_pass)


def _checked_product(names: Sequence[str], tangent: NamedProduct, with_new_pass: NamedProduct) -> Product:
    """Return a product by ``tangent``, or by ``with_new_pass`` where ``tangent`` does not repeat itself.

    `torch.func.linearize` keeps what does not depend on the vector. Where the network changes such a value in place (the bias
    that is added after the product with a transposed input), torch changes the kept one, and every later product is wrong.
    The first product is therefore made twice.
    """
    chosen_product: NamedProduct | None = None

    def product(v: Sequence[Tensor]) -> Sequence[Tensor]:
        nonlocal chosen_product
        vectors = dict(zip(names, v))
        if chosen_product is None:
            first = {name: value.clone() for name, value in tangent(vectors).items()}
            second = tangent(vectors)
            is_repeated = all(torch.equal(value, second[name]) for name, value in first.items())
            chosen_product = tangent if is_repeated else with_new_pass
            return [first[name] for name in names]
        result = chosen_product(vectors)
        return [result[name] for name in names]

    return product


def _sandwich(logits: Tensor, parameters: list[Tensor], middle: Callable[[Tensor], Tensor], scale: float) -> Product:
    """Return J^T M J v. J v comes from reverse passes alone: J^T u is linear in u, and its transpose in u is J."""
    dummy = torch.zeros_like(logits, requires_grad=True)
    with BilinearConvDoubleBackward(convolutions=False):
        pulled = torch.autograd.grad(
            logits, parameters, dummy, create_graph=True, retain_graph=True, materialize_grads=True
        )
    used = [i for i, g in enumerate(pulled) if g.requires_grad]

    def product(v: Sequence[Tensor]) -> Sequence[Tensor]:
        if not used:
            return [torch.zeros_like(p) for p in parameters]
        outputs, vectors = [pulled[i] for i in used], [v[i] for i in used]
        with BilinearConvDoubleBackward(convolutions=False):
            (pushed,) = torch.autograd.grad(outputs, dummy, vectors, retain_graph=True)  # (B, C)
            return torch.autograd.grad(
                logits, parameters, middle(pushed) * scale, retain_graph=True, materialize_grads=True
            )

    return product


def _finite(loss: Tensor, first_image: int, n: int) -> float:
    """Return the value of a loss; raise NumericalError where it is not finite."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NumericalError(
            "loss",
            value,
            f"not finite on images {first_image} to {first_image + n - 1}, so it has no curvature",
            "check the weights and the batch for values that are not finite, or use float64",
        )
    return value
