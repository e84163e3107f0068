"""Symmetric operators of other packages, seen as the solvers here take them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import Tensor

from vitscope.runtime import stop_flag
from vitscope.runtime.errors import NumericalError

#: largest difference of <u, H v> and <v, H u>, relative to |u| |H v|: half of the digits
_ASYMMETRY_POWER = 0.5


class ForeignOperator:
    """A symmetric operator on flat vectors ``(size,)`` of which only products are known.

    Args:
        operator: A SciPy ``LinearOperator`` or sparse matrix, a symmetric NumPy array or torch tensor ``(size, size)``, or an
            object with ``shape``, ``dtype``, ``device`` and ``@`` for torch vectors, as curvlinops' operators.
        seed: Seed of the two vectors with which symmetry is checked.

    Attributes:
        size: Number of rows.
        dtype: float32 or float64, the type of vectors.
        device: The device of vectors.
        n_products: Products made so far, two of them by the check.

    Raises:
        ValueError: Something that is none of these, not square, not real or not symmetric.
        NumericalError: A product that is not finite.
    """

    #: the operator is `unshifted` plus this multiple of the identity
    shift = 0.0

    def __init__(self, operator: Any, seed: int = 0) -> None:
        shape = tuple(getattr(operator, "shape", ()))
        if len(shape) != 2 or shape[0] != shape[1] or not shape[0]:
            raise ValueError(f"Expected a square operator of shape (size, size), received shape {shape or 'none'}.")
        self.size = int(shape[0])
        self.n_products = 0
        dtype = getattr(operator, "dtype", None)
        self._multiplies_tensors = isinstance(dtype, torch.dtype)
        if self._multiplies_tensors:
            is_double = dtype is torch.float64
            is_real = dtype in (torch.float32, torch.float64)
            self.device = torch.device(getattr(operator, "device", "cpu"))
            self._operator: Any = operator
        else:
            linear_operator = _scipy_operator(operator)
            numbers = np.dtype(linear_operator.dtype) if linear_operator.dtype is not None else np.dtype(float)
            is_double = numbers != np.float32
            is_real = numbers.kind in "fiub" and numbers != np.float16
            self.device = torch.device("cpu")
            self._operator = linear_operator
        if not is_real:
            raise ValueError(f"Expected an operator of float32 or float64 numbers, received {dtype}.")
        self.dtype = torch.float64 if is_double else torch.float32
        self._check_symmetry(seed)

    def __call__(self, v: Tensor) -> Tensor:
        """Return the product with ``v (size,)``."""
        stop_flag.check()
        self.n_products += 1
        if self._multiplies_tensors:
            return torch.as_tensor(self._operator @ v).detach().reshape(-1)  # of parameters, it has a graph
        product = np.asarray(self._operator.matvec(v.numpy()), dtype=str(self.dtype).removeprefix("torch."))
        return torch.from_numpy(np.ascontiguousarray(product.reshape(-1)))

    unshifted = __call__

    def random(self, seed: int) -> Tensor:
        """Return a vector of independent normal numbers ``(size,)``, drawn on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.size, generator=generator, dtype=torch.float32).to(self.device, self.dtype)

    def _check_symmetry(self, seed: int) -> None:
        u, v = self.random(2 * seed), self.random(2 * seed + 1)
        hu, hv = self(u), self(v)
        if not (bool(hu.isfinite().all()) and bool(hv.isfinite().all())):
            raise NumericalError("operator", None, "a product is not finite", "look at its numbers, or use float64")
        scale = float((u.norm() * hv.norm()).clamp_min(torch.finfo(self.dtype).tiny))
        difference = abs(float(u @ hv - v @ hu)) / scale
        if difference > float(torch.finfo(self.dtype).eps) ** _ASYMMETRY_POWER:
            raise ValueError(
                f"Expected a symmetric operator, received one for which u'Hv and v'Hu differ by {difference:.2g} of |u||Hv|."
            )


def _scipy_operator(operator: Any) -> LinearOperator:
    if isinstance(operator, LinearOperator):
        return operator
    try:
        return aslinearoperator(operator)
    except TypeError:
        raise ValueError(
            "Expected a SciPy LinearOperator, a matrix, or an operator with shape, dtype and @ for torch vectors, received "
            f"{type(operator).__name__}."
        ) from None
