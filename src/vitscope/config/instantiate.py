"""Instantiation of configuration nodes after every target was checked."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vitscope.config.error_translation import is_misconfiguration
from vitscope.config.loading import plain
from vitscope.config.target_allowlist import check_target, resolve
from vitscope.runtime.errors import ConfigError

#: keys of a node that are ours and not an argument of its `_target_`
RESERVED = {"_target_", "_partial_", "_convert_", "_recursive_"}


def targets(node: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield ``(dotted path, node)`` of every mapping with a ``_target_`` in a plain tree, outer ones first."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from targets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from targets(value, f"{path}.{index}")


def instantiate(node: Any, path: str, *, drop: Iterable[str] = (), **arguments: Any) -> Any:
    """Call what a node's ``_target_`` names with the node's keys, after checking every target in the tree.

    Args:
        node: A mapping with ``_target_``; nested ones are built first.
        path: Dotted place of the node in the configuration, for errors.
        drop: Keys that are not arguments.
        arguments: Arguments that are passed beside the node's.

    Raises:
        ConfigError: A target that is not meant to be configured, or arguments that it refuses.
    """
    tree = plain(node)
    for place, inner in targets(tree, path):
        check_target(inner, place)
    return _build({k: v for k, v in tree.items() if k not in set(drop)}, path, arguments)


def _build(node: Any, path: str, arguments: Mapping[str, Any]) -> Any:
    if isinstance(node, list):
        return [_build(item, f"{path}.{index}", {}) for index, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    keywords = {k: _build(v, f"{path}.{k}", {}) for k, v in node.items() if k not in RESERVED}
    if "_target_" not in node:
        return keywords
    target = resolve(node["_target_"], path)
    keywords.update(arguments)
    if node.get("_partial_", False):
        return functools.partial(target, **keywords)
    try:
        return target(**keywords)
    except Exception as error:
        if not refused(error):
            raise
        key, value = refused_argument(str(error), node, path)
        raise ConfigError(key, value, str(error).rstrip("."), f"see the arguments of {node['_target_']}") from error


def refused_argument(text: str, node: Mapping[str, Any], path: str) -> tuple[str, Any]:
    """Return the key and the value that an error speaks of, "Expected depth ...", as far as they are in a node."""
    matched = re.match(r"Expected (?:an? )?(\w+)\b", text)
    name = matched[1] if matched else ""
    return (f"{path}.{name}", node[name]) if name in node and name not in RESERVED else (path, None)


def refused(error: Exception) -> bool:
    """Tell whether a callee refused its arguments, which is the user's to mend: such errors are raised on purpose there."""
    wrong_arguments = isinstance(error, TypeError) and "argument" in str(error)
    return isinstance(error, ValueError) or wrong_arguments or is_misconfiguration(error)
