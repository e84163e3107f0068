"""The run folder: made exclusively, found again, read by reports and notebooks.

Layout: ``config.yaml provenance.json metrics.jsonl checkpoints/ results/ figures/ wandb/ log.txt``.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vitscope.config import experiment_identity, loading
from vitscope.runs import metrics_log, run_lock, run_origin
from vitscope.runtime import atomic_write, redaction, safe_files
from vitscope.runtime.errors import CheckpointError, ConfigError, StorageError

#: environment variable by which a parent process passes its run folder to the processes that it starts
ENVIRONMENT = "VITSCOPE_RUN_DIR"


@dataclass(frozen=True)
class Run:
    """A run's folder and what lies where in it."""

    path: Path

    @property
    def id(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints and their manifest."""
        return self.path / "checkpoints"

    @property
    def results(self) -> Path:
        """The folder of results, one folder an analysis."""
        return self.path / "results"

    @property
    def figures(self) -> Path:
        """The folder of figures."""
        return self.path / "figures"

    @property
    def journal(self) -> Path:
        """The file of metrics."""
        return self.path / metrics_log.FILE

    @property
    def log(self) -> Path:
        """The file of tracebacks and notices."""
        return self.path / "log.txt"

    def measured_file(self) -> tuple[Path, str] | None:
        """Return the file of weights that ``analyze.py`` measured here and its ``ckpt``; None for a training or no file.

        Raises:
            CheckpointError: The folder's configuration is missing or damaged.
        """
        if self.checkpoints.exists() or self.provenance().get("command") != "analyze":
            return None
        stored = self.config()
        path = stored.get("ckpt_path")
        return (Path(str(path)), str(stored.get("ckpt", "last"))) if path else None

    def config(self) -> DictConfig:
        """Return the configuration that made the run.

        Raises:
            CheckpointError: The folder has none, so it is no run, or it is damaged.
        """
        path = self.path / "config.yaml"
        if not path.is_file():
            raise CheckpointError("run", self.path, "no config.yaml in it", "name a run folder or a checkpoint in one")
        try:
            safe_files.refuse_links(path)
            loaded = OmegaConf.load(path)
        except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
            reason = f"config.yaml is damaged ({type(error).__name__})"
            raise CheckpointError("run", self.path, reason, "use another run") from None
        if not isinstance(loaded, DictConfig):
            raise CheckpointError("run", self.path, "config.yaml holds no configuration", "use another run")
        return loaded

    def provenance(self) -> dict[str, Any]:
        """Return what is known of how the run was made and how it ended."""
        try:
            facts = json.loads(safe_files.read_text(self.path / "provenance.json", safe_files.LARGEST))
        except (OSError, ValueError, RecursionError):
            return {}
        return facts if isinstance(facts, dict) else {}

    def note(self, **facts: Any) -> None:
        """Add facts to ``provenance.json``; facts that another process adds at the same time are kept.

        Raises:
            StorageError: The folder is gone (it is not made anew) or cannot be written.
        """
        with self.exclusive():
            content = redaction.redacted({**self.provenance(), **facts})
            atomic_write.write_atomically(
                self.path / "provenance.json", json.dumps(content, indent=2, default=str).encode()
            )

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other processes out of the same block: for a moment in which a file is read and then added to.

        Raises:
            StorageError: The folder is gone.
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(run_lock.exclusive(self.path))
            except OSError as error:
                raise StorageError("run", self.path, f"no such folder ({error.strerror})", "start a new run") from None
            yield


def create(cfg: DictConfig, command: str) -> Run:
    """Make the run's folder, exclusively, and write its configuration and provenance.

    The folder is ``cfg.run_dir`` where a parent named one, else ``<paths.runs>/<time>-<random>`` with ``cfg.name`` between
    the two where the user gave one; processes of one ``torchrun`` or SLURM job agree on one by the job's id.

    The folder's lock is taken before anything is written; the caller gives it back with `run_lock.release`.

    Raises:
        StorageError: It cannot be made or written, or another process trains in it.
        ConfigError: ``run_dir`` already holds a run.
    """
    path = requested_run_folder(cfg)
    try:
        path.mkdir(parents=True, exist_ok=cfg.get("run_dir") is not None or _job_id() is not None)
    except OSError as error:
        raise _no_folder(path, error) from None
    run_lock.acquire(path)  # before anything is written: a second process with this run_dir is refused
    try:
        return _described(cfg, command, Run(path))
    except BaseException:
        run_lock.release(path)
        raise


def _described(cfg: DictConfig, command: str, run: Run) -> Run:
    """Write what makes a folder a run: its configuration, then its provenance.

    A folder that a kill left without the second, and in which nothing was trained, is written anew.
    """
    from vitscope.runs.checkpoints import checkpoint_io  # imports torch, which a reader of run folders does not need

    path = run.path
    is_begun = (path / "provenance.json").exists() or run.journal.exists() or checkpoint_io.present(run.checkpoints)
    is_restarted = _job_id() is not None and not _is_of_another_command(run, cfg)
    if (path / "config.yaml").exists() and is_begun and not is_restarted:
        raise ConfigError("run_dir", path, "already holds a run", "choose another folder, or resume with run=<folder>")
    try:
        atomic_write.sweep(path)
        atomic_write.write_atomically(path / "config.yaml", OmegaConf.to_yaml(redacted(cfg)).encode())
    except OSError as error:
        raise _no_folder(path, error) from None
    run.note(**run_origin.facts(cfg, command), status="running")
    return run


def _no_folder(path: Path, error: OSError) -> StorageError:
    return StorageError(
        "paths.runs", path.parent, f"no folder can be made there ({error.strerror})", "choose another folder"
    )


def reopen(run: Run, cfg: DictConfig, command: str) -> None:
    """Hold a run's folder to go on with it: repair what a kill left half done, delete stale temporary files.

    The caller gives it back with `run_lock.release`.

    Raises:
        StorageError: Another process trains in it.
        CheckpointError: The manifest cannot be trusted.
    """
    from vitscope.runs.checkpoints import checkpoint_io

    run_lock.acquire(run.path)
    try:
        checkpoint_io.repair(run.checkpoints)
        for folder in (run.path, run.figures, run.results, *run.results.glob("*/")):
            atomic_write.sweep(folder)
        if not (run.path / "provenance.json").exists():
            run.note(**run_origin.facts(cfg, command), status="running")
    except BaseException:
        run_lock.release(run.path)
        raise


def find(where: str | Path) -> Run:
    """Return the run of a folder or of a checkpoint file in one.

    Raises:
        CheckpointError: There is no run.
    """
    path = Path(where)
    if path.is_file():
        path = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    if not (path / "config.yaml").is_file():
        raise CheckpointError(
            "run", where, "no run there", "name a folder that holds config.yaml, or a checkpoint in one"
        )
    return Run(path)


def owner_of(file: Path) -> Run | None:
    """Return the run in whose folder of checkpoints a file lies; None for a file from elsewhere."""
    folder = file.absolute().parent.parent
    is_of_a_run = file.parent.name == "checkpoints" and (folder / "config.yaml").is_file()
    return Run(folder) if is_of_a_run else None


def redacted(cfg: DictConfig) -> DictConfig:
    """Return a resolved copy without secrets, see `redaction.redacted`."""
    return DictConfig(redaction.redacted(loading.plain(cfg)))


def requested_run_folder(cfg: DictConfig) -> Path:
    """Return the folder that a new run takes (a fresh random name each time, unless a parent or a job decides)."""
    named = os.environ.get(ENVIRONMENT) or cfg.get("run_dir")
    if named:
        return Path(named).absolute()
    root = Path(cfg.paths.runs).absolute()
    if job := _job_id():
        return _job_folder(root / re.sub(r"[^\w.-]", "_", job)[:100], cfg)
    return root / "-".join(filter(None, (time.strftime("%Y%m%d-%H%M%S"), cfg.get("name"), secrets.token_hex(3))))


def _job_folder(first: Path, cfg: DictConfig) -> Path:
    """Return the first of the folders ``<job>``, ``<job>-2``, ... that no other command uses.

    One job may start several commands (a loop of ``srun`` in a batch script), and ``torchrun`` gives all its jobs the same id
    where the user states none. A command that its job starts again takes the folder that it had.
    """
    folders = (first if n == 1 else first.with_name(f"{first.name}-{n}") for n in itertools.count(1))
    return next(folder for folder in folders if not _is_of_another_command(Run(folder), cfg))


def _is_of_another_command(run: Run, cfg: DictConfig) -> bool:
    """Tell whether a folder holds a run that is finished, or that another command line or configuration made."""
    facts = run.provenance()
    if not facts:
        return False
    is_same = _comparable(facts.get("arguments")) == _comparable(sys.argv[1:])
    is_same = is_same and facts.get("config_hash") == experiment_identity.config_hash(cfg)
    return facts.get("status") == "finished" or not is_same


def _comparable(arguments: Any) -> list[str]:
    texts = [redaction.cleaned(str(text)) for text in arguments] if isinstance(arguments, list) else []
    return [text for text in redaction.redacted(texts) if not text.startswith("run_dir=")]


def _job_id() -> str | None:
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        run_id = os.environ["TORCHELASTIC_RUN_ID"]
        return f"torchrun-{run_id}-{os.environ.get('MASTER_PORT', '')}" if run_id == "none" else f"torchrun-{run_id}"
    if "SLURM_JOB_ID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        return f"slurm-{os.environ['SLURM_JOB_ID']}"
    return None
