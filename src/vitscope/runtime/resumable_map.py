"""A map over keys whose finished rows survive an interruption and whose work is divided among the ranks."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, TypeVar

from vitscope.runtime import distributed, progress

Row = Mapping[str, Any]
#: finished rows by name; a run keeps them on disk
Partial = MutableMapping[str, Row]
Key = TypeVar("Key")


def map_resumably(
    keys: Sequence[Key],
    compute: Callable[[Key], Row],
    *,
    name: Callable[[Key], str],
    partial: Partial | None,
    description: str,
    compute_group: Callable[[Sequence[Key]], Sequence[Row]] | None = None,
    group: Callable[[Key], Any] | None = None,
    group_size: int = 1,
) -> list[Row]:
    """Return ``compute(key)`` of every key in the order of ``keys``; only rows that ``partial`` lacks are computed.

    Each row is stored in ``partial`` under ``name(key)`` as soon as it is computed, by the rank that computed it; every rank
    returns all rows. Rows that any rank has are not computed again, also after a restart with another number of ranks.

    Args:
        keys: Keys in the order of the work; neighbors go to one rank.
        compute: Function that computes one row.
        name: A key's name in ``partial``.
        partial: Finished rows; None stores no row.
        description: The text beside the progress.
        compute_group: Function that computes the rows of several keys, equal to those of ``compute``; used where
            ``group_size`` exceeds 1.
        group: Neighbors with one value may be computed together; all of them by default.
        group_size: Most keys that are computed together.

    Raises:
        Interrupted: A stop was requested; the finished rows are stored, those of an unfinished group are not.
        RuntimeError: Computing a row failed on another rank, which raises its own error.
    """
    names = {key: name(key) for key in keys}
    stored = {n: dict(partial[n]) for n in names.values() if n in partial} if partial is not None else {}
    finished: dict[str, Row] = merge_rows(stored)
    missing = [key for key in keys if names[key] not in finished]
    rank, world = distributed.rank(), distributed.world_size()
    share = missing[rank * len(missing) // world : (rank + 1) * len(missing) // world]
    computed: dict[str, Row] = {}
    with distributed.failing_together():
        if compute_group is not None and group_size > 1:
            for keys_of_group in progress.track(_groups(share, group, group_size), description):
                for key, row in zip(keys_of_group, compute_group(keys_of_group), strict=True):
                    computed[names[key]] = stored_row(partial, names[key], functools.partial(dict, row))
        else:
            for key in progress.track(share, description):
                computed[names[key]] = stored_row(partial, names[key], functools.partial(compute, key))
    finished |= merge_rows(computed)
    return [finished[names[key]] for key in keys]


def _groups(keys: Sequence[Key], group: Callable[[Key], Any] | None, most: int) -> list[Sequence[Key]]:
    """Return neighbors with one value of ``group`` together, in parts of nearly equal size of at most ``most``."""
    parts: list[Sequence[Key]] = []
    for _, members in itertools.groupby(keys, key=group or (lambda _: None)):
        members = list(members)
        n_parts = -(-len(members) // most)
        ends = [i * len(members) // n_parts for i in range(n_parts + 1)]
        parts += [members[start:end] for start, end in itertools.pairwise(ends)]
    return parts


def stored_row(partial: Partial | None, name: str, compute: Callable[[], Row], required: Sequence[str] = ()) -> Row:
    """Return the finished row ``name`` of ``partial``; a row that is missing is computed and stored.

    Args:
        partial: Finished rows; None stores no row.
        name: The row's name in ``partial``.
        compute: Function that computes the row.
        required: Values without which a stored row, of an earlier version, is computed again.
    """
    row = None if partial is None else partial.get(name)
    if row is None or any(value not in row for value in required):
        row = compute()
        if partial is not None:
            partial[name] = row
    return row


def merge_rows(rank_rows: Mapping[Key, Row]) -> dict[Key, Row]:
    """Return the rows of all ranks by key; every rank must call it."""
    return {key: row for rows in distributed.gather_objects(dict(rank_rows)) for key, row in rows.items()}
