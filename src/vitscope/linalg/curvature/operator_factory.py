"""The curvature operators of a probe: of the mean over all its batches, or of each batch by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitscope.core.objective import n_labeled
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Batch, Probe
from vitscope.linalg.curvature.curvature_operator import Curvature
from vitscope.linalg.curvature.l2_curvature import warn_of_sum_norm
from vitscope.linalg.curvature.parameter_subsets import select_parameters, subset_name
from vitscope.linalg.krylov_basis import norm

#: parts of modules' class names whose randomness the eval mode switches off
_RANDOM = ("Dropout", "DropPath", "StochasticDepth")
#: length of a start vector's random part, in units of the gradient's. Of 60 constructed searches for an end that the gradient
#: does not show 23 passed it over with 0.1, and 3 do with 1, with as many products
RANDOM_SHARE = 1.0


@dataclass(frozen=True)
class Curvatures:
    """What `curvatures` yields: makes operators that share a model, parameters and options.

    Attributes:
        probe: the probe inside its guard.
        model: its model.
        parameters: those analysed, by name.
        options: passed on to `Curvature`.
        bn: the BatchNorm policy in force.
        subset: the parameter subset as it was asked for.
    """

    probe: Probe
    model: nn.Module
    parameters: dict[str, Tensor]
    options: dict[str, Any]
    bn: str
    subset: str | list[str] | None

    def mean(self) -> Curvature:
        """Return the operator of the mean over all batches; under several ranks its products are reduced."""
        size = self.probe.batch_size

        def batches() -> Iterator[tuple[int, Batch]]:
            return ((index * size, batch) for index, batch in self.probe.local_batches())

        return self._operator(batches, self.probe.n_labeled, reduce=True)

    def batch(self, index: int, batch: Batch) -> Curvature:
        """Return the operator of one batch alone, on this rank alone."""
        pairs = [(index * self.probe.batch_size, batch)]
        return self._operator(lambda: pairs, n_labeled(batch[1]), reduce=False)

    def of(self, batches: Callable[[], Iterable[tuple[int, Batch]]], n_images: int, reduce: bool = False) -> Curvature:
        """Return the operator of chosen ``(index, batch)`` pairs, ``n_images`` being those of them that have a label."""
        size = self.probe.batch_size
        return self._operator(lambda: ((i * size, batch) for i, batch in batches()), n_images, reduce=reduce)

    def card(self, solver: dict[str, Any], **overrides: Any) -> ObjectiveCard:
        """Return the probe's card with the dtype, subset, BatchNorm policy and solver of these operators."""
        n_random = sum(any(part in type(m).__name__ for part in _RANDOM) for m in self.model.modules())
        facts = {"operator": self.options["kind"], "product": self.options["product"], **solver}
        if n_random:
            facts["dropout"] = f"off ({n_random} dropout or drop-path modules)"
        return self.probe.card(
            **{"parameters": subset_name(self.subset), "bn_policy": self.bn, "solver": facts, **overrides}
        )

    def _operator(self, batches: Callable[[], Iterable[tuple[int, Batch]]], n_images: int, reduce: bool) -> Curvature:
        return Curvature(
            self.model,
            batches,
            self.probe.objective,
            self.parameters,
            n_images=n_images,
            reduce=reduce,
            **self.options,
        )


@contextmanager
def curvatures(
    probe: Probe,
    *,
    operator: str = "hessian",
    parameters: str | Sequence[str] | None = None,
    dtype: str | torch.dtype | None = None,
    bn: str = "eval",
    product: str = "reverse",
    micro_batch: int | None = None,
    n_samples: int = 1,
    seed: int = 0,
) -> Iterator[Curvatures]:
    """Enter the probe's second-order guard and yield what makes operators.

    Args:
        probe: the model, batches and objective.
        operator: ``hessian``, ``ggn``, ``fisher_mc`` or ``fisher_empirical``.
        parameters: a subset as `select_parameters` reads it; None for all that require gradients.
        dtype: ``float32`` or ``float64``; None for the model's own.
        bn: ``eval`` for BatchNorm's running statistics, ``batch`` for those of each batch.
        product: ``reverse`` or ``linearize``.
        micro_batch: images held at once; None for a whole batch.
        n_samples: labels drawn for each image by ``fisher_mc``.
        seed: of those draws.

    Raises:
        ValueError: an argument of no such name, no parameters, a compiled or inference model, a batch on another device,
            or micro-batches together with batch statistics.
    """
    if bn == "batch" and micro_batch is not None:
        raise ValueError(
            f"Expected micro_batch=None with bn='batch' (it changes the statistics), received {micro_batch}."
        )
    options = {
        "kind": operator,
        "product": product,
        "micro_batch": micro_batch,
        "n_samples": n_samples,
        "seed": seed,
    }
    subset = list(parameters) if parameters is not None and not isinstance(parameters, str) else parameters
    named = probe.parameters()
    with probe.guard(second_order=True, dtype=float_type(dtype), bn=bn, micro_batch=micro_batch) as model:
        chosen = select_parameters(model, named, subset)
        for name, p in model.named_parameters():
            p.requires_grad_(name in chosen)  # the others' gradients need not be made; the guard puts the flags back
        warn_of_sum_norm(probe.objective, chosen)
        yield Curvatures(probe, model, chosen, options, bn, subset)


def float_type(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return the torch type of ``float32`` or ``float64``.

    Raises:
        ValueError: another name.
    """
    if dtype is None:
        return None
    known = {"float32": torch.float32, "float64": torch.float64}
    name = str(dtype).removeprefix("torch.")
    if name not in known:
        raise ValueError(f"Expected dtype to be float32, float64 or None, received {name}.")
    return known[name]


def start_vector(operator: Curvature, seed: int = 0) -> Tensor:
    """Return a first vector for Krylov methods: the data gradient's direction plus as much of a random one.

    The gradient lies mostly in the span of the top eigenvectors, which saves products; the random part reaches the
    eigenvectors that are nearly orthogonal to it, such as the most negative ones, at the same number of products.
    """
    return start_along(operator.gradient(data_only=True), seed)


def start_along(gradient: Tensor, seed: int = 0) -> Tensor:
    """Return the direction of ``gradient (size,)``, which is written to, plus as much of a random one (see `start_vector`)."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(len(gradient), generator=generator, dtype=torch.float32).to(gradient)
    length, other = norm(gradient), norm(random)
    if not length > 0:
        return random
    return gradient.div_(length).add_(random, alpha=RANDOM_SHARE / other)
