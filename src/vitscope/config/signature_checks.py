"""Values of a configuration against the signatures of what they configure: unknown keys, types, choices and ranges."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from vitscope.config import instantiate, loading, target_allowlist
from vitscope.config.keys import equivalent_names
from vitscope.config.ranges.number_checks import check_value
from vitscope.runtime import errors
from vitscope.runtime.errors import ConfigError
from vitscope.runtime.value_ranges import ValueRange, range_of

#: names of plain types, and the words for them in errors
_TYPES_IN_WORDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text"}
_UNIONS = (Union, types.UnionType)

#: characters of a list that an error shows whole
_LONGEST_LIST = 60


def check_node(
    path: str,
    node: Any,
    *,
    extra: Sequence[str] = (),
    supplied: Callable[[Callable[..., Any]], Sequence[str]] | None = None,
) -> None:
    """Check a node with a ``_target_``, and those inside it, against the signatures of what they name.

    Args:
        path: The node's key.
        node: Plain values of the node.
        extra: Keys of the node itself that are not the target's arguments.
        supplied: Function from the target of ``path`` to the arguments that vitscope passes, which a configuration need not name.

    Raises:
        ConfigError: Naming the key.
    """
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ConfigError(path, None, "no _target_", f"choose one of {', '.join(loading.options(path.split('.')[0]))}")
    for place, inner in instantiate.targets(node, path):
        target_allowlist.check_role(inner, place)
        target = target_allowlist.resolve(inner["_target_"], place)
        reserved_keys, supplied_names = set(instantiate.RESERVED), ()
        if place == path:
            reserved_keys |= set(extra)
            supplied_names = supplied(target) if supplied is not None else ()
        arguments = {key: value for key, value in inner.items() if key not in reserved_keys}
        check_arguments(place, arguments, target, supplied=supplied_names)


def check_arguments(
    path: str, arguments: Mapping[str, Any], target: Callable[..., Any], supplied: Sequence[str] = ()
) -> None:
    """Check the keys, types and ranges of ``arguments`` against a signature.

    Raises:
        ConfigError: An unknown key, with the nearest ones, or a value of another type or outside of its range.
    """
    parameters = inspect.signature(target).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    names = {name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    hints, ranges = _hints(target), _ranges(target)
    for key, value in arguments.items():
        if key not in names and not open_ended:
            fix = equivalent_names.advice(key, names - set(supplied))
            raise ConfigError(f"{path}.{key}", shown(value), "no such key", fix)
        if key in hints and not fits(value, hints[key]):
            word = _wrong_word(value, hints[key])
            if word is not None:
                fix = errors.nearest(word, _choices(hints[key]))
                raise ConfigError(f"{path}.{key}", shown(value), "no such choice", fix)
            expected = type_text(hints[key])
            raise ConfigError(
                f"{path}.{key}", shown(value), f"not of type {expected}", f"give {type_text(hints[key], words=True)}"
            )
        if key in ranges:
            check_value(f"{path}.{key}", value, ranges[key])


def _ranges(target: Callable[..., Any]) -> dict[str, ValueRange]:
    """Return the ranges that the annotations of a target declare, by argument."""
    hints = _hints(target, include_extras=True)
    return {name: value_range for name, hint in hints.items() if (value_range := range_of(hint)) is not None}


def _hints(target: Callable[..., Any], *, include_extras: bool = False) -> dict[str, Any]:
    try:
        return typing.get_type_hints(
            target.__init__ if inspect.isclass(target) else target, include_extras=include_extras
        )
    except (NameError, TypeError, AttributeError):  # annotations that need imports which are not there
        return {}


def _choices(hint: Any) -> list[str]:
    """Return the words that a hint's ``Literal`` lists."""
    if get_origin(hint) is Literal:
        return [str(word) for word in get_args(hint)]
    if get_origin(hint) in (*_UNIONS, Sequence):
        return [word for option in get_args(hint) for word in _choices(option)]
    return []


def _wrong_word(value: Any, hint: Any) -> str | None:
    """Return the text, or the first one of a list, that a hint's ``Literal`` does not list; None where that is not the fault."""
    words = _choices(hint)
    if not words:
        return None
    entries = value if isinstance(value, list) else [value]
    return next((entry for entry in entries if isinstance(entry, str) and entry not in words), None)


def type_text(hint: Any, words: bool = False) -> str:
    """Return a type hint as an error shows it: ``int or null`` for ``int | None``, in words ``a whole number or null``."""
    if get_origin(hint) in _UNIONS:
        return " or ".join(type_text(option, words) for option in get_args(hint))
    if hint is None or hint is type(None):
        return "null"
    name = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "").replace("collections.abc.", "")
    return _TYPES_IN_WORDS.get(name, f"a value of type {name}") if words else name


def fits(value: Any, hint: Any) -> bool:
    """Tell whether a plain value may be passed where ``hint`` stands; unknown kinds of hints let everything pass."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in _UNIONS:
        return any(fits(value, option) for option in arguments)
    if origin is Literal:
        return value in arguments
    if hint is None or hint is type(None):
        return value is None
    if isinstance(value, Mapping) and "_target_" in value:
        return True
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    if origin in (list, tuple, Sequence):
        if not isinstance(value, list | tuple):
            return False
        if origin is tuple and arguments and Ellipsis not in arguments:
            return len(value) == len(arguments) and all(map(fits, value, arguments))
        return not arguments or all(fits(item, arguments[0]) for item in value)
    if origin is Callable:  # nothing plain is one; a node with a _target_ was let through above
        return False
    if origin in (dict, Mapping):
        return isinstance(value, Mapping)
    # a tensor or profiler cannot be written in a configuration; other classes (paths, enums) may take plain values
    return not (
        isinstance(hint, type) and hint.__module__.partition(".")[0] in ("torch", "pytorch_lightning", "datetime")
    )


def shown(value: Any) -> Any:
    """Return a value as an error shows it; mappings and long lists are cut to ``...``."""
    if isinstance(value, list) and not any(isinstance(item, Mapping | list) for item in value):
        text = f"[{', '.join('null' if item is None else str(item) for item in value)}]"
        return text if len(text) <= _LONGEST_LIST else "..."
    return value if not isinstance(value, Mapping | list) else "..."
