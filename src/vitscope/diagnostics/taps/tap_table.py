"""Table of the places where a model's feature maps are read, with the shapes of the maps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import TAP_COORDINATES, Result
from vitscope.core.undefined_values import warn_nulls
from vitscope.models.structure.coverage import residual_blocks
from vitscope.models.structure.found_structure import find_structure
from vitscope.models.structure.taps import reading

#: what is said below the table of a model whose blocks are not known
UNKNOWN = (
    "no residual unit is known in this model: maps are read after convolutions and pooling, not after additions; "
    "pass Probe(..., taps=[vitscope.Tap(name, kind, stage, depth, module), ...]) to read others"
)


@dataclass(frozen=True)
class TapTableResult(Result, coordinates=TAP_COORDINATES):
    """The taps in the order of the forward pass; `table` gives them as text, which ``analyze.py`` prints.

    Attributes:
        taps: (n_taps) names.
        kinds: (n_taps) ``stem conv msa mlp pool head``.
        stages: (n_taps,) stage numbers, 0 for the stem.
        depths: (n_taps,) normalised depth in [0, 1].
        shapes: (n_taps, 3) channels, height and width of the maps; 0 where the forward pass does not come by.
        n_units: residual units that vitscope knows in the model; with none, its taps follow convolutions and pooling.
        card: under which conditions this was measured.
    """

    taps: tuple[str, ...]
    kinds: tuple[str, ...]
    stages: np.ndarray
    depths: np.ndarray
    shapes: np.ndarray
    n_units: int
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return the number of taps of each kind."""
        counts = {kind: self.kinds.count(kind) for kind in dict.fromkeys(self.kinds)}
        return {"n_taps": float(len(self.taps))} | {f"n_{kind}": float(n) for kind, n in counts.items()}

    def table(self) -> str:
        """Return the taps as text: name, kind, stage, depth and map (channels x height x width), a line a tap."""
        rows = [("tap", "kind", "stage", "depth", "map"), *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        return "\n".join(lines if self.n_units else [*lines, UNKNOWN])

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for name, kind, stage, depth, shape in zip(self.taps, self.kinds, self.stages, self.depths, self.shapes):
            yield name, kind, str(stage), f"{depth:.3f}", "x".join(str(n) for n in shape)


@record_options
def tap_table(probe: Probe) -> TapTableResult:
    """List a probe's taps, with the shapes that one forward pass of the first image gives them.

    Under ``torch.distributed`` every rank looks at the same image, so no rank waits for another.

    Raises:
        ValueError: a model without a tap.
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
    return TapTableResult(
        taps=tuple(tap.name for tap in probe.taps),
        kinds=tuple(tap.kind for tap in probe.taps),
        stages=np.array([tap.stage for tap in probe.taps]),
        depths=np.array([tap.depth for tap in probe.taps], dtype=float),
        shapes=shapes,
        n_units=_n_units(probe),
        card=probe.card(),
    )


def _n_units(probe: Probe) -> int:
    try:
        return len(residual_blocks(find_structure(probe.model, probe.first_images()).components))
    except ValueError:  # none, or a model of which nothing is known
        return 0
