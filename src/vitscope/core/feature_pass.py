"""Several measures of the feature maps from one forward pass over the images.

A measure that keeps nothing but running sums declares with `shares_pass` the function that makes its `Accumulator` from the
probe and the measure's options. The measure itself is a pass with that one; `one_pass` makes it with several. What several of
them need of one map, or of one layer's attention, is computed once (`vitscope.core.shared_values`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from vitscope.core.checks.option_checks import check_options
from vitscope.core.measure_options import with_options
from vitscope.core.probe import Probe
from vitscope.core.sharding.sharded_parameters import plain_weights
from vitscope.core.shared_values.sharing import sharing_values
from vitscope.core.structure_lookup import structure_reader
from vitscope.core.tap import Tap
from vitscope.runtime.distributed import failing_together, world_size
from vitscope.runtime.progress import track


class Accumulator(Protocol):
    """Sums that a measure keeps between batches; it may be a `PrefixAccumulator` and an `AttentionAccumulator` too."""

    def read(self, index: int, tap: Tap, x: Tensor) -> None:
        """Take the maps ``(B, C, h, w)`` of one tap: others read them too, and the model may change them afterwards."""

    def close_batch(self, number: int, n_images: int) -> None:
        """Take note that all maps of batch ``number`` were read."""

    def result(self) -> Any:
        """Return the measure's result, the same on every rank."""


@runtime_checkable
class PrefixAccumulator(Protocol):
    """An accumulator that also takes the tokens in front of the maps."""

    def read_prefix(self, index: int, tap: Tap, tokens: Tensor) -> None:
        """Take the class, distillation and register tokens ``(B, n_prefix, C)`` of a tap that has them, before its map."""


@runtime_checkable
class AttentionAccumulator(Protocol):
    """An accumulator that takes attention weights.

    Attributes:
        attention_units: Units from `vitscope.models.structure.attention_units`, for images of the probe's size.
        reads_maps: Whether it takes the maps of taps too; where no accumulator does, none are read.
    """

    attention_units: Sequence[Any]
    reads_maps: bool

    def read_attention(self, index: int, unit: Any, weights: Tensor) -> None:
        """Take the attention weights ``(B * n_windows, heads, queries, keys)`` of ``attention_units[index]``.

        They are in float32 at least; windows of an image come one after the other. Others read them too, and the model uses
        them afterwards.
        """


#: attribute of a measure that holds the function that makes its accumulator
_ATTRIBUTE = "make_accumulator"

Measure = TypeVar("Measure", bound=Callable[..., Any])


def shares_pass(make: Callable[..., Accumulator]) -> Callable[[Measure], Measure]:
    """Decorate a measure that needs running sums over feature maps alone: its forward pass can serve other measures too.

    Args:
        make: Function that takes the probe and the measure's options and returns the accumulator. An option of the measure
            that ``make`` does not take, such as a second model, needs passes of its own: where it is not None, no pass is
            shared.
    """

    def declare(measure: Measure) -> Measure:
        setattr(measure, _ATTRIBUTE, make)
        return measure

    return declare


def accumulator_of(measure: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Accumulator] | None:
    """Return what makes the measure's accumulator; None where it declares none, or where an option needs other passes."""
    make = getattr(measure, _ATTRIBUTE, None)
    if make is None or any(options.get(name) is not None for name in _options_of_other_passes(measure, make)):
        return None
    return make


def _options_of_other_passes(measure: Callable[..., Any], make: Callable[..., Accumulator]) -> set[str]:
    return set(inspect.signature(measure).parameters) - set(inspect.signature(make).parameters)


def run_feature_pass(probe: Probe, accumulators: Sequence[Accumulator], description: str) -> None:
    """Make one forward pass over this rank's batches and hand every map to every accumulator."""

    def read(index: int, tap: Tap, x: Tensor) -> None:
        with sharing_values():
            for accumulator in accumulators:
                accumulator.read(index, tap, x)

    reading = structure_reader().reading
    prefix_readers = [a.read_prefix for a in accumulators if isinstance(a, PrefixAccumulator)]

    def read_prefix(index: int, tap: Tap, tokens: Tensor) -> None:
        for read_tokens in prefix_readers:
            read_tokens(index, tap, tokens)

    taps = probe.taps if any(getattr(a, "reads_maps", True) for a in accumulators) else []
    with (
        probe.guard(logits=False) as model,
        reading(model, taps, read, read_prefix if prefix_readers else None),
        _reading_attention([a for a in accumulators if isinstance(a, AttentionAccumulator)]),
        failing_together(),
    ):
        for number, (x, _) in track(probe.local_batches(), description, -(-probe.n_batches // world_size())):
            model(x)
            for accumulator in accumulators:
                accumulator.close_batch(number, len(x))


def _reading_attention(accumulators: Sequence[AttentionAccumulator]) -> AbstractContextManager[None]:
    """Return a context in which accumulators are given the attention weights of their units, each computed once."""
    units: dict[str, Any] = {}
    readers: dict[str, list[tuple[AttentionAccumulator, int]]] = {}
    for accumulator in accumulators:
        for index, unit in enumerate(accumulator.attention_units):
            units.setdefault(unit.name, unit)
            readers.setdefault(unit.name, []).append((accumulator, index))
    if not units:
        return nullcontext()

    def read(_: int, unit: Any, weights: Tensor) -> None:
        with sharing_values():
            for accumulator, index in readers[unit.name]:
                accumulator.read_attention(index, accumulator.attention_units[index], weights)

    return structure_reader().reading_attention_units(list(units.values()), read)


def one_pass(probe: Probe, measures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the results of several measures of the feature maps for the price of one forward pass.

    They are, bit for bit, those of the measures called one after the other.

    Args:
        probe: Model, images and taps.
        measures: Options by the measure's name, such as ``{"relative_log_amplitude": {"path": "radial"}, "cka": {}}``.

    Raises:
        ValueError: A measure that needs more than the maps of one pass, or as that measure.
    """
    import vitscope

    with_options = []
    for name, options in measures.items():
        measure = getattr(vitscope, name) if name in vitscope.measures() else None
        if measure is None or accumulator_of(measure, options) is None:
            raise ValueError(f"Expected a measure of the feature maps of one pass, received {name!r}.")
        with_options.append((measure, options))
    return dict(zip(measures, collect(probe, with_options)))


def collect(probe: Probe, measures: Sequence[tuple[Callable[..., Any], Mapping[str, Any]]]) -> list[Any]:
    """Return the results of pairs of a measure and its options, see `one_pass`; each must have an accumulator."""
    accumulators: list[Accumulator] = []
    with plain_weights(probe.model):
        with failing_together():
            for measure, options in measures:
                make = accumulator_of(measure, options)
                assert make is not None
                check_options(measure, options)
                unused = _options_of_other_passes(measure, make)  # all None
                accumulators.append(make(probe, **{key: value for key, value in options.items() if key not in unused}))
            run_feature_pass(probe, accumulators, "feature maps")
        return [
            with_options(accumulator.result(), measure, probe, **options)
            for accumulator, (measure, options) in zip(accumulators, measures, strict=True)
        ]
