"""The cost of a measure before it starts: passes over images, products and bytes, from closed formulas of its options.

A measure declares its formula with `declares_cost`. The formula says how often which piece of work is done; how long a piece
takes is measured once, with the model and the images at hand (`vitscope.analyses.prediction.cost_prediction`). A measure without
a formula has an unknown cost.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence, Sized
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import nn

from vitscope.core.probe import Probe
from vitscope.runtime.torch_internals import BatchNormBase

#: options of a measure by name
Options = Mapping[str, Any]

#: bytes of an entry of a result, which is in float64
ENTRY = 8


@dataclass(frozen=True)
class Workload:
    """Sizes of the model and the images of a measurement, on which formulas depend.

    Attributes:
        n_images: Number of images.
        batch_size: Number of images of a batch; the last one may have fewer.
        image_size: Height and width of an image in pixels.
        n_parameters: Number of trainable parameters.
        parameter_bytes: Their bytes.
        n_tensors: Number of tensors that they are in.
        map_sizes: Height and width of the feature maps at each place where they are read; None where they are not known.
        has_batch_norm: Whether the model has BatchNorm layers with running statistics.
        probe: The model and some of its images, in which formulas count units, layers or classes; None where it is not at hand.
        input_sizes: Sizes of the arguments that a run supplies (`vitscope.core.run_inputs`), by name: numbers of images, of
            checkpoints or of models.
    """

    n_images: int
    batch_size: int
    image_size: tuple[int, int]
    n_parameters: int
    parameter_bytes: int
    n_tensors: int = 1
    map_sizes: Sequence[tuple[int, int]] | None = None
    has_batch_norm: bool = False
    probe: Probe | None = field(default=None, repr=False)
    input_sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def n_batches(self) -> int:
        """The number of batches."""
        return -(-self.n_images // self.batch_size)

    @property
    def first_batch(self) -> int:
        """The number of images of the first batch."""
        return min(self.n_images, self.batch_size)

    def model_probe(self) -> Probe:
        """Return the probe.

        Raises:
            UnknownCost: There is none.
        """
        if self.probe is None:
            raise UnknownCost("it depends on the parts of the model, which is not at hand")
        return self.probe

    def input_size(self, options: Options, name: str) -> int:
        """Return the size of an argument that a run supplies: that of what is passed, or else of what the run has.

        Args:
            options: The measure's.
            name: The argument's name.
        """
        value = options.get(name)
        if isinstance(value, Probe):
            return value.n_images
        if isinstance(value, nn.Module):
            return 1
        if isinstance(value, Sized) and not isinstance(value, str | Mapping):
            return len(value)
        return self.input_sizes.get(name, 0)


class UnknownCost(ValueError):
    """The cost does not follow from the workload and the options; the text says why."""


def workload_of(
    model: nn.Module,
    batch_size: int,
    n_images: int,
    image_size: tuple[int, int] = (0, 0),
    map_sizes: Sequence[tuple[int, int]] | None = None,
) -> Workload:
    """Return the workload of a model and images.

    Args:
        model: The model on any device, also on ``meta``.
        batch_size: Number of images of a batch.
        n_images: Number of images.
        image_size: Height and width of an image in pixels; zeros where no formula asks for them.
        map_sizes: Height and width of the feature maps at each place where they are read, where they are known.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return Workload(
        n_images,
        min(batch_size, n_images),
        image_size,
        sum(p.numel() for p in parameters),
        sum(p.numel() * p.element_size() for p in parameters),
        len(parameters),
        map_sizes,
        any(isinstance(m, BatchNormBase) and m.track_running_stats for m in model.modules()),
    )


@dataclass(frozen=True)
class Count:
    """A number of repeats, with its bounds where it is not known before.

    Attributes:
        expected: What is taken for the prediction.
        low: Lower bound.
        high: Upper bound.
    """

    expected: float
    low: float
    high: float

    @classmethod
    def exactly(cls, n: float) -> Count:
        """Return a number that is known."""
        return cls(n, n, n)

    def __add__(self, other: Count) -> Count:
        """Return the sum."""
        return Count(self.expected + other.expected, self.low + other.low, self.high + other.high)

    def times(self, factor: float) -> Count:
        """Return a multiple."""
        return Count(self.expected * factor, self.low * factor, self.high * factor)

    def __contains__(self, n: float) -> bool:
        """Tell whether a number lies within the bounds."""
        return self.low <= n <= self.high


@dataclass(frozen=True)
class WorkUnit:
    """A piece of work that is timed once with one batch of the images.

    Attributes:
        name: Words for it.
        prepare: Function that takes a probe of one batch and the measure's options; returns a context that gives the function
            that does the work once.
        options: Options of the measure that change it: pieces that agree in them are timed once.
        forwards: Number of forward passes in it.
        n_timed: Number of images to time it with; None for a batch.
        is_product: Whether it is a product with the curvature.
    """

    name: str
    prepare: Callable[[Probe, Options], AbstractContextManager[Callable[[], object]]] = field(repr=False)
    options: tuple[str, ...] = ()
    forwards: float = 1
    n_timed: int | None = None
    is_product: bool = False

    def key(self, options: Options) -> Hashable:
        """Return what pieces of work that take the same time have in common."""
        return self.name, self.prepare, *(str(options.get(name)) for name in self.options)


@dataclass(frozen=True)
class Work:
    """A piece of work and how often it is done.

    Attributes:
        unit: The piece of work.
        repeats: How often it is done.
        n_images: Number of images of each time.
        is_divided: Whether the ranks of a process group divide it; each does it whole otherwise.
        is_check: Whether it is a check before the measurement.
        n_sharing: Number of times that share one reading of the images, on average, where each pass reads them again; infinite
            where another piece of work has read them.
    """

    unit: WorkUnit
    repeats: Count
    n_images: float
    is_divided: bool = True
    is_check: bool = False
    n_sharing: float = 1.0


@dataclass(frozen=True)
class MeasureCost:
    """Work and memory of a measure.

    Attributes:
        works: The measure's pieces of work.
        held_bytes: Bytes of the device beside the model and what a piece of work needs, such as a Lanczos basis or directions.
        held_bytes_shared: Those of them that the ranks of a process group share out.
        result_bytes: Bytes of the result's arrays before compression; None where they are not known.
        limit_s: Seconds after which the measure stops by itself; None without such a limit.
    """

    works: Sequence[Work]
    held_bytes: float = 0.0
    held_bytes_shared: float = 0.0
    result_bytes: float | None = None
    limit_s: float | None = None

    @property
    def forward_images(self) -> Count:
        """The number of images that go forward through the model, repeats counted."""
        return self._sum(lambda work: work.repeats.times(work.n_images * work.unit.forwards))

    @property
    def products(self) -> Count:
        """The number of products with the curvature."""
        return self._sum(lambda work: work.repeats.times(work.unit.is_product))

    def measured(self) -> MeasureCost:
        """Return the cost without the checks before the measurement, which a probe makes once."""
        return replace(self, works=[work for work in self.works if not work.is_check])

    def _sum(self, part: Callable[[Work], Count]) -> Count:
        return sum((part(work) for work in self.works), Count.exactly(0))


#: takes the workload and all options of the measure, defaults included; None, or `UnknownCost`, where they leave the cost unknown
Formula = Callable[[Workload, Options], MeasureCost | None]

#: attribute of a measure that holds its formula
_ATTRIBUTE = "cost_formula"

Measure = TypeVar("Measure", bound=Callable[..., Any])


def declares_cost(formula: Formula) -> Callable[[Measure], Measure]:
    """Decorate a measure whose cost follows from its options.

    Args:
        formula: Function that takes the workload and all options, and returns the cost, or None where the options leave it
            unknown.
    """

    def declare(measure: Measure) -> Measure:
        setattr(measure, _ATTRIBUTE, formula)
        return measure

    return declare


def cost_of(measure: Callable[..., Any], options: Options, workload: Workload) -> MeasureCost | None:
    """Return the cost of a measure; None where it is unknown.

    Args:
        measure: The function.
        options: The measure's arguments; the defaults take the place of the others.
        workload: What it works on.
    """
    try:
        return stated_cost(measure, options, workload)
    except UnknownCost:
        return None


def stated_cost(measure: Callable[..., Any], options: Options, workload: Workload) -> MeasureCost:
    """Return the cost of a measure, see `cost_of`.

    Raises:
        UnknownCost: It is unknown; the text says why.
    """
    options = all_options(measure, options)
    formula: Formula | None = getattr(measure, _ATTRIBUTE, None)
    cost = formula(workload, options) if formula is not None else None
    if cost is None:
        raise UnknownCost("no formula for it, or for its options")
    return cost


def all_options(measure: Callable[..., Any], options: Options) -> dict[str, Any]:
    """Return a measure's options with the defaults of those that are not given."""
    parameters = inspect.signature(measure).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty and p.name != "partial"} | dict(options)
