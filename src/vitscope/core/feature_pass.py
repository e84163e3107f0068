"""Several measures of the feature maps from one forward pass over the images.

A measure that keeps nothing but running sums has an ``accumulate`` beside it in its file: it takes the probe and the measure's
options and returns an `Accumulator`. The measure itself is a pass with that one; `one_pass` makes it with several.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from vitscope.core.measure_options import with_options
from vitscope.core.probe import Probe
from vitscope.core.structure_lookup import structure_reader
from vitscope.core.tap import Tap
from vitscope.runtime.distributed import gather_objects, world_size
from vitscope.runtime.progress import track
from vitscope.runtime.stop_flag import Interrupted


class Accumulator(Protocol):
    """What a measure keeps between batches."""

    def read(self, index: int, tap: Tap, x: Tensor) -> None:
        """Take the maps ``(B, C, h, w)`` of one tap: others read them too, and the model may change them afterwards."""

    def close_batch(self, number: int, n_images: int) -> None:
        """Take note that all maps of batch ``number`` were read."""

    def result(self) -> Any:
        """Return the measure's result, the same on every rank."""


def accumulator_of(measure: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Accumulator] | None:
    """Return the measure's ``accumulate``; None where it has none, or where a second model (``other``) is asked for."""
    module = importlib.import_module(measure.__module__)
    found = getattr(module, "accumulate", None)
    own = getattr(found, "__module__", None) == module.__name__ and module.__name__.endswith(f".{measure.__name__}")
    return found if own and options.get("other") is None else None


def run_feature_pass(probe: Probe, accumulators: Sequence[Accumulator], description: str) -> None:
    """Make one forward pass over this rank's batches and hand every map to every accumulator."""

    def read(index: int, tap: Tap, x: Tensor) -> None:
        for accumulator in accumulators:
            accumulator.read(index, tap, x)

    reading = structure_reader().reading
    with probe.guard(logits=False) as model, reading(model, probe.taps, read):
        for number, (x, _) in track(probe.local_batches(), description, -(-probe.n_batches // world_size())):
            model(x)
            for accumulator in accumulators:
                accumulator.close_batch(number, len(x))


def one_pass(probe: Probe, measures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the results of several measures of the feature maps for the price of one forward pass.

    They are, bit for bit, those of the measures called one after the other.

    Args:
        probe: model, images and taps.
        measures: options by the measure's name, such as ``{"relative_log_amplitude": {"path": "radial"}, "cka": {}}``.

    Raises:
        ValueError: a measure that needs more than the maps of one pass, or as that measure.
    """
    import vitscope

    chosen = []
    for name, options in measures.items():
        measure = getattr(vitscope, name) if name in vitscope.measures() else None
        if measure is None or accumulator_of(measure, options) is None:
            raise ValueError(f"Expected a measure of the feature maps of one pass, received {name!r}.")
        chosen.append((measure, options))
    return dict(zip(measures, collect(probe, chosen)))


def collect(probe: Probe, chosen: Sequence[tuple[Callable[..., Any], Mapping[str, Any]]]) -> list[Any]:
    """Return the results of pairs of a measure and its options, see `one_pass`; each must have an accumulator."""
    accumulators, error = [], None
    try:
        for measure, options in chosen:
            make = accumulator_of(measure, options)
            assert make is not None
            accumulators.append(make(probe, **{key: value for key, value in options.items() if key != "other"}))
        run_feature_pass(probe, accumulators, "feature maps")
    except Interrupted:
        raise
    except Exception as found:  # told to the other ranks, which would wait for this one's sums
        error = found
    if any(gather_objects(error is not None)):
        raise error or RuntimeError("another rank failed")
    return [
        with_options(accumulator.result(), measure, probe, **options)
        for accumulator, (measure, options) in zip(accumulators, chosen, strict=True)
    ]
