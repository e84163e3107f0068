"""Cost of the class structure of the Hessian: its searches, products, and gradients by class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vitscope.core.cost.image_passes import EVALUATION, guard_checks
from vitscope.core.cost.measure_cost import Count, MeasureCost, Options, Work, Workload, WorkUnit
from vitscope.core.probe import Probe
from vitscope.diagnostics.class_structure._class_gradients import class_gradients
from vitscope.linalg.curvature.curvature_options import CurvatureOptions
from vitscope.linalg.curvature.operator_factory import curvatures
from vitscope.linalg.curvature.product_cost import (
    GRAPH,
    PRODUCT,
    REBUILT_PRODUCT,
    basis_bytes,
    curvature_options,
    keeps_graph,
    lanczos_products,
    mean_products,
    with_options,
)

#: eigenvalues that are searched at most without a number
MOST_EIGENVALUES = 100


def n_logits(probe: Probe, options: CurvatureOptions) -> int:
    """Return the number of logits of an image."""
    with probe.guard(dtype=options.torch_dtype, micro_batch=options.micro_batch) as model:
        x, _ = next(probe.iter_batches())
        return int(model(x[:1]).shape[1])


def n_searched(k: int | None, n_classes: int, size: int) -> int:
    """Return the number of eigenvalues that are searched."""
    return k if k is not None else min(2 * n_classes + 10, MOST_EIGENVALUES, size)


@contextmanager
def _class_pass(probe: Probe, options: Options) -> Iterator[Callable[[], object]]:
    n_classes = n_logits(probe, curvature_options(options))
    with curvatures(probe, curvature_options(options), operator="ggn") as operators:
        batch = next(iter(probe.local_batches()))[1]
        yield lambda: class_gradients(
            operators.model,
            lambda: [batch],
            operators.parameters,
            n_classes,
            len(batch[1]),
            [],
            options.get("max_memory"),
        )


#: a forward pass and a gradient for each logit
CLASS_PASS = WorkUnit("gradients by class and logit", _class_pass, ("parameters", "dtype", "max_memory"))


def class_structure_cost(workload: Workload, options: Options) -> MeasureCost:
    """Return the searches on all images, on each part and of the Gauss-Newton matrix, and one pass with gradients by class."""
    n_classes, n_splits = n_logits(workload.model_probe(), curvature_options(options)), int(options["n_splits"])
    k = n_searched(options["k"], n_classes, workload.n_parameters)
    search, n = lanczos_products(workload, options, k), workload.n_images
    works = [
        Work(EVALUATION, Count.exactly(1), 1, is_divided=False),
        *(work for work in guard_checks(workload, n_images=options.get("micro_batch")) if work.repeats.low),
        *mean_products(workload, options, search, gradients=2),
    ]
    for _ in range(n_splits):
        if keeps_graph(workload, options, workload.n_batches):
            works += [Work(GRAPH, Count.exactly(1), n / n_splits), Work(PRODUCT, search, n / n_splits)]
        else:
            works += [Work(GRAPH, Count.exactly(1), n / n_splits), Work(REBUILT_PRODUCT, search, n / n_splits)]
    gauss_newton = MeasureCost(
        mean_products(workload, options, search + Count.exactly(k + int(options["n_vectors"])), gradients=1)
    ).measured()
    works += with_options(gauss_newton, "Gauss-Newton", operator="ggn").works
    works.append(Work(CLASS_PASS, Count.exactly(1), n))
    return MeasureCost(
        works,
        held_bytes=float(k) * workload.parameter_bytes,
        held_bytes_shared=basis_bytes(workload, search.expected),
    )
