"""Adaptive sharpness: the rise of the loss of m images in balls whose axes are scaled by the weights.

Andriushchenko et al., "A modern look at the relationship between sharpness and generalization", ICML 2023, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from vitscope.core.probe import Batch, Probe
from vitscope.core.weight_space import guarded_evaluation
from vitscope.linalg.weights.auto_pgd import StepSize, apgd_step
from vitscope.linalg.weights.directions import filter_parameters, norm, random_direction, scale
from vitscope.linalg.weights.effective_weights import canonical_names, pruning_masks
from vitscope.linalg.weights.weight_space_walk import points_in_plane
from vitscope.runtime import stop_flag
from vitscope.runtime.resumable_map import Partial, Row, map_resumably

AdaptiveMeasure = Literal[
    "elementwise_l2", "elementwise_linf", "elementwise_average", "filter_l2", "filter_linf", "filter_average"
]
MEASURES = get_args(AdaptiveMeasure)

#: norms of centered logits below which they are not divided (the paper's code)
_LEAST_NORM = 1e-10

#: numbers of a case and of a group of images
_Key = tuple[int, int]


@dataclass(frozen=True)
class AdaptiveOptions:
    """Options of adaptive sharpness.

    Attributes:
        measures: Which of `MEASURES`.
        radii: Radii by the last word of a measure: ``l2``, ``linf`` and ``average``.
        m_images: Images of each group.
        n_steps: Steps of the ascent.
        n_starts: Number of starts: the weights themselves, then random points of the ball.
        n_draws: Pairs of opposite random points of the average.
        logit_normalization: Whether logits are centered and divided by their norm.
        seed: Seed of starts and random points.
    """

    measures: tuple[str, ...]
    radii: Mapping[str, tuple[float, ...]]
    m_images: int
    n_steps: int
    n_starts: int
    n_draws: int
    logit_normalization: bool
    seed: int

    def __post_init__(self) -> None:
        """Refuse unknown measures, and radii that are missing or not positive."""
        for measure in self.measures:
            if measure not in MEASURES:
                raise ValueError(f"Expected adaptive to hold some of {', '.join(MEASURES)}, received {measure!r}.")
            ball = measure.rpartition("_")[2]
            if not self.radii[ball] or not min(self.radii[ball]) > 0:
                raise ValueError(f"Expected {ball}_radii to be positive numbers, received {self.radii[ball]}.")

    @property
    def cases(self) -> list[tuple[str, float]]:
        """Measures with each of their radii."""
        return [(measure, radius) for measure in self.measures for radius in self.radii[measure.rpartition("_")[2]]]


@dataclass(frozen=True)
class AdaptiveRises:
    """Rises by case and group.

    Attributes:
        rise: (n_cases, n_groups) in nats.
        late_rise: (n_cases, n_groups) the part of the rise that the last quarter of the steps added; NaN for averages.
    """

    rise: np.ndarray
    late_rise: np.ndarray


def adaptive_rises(
    probe: Probe, options: AdaptiveOptions, dtype: torch.dtype | None, partial: Partial | None
) -> AdaptiveRises:
    """Measure the adaptive rises of each group of images; ``dtype`` is None for the model's own, or one of full precision.

    Raises:
        ValueError: Fewer images than a group has, or logit normalization of outputs that are no logits (B, C).
    """
    cases = options.cases
    n_groups = probe.n_images // options.m_images if cases else 0
    if cases and n_groups == 0:
        raise ValueError(
            f"Expected m_images to be at most the {probe.n_images} images of the probe, received {options.m_images}."
        )
    keys = [(case, group) for group in range(n_groups) for case in range(len(cases))]
    with guarded_evaluation(probe, dtype=dtype) as (model, _):
        search = _Search(probe, model, options)

        def compute(key: _Key) -> Row:
            (measure, radius), group = cases[key[0]], key[1]
            rise_of = search.average if measure.endswith("average") else search.worst
            return rise_of(measure, radius, group)

        def name(key: _Key) -> str:
            (measure, radius), group = cases[key[0]], key[1]
            return f"{measure} {radius!r} of group {group}"

        rows = (
            map_resumably(keys, compute, name=name, partial=partial, description="adaptive sharpness") if keys else []
        )
    rise, late = (
        np.array([row[field] for row in rows], dtype=np.float64).reshape(n_groups, len(cases)).T
        for field in ("rise", "late_rise")
    )
    return AdaptiveRises(rise, late)


class _Search:
    """Points of balls around a model's weights, in which each weight moves in units of its own scale."""

    def __init__(self, probe: Probe, model: nn.Module, options: AdaptiveOptions) -> None:
        self._probe, self._model, self._options = probe, model, options
        self._parameters = probe.parameters()
        self._names = canonical_names(model)
        self._group: tuple[int, list[Batch]] = (-1, [])
        self._scales = {kind: _scales(model, self._parameters, kind) for kind in ("elementwise", "filter")}

    def average(self, measure: str, radius: float, group: int) -> Row:
        """Return the mean rise over normal points with ``radius`` times the scales as standard deviations."""
        scales = self._scales[measure.partition("_")[0]]
        center = self._nll(group)
        rises = []
        for draw in range(self._options.n_draws):
            index = -1_000_000 - group * self._options.n_draws - draw  # a stream of its own
            offset = random_direction(self._parameters, self._options.seed, index, self._names)
            for name, d in offset.items():
                d.mul_(scales[name])
            with points_in_plane(self._parameters, None, offset) as move:
                for sign in (-radius, radius):
                    move(0.0, sign)
                    rises.append(self._nll(group) - center)
        return {"rise": float(np.mean(rises)), "late_rise": float("nan")}

    def worst(self, measure: str, radius: float, group: int) -> Row:
        """Return the largest rise that the ascents from all starts meet."""
        kind, _, ball = measure.partition("_")
        center = self._nll(group)
        best = late = 0.0
        for start in range(self._options.n_starts):
            bests = self._ascent(self._scales[kind], ball, radius, group, start)
            if bests[-1] - center > best:
                best = bests[-1] - center
                late = bests[-1] - bests[int(np.ceil(0.75 * self._options.n_steps))]
        return {"rise": best, "late_rise": late}

    def _ascent(self, scales: Mapping[str, Tensor], ball: str, radius: float, group: int, start: int) -> list[float]:
        """Return the largest loss met after each step of APGD in the coordinates ``u = offset / scale``.

        In these coordinates the ball is round, and a rescaling of weights changes neither them nor the gradient by them.
        """
        n_steps = self._options.n_steps
        u = self._start(scales, ball, radius, start, group)
        before, best_u = _copy(u), _copy(u)
        step_size = StepSize(2 * radius, n_steps)
        offset = {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        bests: list[float] = []
        with points_in_plane(self._parameters, None, offset) as move:
            for k in range(n_steps + 1):
                for name, d in offset.items():
                    d.copy_(u[name] * scales[name])
                move(0.0, 1.0)
                loss, gradient = self._nll_and_gradient(group)
                if not np.isfinite(loss):
                    return bests + [np.inf] * (n_steps + 1 - len(bests))
                if not bests or loss > bests[-1]:
                    best_u = _copy(u)
                    step_size.n_improving += 1
                bests.append(max([loss, *bests[-1:]]))
                if k == n_steps:
                    break
                if step_size.is_halved(k, bests[-1]):
                    # the gradient belongs to the point that is left; the next step computes that of the best one
                    u, before = _copy(best_u), _copy(best_u)
                    continue
                for name, g in gradient.items():
                    g.mul_(scales[name])
                u, before = apgd_step(u, before, gradient, step_size.value, ball, radius, first=k == 0), u
        return bests

    def _start(
        self, scales: Mapping[str, Tensor], ball: str, radius: float, start: int, group: int
    ) -> dict[str, Tensor]:
        if start == 0:
            return {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        u = random_direction(self._parameters, self._options.seed, -2_000_000 - start - 1000 * group, self._names)
        for name, d in u.items():
            d.mul_(scales[name] > 0)
        if ball == "l2":
            return scale(u, radius / max(norm(u), 1e-300))
        return {name: radius * torch.erf(d / 2**0.5) for name, d in u.items()}  # uniform in the cube

    def _batches(self, group: int) -> list[Batch]:
        """Return the images of a group, cut from the probe's batches."""
        if self._group[0] != group:
            first, last = group * self._options.m_images, (group + 1) * self._options.m_images
            pieces, start = [], 0
            for x, y in self._probe.iter_batches():
                part = slice(max(first - start, 0), max(last - start, 0))
                if len(y[part]):
                    pieces.append((x[part], y[part]))
                start += len(y)
                if start >= last:
                    break
            self._group = (group, pieces)
        return self._group[1]

    def _loss(self, x: Any, y: Tensor) -> Tensor:
        outputs = self._model(x)
        if self._options.logit_normalization:
            if not isinstance(outputs, Tensor) or outputs.ndim != 2:
                raise ValueError("Expected logits (B, C) with logit_normalization=True, received other outputs.")
            outputs = normalized_logits(outputs)
        return self._probe.objective.data_loss(outputs, y, "sum")

    def _count(self, batches: Sequence[Batch]) -> int:
        count = sum(self._probe.objective.n_examples(y) for _, y in batches)
        if count == 0:
            raise ValueError("Expected a label in each group of m_images images, received a group without any.")
        return count

    def _nll(self, group: int) -> float:
        batches = self._batches(group)
        # added up on the device: a number read for each batch would make the host wait for it
        losses = []
        for x, y in batches:
            stop_flag.check()
            losses.append(self._loss(x, y).detach().double())
        return float(sum(losses)) / self._count(batches)

    def _nll_and_gradient(self, group: int) -> tuple[float, dict[str, Tensor]]:
        batches = self._batches(group)
        losses, count = [], self._count(batches)
        gradient = {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        with torch.enable_grad():
            for x, y in batches:
                stop_flag.check()
                loss = self._loss(x, y) / count
                losses.append(loss.detach().double())
                pieces = torch.autograd.grad(loss, list(self._parameters.values()), materialize_grads=True)
                for sums, piece in zip(gradient.values(), pieces):
                    sums.add_(piece)
        return float(sum(losses)), gradient


def normalized_logits(logits: Tensor) -> Tensor:
    """Return logits (B, C), of each image centered and divided by their Euclidean norm (Andriushchenko et al., 2023)."""
    centered = logits - logits.mean(dim=1, keepdim=True)
    return centered / centered.norm(dim=1, keepdim=True).clamp(min=_LEAST_NORM)


def _scales(model: nn.Module, parameters: Mapping[str, nn.Parameter], kind: str) -> dict[str, Tensor]:
    """Return the scale of each weight: its absolute value, or the root mean square of its filter."""
    filters, masks = filter_parameters(model), pruning_masks(model)
    scales = {}
    for name, p in parameters.items():
        w = p.detach() * masks[name].to(p) if name in masks else p.detach()
        scales[name] = w.abs()
        if kind == "filter" and name in filters and w.ndim > 1:
            mask = masks[name].to(w) if name in masks else torch.ones_like(w)
            axes = tuple(range(1, w.ndim))
            mean_square = w.square().sum(axes, keepdim=True) / mask.sum(axes, keepdim=True).clamp(min=1)
            scales[name] = mean_square.sqrt() * mask
    return scales


def _copy(u: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: d.clone() for name, d in u.items()}
