"""Ranges of the arguments of this package's functions and classes, read from their source without importing them.

A model or a measure imports torch, which takes seconds; a number outside of its range is refused before that. The annotations
that are read are those of `vitscope.runtime.value_ranges`; others are left to the check against the imported signature.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import vitscope
from vitscope import models
from vitscope.runtime import value_ranges
from vitscope.runtime.value_ranges import ValueRange, range_of

_ROOT = Path(vitscope.__file__).parent

#: the types that carry a range, by name
_RANGES = {
    name: value_range for name, hint in vars(value_ranges).items() if (value_range := range_of(hint)) is not None
}

Definition = ast.FunctionDef | ast.ClassDef


@functools.cache
def argument_ranges(target: str) -> dict[str, ValueRange]:
    """Return the ranges of the arguments that a dotted name of this package takes, by name; empty for other names.

    Args:
        target: Name of a function, for example ``vitscope.models.vit`` or ``vitscope.hessian_trace``.
    """
    definition = _definition_of(target)
    if definition is None:
        return {}
    annotations = {argument.arg: argument.annotation for argument in _arguments(*definition)}
    ranges = {argument: _range(annotation) for argument, annotation in annotations.items() if annotation is not None}
    return {argument: value_range for argument, value_range in ranges.items() if value_range is not None}


@functools.cache
def argument_descriptions(target: str) -> dict[str, str]:
    """Return what the docstring of a dotted name of this package says of its arguments, by name; empty for other names.

    Args:
        target: Name of a function, for example ``vitscope.models.vit`` or ``vitscope.hessian_trace``.
    """
    definition = _definition_of(target)
    return _documented_arguments(definition[1]) if definition is not None else {}


def _documented_arguments(definition: Definition) -> dict[str, str]:
    """Return the entries of the sections ``Args`` and ``Attributes`` of a docstring."""
    descriptions: dict[str, str] = {}
    is_section, name = False, ""
    for line in (ast.get_docstring(definition) or "").splitlines():
        if line and not line.startswith(" "):
            is_section, name = line in ("Args:", "Attributes:"), ""
        elif is_section and (entry := re.match(r"    \*{0,2}(\w+): (.+)", line)):
            name = entry[1]
            descriptions[name] = entry[2]
        elif is_section and name and line.strip():
            descriptions[name] += f" {line.strip()}"
    return {name: text.replace("``", "").rstrip(".") for name, text in descriptions.items()}


def _definition_of(target: str) -> tuple[str, Definition] | None:
    """Return the definition of a dotted name, also of one that the package exports lazily; see `_definition`."""
    package, _, name = target.rpartition(".")
    lazy_modules = {"vitscope": vitscope.measures, "vitscope.models": models.functions}
    if package in lazy_modules:
        package = lazy_modules[package]().get(name, package)
    return _definition(package, name)


def _definition(module: str, name: str) -> tuple[str, Definition] | None:
    """Return the function or class of a name, and the module of this package that defines it; imports are followed."""
    tree = _parsed(module)
    if tree is None:
        return None
    for node in tree.body:
        if isinstance(node, Definition) and node.name == name:
            return module, node
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _definition(node.module, alias.name)
    return None


@functools.cache
def _parsed(module: str) -> ast.Module | None:
    """Return the syntax tree of a module of this package, None where there is no such module."""
    package, *parts = module.split(".")
    if package != "vitscope" or not all(part.isidentifier() for part in parts):
        return None
    path = _ROOT.joinpath(*parts)
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return ast.parse(file.read_text(encoding="utf-8"))
    return None


def _arguments(module: str, definition: Definition) -> Iterator[ast.arg]:
    """Yield the arguments of a function, of a class's constructor, or the fields of a dataclass or typed dictionary."""
    if isinstance(definition, ast.ClassDef):
        yield from _arguments_of_class(module, definition)
        return
    signature = definition.args
    yield from (*signature.posonlyargs, *signature.args, *signature.kwonlyargs)
    unpacked = getattr(signature.kwarg, "annotation", None)  # **options: Unpack[Options]
    if isinstance(unpacked, ast.Subscript) and isinstance(unpacked.slice, ast.Name):
        options = _definition(module, unpacked.slice.id)
        if options is None:
            return
        selected_names = _selected_names(definition)
        for argument in _arguments(*options):
            if not selected_names or argument.arg in selected_names:
                yield argument


def _arguments_of_class(module: str, definition: ast.ClassDef) -> Iterator[ast.arg]:
    """Yield the arguments of a class's own constructor, without one the fields of its bases and its own."""
    constructors = [node for node in definition.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    if constructors:
        for constructor in constructors:
            yield from _arguments(module, constructor)
        return
    for base in definition.bases:
        inherited = _definition(module, base.id) if isinstance(base, ast.Name) else None
        if inherited is not None:
            yield from _arguments(*inherited)
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield ast.arg(node.target.id, node.annotation)


def _selected_names(definition: ast.FunctionDef) -> set[object]:
    """Return the options that a decorator names, as in ``@curvature_arguments("tol", "seed")``; none means all."""
    calls = [node for node in definition.decorator_list if isinstance(node, ast.Call)]
    selecting = [call for call in calls if ast.unparse(call.func).endswith("_arguments")]
    return {argument.value for call in selecting for argument in call.args if isinstance(argument, ast.Constant)}


def _range(annotation: ast.expr) -> ValueRange | None:
    """Return the range of the first type of `value_ranges` in an annotation."""
    names = (node.id for node in ast.walk(annotation) if isinstance(node, ast.Name))
    return next((_RANGES[name] for name in names if name in _RANGES), None)
