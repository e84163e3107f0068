"""Tensors that require gradients and on which a result depends, read from autograd's graph."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import Tensor


def leaves_of(results: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors that require gradients and from which the results were computed, each once."""
    waiting = [t.grad_fn for t in results if t.grad_fn is not None]
    leaves = {id(t): t for t in results if t.requires_grad and t.grad_fn is None}
    visited = set(waiting)
    while waiting:
        node = waiting.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            leaves[id(leaf)] = leaf
        parents = {parent for parent, _ in node.next_functions if parent is not None} - visited
        visited |= parents
        waiting.extend(parents)
    return list(leaves.values())


def outside_tensors(results: Iterable[Tensor], parameters: Collection[Tensor]) -> list[Tensor]:
    """Return the leaves of `leaves_of` that are none of ``parameters``."""
    identities = {id(t) for t in parameters}
    return [leaf for leaf in leaves_of(results) if id(leaf) not in identities]
