"""Taps: places of a model where a feature map is read, and the choice of some of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict

import numpy as np
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class TokenOrder:
    """Order in which a tensor holds the positions of a map, as one forward pass has shown it.

    Attributes:
        channel: Axis of the channels; the others, flattened, hold images and in each image its tokens.
        n_tokens: Tokens of an image, with those that have no position.
        index: (h, w) number of the token at each position.
        image_size: (H, W) of the images for which the order holds.
    """

    channel: int
    n_tokens: int
    index: Tensor
    image_size: tuple[int, int]


@dataclass(frozen=True)
class Tap:
    """A place where a feature map is read.

    Attributes:
        name: Unique name, such as ``blocks.0.attn``.
        kind: What produced the map: ``stem conv msa mlp pool head``.
        stage: 0 for the stem, then from 1.
        depth: Normalized depth, index / (number of taps - 1), from 0 to 1.
        module: The module whose output or first input is the map.
        at: Which of the two; ``sum`` for an addition in the module's forward that no module returns or takes.
        layout: Axes of that tensor: ``NCHW``, ``NHWC``, ``NLC`` (tokens), ``NCL`` or ``LNC``; ``unknown`` for one that is no map.
        n_prefix: Class, distillation and register tokens in front of the grid, dropped from the map.
        grid: Rows and columns of the tokens, to be declared where no convolution or pooling of the forward pass shows them.
        call: Which of the module's calls in a forward pass is read, from 0.
        n_calls: Number of its calls in a pass.
        subsamples: Whether the unit made the map smaller (strided blocks, pooling, patch merging).
        order: Order of the tokens of a tensor of unknown layout or grid, or why it is not certain; None where it was not sought.
        number: Number of a sum among the additions that the module's call makes itself, from 0.
    """

    name: str
    kind: Kind
    stage: int
    depth: float
    module: nn.Module
    at: Literal["output", "input", "sum"] = "output"
    layout: Layout = "NCHW"
    n_prefix: int = 0
    grid: tuple[int, int] | None = None
    subsamples: bool = False
    call: int = 0
    n_calls: int = 1
    order: TokenOrder | str | None = None
    number: int = 0

    def __repr__(self) -> str:
        """Return the fields that are not their defaults, with the module's class in place of its own text of many lines."""
        texts = {f.name: repr(getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default}
        texts["module"] = type(self.module).__name__
        return f"Tap({', '.join(f'{name}={text}' for name, text in texts.items() if name != 'order')})"


def refuse_other_taps(taps: Iterable[Any]) -> None:
    """Check that what a probe is given as taps are none of names and modules.

    Raises:
        ValueError: One is a text or a module.
    """
    for tap in taps:
        if isinstance(tap, str | nn.Module) or isinstance(getattr(tap, "module", None), str):
            what = repr(tap) if isinstance(tap, str) else f"a {type(tap).__name__}"
            what += f" whose module is the text {tap.module!r}" if isinstance(tap, Tap) else ""
            raise ValueError(
                f"Expected taps to be a list of vs.Tap with a module each, received {what}: choose some of vs.taps(model), "
                "[tap for tap in vs.taps(model) if tap.name == ...]."
            )


Kind = Literal["stem", "conv", "msa", "mlp", "pool", "head"]

Layout = Literal["NCHW", "NHWC", "NLC", "NCL", "LNC", "unknown"]


class TapFields(TypedDict):
    """The fields of a result that name its taps; `vitscope.core.results.result.TAP_COORDINATES` makes them columns of tables.

    Attributes:
        taps: (n_taps,) names.
        kinds: (n_taps,) kinds.
        stages: (n_taps,) stages, 0 for the stem.
        depths: (n_taps,) normalized depths, from 0 to 1.
    """

    taps: tuple[str, ...]
    kinds: tuple[str, ...]
    stages: np.ndarray
    depths: np.ndarray


def tap_fields(taps: Sequence[Tap]) -> TapFields:
    """Return names, kinds, stages and depths of taps, as results of measures hold them."""
    return TapFields(
        taps=tuple(tap.name for tap in taps),
        kinds=tuple(tap.kind for tap in taps),
        stages=np.array([tap.stage for tap in taps]),
        depths=np.array([tap.depth for tap in taps], dtype=float),
    )


def chosen_taps(taps: Sequence[Tap], choice: str | Sequence[str]) -> list[Tap]:
    """Return the taps that a measure reads, in their order.

    Args:
        taps: Taps of the model, at least one.
        choice: ``stages``, the last tap of each stage after the stem, and the last of all; ``last``; ``all``; or names.

    Raises:
        ValueError: A name that no tap has, or none.
    """
    if choice == "all":
        return list(taps)
    if choice == "last":
        return [taps[-1]]
    if choice == "stages":
        last = {tap.stage: i for i, tap in enumerate(taps) if tap.stage > 0}
        return [taps[i] for i in sorted({*last.values(), len(taps) - 1})]
    names = [choice] if isinstance(choice, str) else list(choice)
    taps_by_name = {tap.name: tap for tap in taps}
    if not names or (unknown := [name for name in names if name not in taps_by_name]):
        received = repr(unknown[0]) if names else "none"
        raise ValueError(
            f"Expected taps to be stages, last, all or names among {', '.join(taps_by_name)}, received {received}; pass "
            f"taps=[{taps[-1].name}]."
        )
    return [tap for tap in taps if tap.name in names]
