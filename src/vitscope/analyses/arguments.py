"""Options of a measure that its node does not spell out: the run's checkpoints, other probes, an untrained model."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from vitscope.config import factories
from vitscope.core.probe import Probe
from vitscope.runs import checkpoint_sequence, result_store, run_dir

if TYPE_CHECKING:
    from vitscope.analyses.runner import Analysis, Place

#: by the parameter name of the measure that takes it
NAMES = ("partial", "checkpoints", "validation", "initial")


def options(analysis: Analysis, place: Place, rows: result_store.PartialRows) -> dict[str, Any]:
    """Return what the measure takes and its node leaves open."""
    wanted = inspect.signature(analysis.measure).parameters
    found: dict[str, Any] = {}
    if "partial" in wanted:
        found["partial"] = rows
    if "checkpoints" in wanted and analysis.options.get("checkpoints") is None:
        found["checkpoints"] = checkpoint_sequence.of_run(place.run)
    if "validation" in wanted and analysis.options.get("validation") is None:
        request = {"split": "val", "augment": False, "n_images": None, "batch_size": place.datamodule.eval_batch_size}
        found["validation"] = factories.probe(place.cfg, place.network, place.datamodule, request)
    if "initial" in wanted and analysis.options.get("initial") is None:
        found["initial"] = factories.model(_untrained(place.cfg))
    return found


def loaded(key: str, value: Any, probe: Probe) -> Any:
    """Turn ``other=runs/<id>`` into a probe of that run on the same images, named checkpoints into their weights."""
    if key == "checkpoints" and value is not None:
        return checkpoint_sequence.named(value)
    if key != "other" or not isinstance(value, str):
        return value
    other = run_dir.load_probe(value, split=probe.about["split"])
    other.model.to(probe.device)
    about = {**probe.about, "checkpoint": other.about["checkpoint"]}
    return Probe(other.model, probe.batches, probe.objective, about=about, optimizer=other.optimizer)


def _untrained(cfg: DictConfig) -> DictConfig:
    """Return the configuration without pretrained weights, which are no initialisation."""
    if not cfg.model.get("pretrained", False):
        return cfg
    cfg = copy.deepcopy(cfg)
    cfg.model.pretrained = False
    return cfg
