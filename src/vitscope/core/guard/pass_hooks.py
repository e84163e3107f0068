"""Hooks around every forward pass of a model, before all hooks of its own and also after a pass that fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def hooked_passes(model: nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> Iterator[None]:
    """Call ``before`` and ``after`` around every forward pass inside.

    Args:
        model: The model whose passes are hooked.
        before: A forward pre-hook ``(model, args)``, called before the model's own; what it returns replaces ``args``.
        after: A forward hook ``(model, args, output)``, also called after a pass that raised, with None for ``output``.
    """
    first = model.register_forward_pre_hook(before, prepend=True)
    last = model.register_forward_hook(after, always_call=True)
    try:
        yield
    finally:
        first.remove()
        last.remove()
