"""A model under each corruption at each severity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial as with_arguments
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitscope.core.cost.measure_cost import Options, WorkUnit
from vitscope.core.evaluation import evaluate
from vitscope.core.input_normalization import Pixels, stated_pixels
from vitscope.core.objective import Objective, hard_targets
from vitscope.core.probe import Batch, Probe
from vitscope.diagnostics.corruption._archives import Arrays, Folders
from vitscope.diagnostics.corruption._severity_table import COMMON, VALIDATION
from vitscope.diagnostics.corruption._transforms import corrupted
from vitscope.runtime import stop_flag
from vitscope.runtime.resumable_map import map_resumably

Condition = tuple[str, int]

#: types by the name of their set
SETS = {"common": COMMON, "validation": VALIDATION, "all": COMMON + VALIDATION}

#: the images as they are
CLEAN: Condition = ("clean", 0)


def measured(
    probe: Probe,
    conditions: Sequence[Condition],
    label: str,
    *,
    source: Arrays | Folders | None,
    pixels: Pixels,
    seed: int,
    partial: MutableMapping[str, Mapping[str, Any]] | None,
) -> list[Mapping[str, Any]]:
    """Return accuracy, nll, ece and each image's ``correct`` under every condition; ranks share out the conditions.

    Args:
        probe: The model and the clean images.
        conditions: Pairs of type and severity.
        label: Name that tells the rows of several models apart in ``partial``.
        source: A published data set; None makes the corruptions from the probe's images.
        pixels: The model's normalization.
        seed: Seed of the corruptions that are generated.
        partial: Finished rows.
    """
    with probe.guard() as model:

        def row(condition: Condition) -> Mapping[str, Any]:
            if condition == CLEAN:
                batches: Iterator[Batch] = probe.iter_batches()
            elif source is None:
                batches = _made(probe, pixels, condition, seed)
            else:
                batches = _published(probe, pixels, source, condition)
            hard = ((x, hard_targets(y)) for x, y in _polled(batches))
            evaluation = evaluate(model, hard, Objective(), per_image=True, reduce=False)
            return {
                "accuracy": evaluation.accuracy,
                "nll": evaluation.nll,
                "ece": evaluation.ece,
                "correct": evaluation.answers,
            }

        name = with_arguments("{0} {1[0]} {1[1]}".format, label)
        return map_resumably(conditions, row, name=name, partial=partial, description="corruption")


def _made(probe: Probe, pixels: Pixels, condition: Condition, seed: int) -> Iterator[Batch]:
    kind, severity = condition
    number = (COMMON + VALIDATION).index(kind)
    place = 0
    for x, y in probe.iter_batches():
        images = pixels.to_pixels(x.double()).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()  # (B, h, w, C)
        changed = [
            corrupted(image, kind, severity, np.random.default_rng((seed, number, place + i)))
            for i, image in enumerate(images)
        ]
        place += len(images)
        yield _as_input(torch.from_numpy(np.stack(changed)), pixels, probe), y


def _published(probe: Probe, pixels: Pixels, source: Arrays | Folders, condition: Condition) -> Iterator[Batch]:
    size = next(probe.iter_batches())[0].shape[-2:]
    for images, labels in source.read(*condition, batch_size=probe.batch_size):
        x = _as_input(torch.from_numpy(images).double() / 255, pixels, probe)
        if x.shape[-2:] != size:
            x = F.interpolate(x, size=size, mode="bicubic", antialias=True)
        yield x, torch.from_numpy(labels).to(probe.device)


def _as_input(images: Tensor, pixels: Pixels, probe: Probe) -> Tensor:
    return pixels.to_input(images.permute(0, 3, 1, 2)).to(probe.device, probe.dtype)  # (B, C, h, w)


def _polled(batches: Iterator[Batch]) -> Iterator[Batch]:
    for batch in batches:
        stop_flag.check()
        yield batch


def type_names(types: str | Sequence[str]) -> tuple[str, ...]:
    """Return the types of corruption that an option names.

    Args:
        types: ``common``, ``validation``, ``all``, a name or names.

    Raises:
        ValueError: An unknown name, none, or one twice.
    """
    names = SETS.get(types, (types,)) if isinstance(types, str) else tuple(types)
    unknown = [name for name in names if name not in SETS["all"]]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(
            f"Expected types to be common, validation, all, or different names among {', '.join(SETS['all'])}, "
            f"received {unknown[0] if unknown else list(names)!r}."
        )
    return names


#: images that the making of corrupted ones is timed with
_N_TIMED = 16


@contextmanager
def _corrupting(probe: Probe, options: Options) -> Iterator[Callable[[], object]]:
    pixels = stated_pixels(probe, options.get("mean"), options.get("std"))
    seed = int(options.get("seed") or 0)
    names, severities = type_names(options["types"]), options["severities"]
    conditions = [(name, int(severity)) for name in names for severity in severities]
    with probe.guard(logits=False):
        yield lambda: [batch for condition in conditions for batch in _made(probe, pixels, condition, seed)]


#: the making of the images of all types and severities, on the CPU
CORRUPTED_IMAGES = WorkUnit(
    "corruption of images", _corrupting, ("types", "severities", "mean", "std"), forwards=0, n_timed=_N_TIMED
)
