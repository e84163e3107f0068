"""One clear error where a network cannot be differentiated twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from vitscope.runtime.errors import first_line
from vitscope.runtime.torch_internals import has_once_differentiable

#: parts of autograd's messages for operations without a second derivative: functions marked with ``once_differentiable``, fused
#: kernels, compiled graphs
_SIGNS = (
    "differentiate twice",
    "does not currently support double backward",
    "double backward",
    "is not implemented",
    "not implemented for",
    "is not differentiable",
)


class NotTwiceDifferentiableError(ValueError):
    """A network of which an operation has no second derivative."""


def refuse_once_differentiable(gradient: Iterable[Tensor]) -> None:
    """Check that a gradient can be differentiated.

    Raises:
        NotTwiceDifferentiableError: A part of it comes from a function marked with ``once_differentiable``, which autograd
            would take for a constant.
    """
    if has_once_differentiable(gradient):
        raise not_twice_differentiable("an autograd.Function of it is marked with once_differentiable")


def not_twice_differentiable(reason: str) -> NotTwiceDifferentiableError:
    """Return the error about a network that has no second derivative, with the reason and a way round."""
    return NotTwiceDifferentiableError(
        f"Expected a model that can be differentiated twice, received one that cannot ({reason}); set product='difference' "
        "(differences of first gradients, with their error), or use operations with a second derivative."
    )


@contextmanager
def named_second_derivative_errors() -> Iterator[None]:
    """Name ``product='difference'`` where autograd has no second derivative of an operation.

    Raises:
        NotTwiceDifferentiableError: In place of autograd's error.
    """
    try:
        yield
    except RuntimeError as error:  # NotImplementedError is one
        text = str(error)
        is_about_derivatives = any(word in text for word in ("derivative", "backward", "differentiate"))
        if not is_about_derivatives or not any(sign in text for sign in _SIGNS):
            raise
        raise not_twice_differentiable(first_line(error, 200)) from error
