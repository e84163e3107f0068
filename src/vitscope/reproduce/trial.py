"""Perform one trial of a reproduction: train and measure where no result exists, and report failures."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from vitscope.analyses import runner, spec
from vitscope.analyses.context import AnalysisContext
from vitscope.config import experiment_identity, factories, loading
from vitscope.reports.value_lookup import undefined_reason
from vitscope.reproduce import cost_estimates, run_kinds
from vitscope.reproduce.plan import Outcome, Trial
from vitscope.reproduce.trial_config import composed as composed
from vitscope.runs import run_search
from vitscope.runs.checkpoints import checkpoint_content, checkpoint_io, checkpoint_manifest, checkpoint_weights
from vitscope.runs.run_dir import Run
from vitscope.runtime.errors import CheckpointError, VitscopeError
from vitscope.runtime.stop_flag import Interrupted
from vitscope.training.training_run import train

#: endings of the names of intervals
_INTERVAL_ENDS = ("_low", "_high", "_lower", "_upper", "_half_width", "_standard_error")


def perform(trial: Trial, root: Path) -> Outcome:
    """Train and measure, both only where it has not been done.

    Args:
        trial: Trial to perform.
        root: The folder of runs.

    Raises:
        Interrupted: A stop was asked for.
        VitscopeError: It cannot be trained.
    """
    cfg = composed(trial, root)
    analyses = cfg.analysis
    kinds = run_kinds.measurement_kinds(cfg)
    cfg.analysis = {}
    run = _trained_run(cfg, trial, root)
    problems: list[str] = []
    results: list[str] = []
    for tag in trial.tags:
        failures, measured = _measure(run, analyses, tag, kinds)
        problems += failures
        results += measured
    return Outcome(run.path, tuple(problems), tuple(results))


def _trained_run(cfg: DictConfig, trial: Trial, root: Path) -> Run:
    identity = experiment_identity.config_hash(cfg)
    if (finished_run := run_search.finished(root, identity)) is not None:
        drop_optimizer_states(finished_run)  # where a kill left it undone
        return finished_run
    if _needs_processes(cfg):
        # Lightning starts the other ranks with this process's command line: it must be train.py's
        overrides = [
            *(o for o in trial.overrides if not o.startswith("analysis")),
            "analysis=[]",
            loading.path_override("paths.runs", root.absolute()),
            "skip_finished=true",
            "ckpt_path=auto",
        ]
        code = subprocess.run([sys.executable, "-m", "vitscope", "train", *overrides], check=False).returncode
        finished_run = run_search.finished(root, identity)
        if finished_run is None:
            raise CheckpointError("train", None, f"ended with exit code {code}", "see its message above")
        run = finished_run
    else:
        run = train(cfg)
    drop_optimizer_states(run)
    return run


def _needs_processes(cfg: DictConfig) -> bool:
    return cfg.trainer.get("devices", 1) not in (1, "1") or cfg.trainer.get("num_nodes", 1) != 1


def drop_optimizer_states(run: Run) -> None:
    """Drop the optimizer state from all checkpoints of a finished run but the last, two thirds of their size.

    Each file is replaced atomically. An interrupted call is completed by the next one; a finished run is not read again.
    """
    if run.provenance().get("slim"):
        return
    checkpoint_io.repair(run.checkpoints)
    for name in checkpoint_manifest.entries(run.checkpoints):
        path = run.checkpoints / name
        if name == "last.ckpt" or not checkpoint_io.verified(path):
            continue
        content = checkpoint_io.read(path)
        if content.get("optimizer_states"):
            checkpoint_io.write({**content, "optimizer_states": []}, path)
    run.note(slim=True)


def _measure(run: Run, requested: Any, tag: str, kinds: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Measure at one moment; return the failures and the names of the results."""
    cfg = run.config()
    OmegaConf.update(cfg, "analysis", OmegaConf.create(loading.plain(requested)), force_add=True, merge=False)
    analyses = [spec.replaced(analysis, on_error="raise") for analysis in spec.parse(cfg.analysis)]
    try:
        context = replace(_analysis_context(cfg, run, tag), due=analyses)
    except VitscopeError as error:
        return [f"run {run.id}: {', '.join(a.name for a in analyses)} at {tag} ({error})"], []
    problems: list[str] = []
    results: list[str] = []
    for analysis in analyses:
        name = f"{analysis.name}/{tag}-{runner.settings_hash(analysis, context)}"
        folder, _, stem = name.partition("/")
        is_begun = any((run.results / folder).glob(f".partial-{stem}-*"))  # the rest of it tells no whole duration
        is_new = not is_begun and not (run.results / f"{name}.npz").is_file()
        started = time.monotonic()
        try:
            result = runner.perform(analysis, context)
        except (Interrupted, KeyboardInterrupt):
            raise
        except Exception as error:  # one analysis must not take the others with it
            text = str(error).strip().splitlines()
            problems.append(f"run {run.id}: {analysis.name} at {tag} ({text[0] if text else type(error).__name__})")
            continue
        if is_new:
            _note_seconds(run, kinds[analysis.name], time.monotonic() - started)
        results.append(name)
        scalars = result.scalars() if result is not None else {}
        measure = analysis.measure.__name__
        not_finite = [
            n for n, value in scalars.items()
            if not np.isfinite(value) and not undefined_reason(measure, scalars, n) and not _is_interval(n, scalars)
        ]  # fmt: skip
        problems += [f"run {run.id}: {analysis.name}.{name} at {tag} (not finite)" for name in not_finite]
    return problems, results


def _is_interval(name: str, scalars: Mapping[str, float]) -> bool:
    """Tell whether a number is an end of the interval of a finite one: a few images give the number and no interval."""
    base = next((name.removesuffix(end) for end in _INTERVAL_ENDS if name.endswith(end)), None)
    return base is not None and base in scalars and bool(np.isfinite(scalars[base]))


def _note_seconds(run: Run, kind: str, seconds: float) -> None:
    """Record how long a result took to measure; `cost_estimates` reads it."""
    noted = run.provenance().get(cost_estimates.MEASURED_S)
    run.note(**{cost_estimates.MEASURED_S: {**(noted if isinstance(noted, dict) else {}), kind: round(seconds, 2)}})


def _analysis_context(cfg: DictConfig, run: Run, tag: str) -> AnalysisContext:
    path = run.checkpoints / ("last.ckpt" if tag == "end" else f"{tag}.ckpt")
    content = checkpoint_io.read(path)
    network = factories.model(cfg)
    checkpoint_weights.load_weights(network, content, path)
    data = factories.data(cfg)
    data.adapt_to(network)
    facts = checkpoint_content.facts(content, path)
    epoch = max(facts.get("epoch", 0) - (facts.get("batch") == 0), 0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return AnalysisContext(
        cfg, run, network.to(device), data, tag, epoch, int(content.get("global_step", 0)), content=content
    )
