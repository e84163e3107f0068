"""Values that several readers need of one object: computed once for all of them while they read it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

Object = TypeVar("Object")
Value = TypeVar("Value")

#: by function and identity of the object: the object itself, so that no other takes its identity, and the function's value
_shared: ContextVar[dict[tuple[Any, int], tuple[Any, Any]] | None] = ContextVar("shared_values", default=None)


@contextmanager
def sharing_values() -> Iterator[None]:
    """Keep what functions decorated with `computed_once` return, until the end of this context."""
    token = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(token)


def computed_once(function: Callable[[Object], Value]) -> Callable[[Object], Value]:
    """Decorate a function of one object: inside of `sharing_values` it is computed once for an object.

    Its readers get the same value and must change neither the value nor the object. Elsewhere it is computed on every call.
    """

    @functools.wraps(function)
    def value_of(source: Object) -> Value:
        values = _shared.get()
        if values is None:
            return function(source)
        key = (function, id(source))
        if key not in values:
            values[key] = source, function(source)
        return values[key][1]

    return value_of
