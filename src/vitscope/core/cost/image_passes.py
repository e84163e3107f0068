"""Pieces of work over images that measures are made of: evaluations, gradients, and a pass that reads feature maps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from vitscope.core import feature_pass
from vitscope.core.cost.measure_cost import Count, Formula, MeasureCost, Options, Work, Workload, WorkUnit
from vitscope.core.probe import Probe
from vitscope.core.tap import Tap
from vitscope.core.weight_space import MOST_POINTS_A_PASS, guarded_evaluation
from vitscope.runtime.dtypes import parse_float_dtype


@contextmanager
def _evaluation(probe: Probe, options: Options) -> Iterator[Callable[[], object]]:
    kind = parse_float_dtype(options.get("dtype"))
    with guarded_evaluation(probe, dtype=kind, bn=str(options.get("bn") or "eval")) as (_, evaluate_current_weights):
        yield evaluate_current_weights


@contextmanager
def _gradient(probe: Probe, options: Options) -> Iterator[Callable[[], object]]:
    with probe.guard(second_order=True) as model:
        x, y = next(iter(probe.iter_batches()))
        leaves = list(probe.parameters().values())
        yield lambda: torch.autograd.grad(probe.objective.data_loss(model(x), y), leaves, materialize_grads=True)


@contextmanager
def _taps(probe: Probe, options: Options) -> Iterator[Callable[[], object]]:
    yield lambda: Probe(probe.model, probe.batches, probe.objective).check_kinds()


#: the search for the places where feature maps are read
TAPS = WorkUnit("search for taps", _taps, forwards=0)
#: one evaluation of the loss, accuracy and calibration error over images
EVALUATION = WorkUnit("forward pass", _evaluation, ("dtype", "bn"))
#: the same with BatchNorm's statistics computed anew before it
RECALIBRATED_EVALUATION = WorkUnit("recalibrated forward pass", _evaluation, ("dtype", "bn"), forwards=2)
#: a gradient of the loss in the weights
GRADIENT = WorkUnit("gradient", _gradient)


def evaluations(workload: Workload, options: Options, repeats: Count, n_in_row: int = 1) -> Work:
    """Return evaluations over all images, under the options ``dtype`` and ``bn``.

    Args:
        workload: What is measured.
        options: The measure's.
        repeats: Number of points.
        n_in_row: Number of points of a row or line: where each pass would read the images again, some of a row share a pass.
    """
    recalibrates = options.get("bn") == "recalibrate" and workload.has_batch_norm
    unit = RECALIBRATED_EVALUATION if recalibrates else EVALUATION
    n_sharing = 1.0 if options.get("bn") == "recalibrate" else n_in_row / -(-n_in_row // MOST_POINTS_A_PASS)
    return Work(unit, repeats, workload.n_images, n_sharing=n_sharing)


def changed_evaluations(workload: Workload, n_changes: int) -> Work:
    """Return evaluations of each batch as it is and with each of some changes, for which it is read once."""
    repeats = 1 + n_changes
    return Work(EVALUATION, Count.exactly(repeats), workload.n_images, n_sharing=repeats)


def guard_checks(
    workload: Workload, *, moves_weights: bool = False, second_order: bool = False, n_images: int | None = None
) -> list[Work]:
    """Return the passes by which `Probe.guard` looks whether the model repeats itself, over the first batch.

    Two passes are compared; where the model seems to keep tables that it makes of its weights, one more finds them. Where the
    weights count, a pass with two images finds those that the outputs do not depend on.

    Args:
        workload: What is measured.
        moves_weights: Whether the measure evaluates the model at other weights.
        second_order: Whether it differentiates the model.
        n_images: Number of images that it evaluates at once; None for a batch.
    """
    n = min(workload.first_batch, n_images or workload.first_batch)

    def check(unit: WorkUnit, repeats: Count, n_images: int) -> Work:
        return Work(unit, repeats, n_images, is_divided=False, is_check=True)

    tables = check(EVALUATION, Count(0, 0, 1), n)
    works = [tables, check(GRADIENT if second_order else EVALUATION, Count.exactly(2), n)]
    return [*works, check(GRADIENT, Count.exactly(1), min(2, n))] if moves_weights or second_order else works


def independence_checks(workload: Workload, n_at_once: int = 2) -> list[Work]:
    """Return the passes that show whether images of a batch influence each other, see `refuse_dependent_images`.

    Args:
        workload: What is measured.
        n_at_once: Images that are evaluated together, half of them alone too.
    """
    n, n_part = min(max(2, n_at_once), workload.first_batch), max(1, n_at_once // 2)
    sizes = (n, n_part) if n > n_part else ()
    return [Work(EVALUATION, Count.exactly(1), size, is_divided=False, is_check=True) for size in sizes]


def trained_and_untrained_passes(
    workload: Workload,
    options: Options,
    unit: WorkUnit,
    *,
    first_unit: WorkUnit | None = None,
    evaluation: WorkUnit | None = None,
    tap_searches_a_model: bool = True,
    takes_batches_apart: bool = False,
) -> MeasureCost:
    """Return a pass over all images, and another of the model before training where the measure has it (``initial``).

    Args:
        workload: What is measured.
        options: All options of the measure.
        unit: The pass over a batch.
        first_unit: The pass over the first batch, where more is done with it; None for the same pass.
        evaluation: The evaluation of each model's sums, timed with those of the first batch; None where it takes no time.
        tap_searches_a_model: Whether the places of feature maps are searched in each model; in the trained one alone otherwise.
        takes_batches_apart: Whether each model is checked for images that influence each other.
    """
    n_models = 1 + workload.input_size(options, "initial")
    checks = guard_checks(workload) * n_models  # each model has a probe of its own
    checks += independence_checks(workload) * n_models if takes_batches_apart else []
    n_searches = n_models if tap_searches_a_model else 1
    repeats, n, n_first = Count.exactly(n_models), workload.n_images, workload.first_batch
    passes = [Work(unit, repeats, n)]
    if first_unit is not None:
        passes = [Work(unit, repeats, n - n_first), Work(first_unit, repeats, n_first)]
    if evaluation is not None:
        passes.append(Work(evaluation, repeats, n_first, is_divided=False))
    searches = Work(TAPS, Count.exactly(n_searches), workload.first_batch, is_divided=False)
    return MeasureCost([*passes, searches, *checks], held_bytes=(n_models - 1.0) * workload.parameter_bytes)


def feature_pass_cost(
    make: Callable[..., feature_pass.Accumulator],
    result_bytes: Callable[[Workload, Options], float | None] = lambda workload, options: None,
    further_images: Callable[[Workload, Options], int] = lambda workload, options: 0,
    evaluation: Callable[[Workload, Options], MeasureCost | None] = lambda workload, options: None,
) -> Formula:
    """Return the formula of a measure of the feature maps of one pass: the pass with its accumulator, and the sums' evaluation.

    Args:
        make: The function that makes the accumulator, see `vitscope.core.feature_pass.shares_pass`. Options that it does not
            take, such as a second model, leave the cost unknown.
        result_bytes: Bytes of the result's arrays, where they follow from the workload and the options.
        further_images: Number of images that go through the model once more when the pass has ended.
        evaluation: The cost of the sums' evaluation, where it depends on the number of images; None where that of the first
            batch tells its time.
    """
    names = [name for name in inspect.signature(make).parameters if name != "probe"]

    def accumulator(probe: Probe, options: Options) -> feature_pass.Accumulator:
        return make(probe, **{name: options[name] for name in names if name in options})

    @contextmanager
    def reading(probe: Probe, options: Options) -> Iterator[Callable[[], object]]:
        sums = accumulator(probe, options)
        yield lambda: feature_pass.run_feature_pass(probe, [sums], "feature maps")

    @contextmanager
    def evaluating(probe: Probe, options: Options) -> Iterator[Callable[[], object]]:
        def evaluate() -> object:
            sums = accumulator(probe, options)
            feature_pass.run_feature_pass(probe, [sums], "feature maps")
            return sums.result()

        yield evaluate

    pass_unit = WorkUnit(f"feature pass, {make.__module__}", reading, tuple(names))
    # the pass that it needs is part of the unit, so that each time begins with new sums
    end_unit = WorkUnit(f"feature pass and result, {make.__module__}", evaluating, tuple(names))

    def formula(workload: Workload, options: Options) -> MeasureCost | None:
        if any(value is not None for name, value in options.items() if name not in names and name != "partial"):
            return None
        n, n_first = workload.n_images, workload.first_batch
        own_cost = evaluation(workload, options)
        if own_cost is not None:
            passes = [Work(pass_unit, Count.exactly(1), n), *own_cost.works]
        else:
            end = Work(end_unit, Count.exactly(1), n_first, is_divided=False)
            passes = [Work(pass_unit, Count.exactly(1), n - n_first), end]
        works = [
            *passes,
            Work(EVALUATION, Count.exactly(1), further_images(workload, options)),
            Work(TAPS, Count.exactly(1), workload.first_batch, is_divided=False),
            *guard_checks(workload),
        ]
        held_bytes = own_cost.held_bytes if own_cost is not None else 0.0
        return MeasureCost(works, held_bytes=held_bytes, result_bytes=result_bytes(workload, options))

    return formula


def tap_sizes(probe: Probe) -> list[tuple[int, int]]:
    """Return height and width of the feature maps at each tap of a probe, from a pass over its images."""
    sizes = _MapSizes()
    feature_pass.run_feature_pass(probe, [sizes], "feature maps")
    return [sizes.result()[index] for index in sorted(sizes.result())]


class _MapSizes:
    """An accumulator that keeps the size of the maps of each tap."""

    def __init__(self) -> None:
        self._sizes: dict[int, tuple[int, int]] = {}

    def read(self, index: int, tap: Tap, x: torch.Tensor) -> None:
        """Take note of the size of maps ``(B, C, h, w)``."""
        self._sizes[index] = (int(x.shape[-2]), int(x.shape[-1]))

    def close_batch(self, number: int, n_images: int) -> None:
        """Do nothing: a size does not depend on the images."""

    def result(self) -> dict[int, tuple[int, int]]:
        """Return the sizes by the number of the tap."""
        return self._sizes
