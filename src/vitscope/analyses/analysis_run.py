"""One analysis command from its composed configuration: its inputs, the run folder, measures and results."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from vitscope.analyses import announcement, arguments, context, run_changes, runner, spec
from vitscope.analyses.analysis_inputs import AnalysisInputs, prepare_inputs
from vitscope.analyses.prediction import cost_prediction, time_prediction
from vitscope.analyses.prediction.cost_prediction import PredictedCost
from vitscope.config import error_translation, loading, model_facts
from vitscope.core.cost.measure_cost import Count
from vitscope.models.state_dicts import CURRENT_WEIGHTS
from vitscope.runs import named_weights, run_dir, run_end, run_lock
from vitscope.runs.checkpoints import checkpoint_content, checkpoint_sequence
from vitscope.runs.checkpoints.checkpoint_weights import AVERAGE
from vitscope.runs.run_dir import Run
from vitscope.runs.scalar_loggers import run_mirror
from vitscope.runs.summary_table import print_headline
from vitscope.runs.wandb_mirror import WandbMirror
from vitscope.runtime.distributed import gather_objects, rank, world_size

_logger = logging.getLogger(__name__)


@run_lock.released_at_end()
def analyze(cfg: DictConfig, chosen_keys: Sequence[str] = (), run_value_overrides: Sequence[str] = ()) -> Run:
    """Measure what a composed configuration names.

    Args:
        cfg: The configuration of ``conf/analyze.yaml``.
        chosen_keys: Keys and groups that the command line set; they win over the run's.
        run_value_overrides: Dotted overrides of the run's groups.

    Returns:
        The run folder that holds the results.

    Raises:
        VitscopeError: With the exit code of its kind.
    """
    inputs = prepare_inputs(cfg, chosen_keys, run_value_overrides)
    cfg, run = inputs.cfg, inputs.run
    if run is None:
        if cfg.ckpt_path:
            cfg.ckpt_path = str(Path(cfg.ckpt_path).absolute())  # the folder is measured again from anywhere
        run = _new_run(cfg)
    run_end.log_tracebacks_to(run)
    if rank() == 0 and model_facts.KEY not in run.provenance() and _is_own_model(cfg, run):
        run.note(**{model_facts.KEY: model_facts.of_model(cfg)})
    mirror = run_mirror.start(cfg, run, "analyze")
    code = 1
    try:
        _measure(inputs, run, mirror)
        code = 0
    except BaseException as error:
        code = error_translation.code_for(error)
        raise
    finally:
        if rank() == 0 and run.provenance().get("command") == "analyze":
            run_end.note_end(run, code)
        mirror.finish(code)
    return run


def predict(
    cfg: DictConfig, chosen_keys: Sequence[str] = (), run_value_overrides: Sequence[str] = (), n_ranks: int = 1
) -> list[PredictedCost]:
    """Return what the analyses that a composed configuration names would cost; nothing is written.

    Args:
        cfg: Those of `analyze`, and likewise the next two.
        chosen_keys: Keys and groups that the command line set.
        run_value_overrides: Dotted overrides of the run's groups.
        n_ranks: Number of processes that would share the work.

    Raises:
        VitscopeError: As `analyze` does before it measures.
    """
    inputs = prepare_inputs(cfg, chosen_keys, run_value_overrides)
    analyses = spec.parse(inputs.cfg.analysis)
    n_checkpoints = len(checkpoint_sequence.of_run(inputs.run)) if inputs.run is not None else 0
    return cost_prediction.predict_costs(
        inputs.cfg,
        analyses,
        inputs.network,
        inputs.data,
        n_ranks=n_ranks,
        content=inputs.content,
        n_checkpoints=n_checkpoints,
    )


def _new_run(cfg: DictConfig) -> Run:
    """Return a new folder, which rank 0 makes for all."""
    run = run_dir.create(cfg, "analyze") if rank() == 0 else None
    path = gather_objects(run.path if run is not None else None)[0]
    return run or Run(path)


def _is_own_model(cfg: DictConfig, run: Run) -> bool:
    """Tell whether the model is the run's own, at its own image size, rather than one that the command line changed."""
    run_config = run.config()
    if loading.plain(cfg.model) != loading.plain(run_config.get("model")):
        return False
    return all(cfg.data.get(key) == (run_config.get("data") or {}).get(key) for key in ("image_size", "transform"))


def _measure(inputs: AnalysisInputs, run: Run, mirror: WandbMirror) -> None:
    """Make the analyses one after another, and print the headline table."""
    cfg, network, content = inputs.cfg, inputs.network, inputs.content
    tag, epoch, step = _moment(inputs.path, content, run)
    if cfg.ckpt == AVERAGE and CURRENT_WEIGHTS not in (content or {}):
        tag = f"{tag}-{AVERAGE}"  # the averages of a file have results beside those of its weights
    if cfg.ckpt_path and inputs.path is not None:
        named_weights.refuse_other_weights(network, inputs.path, run, tag)
    values: dict[str, Any] = {}
    analyses = [spec.replaced(analysis, on_error="raise") for analysis in spec.parse(cfg.analysis)]
    changes = _announced_changes(inputs)
    place = context.AnalysisContext(
        cfg, run, network, inputs.data, tag, epoch, step, mirror, content, analyses, changes=changes
    )
    _announce(place, inputs.defaults)
    _read_splits(place)
    for analysis in analyses:
        result = runner.perform(analysis, place, reuse=bool(cfg.reuse))
        assert result is not None
        if rank() != 0:
            continue
        if hasattr(result, "table"):  # a result that reads best as text brings its own rows
            print(result.table())
        if hasattr(result, "unit_table"):
            print(result.unit_table())
        values.update({f"{analysis.name}/{key}": value for key, value in result.scalars().items()})
    if rank() == 0:
        print_headline(run, values, mirror)


def _announced_changes(inputs: AnalysisInputs) -> dict[str, Any]:
    """Return what the command changed of the run that it names, and say so."""
    if inputs.run is None:
        return {}
    changes = run_changes.changed_values(inputs.cfg, inputs.run.config())
    if changes and rank() == 0:
        text = ", ".join(f"{key}={value}" for key, value in changes.items())
        _logger.info(f"changed from the run: {text}; results without these changes are not reused")
    return changes


def _announce(place: context.AnalysisContext, defaults: Sequence[str]) -> None:
    """Say what will be measured; rank 0 alone, since the prediction takes forward passes and products of its own."""
    if rank() != 0 or not place.due:
        return
    measured = runner.measured_before(place.due, place) if place.cfg.reuse else []
    announcement.announce(place.cfg, place.due, place.datamodule, defaults=defaults)
    device = next((parameter.device for parameter in place.network.parameters()), torch.device("cpu"))

    def time_products(analyses: Sequence[spec.Analysis]) -> Mapping[str, Count]:
        if world_size() != 1:  # they make each product together
            return {}
        return cost_prediction.predict_times(place.cfg, analyses, place.network, place.datamodule, place.content)

    prediction = time_prediction.predict(place.due, place.network, place.datamodule, measured, time_products)
    announcement.announce_device(device, prediction)
    announcement.announce_image_cache(place.cfg, place.due, place.datamodule, device)


def _read_splits(place: context.AnalysisContext) -> None:
    """Read the splits that the analyses measure, so that a missing one is refused before the first analysis."""
    measured = runner.measured_before(place.due, place) if place.cfg.reuse else []
    unmeasured = [analysis for analysis in place.due if analysis.name not in measured]
    splits = {split for analysis in unmeasured for split in arguments.needed_splits(analysis, place.datamodule)}
    for split in sorted(splits):
        place.datamodule.split(split)


def _moment(path: Path | None, content: Mapping[str, Any] | None, run: Run) -> tuple[str, int | None, int]:
    """Return the tag of results, the epoch and the step of the weights; only a finished run's last ones are its ``end``."""
    if path is None or content is None:
        return "end", None, 0
    facts, step = checkpoint_content.facts(content, path), checkpoint_content.completed_steps(content)
    epoch = facts["epoch"] - 1 if facts.get("batch") == 0 else facts.get("epoch")
    epoch = max(epoch, 0) if epoch is not None else None
    status = run.provenance().get("status", "finished")
    if path.stem != "last" or path.parent != run.checkpoints or status == "finished":
        name = path.stem.removesuffix(".pth")  # timm's files end in .pth.tar
        return {"last": "end"}.get(name, name), epoch, step
    tag = f"epoch-{epoch:04d}" if epoch is not None and facts.get("batch") == 0 else spec.step_tag(step)
    _logger.info(f"{run.path} is not finished ({status}): the result of {path.name} is named {tag}, not end")
    return tag, epoch, step
