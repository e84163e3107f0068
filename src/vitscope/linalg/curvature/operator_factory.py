"""Curvature operators of a probe: of the mean over all its batches, of some of them, or of a single batch."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Unpack
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from vitscope.core.checks.independent_images import refuse_dependent_images
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Batch, Probe
from vitscope.core.sharding.sharded_parameters import is_sharded
from vitscope.linalg.basis_memory import BasisBuffer, placements_of
from vitscope.linalg.curvature.curvature_operator import Curvature
from vitscope.linalg.curvature.curvature_options import CurvatureArguments, CurvatureOptions
from vitscope.linalg.curvature.l2_curvature import warn_of_sum_norm
from vitscope.linalg.curvature.logit_curvature import check_output_curvature
from vitscope.linalg.curvature.parameter_subsets import analyzed_parameters, subset_name
from vitscope.linalg.curvature.recomputed_blocks import block_modules, recomputed_blocks
from vitscope.linalg.differences.central_differences import ROW_ERROR, ROW_STEPS, DifferenceRecord
from vitscope.linalg.differences.kinks import kinked_functions
from vitscope.runtime import distributed
from vitscope.runtime.resumable_map import Row
from vitscope.runtime.torch_internals import BatchNormBase

_logger = logging.getLogger(__name__)

#: parts of modules' class names whose randomness the eval mode switches off
_RANDOM = ("Dropout", "DropPath", "StochasticDepth")


@dataclass(frozen=True)
class Curvatures:
    """A factory of operators that share a model, parameters and options, see `curvatures`.

    Attributes:
        probe: The probe inside its guard.
        model: The probe's model.
        parameters: The parameters analyzed, by name.
        options: Options of the operators.
        subset: The parameters as the objective card names them.
        n_samples: Number of labels drawn for each image by ``fisher_mc``.
        buffers: Memory of bases that `basis_memory` gave.
        records: Steps and errors of products by differences, of each operator and each row that was read.
    """

    probe: Probe
    model: nn.Module
    parameters: dict[str, Tensor]
    options: CurvatureOptions
    subset: str
    n_samples: int = 1
    buffers: list[BasisBuffer] = field(default_factory=list, repr=False)
    records: list[DifferenceRecord] = field(default_factory=list, repr=False)

    def basis_memory(self, *, shared: bool = False) -> BasisBuffer:
        """Return memory for bases, placed as the options say; `card` states where they are.

        Args:
            shared: Every rank runs one search on the operator of `mean`.
        """
        buffer = BasisBuffer(self.options.basis, shared=shared)
        self.buffers.append(buffer)
        return buffer

    def mean(self) -> Curvature:
        """Return the operator of the mean over all batches; under several ranks its products are reduced."""

        def batches() -> Iterator[tuple[int, Batch]]:
            return ((self.probe.first_image(index), batch) for index, batch in self.probe.local_batches())

        return self._operator(batches, self.probe.n_labeled, reduce=True)

    def batch(self, index: int, batch: Batch) -> Curvature:
        """Return the operator of one batch alone, on this rank alone."""
        pairs = [(self.probe.first_image(index), batch)]
        return self._operator(lambda: pairs, self.probe.objective.n_examples(batch[1]), reduce=False)

    def of(self, batches: Callable[[], Iterable[tuple[int, Batch]]], n_images: int, reduce: bool = False) -> Curvature:
        """Return the operator of the mean over the ``(index, batch)`` pairs that ``batches`` yields.

        Args:
            batches: Function that yields this rank's pairs on every call.
            n_images: Examples with a label in the pairs of all ranks.
            reduce: Whether to add the ranks' shares up.
        """

        def numbered() -> Iterator[tuple[int, Batch]]:
            return ((self.probe.first_image(index), batch) for index, batch in batches())

        return self._operator(numbered, n_images, reduce=reduce)

    def card(self, solver: dict[str, Any], **overrides: Any) -> ObjectiveCard:
        """Return the probe's card with the dtype, subset, BatchNorm policy and solver of these operators.

        Raises:
            NumericalError: Products by differences that are not exact enough.
        """
        n_random = sum(any(part in type(m).__name__ for part in _RANDOM) for m in self.model.modules())
        facts = {**self.options.values("operator", "product"), **solver}
        if (placements := placements_of(self.buffers)) is not None:
            facts["basis"] = placements
        if self.options.product == "difference":
            facts |= self._difference_facts()
        if n_random:
            facts["dropout"] = f"off ({n_random} dropout or drop-path modules)"
        return self.probe.card(
            **{
                "parameters": self.subset,
                "bn_policy": self.options.bn,
                "solver": facts,
                **overrides,
            }
        )

    def read_row(self, row: Row) -> Row:
        """Take in what a row states of products by differences, which may come from an earlier process or another rank."""
        if ROW_ERROR in row:
            steps = [float(step) for step in np.atleast_1d(row[ROW_STEPS])]
            self.records.append(DifferenceRecord(float(row[ROW_ERROR]), 1.0, steps, 1))
        return row

    def _difference_facts(self) -> dict[str, Any]:
        """Return the largest relative error and the steps of products by differences, on all ranks, and log them."""
        records = [record for record in self.records if record.n_products]
        with distributed.failing_together():
            for record in records:
                record.check(self.options.tol, next(iter(self.parameters.values())).dtype)
        rank_pairs = [(record.relative_error, record.steps) for record in records]
        shares = [pair for pairs in distributed.gather_objects(rank_pairs) for pair in pairs]
        if not shares:
            return {}
        error, steps = max(error for error, _ in shares), [step for _, steps in shares for step in steps]
        _logger.info(
            f"product=difference: products within {error:.2g} of the largest one (tol={self.options.tol:g}), steps of "
            f"{min(steps):.3g} to {max(steps):.3g}"
        )
        return {"difference_error": error, "difference_steps": [min(steps), max(steps)]}

    def _operator(self, batches: Callable[[], Iterable[tuple[int, Batch]]], n_images: int, reduce: bool) -> Curvature:
        operator = Curvature(
            self.model,
            batches,
            self.probe.objective,
            self.parameters,
            n_images=n_images,
            reduce=reduce,
            kind=self.options.operator,
            n_samples=self.n_samples,
            filler=lambda: next(iter(self.probe.iter_batches())),
            **self.options.values("product", "micro_batch", "seed", "difference_step", "tol"),
        )
        if operator.differences is not None:
            self.records.append(operator.differences.record)
        return operator


def solver_of(cards: Sequence[ObjectiveCard]) -> dict[str, Any]:
    """Return the facts about the solver of several measurements with equal options: the first one's, and all errors' largest."""
    solver = dict(cards[0].solver)
    if "difference_error" in solver:
        steps = [step for card in cards for step in card.solver["difference_steps"]]
        solver["difference_error"] = max(card.solver["difference_error"] for card in cards)
        solver["difference_steps"] = [min(steps), max(steps)]
    return solver


def _allows_shards(probe: Probe, options: CurvatureOptions) -> bool:
    subset = [options.subset] if isinstance(options.subset, str) else options.subset or []
    has_rows = any(rule.startswith("part:") for rule in subset)
    is_shift = probe.objective.l2 in ("half_sq", "none") or probe.objective.weight_decay == 0.0
    return is_shift and not has_rows and options.product != "linearize"


def _refuse_kinks(model: nn.Module, probe: Probe, parameters: dict[str, Tensor]) -> None:
    """Raise ValueError where differences would count jumps of the gradient: float32 has no step that is free of them."""
    dtype = next(iter(parameters.values())).dtype
    inputs = next(iter(probe.iter_batches()))[0][:2]
    if dtype != torch.float64 and (names := kinked_functions(model, inputs)):
        raise ValueError(
            f"Expected dtype='float64' with product='difference' for a network with kinks ({', '.join(names)}), received "
            f"{str(dtype).removeprefix('torch.')!r}: over a step that rounding allows the gradient jumps, which is no curvature; "
            "set dtype='float64', or product='reverse'."
        )


#: sizes of micro-batches that a probe's network has been checked with
_independent_sizes: MutableMapping[Probe, set[int]] = WeakKeyDictionary()


def _refuse_batch_statistics(model: nn.Module, probe: Probe, micro_batch: int) -> None:
    """Raise ValueError where parts of a batch would have other outputs, as of BatchNorm without running statistics."""
    ends = [probe.first_image(index) for index in range(probe.n_batches + 1)]
    if max(end - start for start, end in itertools.pairwise(ends)) <= micro_batch:
        return
    for name, module in model.named_modules():
        if isinstance(module, BatchNormBase) and module.running_mean is None:
            raise ValueError(
                f"Expected micro_batch=None with BatchNorm that uses the statistics of the batch, received {micro_batch} and "
                f"{name or type(module).__name__!r} without running statistics, which differ for parts of a batch."
            )
    if micro_batch not in _independent_sizes.setdefault(probe, set()):
        x, _ = next(iter(probe.iter_batches()))
        n_part = max(1, micro_batch // 2)  # no more images at once than the measure has, but for single ones
        refuse_dependent_images(model, x[: max(2, micro_batch)], n_part, f"micro_batch={micro_batch}")
        _independent_sizes[probe].add(micro_batch)


@contextmanager
def curvatures(
    probe: Probe,
    options: CurvatureOptions | None = None,
    *,
    n_samples: int = 1,
    mean_alone: bool = False,
    **changes: Unpack[CurvatureArguments],
) -> Iterator[Curvatures]:
    """Enter the probe's second-order guard and yield the factory of operators.

    Args:
        probe: The model, batches and objective.
        options: Options of the operators; None for the defaults.
        n_samples: Number of labels drawn for each image by ``fisher_mc``.
        mean_alone: Whether only `Curvatures.mean` will be used: weights that are sharded over ranks then stay so, where the L2
            term, the subset and the product allow it. They are whole on every rank otherwise.
        changes: Fields of ``options`` to replace.

    Raises:
        ValueError: As `CurvatureOptions` and `select_parameters`; a loss without the operator, no parameters, a compiled or
            inference-mode model, a batch on another device, or micro-batches of a model that uses statistics of the batch.
    """
    options = replace(options or CurvatureOptions(), **changes)
    check_output_curvature(options.operator, probe.objective)
    probe.parameters()  # refuses a model without any, before anything is computed
    keeps_shards = mean_alone and is_sharded(probe.model) and _allows_shards(probe, options)
    by_differences = options.product == "difference"
    subset = subset_name(probe.model, options.subset)  # before the others' gradients are switched off below
    guard = probe.guard(
        second_order=True,
        dtype=options.torch_dtype,
        bn=options.bn,
        micro_batch=options.micro_batch,
        moves_weights=by_differences,
        first_order=by_differences,
        keeps_shards=keeps_shards,
    )
    with (
        guard as model,
        analyzed_parameters(model, probe.parameters(), options.subset, probe.first_images) as parameters,
    ):
        for name, p in model.named_parameters():
            p.requires_grad_(name in parameters)  # the others' gradients are not needed; the guard restores the flags
        if options.micro_batch is not None:
            _refuse_batch_statistics(model, probe, options.micro_batch)
        warn_of_sum_norm(probe.objective, parameters)
        if by_differences:
            _refuse_kinks(model, probe, parameters)
        modules = block_modules(model, probe.first_images()) if options.checkpoint_blocks else {}
        with recomputed_blocks(modules):
            yield Curvatures(probe, model, parameters, options, subset, n_samples)
