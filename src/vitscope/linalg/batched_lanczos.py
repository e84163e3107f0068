"""The Hessians of several batches at once: Lanczos runs side by side that share the weights and each product's kernels.

A batch of 16 leaves a GPU idle. Here one call multiplies the Hessian of each of B batches with a vector of its own: forward
over reverse (`torch.func.jvp` of `torch.func.grad`) under `torch.func.vmap`, the weights shared, about four gradients of
B batches, no graph kept. The runs are those of `linalg.eigensolver`; one that has ended leaves the group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, jvp, vmap

from vitscope.core.guard.substituted_call import substituted_call
from vitscope.core.probe import Batch
from vitscope.linalg.basis_memory import free_memory
from vitscope.linalg.curvature.l2_curvature import add_l2_product
from vitscope.linalg.curvature.operator_factory import Curvatures
from vitscope.linalg.curvature.start_vector import start_along
from vitscope.linalg.eigensolver import Search
from vitscope.linalg.krylov_basis import norm
from vitscope.linalg.ritz_values import count
from vitscope.linalg.solvers import Solution, l2_contribution
from vitscope.runtime import stop_flag
from vitscope.runtime.errors import NumericalError

#: batches on a GPU at once at most: by then its units are busy, and more would only take memory
MOST = 64
#: number of basis vectors of each run that must fit on a GPU; with more, runs restart
ROWS = 48


class CannotBatch(ValueError):
    """Batches cannot be analyzed at once; the message says why."""


class SideBySide:
    """The Hessians of batches of equal shape, each a mean over its images, with the L2 term's where that is no shift.

    Args:
        made: The model, parameters and options.
        group: ``(number, (x, y))`` of each batch.

    Raises:
        CannotBatch: Another operator than the Hessian, batch statistics, micro-batches or unequal shapes.
    """

    def __init__(self, curvatures: Curvatures, group: Sequence[tuple[int, Batch]]) -> None:
        if reason := obstacle(curvatures):
            raise CannotBatch(reason)
        if len({(x.shape, y.shape) for _, (x, y) in group}) > 1:
            raise CannotBatch("Expected batches of equal shape to analyze them at once, received several shapes.")
        self.made, self.group = curvatures, list(group)
        self.operators = [curvatures.batch(index, batch) for index, batch in group]
        self.x, self.y = (torch.stack(parts) for parts in zip(*(batch for _, batch in group)))  # (B, b, ...)
        self.point = {name: p.detach() for name, p in curvatures.parameters.items()}

    def gradients(self) -> Tensor:
        """Return the data term's gradients ``(B, size)``.

        Raises:
            NumericalError: A loss is not finite.
        """
        gradients, losses = vmap(grad_and_value(self._loss), in_dims=(None, 0, 0))(self.point, self.x, self.y)
        for (index, (x, _)), loss in zip(self.group, losses.tolist()):
            if not abs(loss) < float("inf"):
                first = self.made.probe.first_image(index)
                raise NumericalError(
                    "loss", loss, f"not finite on images {first} to {first + len(x) - 1}, so it has no curvature",
                    "check the weights and the batch for values that are not finite, or use float64",
                )  # fmt: skip
        return torch.cat([gradients[name].reshape(len(self.x), -1) for name in self.point], dim=1)  # (B, size)

    def products(self, vectors: Sequence[Tensor], which: Sequence[int]) -> list[list[Tensor]]:
        """Return H v without the L2 term's shift, in pieces, of the batches numbered ``which`` in the group.

        Args:
            vectors: One ``(size,)`` each.
            which: Places in the group.
        """
        sizes = [p.numel() for p in self.point.values()]
        columns = torch.stack(list(vectors)).split(sizes, dim=1)
        # (A, numel) to (A, *shape) for each parameter
        tangents = {name: part.reshape(-1, *p.shape) for (name, p), part in zip(self.point.items(), columns)}
        whole = len(which) == len(self.x)
        x, y = (self.x, self.y) if whole else (self.x[list(which)], self.y[list(which)])
        products = vmap(self._product)(tangents, x, y)
        pieces = [[products[name][i].reshape(-1) for name in self.point] for i in range(len(which))]
        if self.made.probe.objective.l2 in ("half_sq", "none"):
            return pieces
        return [[self._with_l2(v, torch.cat(product_pieces))] for v, product_pieces in zip(vectors, pieces)]

    def _product(self, tangent: Mapping[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return jvp(lambda point: grad(self._loss)(point, x, y), (self.point,), (dict(tangent),))[1]

    def _loss(self, point: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return self.made.probe.objective.data_loss(substituted_call(self.made.model, point, x), y)

    def _with_l2(self, v: Tensor, product: Tensor) -> Tensor:
        split = self.operators[0].split(v)
        return add_l2_product(self.made.probe.objective, self.made.parameters, split, product)


def obstacle(curvatures: Curvatures) -> str:
    """Return why these operators cannot be multiplied at once, or an empty string."""
    options = curvatures.options
    required = {"operator": "hessian", "product": "reverse", "micro_batch": None, "checkpoint_blocks": False}
    for name, value in required.items():
        if getattr(options, name) != value:
            received = getattr(options, name)
            return f"Expected {name}={value} to analyze several batches at once, received {received!r}."
    if options.bn != "eval":
        return f"Expected bn='eval' to analyze several batches at once (statistics are each batch's), received {options.bn!r}."
    if callable(curvatures.probe.objective.loss):
        return "Expected a named loss to analyze several batches at once, received a loss of your own."
    if not curvatures.probe.takes_images:
        return "Expected batches of images alone to analyze several at once, received batches of more entries."
    return ""


def eigenvalues_side_by_side(
    curvatures: Curvatures,
    group: Sequence[tuple[int, Batch]],
    *,
    k: int,
    n_ends: int = 0,
    tol: float = 1e-3,
    max_products: int = 200,
    max_memory: float | None = None,
    seed: int = 0,
) -> list[Solution]:
    """Return the ``k`` eigenvalues of largest magnitude of each batch's Hessian, as `solve` would one after the other.

    Args:
        curvatures: The model, parameters and options.
        group: ``(number, (x, y))`` of each batch.
        k: Number of eigenvalues.
        n_ends: Number of the largest and of the smallest eigenvalues that are returned too.
        tol: Relative error at which to stop.
        max_products: The most products of a batch.
        max_memory: Bytes that all bases together may take; None: a quarter of what is free (on a GPU half).
        seed: Seed of start vectors.

    Raises:
        CannotBatch: See `SideBySide`; or the model's operations do not allow it, or give other products under vmap.
        ValueError, NumericalError: As `solve`.
    """
    stacked = SideBySide(curvatures, group)
    starts = _started(stacked, seed)
    memory = max_memory or free_memory(starts[0].device) / (2 if starts[0].device.type == "cuda" else 4)
    options = {"n_ends": n_ends, "tol": tol, "max_products": max_products, "seed": seed}
    shift = stacked.operators[0].shift
    runs = {
        i: Search(start, k, max_memory=memory / len(starts), shift=shift, memory=curvatures.basis_memory(), **options)
        for i, start in enumerate(starts)
    }
    del starts
    needed = curvatures.probe.objective.l2 in ("sum_norm", "adamw")
    solutions: dict[int, Solution] = {}
    while runs:
        stop_flag.check()
        products = stacked.products([run.lanczos.row for run in runs.values()], list(runs))
        for (i, run), product in zip(list(runs.items()), products):
            if run.absorb(product):
                pairs = runs.pop(i).pairs(needed)
                solutions[i] = Solution(pairs, l2_contribution(stacked.operators[i], pairs))
            else:
                run.make_space()
    return [solutions[i] for i in sorted(solutions)]


def at_once(curvatures: Curvatures, sample: tuple[int, Batch], k: int, n_ends: int, max_products: int) -> int:
    """Return how many batches like ``sample`` fit on the GPU at once; 1 on a CPU, where nothing is won."""
    device = curvatures.probe.device
    if device.type != "cuda" or obstacle(curvatures):
        return 1
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        _started(SideBySide(curvatures, [sample]), 0)
    except CannotBatch:
        return 1
    bytes_used = torch.cuda.max_memory_allocated(device) - before
    row = sum(p.numel() * p.element_size() for p in curvatures.parameters.values())
    rows = min(max_products + 1, max(2 * count(k, "LM", n_ends) + 4, ROWS))
    torch.cuda.empty_cache()
    return int(max(1, min(MOST, 0.6 * free_memory(device) // (bytes_used + (rows + 4) * row))))


def _started(stacked: SideBySide, seed: int) -> list[Tensor]:
    """Return start vectors, once the first batch's product has been found to be the one that its graph gives."""
    try:
        starts = [start_along(gradient, seed) for gradient in stacked.gradients()]
        (pieces,) = stacked.products(starts[:1], [0])
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # an operation without a rule for vmap or for forward derivatives
        line = str(error).strip().splitlines()[0]
        raise CannotBatch(f"Expected a model that vmap can differentiate, received one that says: {line}") from error
    operator = stacked.operators[0]
    expected = torch.cat([piece.reshape(-1) for piece in operator.unshifted(starts[0])])
    operator.release()
    difference = norm(torch.cat([piece.reshape(-1) for piece in pieces]) - expected)
    allowed = torch.finfo(expected.dtype).eps ** 0.5 * 10  # rounding is far below, a wrong rule far above
    if not difference <= allowed * norm(expected):
        raise CannotBatch(
            f"Expected products under vmap to be those of the graph, received ones that differ by "
            f"{difference / max(norm(expected), 1e-300):.1e} of their length: set batches_at_once=1."
        )
    return starts
