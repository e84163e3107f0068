"""The objective's curvature as an operator of SciPy, for solvers of others."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Unpack

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator

from vitscope.core.probe import Probe
from vitscope.linalg.curvature.curvature_operator import Curvature
from vitscope.linalg.curvature.curvature_options import CurvatureArguments, CurvatureOptions, curvature_arguments
from vitscope.linalg.curvature.operator_factory import curvatures
from vitscope.linalg.differences.central_differences import DifferenceRecord


class HessianOperator(LinearOperator):
    """A symmetric `scipy.sparse.linalg.LinearOperator`, made by `hessian_operator`.

    Outside of ``with`` each product enters and leaves the probe's guard, and the graph is built for each. Inside, the graph of
    a single batch is kept, and the model is in the guard's state (parameters frozen but those analyzed, eval mode) until the end.

    Attributes:
        shape: (size, size), the number of parameters analyzed.
        dtype: float32 or float64, the type of the products.
        parameter_names: Names of the parameters analyzed, in the order of a vector's entries.
        n_products: Number of products so far.
        difference_error: With ``product='difference'``, the estimated error of products so far relative to the largest one, see
            `vitscope.linalg.differences.central_differences`; 0 for exact products.
    """

    def __init__(self, probe: Probe, options: CurvatureOptions) -> None:
        self.probe, self.options = probe, options
        self.n_products = 0
        self._entered: ExitStack | None = None
        self._curvature: Curvature | None = None
        self._record = DifferenceRecord()
        with curvatures(probe, options, mean_alone=True) as operators:
            operator = operators.mean()
            size, dtype = operator.size, operator.dtype
            self.parameter_names = tuple(operators.parameters)
        super().__init__(dtype=np.dtype(str(dtype).removeprefix("torch.")), shape=(size, size))

    @property
    def difference_error(self) -> float:
        """The estimated error of products by differences, relative to the largest one."""
        return self._record.relative_error

    def __enter__(self) -> HessianOperator:
        """Enter the probe's guard for all products until the end."""
        if self._entered is not None:
            raise RuntimeError("this operator is entered already.")
        with ExitStack() as stack:
            self._curvature = stack.enter_context(curvatures(self.probe, self.options, mean_alone=True)).mean()
            self._entered = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the guard: the model is as it was before."""
        stack, operator, self._entered, self._curvature = self._entered, self._curvature, None, None
        if stack is not None:
            stack.__exit__(kind, error, traceback)
        if kind is None and operator is not None and operator.differences is not None:
            operator.differences.check()

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        if self._curvature is not None:
            return self._product(self._curvature, x)
        with curvatures(self.probe, self.options, mean_alone=True) as operators:
            operator = operators.mean()
            product = self._product(operator, x)
            if operator.differences is not None:
                operator.differences.check()
            return product

    def _adjoint(self) -> HessianOperator:
        return self  # symmetric

    def _product(self, operator: Curvature, x: np.ndarray) -> np.ndarray:
        self.n_products += 1
        if operator.differences is not None:
            operator.differences.record = self._record  # of all products: each may have an operator of its own
        v = torch.from_numpy(np.ascontiguousarray(x.reshape(-1), dtype=self.dtype)).to(operator.device)
        return operator(v).cpu().numpy().reshape(x.shape)


@curvature_arguments("operator", "parameters", "dtype", "bn", "product", "difference_step", "micro_batch", "seed")
def hessian_operator(probe: Probe, **curvature: Unpack[CurvatureArguments]) -> HessianOperator:
    """Return the Hessian of the objective's mean over all batches, L2 term included, as a SciPy ``LinearOperator``.

    Under ``torch.distributed`` every rank has to make the same products.

    Args:
        probe: The model, batches and objective.
        curvature: ``operator`` (also ``ggn``, ``fisher_mc``, ``fisher_empirical``), ``parameters``, ``dtype``, ``bn``,
            ``product``, ``difference_step``, ``micro_batch``, ``seed``: see
            `vitscope.linalg.curvature.curvature_options.CurvatureOptions`.

    Raises:
        ValueError: As `hessian_eigenvalues`.

    Example:
        Another solver for the same numbers, the graph kept between products::

            with vs.hessian_operator(probe, dtype="float64") as hessian:
                scipy.sparse.linalg.eigsh(hessian, k=5, which="LM", return_eigenvectors=False)
    """
    return HessianOperator(probe, CurvatureOptions(**curvature))
