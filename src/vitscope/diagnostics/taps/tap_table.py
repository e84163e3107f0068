"""Tables of the places where a model's feature maps are read, with the shapes of the maps, and of the units of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from vitscope.core.cost.image_passes import EVALUATION, TAPS, guard_checks
from vitscope.core.cost.measure_cost import Count, MeasureCost, Options, Work, Workload, WorkUnit, declares_cost
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import TAP_COORDINATES, Result
from vitscope.core.tap import tap_fields
from vitscope.core.undefined_values import warn_nulls
from vitscope.models.structure.structure_table import Structure, StructureUnit, structure
from vitscope.models.structure.taps import reading
from vitscope.runtime.errors import StructureError
from vitscope.runtime.text_layout import aligned

#: line below the table of a model whose blocks are not known
UNKNOWN = (
    "no residual unit is known in this model: maps are read after convolutions and pooling, not after additions; "
    "pass Probe(..., taps=[vitscope.Tap(name, kind, stage, depth, module), ...]) to read others"
)


#: values of ``unit_branches``
BRANCHES = ("residual", "residual, returned by no module", "not residual")

COORDINATES = {**TAP_COORDINATES, "unit": "units", "kind": ("kinds", "unit_kinds"), "stage": ("stages", "unit_stages")}


@dataclass(frozen=True)
class TapTableResult(Result, coordinates=COORDINATES):
    """The taps and units in the order of the forward pass; `table` and `unit_table` are the text that ``analyze.py`` prints.

    Attributes:
        taps: (n_taps) names.
        kinds: (n_taps) ``stem conv msa mlp pool head``.
        stages: (n_taps,) stage numbers, 0 for the stem.
        depths: (n_taps,) normalized depth in [0, 1].
        shapes: (n_taps, 3) channels, height and width of the maps; 0 where the forward pass does not come by.
        n_units: Residual units that vitscope knows in the model; with none, its taps follow convolutions and pooling.
        units: (n_structure_units) names of residual units and of layers between them; without residual units, of convolutions
            and pooling.
        unit_kinds: (n_structure_units) ``conv msa mlp pool``.
        unit_stages: (n_structure_units,) stage numbers, from 1.
        unit_parameters: (n_structure_units,) number of elements of the unit's parameters.
        unit_branches: (n_structure_units) ``residual`` where lesions and branch measures reach the unit, ``residual, returned by
            no module`` where its branch can neither be read nor removed, ``not residual`` where it adds to no stream.
        uncovered: (n_uncovered) what belongs to no unit, in words; measures that compare kinds refuse such a model.
        card: Conditions of the measurement.
    """

    taps: tuple[str, ...]
    kinds: tuple[str, ...]
    stages: np.ndarray
    depths: np.ndarray
    shapes: np.ndarray
    n_units: int
    units: tuple[str, ...] = ()
    unit_kinds: tuple[str, ...] = ()
    unit_stages: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))
    unit_parameters: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))
    unit_branches: tuple[str, ...] = ()
    uncovered: tuple[str, ...] = ()
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return the number of taps and of residual units of each kind."""
        counts = {f"n_{kind}": self.kinds.count(kind) for kind in dict.fromkeys(self.kinds)}
        residual = [kind for kind, branch in zip(self.unit_kinds, self.unit_branches) if branch != BRANCHES[2]]
        counts |= {"n_units": self.n_units}
        counts |= {f"n_units_{kind}": residual.count(kind) for kind in dict.fromkeys(residual)}
        return {"n_taps": float(len(self.taps))} | {name: float(n) for name, n in counts.items()}

    def table(self) -> str:
        """Return the taps as text: name, kind, stage, depth and map (channels x height x width), a line a tap."""
        lines = aligned([("tap", "kind", "stage", "depth", "map"), *self._rows()])
        return "\n".join(lines if self.n_units else [*lines, UNKNOWN])

    def unit_table(self) -> str:
        """Return the units as text: name, kind, stage, number of parameters and branch, a line a unit."""
        columns = (self.units, self.unit_kinds, self.unit_stages, self.unit_parameters, self.unit_branches)
        rows = [(name, kind, str(stage), f"{n:,}", branch) for name, kind, stage, n, branch in zip(*columns)]
        lines = aligned([("unit", "kind", "stage", "parameters", "branch"), *rows])
        return "\n".join([*lines, *(f"not covered: {text}" for text in self.uncovered)])

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for name, kind, stage, depth, shape in zip(self.taps, self.kinds, self.stages, self.depths, self.shapes):
            yield name, kind, str(stage), f"{depth:.3f}", "x".join(str(n) for n in shape)


@contextmanager
def _structure_search(probe: Probe, options: Options) -> Iterator[Callable[[], object]]:
    yield lambda: _structure(probe)


#: the search for the units of the model, by an image
_STRUCTURE = WorkUnit("search for units", _structure_search, forwards=0, n_timed=1)


def _cost(workload: Workload, options: Options) -> MeasureCost:
    """Return the searches for taps and units and a pass with one image."""
    works = [
        Work(TAPS, Count.exactly(1), workload.first_batch, is_divided=False),
        Work(_STRUCTURE, Count.exactly(1), 1, is_divided=False),
        Work(EVALUATION, Count.exactly(1), 1, is_divided=False),
        *guard_checks(workload),
    ]
    return MeasureCost(works)


@declares_cost(_cost)
@record_options
def tap_table(probe: Probe) -> TapTableResult:
    """List a probe's taps, with the shapes that one forward pass of the first image gives them, and the units of its model.

    Under ``torch.distributed`` every rank looks at the same image, so no rank waits for another.

    Raises:
        ValueError: A model without a tap.
    """
    probe.check_taps()
    shapes = np.zeros((len(probe.taps), 3), dtype=int)

    def read(index: int, tap: Any, x: Tensor) -> None:
        shapes[index] = x.shape[1:]

    with probe.guard() as model, reading(model, probe.taps, read):
        x, _ = next(probe.iter_batches())
        model(x[:1])
    missed = {tap.name: "not reached by the forward pass" for tap, shape in zip(probe.taps, shapes) if not shape[0]}
    warn_nulls("tap_table", missed)
    model_structure = _structure(probe)
    units = model_structure.units
    sizes = model_structure.sizes or {}
    return TapTableResult(
        **tap_fields(probe.taps),
        shapes=shapes,
        n_units=sum(unit.residual for unit in units),
        units=tuple(unit.name for unit in units),
        unit_kinds=tuple(unit.kind for unit in units),
        unit_stages=np.array([unit.stage for unit in units], dtype=int),
        unit_parameters=np.array([sum(sizes[name] for name in unit.parameters) for unit in units], dtype=int),
        unit_branches=tuple(_branch(unit) for unit in units),
        uncovered=model_structure.missing,
        card=probe.card(),
    )


def _structure(probe: Probe) -> Structure:
    images = probe.first_images()
    try:
        with probe.calling():
            return structure(probe.model, images)
    except StructureError:  # a model of which nothing is known
        return Structure("", (), {})


def _branch(unit: StructureUnit) -> str:
    if not unit.residual:
        return BRANCHES[2]
    return BRANCHES[0] if unit.branch else BRANCHES[1]
