"""Translation of any error into the one line and the exit code that a user gets."""

from __future__ import annotations

import errno
import re
import signal
from collections.abc import Iterator
from typing import Any

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from vitscope.config import loading
from vitscope.config.keys import equivalent_names
from vitscope.runtime import errors, stop_flag
from vitscope.runtime.errors import ConfigError, DistributedError, StorageError, VitscopeError, first_line
from vitscope.runtime.stop_flag import Interrupted

INTERRUPTED, TERMINATED = 130, 143

_MISCONFIGURATION = "lightning_fabric.utilities.exceptions.MisconfigurationException"

#: Hydra's message for a group that a command's configuration does not choose from
_NO_GROUP = re.compile(r"Could not override '([\w/]+)'\. No match in the defaults list")
_IN_PLACE_OF_GROUPS = {
    "optimizer": "leave it out: analyze.py takes the optimizer that the run's checkpoint holds",
    "callbacks": "leave it out: callbacks belong to train.py",
}

#: what the messages of torch's groups of processes name; a path or a label may hold the same letters
_OF_PROCESSES = re.compile(r"\bProcessGroup|\bgloo\b|\bNCCL\b|\btimeout caused pair closure\b")

_STORAGE = (
    errno.ENOSPC,
    errno.EROFS,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EIO,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.EMFILE,
    errno.ENFILE,
    errno.ESTALE,
)


def explain(error: BaseException) -> VitscopeError | None:
    """Return an error as the one line that a user can act on; None for a defect."""
    for cause in _chain(error):
        if isinstance(cause, VitscopeError):
            return cause
    if isinstance(error, MissingConfigException):
        return _missing(error)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _refused(error)
    if is_misconfiguration(error):
        return ConfigError("trainer", None, first_line(error).rstrip("."), "correct its options")
    if isinstance(error, ValueError) and "Config group override must be" in str(error):
        return ConfigError("config", None, "a group was given a value that is no name", "choose a name; see --help")
    if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
        reason = "a batch holds one image, over which BatchNorm cannot compute a variance"
        return ConfigError(
            "data.batch_size",
            None,
            reason,
            "set another data.batch_size, or data.drop_last=true to skip the last batch",
        )
    if isinstance(error, OSError) and error.errno in _STORAGE:
        return StorageError("paths.runs", error.filename, str(error.strerror), "free space or choose another folder")
    is_of_processes = isinstance(error, RuntimeError) and _OF_PROCESSES.search(str(error)) is not None
    if type(error).__module__.startswith("torch.distributed") or is_of_processes:
        line = first_line(error)
        reason = line.partition("] ")[2].partition(". ")[0] or line  # after the place in its source
        return DistributedError("trainer.devices", None, f"another process died or hangs ({reason})", "see its output")
    return None


def is_misconfiguration(error: BaseException) -> bool:
    """Tell whether Lightning refused its arguments; compared by name, since to import the class takes seconds."""
    return any(f"{kind.__module__}.{kind.__qualname__}" == _MISCONFIGURATION for kind in type(error).__mro__)


def code_for(error: BaseException) -> int:
    """Return the exit code that an error will end the command with."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, SystemExit) and (stopped := stop_flag.requested()) is not None:
        error = Interrupted(stopped)  # Lightning's own answer to SIGTERM
    if isinstance(error, Interrupted):
        return INTERRUPTED if error.signum == signal.SIGINT else TERMINATED
    explained = explain(error)
    return explained.exit_code if explained else 1


def _missing(error: MissingConfigException) -> ConfigError:
    missing_file = error.missing_cfg_file or ""
    group, _, name = missing_file.rpartition("/")
    names = list(error.options or []) or loading.options(group)
    fix = errors.nearest(name, names)
    if group == "model":
        fix += f" a model of timm is model=timm model.name={name}"
    return ConfigError(group or "config", name, "no such choice", fix)


def _right_key(key: str, parent: Any) -> str:
    """Return what to write instead of a key that there is not: one of that name in a group, or the nearest ones.

    Args:
        key: The dotted key.
        parent: The node that lacks it.
    """
    name = key.rpartition(".")[2]
    keys = [str(sibling) for sibling in parent]
    if key == name:
        eigenvalues = equivalent_names.NUMBER_OF_EIGENVALUES
        same = eigenvalues if name in eigenvalues else (name,)
        within = [
            dotted
            for dotted in _dotted_keys(parent)
            if dotted.rpartition(".")[2] in same and not dotted.startswith("caps.")  # those are bounds
        ]
        if 0 < len(within) <= 3:
            return f"write {' or '.join(f'{dotted}=...' for dotted in within)}"
    return equivalent_names.advice(name, keys)


def _dotted_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys below a node, those of Hydra's own left out."""
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return
    for key in node:
        dotted = f"{prefix}{key}"
        if dotted == "hydra":
            continue
        yield dotted
        yield from _dotted_keys(node._get_node(key), f"{dotted}.")


def _refused(error: BaseException) -> ConfigError:
    for cause in _chain(error):
        parent = getattr(cause, "parent_node", None)
        key = getattr(cause, "full_key", None)
        if key and parent is not None and "not in struct" in str(cause):
            return ConfigError(key, None, "no such key", _right_key(key, parent))
    text = first_line(error)
    if no_group := _NO_GROUP.match(text):
        return ConfigError(
            no_group[1], None, "no group of this command", _IN_PLACE_OF_GROUPS.get(no_group[1], "leave it out")
        )
    for cause in _chain(error):
        key = getattr(cause, "full_key", None)
        if key:
            return ConfigError(key, None, first_line(cause), "see --help for the values that it takes")
    if text.startswith("Ambiguous value for argument"):
        return ConfigError("config", None, text.rstrip("."), "quote the value, or add -m for one job per value")
    unread = any(isinstance(cause, OverrideParseException) for cause in _chain(error))
    fix = "write key=value, a list as runs=[a,b]; see --help" if unread else "see --help"
    return ConfigError("config", None, text.rstrip("."), fix)


def _chain(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return chain
