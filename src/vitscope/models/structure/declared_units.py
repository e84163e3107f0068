"""Residual units that a user declares for a model, beside or in place of those that are found."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from vitscope.core.guard.eager_execution import unwrapped
from vitscope.core.tap import Kind, Layout
from vitscope.models.structure.residual_structure import ModelComponent, Read, ResidualUnit
from vitscope.runtime.errors import StructureError

_KINDS = ("conv", "msa", "mlp", "pool")
_LAYOUTS = ("NCHW", "NHWC", "NLC", "NCL", "LNC")
_declared: weakref.WeakKeyDictionary[nn.Module, tuple[UnitDescription, ...]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class UnitDescription:
    """A residual unit, by the names of modules; an entry of ``structure=`` and of ``model.structure``.

    ``*`` in ``module`` stands for one part of a dotted name, and ``{0}``, ``{1}``, ... in the other names for what it stood for:
    ``UnitDescription("blocks.*.attn", "msa", branch_in="blocks.{0}.norm1", after="blocks.{0}.norm2:input")``.
    ``:input`` behind a name means the module's first input, else its output is meant.

    Attributes:
        module: The module that holds the unit's layers; the unit has its name.
        kind: ``conv msa mlp pool``.
        branch_in: The branch's normalized input; by default the input of ``module``.
        branch_out: The branch as it is added; by default the output of ``module``.
        after: The map after the addition; empty if it can be read nowhere.
        layout: Axes of these tensors: ``NCHW NHWC NLC NCL LNC``.
        n_prefix: Tokens in front of the grid.
        stage: Number of the stage, from 1.
        modules: Further modules whose parameters belong to the unit, such as its norm.
    """

    module: str
    kind: Kind
    branch_in: str = ""
    branch_out: str = ""
    after: str = ""
    layout: Layout = "NLC"
    n_prefix: int = 0
    stage: int = 1
    modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: A kind or layout that there is not, or a number out of range.
        """
        for name, value, choices in (("kind", self.kind, _KINDS), ("layout", self.layout, _LAYOUTS)):
            if value not in choices:
                raise ValueError(
                    f"Expected {name} of {self.module!r} to be one of {', '.join(choices)}, received {value!r}."
                )
        if self.n_prefix < 0 or self.stage < 1:
            raise ValueError(
                f"Expected n_prefix >= 0 and stage >= 1 of {self.module!r}, received {self.n_prefix} and {self.stage}."
            )


def declare_units(model: nn.Module, structure: Sequence[UnitDescription | Mapping[str, Any]] | None) -> None:
    """Let a model have these units, in place of found ones with the same parameters; None or an empty list takes them back.

    Every function that asks for the model's structure uses them from then on, as long as the model lives.

    Args:
        model: The model.
        structure: Descriptions, or mappings with their keys.

    Raises:
        ValueError: An unknown key or value.
        StructureError: A name that no module of the model has.
    """
    descriptions = tuple(d if isinstance(d, UnitDescription) else _description(d) for d in structure or ())
    model = unwrapped(model)
    if not descriptions:
        _declared.pop(model, None)
        return
    for description in descriptions:
        list(_components(model, description))
    _declared[model] = descriptions


def declared_components(model: nn.Module) -> list[ModelComponent]:
    """Return the units that were declared for a model, in the order of the descriptions."""
    return [component for d in _declared.get(unwrapped(model), ()) for component in _components(unwrapped(model), d)]


def _description(entry: Mapping[str, Any]) -> UnitDescription:
    names = [f.name for f in fields(UnitDescription)]
    unknown = [key for key in entry if key not in names]
    if unknown or "module" not in entry or "kind" not in entry:
        raise ValueError(
            f"Expected an entry of structure with module, kind and any of {', '.join(names[2:])}, received {dict(entry)}."
        )
    modules = entry.get("modules", ())
    return UnitDescription(**{**entry, "modules": (modules,) if isinstance(modules, str) else tuple(modules)})


def _components(model: nn.Module, description: UnitDescription) -> Iterator[ModelComponent]:
    modules = dict(model.named_modules())
    pattern = re.compile(r"([^.]+)".join(re.escape(part) for part in description.module.split("*")))
    matches = [(name, match.groups()) for name in modules if name and (match := pattern.fullmatch(name))]
    if not matches:
        raise StructureError(
            type(model).__name__, f"no module is named {description.module!r}", "name modules as named_modules()"
        )

    def read(text: str, words: tuple[str, ...], default: Read) -> Read:
        if not text:
            return default
        path, _, side = text.format(*words).partition(":")
        if path not in modules or side not in ("", "input", "output"):
            raise StructureError(
                type(model).__name__, f"no module is named {path!r}", "name modules as named_modules()"
            )
        return Read(modules[path], "input" if side == "input" else "output", description.layout)

    for name, words in matches:
        module = modules[name]
        first = read(description.branch_in, words, Read(module, "input", description.layout))
        out = read(description.branch_out, words, Read(module, "output", description.layout))
        after = read(description.after, words, out) if description.after else None
        part = ResidualUnit(description.kind, after, first, out, attention=None, residual=True)
        paths = (name, *(extra.format(*words) for extra in description.modules))
        owned = [key for key, _ in model.named_parameters() if any(key == p or key.startswith(p + ".") for p in paths)]
        block = modules[name.rpartition(".")[0]]
        yield ModelComponent(name, part, block, description.stage, description.n_prefix, tuple(owned))
