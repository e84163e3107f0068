"""Options that measures name differently for the same thing: how many eigenvalues are computed."""

from __future__ import annotations

from collections.abc import Iterable

from vitscope.runtime import errors

#: ``n_top`` of each mini-batch, ``k`` of the mean over all batches
NUMBER_OF_EIGENVALUES = ("k", "n_top")


def advice(name: str, names: Iterable[str]) -> str:
    """Return a few words that lead from an unknown key to the right one: an equivalent name, else the nearest ones.

    Args:
        name: The unknown key without the group before it.
        names: Keys that there are.
    """
    names = list(names)
    if name in NUMBER_OF_EIGENVALUES:
        for other in NUMBER_OF_EIGENVALUES:
            if other in names:
                return f"the number of eigenvalues is {other} here"
    return errors.nearest(name, names)
