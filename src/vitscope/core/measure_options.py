"""Record a measure's options on the card of its result, so that results with other options are not compared unseen."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import replace
from os import PathLike, fspath
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from vitscope.core.checks.option_checks import check_options
from vitscope.core.probe import Probe
from vitscope.core.sharding.sharded_parameters import plain_weights

#: arguments of measures that do not change what a number means: draws, memory, chunks, finished rows, how a product or a pass
#: is computed (the card's solver states products by differences), what belongs to the model itself (its checkpoints, its initial
#: weights, its units), and the result that colors are aligned to. ``dtype`` is on the card as the type that was used. Every
#: other argument, also of a measure that is added later, is compared.
INCIDENTAL = frozenset({
    "probe", "partial", "seed", "micro_batch", "max_memory", "basis", "checkpoint_blocks", "batches_at_once", "budget_s",
    "product", "difference_step", "cache", "eigenvectors", "checkpoints", "initial", "units", "dtype", "reference",
})  # fmt: skip

#: the same, of one measure: another one has an argument of that name with another meaning
INCIDENTAL_OF = frozenset({
    ("hessian_eigenvalues", "start"), ("edge_of_stability", "previous"), ("edge_of_stability", "step"),
    ("edge_of_stability", "optimizer"),
})  # fmt: skip

#: measures that leave the weights of a sharded model on their ranks where their options allow it
KEEP_SHARDS = frozenset({"hessian_eigenvalues", "hessian_trace", "spectral_density"})

#: names of one argument, of which each measure has one and accepts the others: how many eigenvalues are computed, ``k`` of the
#: mean over all batches and ``n_top`` of each
EQUIVALENT = ("k", "n_top")

#: arguments of measures that are probes
_PROBES = frozenset({"probe", "other", "train", "validation"})

P = ParamSpec("P")
R = TypeVar("R")


def record_options(measure: Callable[P, R]) -> Callable[P, R]:
    """Decorate a measure: its result's card gets the options it was called with, defaults included.

    An argument may be passed under another of the `EQUIVALENT` names; the card has the measure's own. The checks that the
    measure declares (`vitscope.core.checks.option_checks`) run before it. A model whose weights are
    sharded over ranks has whole copies of them for the time of the measure, but for measures of `KEEP_SHARDS`; all ranks call it
    together.
    """
    parameters = inspect.signature(measure).parameters
    keeps_shards = getattr(measure, "__name__", "") in KEEP_SHARDS

    @functools.wraps(measure)
    def recording(*args: P.args, **kwargs: P.kwargs) -> R:
        _rename_equivalent(kwargs, parameters)
        probe = args[0] if args else kwargs.get("probe")
        _check_probes(measure, args, kwargs)
        check_options(measure, _given(measure, args, kwargs))
        is_whole = keeps_shards or not isinstance(probe, Probe)
        with nullcontext() if is_whole else plain_weights(cast(Probe, probe).model):
            return with_options(measure(*args, **kwargs), recording, *args, **kwargs)

    # Python 3.14 copies what computes annotations, which is None where a decorator has set them (`curvature_arguments`)
    recording.__annotations__ = measure.__annotations__
    return recording


def _check_probes(measure: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse a model, a list of batches or a run in place of a probe, as the first argument and wherever a probe is taken.

    Raises:
        ValueError: Another object.
    """
    name = getattr(measure, "__name__", "the measure")
    probes = {"probe": args[0]} if args else {}
    probes |= {key: value for key, value in kwargs.items() if key in _PROBES}
    for key, value in probes.items():
        if isinstance(value, nn.Module | list | tuple | str | PathLike):
            fix = "vs.Probe(model, batches, vs.Objective())"
            if key == "probe":
                fix += ", or vs.load_probe of a run"
            elif key == "other":
                fix += " of the same images"
            raise ValueError(
                f"Expected {key} of vs.{name} to be a vs.Probe, received {type(value).__name__}: pass {fix}."
            )


def _given(measure: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name; none where they do not fit, which the call itself will say."""
    try:
        return inspect.signature(measure).bind_partial(*args, **kwargs).arguments
    except TypeError:
        return {}


def _rename_equivalent(arguments: dict[str, Any], names: Collection[str]) -> None:
    """Give an argument that has another of the `EQUIVALENT` names the name that a measure has, in place.

    Raises:
        TypeError: It is given under both names.
    """
    own_names = [name for name in EQUIVALENT if name in names]
    if len(own_names) != 1:
        return
    own_name = own_names[0]
    for other in EQUIVALENT:
        if other in arguments and other not in names:
            if own_name in arguments:
                raise TypeError(f"Expected {own_name} or {other}, which are the same argument, received both.")
            arguments[own_name] = arguments.pop(other)


def with_options(result: Any, measure: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Return ``result`` with the options of the call ``measure(*args, **kwargs)`` on its card; unchanged without a card."""
    card = getattr(result, "card", None)
    return result if card is None else replace(result, card=replace(card, options=options_of(measure, *args, **kwargs)))


def options_of(measure: Callable[..., Any], /, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a call by name as plain values, defaults included and `INCIDENTAL` ones left out."""
    bound = inspect.signature(measure).bind(*args, **kwargs)
    bound.apply_defaults()
    probe = bound.arguments.get("probe")
    own_name = getattr(measure, "__name__", "")
    arguments = {
        key: value
        for key, value in bound.arguments.items()
        if key not in INCIDENTAL and (own_name, key) not in INCIDENTAL_OF
    }
    return {key: _plain(value, probe) for key, value in arguments.items()}


def _plain(value: Any, probe: Probe | None) -> Any:
    """Return a value as what JSON holds; tensors and modules, which belong to one model, by their kind alone."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Probe):
        return _probe_facts(value, probe)
    if isinstance(value, Tensor | np.ndarray):
        return f"tensor of shape {tuple(value.shape)}"
    if isinstance(value, nn.Module):
        return type(value).__name__
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, PathLike):
        return fspath(value)
    if isinstance(value, Mapping):
        if any(isinstance(item, Tensor | np.ndarray) for item in value.values()):
            return f"{len(value)} tensors"
        return {str(key): _plain(item, probe) for key, item in value.items()}
    if isinstance(value, list | tuple | range | set | frozenset):
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return [_plain(item, probe) for item in items]
    return getattr(value, "__qualname__", type(value).__name__)


def _probe_facts(option: Probe, probe: Probe | None) -> dict[str, Any]:
    """Return what tells the images of a probe that is an option; ``probe`` is that of the measure."""
    facts: dict[str, Any] = {key: str(option.about.get(key, "unknown")) for key in ("data", "split", "augmentation")}
    preprocessing = option.about.get("preprocessing", "default")
    if preprocessing != "default":  # earlier versions have no such fact
        facts["preprocessing"] = str(preprocessing)
    has_same_batches = probe is not None and option.batches is probe.batches
    facts["n_images"] = probe.n_images if probe is not None and has_same_batches else option.n_images
    return facts
