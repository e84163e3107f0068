"""Mean distance and entropy of each attention head."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from torch import nn

from vitscope.core.batches.batch_inputs import images_of
from vitscope.core.cost.image_passes import TAPS, guard_checks
from vitscope.core.cost.measure_cost import Count, MeasureCost, Options, Work, Workload, WorkUnit, declares_cost
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import Result
from vitscope.core.running_mean import estimate_lists
from vitscope.core.undefined_values import warn_nulls
from vitscope.diagnostics.attention._running_sums import Sums
from vitscope.models.structure.attention_units import AttentionUnit, attention_units
from vitscope.models.structure.attention_weights import reading_attention
from vitscope.models.structure.residual_units import Unit, reading_branches
from vitscope.models.structure.residual_units import units as units_of
from vitscope.runtime import distributed
from vitscope.runtime.progress import track
from vitscope.stats.intervals import few_images


@dataclass(frozen=True)
class AttentionDistanceResult(Result, coordinates={"unit": "units", "stage": "stages", "depth": "depths"}):
    """Means over images and over the queries of the map; half widths belong to 95% t-intervals over images.

    Attributes:
        units: (n_units,) names of the attention units that could be read, by depth.
        stages: (n_units,) from 1.
        depths: (n_units,) from 0 to 1, among all units of the model.
        n_heads: (n_units,).
        n_keys: (n_units,) keys of a query, class tokens included.
        distance: (n_units, n_heads) one array per unit: pixels.
        distance_half_width: (n_units, n_heads) likewise, half their t-intervals over images; NaN with fewer than 128 images.
        entropy: (n_units, n_heads) one array per unit: nats, at most ln(n_keys).
        entropy_half_width: (n_units, n_heads) likewise.
        off_map: (n_units, n_heads) one array per unit: share of attention on keys without a place (class tokens, padding).
        uniform_distance: (n_units,) pixels that equal weights over the map, or over windows that are not shifted, would give.
        n_images: Images used.
        card: Conditions of the measurement.
    """

    units: tuple[str, ...]
    stages: np.ndarray
    depths: np.ndarray
    n_heads: np.ndarray
    n_keys: np.ndarray
    distance: tuple[np.ndarray, ...]
    distance_half_width: tuple[np.ndarray, ...]
    entropy: tuple[np.ndarray, ...]
    entropy_half_width: tuple[np.ndarray, ...]
    off_map: tuple[np.ndarray, ...]
    uniform_distance: np.ndarray
    n_images: int
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return means over heads: of the first and last unit, and of all as shares of what equal weights give."""
        distance = np.array([heads.mean() for heads in self.distance])
        entropy = np.array([heads.mean() for heads in self.entropy])
        return {
            "distance_first": float(distance[0]),
            "distance_last": float(distance[-1]),
            "distance_share": float(
                (distance / np.where(self.uniform_distance > 0, self.uniform_distance, np.nan)).mean()
            ),
            "entropy_share": float((entropy / np.log(self.n_keys)).mean()),
        }


@contextmanager
def _reading_pass(probe: Probe, options: Options) -> Iterator[Callable[[], object]]:
    units = _attending_units(probe, options.get("units"))
    with probe.guard(logits=False) as model:
        x, _ = next(iter(probe.iter_batches()))

        def read() -> None:
            sums = Sums(units, _shifts(model, units))
            sums.begin(images_of(x, "attention_distance"))
            with reading_branches(model, units, sums.note_size), reading_attention(units, sums.add):
                model(x)

        yield read


def _attending_units(probe: Probe, units: Sequence[Unit] | None) -> list[Unit]:
    """Return the units with attention among the given ones, or among those of the model."""
    if units is None:
        with probe.calling():
            units = units_of(probe.model, probe.first_images())
    return [unit for unit in units if unit.kind == "msa"]


def _traced_units(probe: Probe, units: Sequence[Unit]) -> dict[str, AttentionUnit]:
    """Return the units whose tokens' positions a forward pass shows, by name: no rule tells where class tokens stand."""
    with probe.calling():
        traced_units, _ = attention_units(probe.model, probe.first_images(), units)
    return {unit.name: unit for unit in traced_units}


def _shifts(model: nn.Module, units: Sequence[Unit]) -> list[tuple[int, int]]:
    """Return the rows and columns by which each unit's block rolls the map before it cuts windows; 0 where it does not."""
    owner = {id(child): block for block in model.modules() for child in block.children()}
    shifts = []
    for unit in units:
        shift = getattr(owner.get(id(unit.attention)), "shift_size", (0, 0))
        shifts.append((shift, shift) if isinstance(shift, int) else (int(shift[0]), int(shift[1])))
    return shifts


#: a forward pass in which attention weights are summed
_READING_PASS = WorkUnit("pass with attention weights", _reading_pass)


def _cost(workload: Workload, options: Options) -> MeasureCost:
    """Return the pass over all images that reads attention weights, after the search for the units."""
    works = [
        Work(_READING_PASS, Count.exactly(1), workload.n_images),
        Work(TAPS, Count.exactly(1), workload.first_batch, is_divided=False),
        *guard_checks(workload),
    ]
    return MeasureCost(works)


@declares_cost(_cost)
@record_options
def attention_distance(probe: Probe, *, units: Sequence[Unit] | None = None) -> AttentionDistanceResult:
    """Measure the mean distance and the entropy of the attention of every head, from explicit attention weights.

    Distance: pixels between the positions of query and key in the image, shifted windows put back in place, averaged
    with the weights over keys that have a place in the map, then over queries on the map and images (Dosovitskiy et al.
    2021, Fig 7; there for 128 images). Entropy: of the weights over all keys, mean over the same queries. A unit whose module
    computes attention several times an image has no one map: it is left out with a warning.

    Args:
        probe: Model and images.
        units: The residual units, for a model that `vitscope.models.structure.residual_units.units` does not know.

    Raises:
        ValueError: No attention whose weights can be read.
    """
    units = _attending_units(probe, units)
    sums = _read(probe, units)
    distance, entropy, off_map = estimate_lists(sums.means)
    repeated = set[int]().union(*distributed.gather_objects(sums.repeated))
    read = [i for i, estimate in enumerate(distance) if estimate.count and i not in repeated]
    if not read:
        raise ValueError(
            "Expected attention whose weights can be read, received none in "
            f"{type(probe.model).__name__}{_causes_of_none(units, repeated)}."
        )
    keys_and_uniform = sums.keys_and_uniform()
    n_keys = {i: keys_and_uniform[i][0] for i in read}
    uniform_distance = {i: keys_and_uniform[i][1] for i in read}
    reasons = _reasons_unread(units, read, repeated)
    for i in read:
        if not uniform_distance[i] > 0:
            reasons[units[i].name] = "a single token has no distance"
        elif not np.isfinite(distance[i].mean).all():
            reasons[units[i].name] = "its weights are not finite"
    warn_nulls("attention_distance", reasons)
    n_images = max(estimate.count for estimate in distance)
    warn_nulls("attention_distance", few_images(n_images))
    return AttentionDistanceResult(
        units=tuple(units[i].name for i in read),
        stages=np.array([units[i].stage for i in read]),
        depths=np.array([units[i].depth for i in read], dtype=np.float64),
        n_heads=np.array([len(distance[i].mean) for i in read]),
        n_keys=np.array([n_keys[i] for i in read]),
        distance=tuple(distance[i].mean for i in read),
        distance_half_width=tuple(distance[i].half_width for i in read),
        entropy=tuple(entropy[i].mean for i in read),
        entropy_half_width=tuple(entropy[i].half_width for i in read),
        off_map=tuple(off_map[i].mean for i in read),
        uniform_distance=np.array([uniform_distance[i] for i in read]),
        n_images=n_images,
        card=probe.card(),
    )


def _read(probe: Probe, units: Sequence[Unit]) -> Sums:
    """Return the sums over this rank's batches."""
    traced_units = _traced_units(probe, units)
    with probe.guard(logits=False) as model:
        sums = Sums(units, _shifts(model, units), traced_units)
        with distributed.failing_together():
            for _, (x, _) in track(probe.local_batches(), "attention distance"):
                sums.begin(images_of(x, "attention_distance"))
                with reading_branches(model, units, sums.note_size), reading_attention(units, sums.add):
                    model(x)
    return sums


def _reasons_unread(units: Sequence[Unit], read: Sequence[int], repeated: Collection[int]) -> dict[str, str]:
    """Return why units were left out, by name.

    Args:
        units: The units with attention.
        read: Indices of those that were read.
        repeated: Indices of those whose module computed more than one map for an image.
    """
    reasons = {}
    for i, unit in enumerate(units):
        if i in repeated:
            reasons[unit.name] = "its module computes attention several times per image, left out"
        elif i not in read:
            reasons[unit.name] = "its attention weights cannot be read, left out"
    return reasons


def _causes_of_none(units: Sequence[Unit], repeated: Collection[int]) -> str:
    """Return why no unit was read, as the end of an error; arguments as of `_reasons_unread`."""
    causes = ""
    if repeated:
        causes += "; their modules compute attention several times per image"
    names = [unit.name for unit in units if unit.attention is None]
    if names:
        others = f" and {len(names) - 1} more units" if len(names) > 1 else ""
        causes += (
            f"; heads of {names[0]}{others} cannot be told apart here, and vs.attention_maps reads the attention of more "
            "modules, nn.MultiheadAttention among them"
        )
    return causes
