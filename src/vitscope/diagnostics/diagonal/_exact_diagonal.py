"""Exact diagonals: of any operator by products with unit vectors, of a Gauss-Newton or Fisher matrix by gradients of images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vitscope.linalg.curvature.curvature_operator import Curvature
from vitscope.linalg.curvature.logit_curvature import output_curvature
from vitscope.linalg.curvature.operator_factory import Curvatures
from vitscope.linalg.per_example_gradients import PerExampleGradients
from vitscope.runtime import distributed
from vitscope.runtime.progress import track

#: parameters up to which a product is made for each
MOST_PRODUCTS = 4096
#: outputs of an image up to which the matrix in the outputs is factored
MOST_OUTPUTS = 1024


def diagonal_by_products(operator: Curvature) -> np.ndarray:
    """Return the diagonal of an operator's data term ``(size,)`` from one product a parameter.

    Raises:
        ValueError: More parameters than `MOST_PRODUCTS`.
    """
    if operator.size > MOST_PRODUCTS:
        raise ValueError(
            f"Expected at most {MOST_PRODUCTS} parameters with method='exact' and operator='hessian', which makes a product for "
            f"each, received {operator.size}: choose some with parameters=, operator='ggn', or method='hutchinson'."
        )
    diagonal = np.empty(operator.size)
    unit = torch.zeros(operator.size, dtype=operator.dtype, device=operator.device)
    for i in track(range(operator.size), "diagonal"):
        unit[i] = 1.0
        diagonal[i] = float(operator.data_product(unit)[i])
        unit[i] = 0.0
    return diagonal


def diagonal_by_images(operators: Curvatures) -> np.ndarray:
    """Return the diagonal of ``sum_i J_i^T M_i J_i / n`` ``(size,)`` from gradients of images.

    With ``M_i = S S^T`` it is the sum over images and columns s of S of the squared entries of ``J_i^T s``.

    Raises:
        ValueError: Outputs that are not one tensor, or more than `MOST_OUTPUTS` an image; and as `PerExampleGradients`.
    """
    probe, options = operators.probe, operators.options
    gradients = PerExampleGradients(operators.model, _along_column, operators.parameters, options.micro_batch)
    total = torch.zeros(gradients.size, dtype=torch.float64, device=probe.device)
    with distributed.failing_together():
        for index, (x, y) in track(probe.local_batches(), "diagonal", probe.n_batches):
            step = options.micro_batch or len(y)
            for a in range(0, len(y), step):
                part = slice(a, a + step)
                columns = _factors(operators, probe.first_image(index) + a, x[part], y[part])  # (columns, b, K)
                for column in columns:
                    for rows in gradients(x[part], column):
                        total += rows.double().square().sum(0)
    return (distributed.all_reduce_sum(total) / probe.n_labeled).cpu().numpy()


def _along_column(outputs: Tensor, column: Tensor) -> Tensor:
    """Return the sum of an image's outputs, weighted with a column ``(K,)`` of its factor."""
    return (outputs.reshape(1, -1) * column).sum()


def _factors(operators: Curvatures, first_image: int, x: object, y: Tensor) -> Tensor:
    """Return the columns of factors S of each image's matrix in its outputs ``(columns, b, K)``, those that are not zero."""
    options, objective = operators.options, operators.probe.objective
    with torch.no_grad():
        outputs = operators.model(x)
    if not isinstance(outputs, Tensor):
        raise ValueError(
            f"Expected an output that is one tensor, received a {type(outputs).__name__}: use method='hutchinson'."
        )
    n_outputs = outputs[0].numel()
    if n_outputs > MOST_OUTPUTS:
        raise ValueError(
            f"Expected at most {MOST_OUTPUTS} outputs an image with method='exact', received {n_outputs}: use "
            "method='hutchinson'."
        )
    matrix_product = output_curvature(
        options.operator,
        outputs,
        y,
        objective,
        first_image=first_image,
        n_samples=operators.n_samples,
        seed=options.seed,
    )
    units = torch.eye(n_outputs, dtype=outputs.dtype, device=outputs.device)
    # M of each image by its columns: (b, K) each
    rows = [
        matrix_product(unit.expand(len(outputs), -1).reshape(outputs.shape)).reshape(len(outputs), -1) for unit in units
    ]
    values, vectors = torch.linalg.eigh(torch.stack(rows, 1).double())  # (b, K), (b, K, K)
    roots = values.clamp(min=0).sqrt()
    columns = (vectors * roots[:, None]).permute(2, 0, 1).to(outputs.dtype)  # (columns, b, K)
    return columns[roots.amax(0) > 0]
