"""Overrides that hold for every run of a reproduction: which keys they may set, and the folders that they lead to."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from vitscope.config import loading
from vitscope.config.experiment_identity import INCIDENTAL_TO_A_RUN, RUN_KEYS
from vitscope.runtime.errors import ConfigError

#: keys of ``train.py`` that the command sets itself, and what to write instead
_OF_THE_COMMAND = {
    "seed": "write seeds=5 for the seeds 0 to 4, seeds=3-3 for seed 3 alone",
    "profile": "write profile=cifar100 beside overrides=",
    "experiment": "conf/reproduce.yaml names the experiment of each target",
    "model": "the profile's models are in conf/reproduce.yaml; a key such as model.depth can be set",
    "analysis": "a key such as analysis.hessian.n_top can be set",
    "paths.runs": "write runs=FOLDER beside overrides=",
    "run_dir": "write runs=FOLDER beside overrides=",
}
#: groups whose settings are part of a run's identity or of a result's, or do not change any number
_ALLOWED = (*(key for key in RUN_KEYS if key != "seed"), "analysis", "caps", "logger", "paths")
#: settings that change no number: runs with and without them lie in one folder
_WITHOUT_EFFECT = (*INCIDENTAL_TO_A_RUN, "logger", "paths")


def checked(text: str) -> tuple[str, ...]:
    """Return the overrides of a command line, ``overrides='optimizer.lr=1e-3 trainer.max_epochs=5'``.

    Settings of an analysis are written with ``++``: they hold for the runs that it is measured on.

    Raises:
        ConfigError: No ``key=value``, or a key by which runs with and without it could not be told apart.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        reason = f"not a list of key=value ({error})"
        raise ConfigError("overrides", text, reason, "quote it: overrides='optimizer.lr=1e-3'") from None
    overrides: list[str] = []
    for word in words:
        key, equals, value = word.partition("=")
        name = key.lstrip("+")
        if not equals or not name or key.startswith("~"):
            raise ConfigError(
                "overrides", word, "not key=value", "write overrides='optimizer.lr=1e-3 trainer.max_epochs=5'"
            )
        if name in _OF_THE_COMMAND:
            raise ConfigError(name, value, "cannot be an override of a reproduction", _OF_THE_COMMAND[name])
        group = name.partition(".")[0]
        if group not in _ALLOWED:
            reason = "runs with and without it could not be told apart"
            raise ConfigError(name, value, reason, f"set a key of {', '.join(_ALLOWED)}")
        overrides.append(f"++{name}={value}" if group == "analysis" else word)
    return tuple(overrides)


def suffix(overrides: Sequence[str]) -> str:
    """Return what is added to the names of the default folders, so that figures of other overrides are not mixed.

    Overrides without an effect on a number, such as ``data.root``, add nothing; their order does not matter.
    """
    effective = sorted(
        override for override in overrides
        if not any(_key(override) == key or _key(override).startswith(f"{key}.") for key in _WITHOUT_EFFECT)
    )  # fmt: skip
    if not effective:
        return ""
    readable = re.sub(r"[^\w.]+", "-", "-".join(o.lstrip("+") for o in effective))[:60].strip("-")
    return f"-{readable}-{loading.digest(effective, 6)}"


def changes_work(overrides: Sequence[str]) -> bool:
    """Tell whether overrides change how long a run takes; name and files of the data set do not."""
    return bool(suffix([o for o in overrides if _key(o) not in ("data", "data.name", "data.source.checksums")]))


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+")
