"""Lookup of a model's structure, which `vitscope.models.structure` knows and this package must not import.

The package's ``__init__`` registers how to load it, so that a `Probe` finds taps in any model that `vitscope.taps` knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vitscope.core.tap import Tap


class StructureReader(Protocol):
    """Functions that read a model's structure; the module `vitscope.models.structure` has them."""

    def known_taps(self, model: nn.Module, images: Tensor | None) -> list[Tap]:
        """Return the taps of a model; ``images`` show where it adds and attends."""
        ...

    def declare_units(self, model: nn.Module, structure: Sequence[Any]) -> None:
        """Let a model have the described units in place of found ones."""
        ...

    def units_without_tap(self, model: nn.Module, images: Tensor | None) -> list[tuple[str, str]]:
        """Return a text about each unit after which no module returns or takes the map."""
        ...

    def missing_units(self, model: nn.Module, images: Tensor | None) -> list[tuple[str, str]]:
        """Return the name and the type of each module that attends outside of the known units."""
        ...

    def warn_missing_units(self, model: nn.Module, missing: list[tuple[str, str]]) -> None:
        """Warn about what `missing_units` returned."""
        ...

    def refuse_missing_units(self, model: nn.Module, missing: list[tuple[str, str]]) -> None:
        """Raise a StructureError about what `missing_units` returned."""
        ...

    def reading(
        self,
        model: nn.Module,
        taps: Sequence[Tap],
        fn: Callable[[int, Tap, Tensor], None],
        prefix_fn: Callable[[int, Tap, Tensor], None] | None = None,
    ) -> AbstractContextManager[None]:
        """Call ``fn(index, tap, map)`` for each tap of a forward pass, before it ``prefix_fn`` with the tokens in front."""
        ...

    def reading_attention_units(
        self, units: Sequence[Any], fn: Callable[[int, Any, Tensor], None]
    ) -> AbstractContextManager[None]:
        """Call ``fn(index, unit, weights)`` with the attention weights of each unit in a forward pass."""
        ...


_load: Callable[[], StructureReader] | None = None


def register_structure_reader(load: Callable[[], StructureReader]) -> None:
    """Name the function that loads the reader; it is called at the first use."""
    global _load
    _load = load


def structure_reader() -> StructureReader:
    """Return the registered reader.

    Raises:
        RuntimeError: None is registered.
    """
    if _load is None:
        raise RuntimeError("Expected a structure reader to be registered by `import vitscope`, received none.")
    return _load()
