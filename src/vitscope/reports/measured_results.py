"""Results of a report and the conditions under which they were measured."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitscope.core.objective_card import ObjectiveCard, differing_keys, shown_value

#: keys of the card in which results of one table may differ: rows name their data themselves
NAMED_BY_ROWS = ("data",)
#: keys of the card that follow from the run's own configuration, in which experiments of a figure over such a key differ
OF_THE_RUN = ("data", "loss", "l2", "weight_decay", "augmentation")
#: an analysis and everything that its card compares, as sorted pairs: results that share them may be compared
Conditions = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Measured:
    """One result on disk, or the record of a measure that failed.

    Attributes:
        analysis: The configuration's name for it.
        tag: ``init``, ``epoch-0099``, ``step-000120`` or ``end``.
        measure: The function that made it.
        path: The ``.npz``.
        scalars: Numbers by name; None for one that is not finite.
        card: Conditions of the measurement.
        error: Reason why there is no result, else empty.
        time: Modification time of the file, in seconds, to find the newest result.
        texts: Fields of the result that are texts, where it comes from a study without arrays
            (`vitscope.reports.exports.study_export`).
    """

    analysis: str
    tag: str
    measure: str
    path: Path
    scalars: Mapping[str, float | None]
    card: ObjectiveCard | None
    error: str
    time: float
    texts: Mapping[str, str] = field(default_factory=dict)

    def load(self) -> Any:
        """Return the result with its arrays.

        Raises:
            StorageError: The file is damaged or gone.
        """
        from vitscope.runs import result_store  # imports NumPy, which a list of runs does not need

        return result_store.load(self.path)

    def conditions(self, without: Sequence[str] = ()) -> Conditions:
        """Return the analysis and all that the card compares but for ``without``, see `Conditions`."""
        compared = {"card": "none"} if self.card is None else self.card.conditions()
        return (("analysis", self.analysis), *(pair for pair in compared.items() if pair[0] not in without))


def moment(tag: str) -> tuple[int, int, str]:
    """Sort key of tags: ``init``, the steps, the epochs and other checkpoints, ``end``.

    Steps are in their order whatever the number of digits; a run with both steps and epochs has them apart, as a tag does not
    say how many steps an epoch takes.
    """
    step = step_of_tag(tag)
    return {"init": 0, "end": 3}.get(tag, 2 if step is None else 1), step or 0, tag


def step_of_tag(tag: str) -> int | None:
    """Return the number of optimizer steps that a tag such as ``step-000120`` states; None for another tag."""
    matched = re.fullmatch(r"step-(\d+)(-ema)?", tag)
    return int(matched[1]) if matched else None


def tag_of_step(step: int) -> str:
    """Return the tag of results after a number of optimizer steps, see `step_of_tag`."""
    return f"step-{step:06d}"


def differing(conditions: Iterable[Conditions]) -> list[str]:
    """Return the keys in which conditions differ."""
    return differing_keys(map(dict, conditions))


def stated(conditions: Conditions, keys: Sequence[str]) -> str:
    """Return the values of some keys in words."""
    return ", ".join(f"{key} {_written(shown_value(dict(conditions), key))}" for key in keys)


def _written(value: Any) -> str:
    return f"[{', '.join(map(_written, value))}]" if isinstance(value, tuple) else str(value)


def majority(measured: Mapping[str, Sequence[Measured]], without: Sequence[str] = NAMED_BY_ROWS) -> Conditions | None:
    """Return the conditions under which most runs were measured.

    Conditions without changes of the runs' own networks and images come before all others; of equals the newest count.

    Args:
        measured: Results of one measure at one moment, by run.
        without: Keys of the card that do not count.
    """
    counts: Counter[Conditions] = Counter()
    newest: dict[Conditions, float] = {}
    for results in measured.values():
        successes = [(m.conditions(without), m.time) for m in results if not m.error]
        for conditions, time in successes:
            newest[conditions] = max(newest.get(conditions, 0.0), time)
        counts.update({conditions for conditions, _ in successes})
    return max(counts, key=lambda c: ("changes" not in dict(c), counts[c], newest[c]), default=None)
