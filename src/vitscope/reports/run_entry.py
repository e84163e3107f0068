"""One run of a report: configuration, provenance, metrics, curves and results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vitscope.config import experiment_identity
from vitscope.reports import model_family
from vitscope.reports.measured_results import Measured, moment
from vitscope.runs.run_dir import Run

#: the moment after training
END = "end"


@dataclass(frozen=True)
class Entry:
    """One run.

    Attributes:
        run: Folder of the run.
        config: Resolved configuration as plain containers.
        facts: Provenance of the run.
        metrics: Each metric's last value; None is one that was not finite.
        curves: Steps and values of each training and validation metric.
        results: Results of analyses, by age.
        group: Digest of the experiment, the seed left out.
        label: The experiment's name in this report.
        superseded: Whether a later run repeats it (then only the list of runs shows it).
        name: Name among the runs of a report where several folders have one name, see `vitscope.reports.run_index.labeled`.
    """

    run: Run
    config: Mapping[str, Any]
    facts: Mapping[str, Any]
    metrics: Mapping[str, float | None]
    curves: Mapping[str, tuple[list[float], list[float]]] = field(repr=False)
    results: tuple[Measured, ...] = field(repr=False)
    group: str = ""
    label: str = ""
    superseded: bool = False
    name: str = ""

    @property
    def id(self) -> str:
        """The folder's name; where several folders of a report have it, with the folders above that tell them apart."""
        return self.name or self.run.id

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.config.get("seed") or 0)

    @property
    def status(self) -> str:
        """``finished``, ``failed``, ``stopped``, ``running`` or ``unknown``."""
        return str(self.facts.get("status", "unknown"))

    @property
    def trained(self) -> bool:
        """Whether the run is a training (rather than an analysis of a model that was not trained here)."""
        return self.facts.get("command") != "analyze"

    @property
    def from_initial_weights(self) -> bool:
        """Whether the run is a training from initial weights whose length was never changed, as its configuration alone says."""
        return self.trained and experiment_identity.is_from_initial_weights(self.config, self.facts)

    @property
    def untrained(self) -> bool:
        """Whether one of our models was analyzed as it was built, without weights from anywhere."""
        node = self.config.get("model") or {}
        is_builtin = str(node.get("_target_", "")).startswith("vitscope.models.")
        return is_builtin and not (self.trained or node.get("pretrained") or self.config.get("ckpt_path"))

    @property
    def family(self) -> str:
        """The model's builder."""
        return experiment_identity.family(self.config)

    @property
    def kin(self) -> str:
        """The family of the paper that the model belongs to, timm's by the kinds of their units."""
        return model_family.kin(self.config, self.facts)

    @property
    def data(self) -> str:
        """The data set's name, with the share that was trained on."""
        fraction = (self.config.get("data") or {}).get("fraction", 1.0)
        return self.data_name + (f" ({fraction:g})" if fraction != 1 else "")

    @property
    def data_name(self) -> str:
        """The data set's name."""
        return str((self.config.get("data") or {}).get("name", "?"))

    def results_at(self, tag: str | None) -> list[Measured]:
        """Return the results of one moment, by age.

        Args:
            tag: The moment; ``all`` for every one; None for `newest_tag` of each measure.
        """
        if tag is not None:
            return [m for m in self.results if tag in ("all", m.tag)]
        return [m for m in self.results if m.tag == self.newest_tag(m.analysis, m.measure)]

    def newest_tag(self, analysis: str | None, measure: str | None = None) -> str | None:
        """Return ``end`` where something was measured there, else the moment of its newest result, None without one.

        Args:
            analysis: The configuration's name; None for any.
            measure: The measure; None for any.
        """
        results = [m for m in self.results if analysis in (None, m.analysis) and measure in (None, m.measure)]
        successes = [m for m in results if not m.error] or results
        if any(m.tag == END for m in successes):
            return END
        return max(successes, key=lambda m: m.time).tag if successes else None

    def tags(self) -> list[str]:
        """Return the moments at which something was measured, in their order."""
        return sorted({m.tag for m in self.results}, key=moment)
