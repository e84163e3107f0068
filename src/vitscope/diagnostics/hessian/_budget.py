"""A stated budget for the batch-wise spectrum: time one product, predict, fit the number of batches, watch the clock."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vitscope.core.probe import Batch
from vitscope.linalg.batched_lanczos import SideBySide
from vitscope.linalg.curvature.operator_factory import Curvatures
from vitscope.linalg.curvature.product_cost import expected_search_products
from vitscope.linalg.krylov_basis import norm
from vitscope.runtime import distributed

_logger = logging.getLogger(__name__)

#: seconds; a name of its own so that tests can set the time
clock: Callable[[], float] = time.perf_counter


@dataclass
class Budget:
    """Measured and predicted times, and the number of batches that fit into the budget.

    Attributes:
        seconds: The budget; None for no limit.
        limit: Batches that fit, counted over all ranks from the first.
        facts: Facts for the card: the budget, seconds a product, seconds and bytes predicted.
    """

    seconds: float | None
    limit: int
    facts: dict[str, Any] = field(default_factory=dict)
    _started: float = 0.0
    _done: int = 0

    def allows(self, n: int) -> bool:
        """Return whether ``n`` more batches end in time, at the pace so far; always where none was computed yet."""
        if self.seconds is None or self._done == 0 or n == 0:
            return True
        spent = clock() - self._started
        return spent * (1 + n / self._done) <= self.seconds

    def done(self, n: int) -> None:
        """Count ``n`` batches that were computed."""
        self._done += n


def unlimited(n_batches: int) -> Budget:
    """Return a budget that allows everything."""
    return Budget(None, n_batches)


def fitted(operators: Curvatures, seconds: float, n_values: int, at_once: int) -> Budget:
    """Time one product, predict time and memory of all batches, say so, and fit the number of batches.

    How many products a batch takes is not known before: those of `expected_search_products` are assumed. The clock decides in the
    end, see `Budget.allows`.

    Args:
        operators: The factory of operators.
        seconds: The budget.
        n_values: Eigenvalues of a batch.
        at_once: Batches in one product.

    Raises:
        ValueError: A budget that is not positive.
    """
    if not seconds > 0:
        raise ValueError(f"Expected budget_s to be positive or None, received {seconds}.")
    started = clock()
    with distributed.failing_together():
        measured = [_measured(operators, batch, at_once) for batch in _first(operators)]
    product, graph = (max(parts) for parts in zip(*_gathered(measured)))
    size = sum(p.numel() for p in operators.parameters.values())
    row = sum(p.numel() * p.element_size() for p in operators.parameters.values())
    products = min(operators.options.max_products, size, expected_search_products(n_values))
    total, world = operators.probe.n_batches, distributed.world_size()
    rounds = max(1, int(seconds / (product * products))) if product > 0 else total
    limit = min(total, rounds * world)
    predicted = product * products * -(-limit // world)
    memory = (products + 2) * row * at_once + graph
    _logger.info(
        f"hessian spectrum: {product:.3g} s per product, about {products} products per batch, {memory / 2**20:.0f} MiB; "
        f"{limit} of {total} batches in about {predicted:.0f} s (budget_s={seconds:g})"
    )
    facts = {
        "budget_s": seconds,
        "seconds_per_product": product,
        "predicted_s": predicted,
        "predicted_bytes": float(memory),
    }
    return Budget(seconds, limit, facts, started)


def _first(operators: Curvatures) -> list[tuple[int, Batch]]:
    """Return this rank's first batch, none where it has none."""
    return [pair for pair, _ in zip(operators.probe.local_batches(), range(1))]


def _gathered(measured: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [pair for share in distributed.gather_objects(measured) for pair in share]


def _measured(operators: Curvatures, batch: tuple[int, Batch], at_once: int) -> tuple[float, float]:
    """Return seconds of a product of one batch, and the bytes of the graph that is kept for it."""
    operator = operators.batch(*batch)
    v = torch.ones(operator.size, dtype=operator.dtype, device=operator.device)
    if at_once > 1:
        stacked = SideBySide(operators, [batch] * at_once)
        vectors = [v] * at_once
        return _timed(lambda: stacked.products(vectors, range(at_once))[0][0]) / at_once, 0.0
    graph = _graph_bytes(lambda: operators.batch(*batch).gradient())
    seconds = _timed(lambda: operator(v))
    operator.release()
    return seconds, graph


def _timed(product: Callable[[], Tensor]) -> float:
    norm(product().reshape(-1))  # builds the graph, warms caches
    before = clock()
    norm(product().reshape(-1))  # waits for the device
    return clock() - before


def _graph_bytes(gradient: Callable[[], object]) -> float:
    """Return the bytes of all tensors that autograd keeps."""
    saved_bytes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved_bytes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gradient()
    return float(sum(saved_bytes.values()))
