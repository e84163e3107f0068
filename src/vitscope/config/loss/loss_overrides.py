"""Overrides of single keys of a loss: ``objective.loss`` is a name by default, so that its keys come in one mapping."""

from __future__ import annotations

from collections.abc import Sequence

_PREFIX = "objective.loss."


def joined(arguments: Sequence[str]) -> list[str]:
    """Return a command line with ``objective.loss.<key>=<value>`` arguments joined in ``objective.loss={<key>:<value>,...}``.

    Args:
        arguments: Command line without the program's name.
    """
    keys = [argument.lstrip("+") for argument in arguments if _is_key(argument)]
    if not keys:
        return list(arguments)
    entries = ",".join(key.removeprefix(_PREFIX).replace("=", ":", 1) for key in keys)
    first = next(i for i, argument in enumerate(arguments) if _is_key(argument))
    rest = [argument for argument in arguments[first:] if not _is_key(argument)]
    return [*arguments[:first], f"objective.loss={{{entries}}}", *rest]


def _is_key(argument: str) -> bool:
    return argument.lstrip("+").startswith(_PREFIX) and "=" in argument
