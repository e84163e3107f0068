"""Cost of measures that multiply vectors by the curvature: the products, the gradients before them, and a Lanczos basis."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields, replace
from math import inf
from typing import Any

import torch

from vitscope.core.cost.image_passes import guard_checks, independence_checks
from vitscope.core.cost.measure_cost import Count, MeasureCost, Options, UnknownCost, Work, Workload, WorkUnit
from vitscope.core.probe import Probe
from vitscope.linalg.curvature.curvature_options import CurvatureOptions
from vitscope.linalg.curvature.operator_factory import Curvatures, curvatures
from vitscope.linalg.eigensolver import CONFIRMATIONS

#: options of a measure that change the time of a product
_OPTIONS = ("operator", "parameters", "dtype", "bn", "product", "micro_batch", "checkpoint_blocks")


def curvature_options(options: Options) -> CurvatureOptions:
    """Return those of a measure's options that are options of its curvature."""
    names = [field.name for field in fields(CurvatureOptions)]
    return CurvatureOptions(**{name: options[name] for name in names if name in options})


def _batch_operator(operators: Curvatures) -> Any:
    return operators.batch(*next(iter(operators.probe.local_batches())))


@contextmanager
def _graph(probe: Probe, options: Options) -> Iterator[Callable[[], object]]:
    with curvatures(probe, curvature_options(options)) as operators:
        yield lambda: _batch_operator(operators).gradient(data_only=True)


@contextmanager
def _product(probe: Probe, options: Options) -> Iterator[Callable[[], object]]:
    with curvatures(probe, curvature_options(options)) as operators:
        operator = _batch_operator(operators)
        v = torch.ones(operator.size, dtype=operator.dtype, device=operator.device)
        operator(v)  # builds the graph
        yield lambda: operator(v)


@contextmanager
def _rebuilt_product(probe: Probe, options: Options) -> Iterator[Callable[[], object]]:
    with curvatures(probe, curvature_options(options)) as operators:
        operator = _batch_operator(operators)
        v = torch.ones(operator.size, dtype=operator.dtype, device=operator.device)

        def rebuild_and_multiply() -> object:
            operator.release()
            return operator(v)

        yield rebuild_and_multiply


#: the gradient with the graph that products with one batch's curvature keep
GRAPH = WorkUnit("gradient with its graph", _graph, _OPTIONS)
#: a product by a kept graph
PRODUCT = WorkUnit("product", _product, _OPTIONS, forwards=0, is_product=True)
#: a product that makes the graph of each batch anew, as one over several batches does
REBUILT_PRODUCT = WorkUnit("product over several batches", _rebuilt_product, _OPTIONS, is_product=True)


def keeps_graph(workload: Workload, options: Options, n_batches: int = 1) -> bool:
    """Tell whether products over that many batches keep one graph: all their images are differentiated at once."""
    micro_batch = options.get("micro_batch")
    return n_batches == 1 and (micro_batch is None or micro_batch >= workload.first_batch)


def product_checks(workload: Workload, options: Options) -> list[Work]:
    """Return the passes of the guard for derivatives, see `guard_checks`, and those that parts of a batch need."""
    micro_batch = options.get("micro_batch")
    checks = guard_checks(workload, second_order=True, n_images=micro_batch)
    return [*checks, *independence_checks(workload, micro_batch)] if micro_batch else checks


def mean_products(workload: Workload, options: Options, products: Count, gradients: int = 0) -> list[Work]:
    """Return the work of products with the mean curvature over all batches.

    Args:
        workload: What is measured.
        options: The measure's, of which ``micro_batch`` counts.
        products: Number of products.
        gradients: Number of gradients before the first product.
    """
    n = workload.n_images
    checks = product_checks(workload, options)
    if keeps_graph(workload, options, workload.n_batches):
        return [Work(GRAPH, Count.exactly(1), n), Work(PRODUCT, products, n), *checks]
    gradient_works = [Work(GRAPH, Count.exactly(gradients), n)] if gradients else []
    return [*gradient_works, Work(REBUILT_PRODUCT, products, n), *checks]


def batch_products(workload: Workload, options: Options, products: Count) -> list[Work]:
    """Return the work of that many products with each batch's own curvature, each after a gradient."""
    n_batches = workload.n_batches
    n = workload.n_images / n_batches
    checks = product_checks(workload, options)
    if keeps_graph(workload, options):
        return [Work(GRAPH, Count.exactly(n_batches), n), Work(PRODUCT, products.times(n_batches), n), *checks]
    # of the batch that the gradient has read
    rebuilt = Work(REBUILT_PRODUCT, products.times(n_batches), n, n_sharing=inf)
    return [Work(GRAPH, Count.exactly(n_batches), n), rebuilt, *checks]


def search_products(workload: Workload, options: Options, n_values: int) -> Count | None:
    """Return the products of a Lanczos search for extreme eigenvalues; None for another solver.

    At least as many as values and confirmations; at most ``max_products`` (or the values, if more), or as many as there are
    parameters. Taken for the prediction are those of `expected_search_products`.

    Args:
        workload: What is measured.
        options: The measure's: ``solver`` and ``max_products``.
        n_values: Number of eigenvalues, of both ends together.
    """
    if options.get("solver", "lanczos") != "lanczos":
        return None
    most = min(max(int(options.get("max_products", 200)), n_values), workload.n_parameters)
    least = min(most, n_values + CONFIRMATIONS - 1)
    return Count(min(most, expected_search_products(n_values)), least, most)


def lanczos_products(workload: Workload, options: Options, n_values: int) -> Count:
    """Return what `search_products` does, of a measure without other solvers.

    Raises:
        UnknownCost: The options name another solver.
    """
    products = search_products(workload, options, n_values)
    if products is None:
        raise UnknownCost("the products of power iteration depend on the spectrum")
    return products


def expected_search_products(n_values: int) -> int:
    """Return the number of products that a search for that many eigenvalues is taken to make.

    Until they are known it takes about 5 and 2 for each value, at a tolerance of 1e-3 for the top of trained networks' spectra,
    and 27 % more for the products that confirm them, see `vitscope.linalg.eigensolver.CONFIRMATIONS`.
    """
    return round(1.27 * (5 + 2 * n_values))


def basis_bytes(workload: Workload, n_rows: float) -> float:
    """Return the bytes of a basis of that many rows and of two vectors beside it."""
    return (n_rows + 2) * workload.parameter_bytes


def subset_sizes(workload: Workload, subsets: Mapping[str, Any], options: Options) -> dict[str, int]:
    """Return the number of parameters of each subset of the model.

    Args:
        workload: What is measured.
        subsets: What ``parameters=`` takes, by name.
        options: The measure's other curvature options.

    Raises:
        UnknownCost: No model is at hand.
    """
    probe = workload.model_probe()
    sizes = {}
    for name, subset in subsets.items():
        subset_options = replace(curvature_options(options), parameters=subset)
        with curvatures(probe, subset_options) as operators:
            sizes[name] = sum(p.numel() for p in operators.parameters.values())
    return sizes


def restricted(workload: Workload, n_parameters: int) -> Workload:
    """Return a workload of some parameters of its model.

    Raises:
        UnknownCost: No model is at hand.
    """
    share = n_parameters / sum(p.numel() for p in workload.model_probe().parameters().values())
    return replace(
        workload,
        n_parameters=round(share * workload.n_parameters),
        parameter_bytes=round(share * workload.parameter_bytes),
    )


def with_options(cost: MeasureCost, text: str, **options: Any) -> MeasureCost:
    """Return the cost of a part of a measure that is done with other options, which its pieces of work are timed with.

    Args:
        cost: By the formula, with the other options.
        text: Words for them, which tell its pieces of work from those of other parts.
        options: The options that differ.
    """
    works = [
        replace(
            work,
            unit=replace(
                work.unit,
                name=f"{work.unit.name}, {text}",
                prepare=_OtherOptions(work.unit.prepare, text, options),
                options=tuple(name for name in work.unit.options if name not in options),
            ),
        )
        for work in cost.works
    ]
    return replace(cost, works=works)


@dataclass(frozen=True)
class _OtherOptions:
    """The preparation of a piece of work with some options in place of the measure's; equal where ``text`` is."""

    prepare: Callable[[Probe, Options], AbstractContextManager[Callable[[], object]]]
    text: str
    options: Mapping[str, Any] = field(compare=False)

    def __call__(self, probe: Probe, options: Options) -> AbstractContextManager[Callable[[], object]]:
        return self.prepare(probe, {**options, **self.options})
