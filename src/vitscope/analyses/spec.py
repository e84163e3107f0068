"""Specification of an analysis: what a node of the `analysis` group says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vitscope.config import loading, target_allowlist
from vitscope.config.loading import NODE_KEYS


@dataclass(frozen=True)
class Analysis:
    """A node of the ``analysis`` group: what to measure, on which images, when.

    Attributes:
        name: The node's key, which names the folder of its results.
        measure: The function.
        options: Keyword arguments of the measure.
        probe: Which images are measured: keys of ``analysis.<name>.probe``.
        when: ``start, every_n_epochs, every_n_steps, at_steps, end`` of training.
        on_error: ``warn`` (training goes on and the result is null) or ``raise``.
    """

    name: str
    measure: Callable[..., Any]
    options: Mapping[str, Any]
    probe: Mapping[str, Any]
    when: Mapping[str, Any] = field(default_factory=dict)
    on_error: str = "warn"

    @property
    def due_at_start(self) -> bool:
        """Whether to measure before the first step."""
        return bool(self.when.get("start", False))

    @property
    def due_at_end(self) -> bool:
        """Whether to measure after the last step."""
        return bool(self.when.get("end", True))

    def due_after(self, epoch: int) -> bool:
        """Whether to measure after ``epoch``, counted from 0."""
        every = int(self.when.get("every_n_epochs") or 0)
        return every > 0 and (epoch + 1) % every == 0

    def due_at_step(self, step: int) -> bool:
        """Whether to measure after ``step`` optimizer steps, as Lightning's ``global_step`` counts them."""
        every = int(self.when.get("every_n_steps") or 0)
        return step > 0 and ((every > 0 and step % every == 0) or self.lists_step(step))

    def lists_step(self, step: int) -> bool:
        """Whether ``at_steps`` names the step, so that its figure is drawn."""
        return step in (self.when.get("at_steps") or ())


def step_tag(step: int) -> str:
    """Return the tag of results after a number of optimizer steps: ``step-000120``."""
    return f"step-{step:06d}"


def parse(nodes: Mapping[str, Any] | None) -> list[Analysis]:
    """Return the analyses of a composed ``analysis`` node, in its order."""
    parsed = []
    for name, node in (loading.plain(nodes) or {}).items():
        measure = target_allowlist.resolve(node["_target_"], f"analysis.{name}")
        options = {key: value for key, value in node.items() if key not in NODE_KEYS}
        parsed.append(
            Analysis(
                name, measure, options, node.get("probe") or {}, node.get("when") or {}, node.get("on_error", "warn")
            )
        )
    return parsed


def probe_request(analysis: Analysis, datamodule: Any) -> dict[str, Any]:
    """Return which images an analysis measures: ``split, augment, n_images, batch_size`` and what else its probe sets."""
    request = {"split": "test", "augment": False, "n_images": None, "batch_size": datamodule.eval_batch_size}
    return {
        **request,
        **{key: value for key, value in analysis.probe.items() if value is not None or key == "n_images"},
    }


def replaced(analysis: Analysis, **changes: Any) -> Analysis:
    """Return a copy with some attributes changed."""
    return replace(analysis, **changes)
