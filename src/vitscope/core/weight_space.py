"""What every walk through weight space shares: the model's numbers where it stands, and rows that survive a stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from vitscope.core.evaluation import evaluate
from vitscope.core.guard.probe_guard import refuse_unfit_weights
from vitscope.core.probe import Probe
from vitscope.runtime import distributed, progress, stop_flag

Row = Mapping[str, Any]
Partial = MutableMapping[str, Row]
Key = TypeVar("Key")

#: a label and the weights by name, as a state dict has them
Checkpoint = tuple[str, Mapping[str, Tensor]]
Checkpoints = Sequence[Checkpoint]

BatchNormPolicy = Literal["eval", "recalibrate"]
BN_POLICIES = get_args(BatchNormPolicy)
DtypeName = Literal["float64", "float32", "bfloat16", "float16"]
_HALF = (torch.bfloat16, torch.float16)


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return the floating-point type of that name.

    Raises:
        ValueError: not the name of one.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        found = None
    if dtype is not None and found is None:
        raise ValueError(f"Expected dtype to be float64, float32, bfloat16 or float16, received {dtype!r}.")
    return found


def chosen(checkpoints: Checkpoints | None, labels: Sequence[str] | None = None) -> Iterator[Checkpoint]:
    """Yield the checkpoints of those labels, in the labels' order and one at a time; all of them for None.

    Raises:
        ValueError: no checkpoint at all, or a label that none has.
    """
    if checkpoints is None or len(checkpoints) == 0:
        raise ValueError("Expected checkpoints (pairs of a label and a state dict), received none.")
    if labels is None:
        yield from checkpoints
        return
    # a lazy sequence may know its labels; asking for each item would read every file
    known = getattr(checkpoints, "labels", None) or [label for label, _ in checkpoints]
    for label in labels:
        if label not in known:
            raise ValueError(f"Expected one of the checkpoints {', '.join(known)}, received {label!r}.")
        yield checkpoints[list(known).index(label)]


def check_movable(probe: Probe) -> None:
    """Raise where the probe's weights cannot be moved or are not finite: before directions are made from them.

    Raises:
        NumericalError: weights that are not finite.
        ValueError: weights that are quantized or sparse.
    """
    refuse_unfit_weights(probe.model, differentiated=True)


@contextmanager
def standing(
    probe: Probe, *, dtype: torch.dtype | None = None, bn: str = "eval"
) -> Iterator[tuple[nn.Module, Callable[[], dict[str, float]]]]:
    """Yield the guarded model and a function that measures it with the weights it has when called.

    The function returns nll, accuracy and ece over all batches of the probe (not this rank's share alone: ranks share out
    points, not batches), and polls for termination at each batch.

    Args:
        probe: what to look at.
        dtype: float64 and float32 cast the model for the time inside; bfloat16 and float16 keep its weights and run the forward
            passes under autocast.
        bn: ``eval`` uses BatchNorm's running statistics; ``recalibrate`` recomputes them at each call, as the average over
            the probe's batches of each batch's statistics.

    Raises:
        ValueError: an unknown BatchNorm policy.
    """
    if bn not in BN_POLICIES:
        raise ValueError(f"Expected bn to be one of {', '.join(BN_POLICIES)}, received {bn!r}.")
    half = dtype in _HALF
    with probe.guard(dtype=None if half else dtype, moves_weights=True) as model:

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for batch in probe.iter_batches():
                stop_flag.check()
                yield batch

        def here() -> dict[str, float]:
            if half:  # autocast keeps cast weights until its outermost context ends, which may be the caller's
                torch.clear_autocast_cache()
            with torch.autocast(probe.device.type, dtype=dtype if half else None, enabled=half):
                if bn == "recalibrate":
                    recalibrate(model, batches())
                found = evaluate(model, batches(), probe.objective, reduce=False)
            return {"nll": found.nll, "accuracy": found.accuracy, "ece": found.ece}

        try:
            yield model, here
        finally:
            if half:
                torch.clear_autocast_cache()


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
    """Replace BatchNorm's running statistics by their average over ``batches`` (means, and unbiased variances).

    Modes and momenta are put back; the statistics stay. A model without BatchNorm is left alone.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    before = [(norm, norm.momentum, norm.training) for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average
            norm.train()
        for x, _ in batches if norms else ():
            model(x)
    finally:
        for norm, momentum, training in before:
            norm.momentum = momentum
            norm.train(training)


def rows(
    keys: Sequence[Key],
    compute: Callable[[Key], Row],
    *,
    name: Callable[[Key], str],
    partial: Partial | None,
    description: str,
) -> list[Row]:
    """Return ``compute(key)`` of every key, computing only what ``partial`` lacks, shared out over the ranks.

    Each row is stored in ``partial`` under ``name(key)`` as soon as it is there, by the rank that computed it; every rank
    returns all rows. Keys that were done on any rank are not computed again, whatever the number of ranks then was.

    Args:
        keys: in the order of the work; neighbours go to one rank where the order is by rows of a plane.
        compute: makes one row.
        name: a key's name in ``partial``.
        partial: finished rows; None keeps none.
        description: shown with the progress.

    Raises:
        Interrupted: a stop was asked for; the finished rows are stored.
    """
    names = {key: name(key) for key in keys}
    own = {n: dict(partial[n]) for n in names.values() if n in partial} if partial is not None else {}
    known: dict[str, Row] = _merged(own)
    missing = [key for key in keys if names[key] not in known]
    rank, world = distributed.rank(), distributed.world_size()
    share = missing[rank * len(missing) // world : (rank + 1) * len(missing) // world]
    fresh: dict[str, Row] = {}
    for key in progress.track(share, description):
        row = compute(key)
        fresh[names[key]] = row
        if partial is not None:
            partial[names[key]] = row
    known |= _merged(fresh)
    return [known[names[key]] for key in keys]


def _merged(rows_: Mapping[str, Row]) -> dict[str, Row]:
    return {key: row for share in distributed.gather_objects(dict(rows_)) for key, row in share.items()}
