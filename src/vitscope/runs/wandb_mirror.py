"""Weights & Biases: a write-only copy of the metrics log and the results. The one file that imports ``wandb``.

Nothing here may stop a training: a server that is gone, a missing key or a dead background process cost a warning.
"""

from __future__ import annotations

import json
import logging
import netrc
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlparse

import wandb
from omegaconf import DictConfig, OmegaConf

from vitscope.config.keys.logger_choice import ARTIFACT_KINDS
from vitscope.runs.run_dir import Run, redacted
from vitscope.runtime import safe_files
from vitscope.runtime.distributed import rank
from vitscope.runtime.errors import ConfigError
from vitscope.runtime.redaction import cleaned, masked
from vitscope.runtime.redaction import redacted as redacted_tree

_logger = logging.getLogger(__name__)

_HOST = "https://api.wandb.ai"

#: seconds that a server which does not answer may cost at the start and at the end (W&B's own: 90, and without end); the
#: rows that were not sent are on disk, for `wandb sync`. Set the variables to wait longer
PATIENCE = {"WANDB_INIT_TIMEOUT": "60", "WANDB_FINISH_TIMEOUT": "120"}


class WandbMirror:
    """One W&B run; every method is safe to call, also when W&B is off, offline or broken."""

    def __init__(self, run: Any = None, uploads: RunArtifacts | None = None) -> None:
        self._run = run
        self._uploads = uploads

    @property
    def run(self) -> Any:
        """W&B's own object; None where W&B is off."""
        return self._run

    @property
    def url(self) -> str | None:
        """The run's page, where there is one."""
        return self._fact("url")

    @property
    def id(self) -> str | None:
        """The run's id, by which a resumed run continues the same one."""
        return self._fact("id")

    @property
    def uploads(self) -> RunArtifacts | None:
        """Files that are uploaded as artifacts when the run ends; None for nothing."""
        return self._uploads

    @property
    def entity(self) -> str | None:
        """The user or team that the run belongs to."""
        return self._fact("entity")

    @property
    def project(self) -> str | None:
        """The run's project."""
        return self._fact("project")

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Log scalars; rows carry ``trainer/global_step`` because W&B drops rows whose ``step`` goes backwards."""
        self._safely(lambda run: run.log({**values, "trainer/global_step": step}))

    def image(self, name: str, path: Path, step: int) -> None:
        """Log a figure."""
        self._safely(lambda run: run.log({name: wandb.Image(str(path)), "trainer/global_step": step}))

    def histogram(self, name: str, values: Any, step: int) -> None:
        """Log the distribution of an array's finite values."""
        self._safely(lambda run: run.log({name: wandb.Histogram(values), "trainer/global_step": step}))

    def table(self, name: str, columns: list[Any], rows: list[Any]) -> None:
        """Log a table."""
        self._safely(lambda run: run.log({name: wandb.Table(columns=columns, data=rows)}))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set the run's headline numbers."""
        self._safely(lambda run: run.summary.update(dict(values)))

    def preempting(self) -> None:
        """Tell the server that the run will come back."""
        self._safely(lambda run: run.mark_preempting())

    def finish(self, exit_code: int) -> None:
        """End the run: without it, two runs of one process would merge. A run that ended well uploads its artifacts."""
        if exit_code == 0 and self._uploads is not None:
            self._safely(self._uploads.log_to)
        self._safely(lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _fact(self, name: str) -> str | None:
        try:
            return getattr(self._run, name, None)
        except Exception:  # as below
            return None

    def _safely(self, action: Callable[[Any], Any]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # whatever W&B raises, training goes on
            warnings.warn(f"W&B: {type(error).__name__}: {_one_line(error)}; metrics.jsonl has every row", stacklevel=3)


@dataclass(frozen=True)
class RunArtifacts:
    """Files of a run folder that are uploaded as W&B artifacts.

    Attributes:
        run: The run folder.
        kinds: ``results`` (numbers and arrays of analyses) and ``checkpoints``.
    """

    run: Run
    kinds: Sequence[str]

    def log_to(self, wandb_run: Any) -> None:
        """Log an artifact ``<run id>-<kind>`` for each kind that has files; JSON files are written without secrets."""
        for kind in self.kinds:
            folder, suffixes = getattr(self.run, kind), ARTIFACT_KINDS[kind]
            files = [file for file in sorted(folder.rglob("*")) if file.suffix in suffixes and not file.is_symlink()]
            if not files:
                continue
            artifact = wandb.Artifact(f"{self.run.id}-{kind}", type="model" if kind == "checkpoints" else kind)
            for file in files:
                name = file.relative_to(folder).as_posix()
                if file.suffix == ".json":
                    with artifact.new_file(name, encoding="utf-8") as copy:
                        json.dump(redacted_tree(json.loads(file.read_text(encoding="utf-8"))), copy, indent=1)
                else:
                    artifact.add_file(str(file), name=name)
            wandb_run.log_artifact(artifact)


def start_report(entity: str | None, project: str, name: str, folder: Path) -> WandbMirror:
    """Start a run on the server that holds the figures and tables of a report.

    Args:
        entity: User or team; None for the account's own.
        project: Project.
        name: Name of the run.
        folder: Where W&B keeps its files until the run ends.

    Raises:
        ConfigError: No account is configured, or the server cannot be reached.
    """
    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online" or not has_key():
        reason = f"WANDB_MODE={mode}" if mode != "online" else "no key is configured"
        fix = "run wandb login, or write the specification alone: spec=report.json"
        raise ConfigError("wandb-report", None, f"a report is made on the server, and {reason}", fix)
    os.environ.setdefault("WANDB_SILENT", "true")
    for variable, seconds in PATIENCE.items():
        os.environ.setdefault(variable, seconds)
    settings = wandb.Settings(x_disable_meta=True, disable_git=True, console="off")
    try:
        started = wandb.init(
            project=project or None, entity=entity, name=masked(name), job_type="report", mode="online", settings=settings,
            dir=str(folder),
        )  # fmt: skip
    except Exception as error:  # whatever W&B raises
        fix = "check the network and wandb login, or use spec=report.json"
        raise ConfigError("wandb-report", None, f"W&B did not start ({_one_line(error)})", fix) from None
    return WandbMirror(started)


def start(cfg: DictConfig, run: Run, job_type: str) -> WandbMirror:
    """Start (or, for a resumed folder, go on with) the W&B run of a run folder.

    Offline unless a key is configured or ``WANDB_MODE`` says otherwise. Only rank 0 has one.
    """
    options = redacted(cfg).get("logger") or DictConfig({})  # names of projects and tags are sent, too
    if rank() != 0 or not options.get("project"):
        return WandbMirror()
    safe_files.refuse_links(run.path / "wandb")
    mode = os.environ.get("WANDB_MODE")
    if mode is None and not has_key():
        mode = "offline"
        _logger.info(
            "W&B: no key configured, so the run is logged offline (wandb login, or WANDB_MODE=online, to send it)"
        )
    os.environ.setdefault("WANDB_SILENT", "true")
    for name, seconds in PATIENCE.items():
        os.environ.setdefault(name, seconds)
    arguments = _arguments(cfg, options, run, job_type)
    # a measurement has no checkpoints of its own
    kinds = [kind for kind in options.get("artifacts") or [] if kind == "results" or job_type == "train"]
    uploads = RunArtifacts(run, kinds) if kinds else None
    for attempt in dict.fromkeys((mode, "offline")):
        try:
            mirror = WandbMirror(wandb.init(**arguments, mode=cast(Any, attempt)), uploads)
            run.note(wandb_id=mirror.id, wandb_url=mirror.url)
            return mirror
        except Exception as error:  # no server, a wrong key, a dead service: try offline, then do without
            then = "trying offline" if attempt != "offline" else "continuing without it; metrics.jsonl has every row"
            _logger.info(f"W&B: not started ({type(error).__name__}: {_one_line(error)}); {then}")
    return WandbMirror()


def _arguments(cfg: DictConfig, options: DictConfig, run: Run, job_type: str) -> dict[str, Any]:
    """Return the arguments of `wandb.init` for a run of a configuration, with its ``logger`` as ``options``."""
    tags = list(dict.fromkeys([*(cfg.get("tags") or []), *(options.get("tags") or [])]))
    arguments: dict[str, Any] = {
        "project": options.get("project"),
        "entity": options.get("entity"),
        "group": options.get("group") or cfg.get("name"),
        "tags": tags or None,
        "job_type": job_type,
        "name": options.get("name") or run.id,
        "resume": "allow",
        "dir": str(run.path),
        "config": flattened(cfg),
    }
    if "WANDB_SWEEP_ID" not in os.environ:  # in a sweep the agent hands over the run's id
        arguments["id"] = run.provenance().get("wandb_id")
    if [cleaned(argument) for argument in sys.argv] != sys.argv:  # W&B would upload the command line as it is
        arguments["settings"] = wandb.Settings(x_disable_meta=True)
    return arguments


def _one_line(error: Exception) -> str:
    return masked(" ".join(str(error).split()))[:300]


def has_key() -> bool:
    """Tell whether a W&B key is configured, in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", _HOST)).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def flattened(cfg: DictConfig) -> dict[str, Any]:
    """Return the configuration with dotted keys.

    A sweep over a group locks the key ``model``, and a nested ``model: {...}`` would be lost.
    """
    flat: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict) and value:
                walk(value, f"{name}.")
            else:
                flat[name] = value

    walk(OmegaConf.to_container(redacted(cfg), resolve=True), "")
    return flat
