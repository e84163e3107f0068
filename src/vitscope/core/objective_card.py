"""The objective card: under which conditions a number was measured, saved with every result."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

#: the card's keys in which two results must agree to be overlaid, beside the changes, the options and what the solver states
COMPARED = (
    "loss", "l2", "weight_decay", "data", "split", "augmentation", "preprocessing", "n_images", "batch_size",
    "mode", "bn_policy", "parameters", "dtype",
)  # fmt: skip

#: facts of ``solver`` about the course of the computation, not the meaning of the number: draws, chunks, memory and time,
#: names of the model's own checkpoints, the model's own preprocessing. Any other fact is compared.
INCIDENTAL_FACTS = frozenset({
    "seed", "product", "micro_batch", "max_memory", "basis", "batches_at_once", "n_products", "budget_s", "seconds_per_product",
    "predicted_s", "predicted_bytes", "batches", "dropout", "labels", "start", "end", "std", "images_of_other",
    "difference_error", "difference_steps",
})  # fmt: skip

#: the product that is compared, since its numbers have an error that those of the others do not have
INEXACT_PRODUCT = ("product", "difference")

#: ends the data's name on the card of a measure on the training split of a run on random labels
RANDOM_LABELS = ", random labels"

#: stands for the options of a result that a version without them on the card has saved
NOT_RECORDED = "not recorded (a result of an older version)"


@dataclass(frozen=True)
class ObjectiveCard:
    """Under which conditions a number was measured; saved with every result.

    The first group (`COMPARED`), the measure's ``options`` and the facts in ``solver`` that are not in `INCIDENTAL_FACTS`
    decide whether two results may share an axis; the rest is provenance.

    Attributes:
        preprocessing: How image files became pixels: the crop, the background of transparent pixels, the samples that are black
            and white; ``default`` for a center crop, white and full scale, and for images that come as arrays.
        parameters: Those of derivatives: a subset by its name, ``all``, or ``trainable`` where a tenth of the values or
            more does not require gradients.
        input_shape: Shape of one image of the first batch as the network takes it, ``3 x 224 x 224``; of a network with several
            inputs the shape of each that has one row an image. It is not compared, for each network has its own.
        step: Optimizer steps that the weights have made, where a run states it.
        options: The measure's arguments, defaults included, but for those of `vitscope.core.measure_options.INCIDENTAL`; None
            where a version saved the result that did not record them.
        changes: Values of the run's network and of the folder of its images that the command changed, by their dotted keys.
    """

    loss: str = "unknown"
    l2: str = "unknown"
    weight_decay: float = 0.0
    data: str = "unknown"
    split: str = "unknown"
    augmentation: str = "unknown"
    preprocessing: str = "default"
    n_images: int = 0
    batch_size: int = 0
    mode: str = "eval"
    bn_policy: str = "eval"
    parameters: str = "all"
    dtype: str = "float32"
    input_shape: str = "unknown"
    seed: int | None = None
    checkpoint: str = "unknown"
    epoch: int | None = None
    step: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    solver: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the card as plain containers."""
        return asdict(self)

    def conditions(self) -> dict[str, Any]:
        """Return everything that is compared: `COMPARED`, ``changes``, ``options.<name>`` and ``solver.<fact>``, all hashable.

        A fact that repeats an option is left out; one that says what an option such as ``auto`` came to stays.
        """
        compared = {key: getattr(self, key) for key in COMPARED}
        if self.changes:
            compared["changes"] = _hashable(self.changes)
        if self.options is None:
            compared["options"] = NOT_RECORDED
        options = {key: _hashable(value) for key, value in sorted((self.options or {}).items())}
        facts = {
            key: _hashable(value)
            for key, value in sorted(self.solver.items())
            if key not in INCIDENTAL_FACTS or (key, value) == INEXACT_PRODUCT
        }
        compared |= {f"options.{key}": value for key, value in options.items()}
        return compared | {f"solver.{k}": v for k, v in facts.items() if k not in options or options[k] != v}

    def differences(self, other: ObjectiveCard) -> list[str]:
        """Return the names of the compared keys in which ``other`` differs, see `conditions`."""
        return differing_keys([self.conditions(), other.conditions()])


def differing_keys(conditions: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the keys that do not have one value in all of the given conditions, in their order.

    A result without recorded options differs from one with them in ``options`` alone: its single options are not known.
    """
    card_conditions = list(conditions)
    keys = dict.fromkeys(key for one in card_conditions for key in one)
    differing = [key for key in keys if any(_differs(card_conditions[0], one, key) for one in card_conditions[1:])]
    if "options" in differing:
        differing = [key for key in differing if not key.startswith(("options.", "solver."))]
    return differing


def _differs(one: Mapping[str, Any], other: Mapping[str, Any], key: str) -> bool:
    return (key in one) != (key in other) or one.get(key) != other.get(key)


def shown_value(conditions: Mapping[str, Any], key: str) -> Any:
    """Return a compared value as an error or a notice shows it."""
    absent = {"options": "recorded", "changes": "none"}
    return conditions.get(key, absent.get(key, "not stated"))


def _hashable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple((str(key), _hashable(value[key])) for key in sorted(value, key=str))
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def check_comparable(cards: Mapping[str, ObjectiveCard | None]) -> None:
    """Refuse to overlay results that were measured under different objectives or with different options.

    Raises:
        ValueError: Naming the keys that differ and both values.
    """
    named = [(name, card.conditions()) for name, card in cards.items() if card is not None]
    for name, conditions in named[1:]:
        first_name, first = named[0]
        if keys := differing_keys([first, conditions]):
            pairs = "; ".join(
                f"{key}: {shown_value(first, key)!r} and {shown_value(conditions, key)!r}" for key in keys
            )
            raise ValueError(
                f"Expected results of one objective, received {first_name!r} and {name!r} that differ in {pairs}. "
                "Pass allow_different=True to overlay them all the same."
            )


def versions() -> dict[str, str]:
    """Return the versions of what the numbers depend on."""
    import timm
    import torch  # reading a card needs neither

    from vitscope import __version__  # which imports this module

    return {
        "python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__, "vitscope": __version__,
    }  # fmt: skip
