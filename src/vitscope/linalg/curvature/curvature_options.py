"""The options that the curvature measures share, and their place in the signatures of the measures."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, ParamSpec, TypedDict, TypeVar, get_args, get_type_hints

import torch

from vitscope.core.checks.option_checks import checks_options
from vitscope.linalg.basis_memory import Placement, check_placement
from vitscope.linalg.curvature.curvature_operator import OperatorKind, ProductKind, check_operator
from vitscope.linalg.eigensolver import check_stopping_rule
from vitscope.linalg.solvers import Solver, check_solver
from vitscope.runtime.dtypes import DERIVATIVE_DTYPE_NAMES, DerivativeDtypeName, parse_float_dtype
from vitscope.runtime.value_ranges import OpenUnitInterval, PositiveFloat, PositiveInt, Seed

P = ParamSpec("P")
R = TypeVar("R")

#: statistics of BatchNorm: the running ones, or those of each batch
BatchNormStatistics = Literal["eval", "batch"]


@dataclass(frozen=True)
class CurvatureOptions:
    """Options of a curvature operator: its kind, parameters and precision, and the search for its eigenvalues.

    A measure takes the fields that apply to it as keyword arguments of the same names and defaults.

    Attributes:
        tol: Relative error of an eigenvalue at which the solver stops; a later value of the run is marked as not converged.
            The default, 1e-3, is far below the spread of eigenvalues between batches.
        solver: ``lanczos``, or ``power`` (eigenvalues by magnitude only): power iteration with PyHessian's stopping rule, to
            compare with published numbers that were computed so.
        operator: ``hessian``, ``ggn`` (generalized Gauss-Newton), ``fisher_mc`` (Fisher information from drawn labels) or
            ``fisher_empirical`` (from the data's labels).
        parameters: The parameters of the operator: None for all that require gradients; ``kind:msa``, ``stage:2``,
            ``layer:blocks.3``, ``part:q`` (``q k v proj mlp_in mlp_out``, rows of a fused weight included), a pattern such as
            ``*.qkv.weight``, or a list of these, which are united. With a subset, the operator is the diagonal block that
            belongs to it.
        dtype: ``float32`` or ``float64``, the type of weights and products; None for the model's own type.
        bn: Statistics of BatchNorm: ``eval`` for the running ones, ``batch`` for those of each batch.
        product: Way of computing a product with the Hessian: ``reverse`` (twice backward, the graph is stored), ``linearize``
            (forward over backward), or ``difference``: central differences of the gradient, for networks that cannot be
            differentiated twice (`vitscope.linalg.differences.central_differences`). Their error is estimated for every
            product, is on the card, and is refused where it exceeds ``tol``.
        difference_step: Length of the step of ``product='difference'``, for a unit vector; None to search for it.
        micro_batch: Number of images in memory at once; None for a whole batch.
        max_products: The largest number of products with the operator in one search (of one batch where every batch has an
            operator of its own); eigenvalues that have not converged by then are marked.
        max_memory: Bytes that the Lanczos basis may take (of all ranks together), after which it is restarted; None for a
            quarter of the free memory.
        basis: Place of the Lanczos basis: ``device``, ``cpu`` (the host's memory), ``disk`` (a file in ``TMPDIR``), or ``auto``
            for the first of these that has space. Ranks that search together hold a share of its columns each.
        checkpoint_blocks: Whether to keep only the inputs of each block of the model's structure, and compute the block again
            in every product: less memory, about 1.5 times the time.
        seed: Seed of start vectors, random vectors and drawn labels.

    Raises:
        ValueError: A value that is not listed above, a ``tol`` outside (0, 1), fewer than one product or image, micro-batches
            together with batch statistics, which they would change, ``product='difference'`` with another operator than the
            Hessian, or a ``difference_step`` without it.
    """

    tol: OpenUnitInterval = 1e-3
    solver: Solver = "lanczos"
    operator: OperatorKind = "hessian"
    parameters: str | Sequence[str] | None = None
    dtype: DerivativeDtypeName | torch.dtype | None = None
    bn: BatchNormStatistics = "eval"
    product: ProductKind = "reverse"
    difference_step: PositiveFloat | None = None
    micro_batch: int | None = None
    max_products: PositiveInt = 200
    max_memory: float | None = None
    basis: Placement = "auto"
    checkpoint_blocks: bool = False
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_solver(self.solver)
        if self.solver == "lanczos":  # power iteration has a stopping rule of its own
            check_stopping_rule(self.tol, self.max_products)
        check_placement(self.basis)
        check_operator(self.operator, self.product, self.micro_batch)
        parse_float_dtype(self.dtype, DERIVATIVE_DTYPE_NAMES)
        if self.difference_step is not None:
            if self.product != "difference":
                raise ValueError(f"Expected product='difference' with difference_step, received {self.product!r}.")
            if not self.difference_step > 0:
                raise ValueError(f"Expected difference_step to be positive or None, received {self.difference_step}.")
        if self.checkpoint_blocks and self.product != "reverse":
            raise ValueError(f"Expected product='reverse' with checkpoint_blocks, received {self.product!r}.")
        if self.bn == "batch" and self.micro_batch is not None:
            raise ValueError(
                f"Expected micro_batch=None with bn='batch' (it changes the statistics), received {self.micro_batch}."
            )

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The torch type of ``dtype``."""
        return parse_float_dtype(self.dtype, DERIVATIVE_DTYPE_NAMES)

    @property
    def subset(self) -> str | list[str] | None:
        """The parameter subset as `select_parameters` reads it."""
        return self.parameters if self.parameters is None or isinstance(self.parameters, str) else list(self.parameters)

    def values(self, *names: str) -> dict[str, Any]:
        """Return the named fields, such as the facts about the solver on a card."""
        return {name: getattr(self, name) for name in names}

    def search(self) -> dict[str, Any]:
        """Return the keyword arguments of `extreme_eigenvalues` that are options: when it stops, its memory and seed."""
        return self.values("tol", "max_products", "max_memory", "seed")


class SharedArguments(TypedDict, total=False):
    """The fields of `CurvatureOptions` that most measures take, as keyword arguments of a function."""

    parameters: str | Sequence[str] | None
    dtype: DerivativeDtypeName | torch.dtype | None
    bn: BatchNormStatistics
    micro_batch: int | None
    basis: Placement
    seed: Seed


class OperatorArguments(SharedArguments, total=False):
    """The fields that choose an operator and how its products are computed: all of a measure that searches no eigenvalue."""

    operator: OperatorKind
    product: ProductKind
    difference_step: PositiveFloat | None
    checkpoint_blocks: bool


class SearchArguments(SharedArguments, total=False):
    """The fields of a search for eigenvalues of the Hessian, with products by reverse mode."""

    tol: OpenUnitInterval
    max_products: PositiveInt
    max_memory: float | None


class CurvatureArguments(OperatorArguments, SearchArguments, total=False):
    """All fields of `CurvatureOptions`."""

    solver: Solver


def curvature_arguments(*names: str, **defaults: Any) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function that ends in ``**curvature: Unpack[CurvatureArguments]``: it takes fields of `CurvatureOptions`.

    Without names, the function takes the fields of the typed dictionary of ``**curvature``, which editors complete as well. The
    signature and the annotations of the function list the fields in place of ``curvature``, with their types and defaults, so
    that `help`, configurations and result cards see ordinary keyword arguments. The values are checked as `CurvatureOptions`
    does (`vitscope.core.checks.option_checks`).

    Args:
        names: The fields that the function takes where no typed dictionary has just these.
        defaults: Defaults of fields that differ from those of `CurvatureOptions`.

    Raises:
        TypeError: When the decorated function is called with another field.

    Example:
        ``@curvature_arguments()`` above ``def trace(probe, **curvature: Unpack[OperatorArguments])``, or
        ``@curvature_arguments("dtype", "seed")`` for these two alone.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        field_names = names or _typed_fields(function, signature)
        signature = _listing_fields(signature, field_names, defaults)

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{function.__name__}() {error}") from None
            return function(*args, **{**defaults, **kwargs})

        annotations = {name: p.annotation for name, p in signature.parameters.items()}
        checked.__annotations__ = {**annotations, "return": signature.return_annotation}
        checked.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]  read by `inspect.signature`
        return checks_options(CurvatureOptions, field_names)(checked)

    return decorate


def _typed_fields(function: Callable[..., Any], signature: inspect.Signature) -> Sequence[str]:
    """Return the fields of the typed dictionary that annotates the ``**`` parameter of a function."""
    parameter = next(p for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD)
    (typed_dict,) = get_args(get_type_hints(function)[parameter.name])  # of Unpack[...]
    return sorted(typed_dict.__required_keys__ | typed_dict.__optional_keys__)


def _listing_fields(
    signature: inspect.Signature, names: Sequence[str], changed: Mapping[str, Any]
) -> inspect.Signature:
    """Return the signature with the named fields in place of its ``**`` parameter, in the order of `CurvatureOptions`."""
    hints: Mapping[str, Any] = get_type_hints(CurvatureOptions, include_extras=True)
    defaults = {field.name: field.default for field in fields(CurvatureOptions)}
    if unknown := {*names, *changed} - set(defaults):
        raise ValueError(f"Expected fields of CurvatureOptions, received {', '.join(sorted(unknown))}.")
    listed = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=changed.get(name, default), annotation=hints[name]
        )
        for name, default in defaults.items()
        if name in names
    ]
    further_parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    return signature.replace(parameters=[*further_parameters, *listed])
