"""Checks of a measure's options that need neither a model nor images.

They run when the measure is called, before anything is computed, and when a configuration is validated: a training that ends in
a measure does not run for hours before the measure refuses its options.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

#: the attribute of a measure that holds its checks; `functools.wraps` hands it on to what decorates the measure
_ATTRIBUTE = "option_checks"


@dataclass(frozen=True)
class OptionCheck:
    """A check of some options of a measure.

    Attributes:
        names: The options that the function is called with, by keyword.
        function: Raises ValueError where the options cannot be meant; its result is not used.
    """

    names: tuple[str, ...]
    function: Callable[..., Any]


def checks_options(check: Callable[..., Any], names: Sequence[str] | None = None) -> Callable[[Function], Function]:
    """Decorate a measure, below `vitscope.core.measure_options.record_options`, which calls the check.

    Args:
        check: Function of options of the measure that raises ValueError where they cannot be meant together.
        names: The options that it is called with; None for the names of its parameters.

    Example:
        ``@checks_options(check_points)`` with ``def check_points(t_min, t_max)`` above a measure with these two arguments.
    """
    check_names = tuple(names if names is not None else inspect.signature(check).parameters)

    def decorate(measure: Function) -> Function:
        checks = (*option_checks_of(measure), OptionCheck(check_names, check))
        setattr(measure, _ATTRIBUTE, checks)
        return measure

    return decorate


def option_checks_of(measure: Callable[..., Any]) -> tuple[OptionCheck, ...]:
    """Return the checks that a measure declares."""
    return getattr(measure, _ATTRIBUTE, ())


def check_options(measure: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Run the checks that a measure declares.

    Args:
        measure: The measure.
        options: The measure's options by name; those that are not given have their defaults, and a check of an
            option without either is left out.

    Raises:
        ValueError: Options that cannot be meant, with what was expected and received.
    """
    checks = option_checks_of(measure)
    if not checks:
        return
    parameters = inspect.signature(measure).parameters.values()
    values = {p.name: p.default for p in parameters if p.default is not p.empty} | dict(options)
    for check in checks:
        if all(name in values for name in check.names):
            check.function(**{name: values[name] for name in check.names})
