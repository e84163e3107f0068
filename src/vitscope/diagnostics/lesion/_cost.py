"""Cost of a lesion study: passes by the whole model and with each lesion, before the first is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from vitscope.core.cost.image_passes import TAPS, evaluations, guard_checks
from vitscope.core.cost.measure_cost import ENTRY, Count, MeasureCost, Options, Work, Workload, WorkUnit
from vitscope.core.probe import Probe
from vitscope.diagnostics.lesion._ablated_forward import batch_passes
from vitscope.diagnostics.lesion._lesions import Lesion, lesions
from vitscope.models.structure.residual_units import Unit
from vitscope.models.structure.residual_units import units as units_of


def chosen_units(probe: Probe, units: Sequence[Unit] | None) -> list[Unit]:
    """Return the units that are lesioned: those given, or all of the model."""
    if units is None:
        with probe.calling():
            units = units_of(probe.model, probe.first_images())
    return list(units)


def chosen_lesions(units: Sequence[Unit], removals: Sequence[str]) -> list[Lesion]:
    """Return the lesions of a study, the removal of each branch first."""
    return lesions(units, ("branch_zero", *(r for r in removals if r != "branch_zero")))


def lesion_cost(workload: Workload, options: Options) -> MeasureCost:
    """Return the passes of all lesions.

    With ``cache``, passes start at the block that a lesion changes, and those of the first batch are compared with full ones;
    where they differ, all others are full, in the same number.
    """
    units = chosen_units(workload.model_probe(), options["units"])
    n_lesions, n, first = len(chosen_lesions(units, options["removals"])), workload.n_images, workload.first_batch
    works = [Work(TAPS, Count.exactly(1), first, is_divided=False), *guard_checks(workload)]
    if options["bn"] == "recalibrate":
        works.append(evaluations(workload, options, Count.exactly(1 + n_lesions)))
    else:
        full = WorkUnit("pass of each lesion", partial(_passes, is_resumed=False), ("removals", "units"), 1 + n_lesions)
        resumed = WorkUnit(
            "pass of each lesion from its block",
            partial(_passes, is_resumed=True),
            ("removals", "units"),
            1 + n_lesions,
        )
        is_compared = options["cache"] and workload.n_batches > 1
        works.append(Work(full, Count.exactly(1), first if is_compared else n))
        if is_compared:
            # the whole model's pass is made once
            works.append(Work(resumed, Count.exactly(n_lesions / (1 + n_lesions)), first))
            works.append(Work(resumed, Count.exactly(1), n - first))
    n_bytes = ENTRY * (4 * n_lesions + 2 * len(units))
    return MeasureCost(works, result_bytes=n_bytes)


@contextmanager
def _passes(probe: Probe, options: Options, is_resumed: bool) -> Iterator[Callable[[], object]]:
    units = chosen_units(probe, options["units"])
    with probe.guard() as model:
        yield batch_passes(
            probe,
            model,
            chosen_lesions(units, options["removals"]),
            next(probe.iter_batches()),
            units if is_resumed else (),
        )
