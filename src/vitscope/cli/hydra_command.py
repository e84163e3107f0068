"""Compose the configuration of a command and hand it to the function that runs the command.

`hydra.compose` serves a command line of ``key=value`` overrides, and errors rise as from any function. Hydra's own main serves
what only it can do: options such as ``--help``, ``--cfg`` and ``--multirun``, shell completion, and configurations with
callbacks, logging or environment variables of their own.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hydra
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, flag_override

from vitscope.cli import help_text
from vitscope.cli.main import version_line
from vitscope.config import composition, hydra_internals, loading

#: variable that lets Hydra raise errors; without it, Hydra prints a text of its own and exits with 1
FULL_ERROR = "HYDRA_FULL_ERROR"

_OPTIONS_WITH_VALUE = (
    "--cfg", "-c", "--package", "-p", "--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn",
)  # fmt: skip
_INFO = ("--info", "-i")  # which may have a value, such as searchpath

#: receives the composed configuration without its ``hydra`` node, and the overrides it was composed with
Task = Callable[[DictConfig, Sequence[str]], Any]


def answered(config_name: str, arguments: Sequence[str]) -> bool:
    """Answer ``--help`` and ``--version`` on standard output; tell whether a command line asked for one of them.

    Args:
        config_name: Name of a file in ``conf/`` without its suffix.
        arguments: Command line without the program's name.
    """
    if "--version" in arguments:
        print(version_line())
    elif help_text.is_asked(arguments):
        _print_for_pager(help_text.help_of(config_name, arguments))
    else:
        return False
    return True


def _print_for_pager(text: str) -> None:
    """Print a text of which a reader such as ``head`` may take only the beginning."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end


def run_composed(config_name: str, arguments: Sequence[str], task: Task) -> None:
    """Compose a configuration and run a function with it.

    Args:
        config_name: Name of a file in ``conf/`` without its suffix.
        arguments: Command line without the program's name.
        task: Function of the module of the command. Hydra takes the job's name from that module.

    Raises:
        ConfigError: For an option that Hydra does not know.
        HydraException: From the composition; and whatever ``task`` raises.
    """
    composition.check_options(arguments)
    if all(_is_override_of_command(argument) for argument in arguments):
        with hydra_internals.composing_from(str(loading.folder()), config_name):
            cfg = compose(config_name, overrides=list(arguments), return_hydra_config=True)
        if not _needs_hydra_main(cfg.hydra):
            overrides = list(cfg.hydra.overrides.task)
            with flag_override(cfg, ["struct", "readonly"], False):
                cfg.hydra.runtime.output_dir = os.path.abspath(cfg.hydra.run.dir)  # as Hydra's main does
                # for ${hydra:...} and for Lightning, which starts the other ranks
                HydraConfig.instance().set_config(cfg)
                del cfg["hydra"]
            task(cfg, overrides)
            return
    _run_hydra_main(config_name, arguments, task)


def _is_override_of_command(argument: str) -> bool:
    """Tell whether an argument is an override of the command's own keys, neither an option nor a key of Hydra's."""
    key = argument.lstrip("+~").partition("=")[0]
    return not argument.startswith("-") and not key.startswith(("hydra.", "hydra/", "hydra@"))


def _needs_hydra_main(node: DictConfig) -> bool:
    """Tell whether a configuration, such as an experiment's, asks for what `hydra.compose` does not do."""
    callbacks = set(node.callbacks or {}) - {"jobs"}  # of multiruns only
    logs = [key for key in ("job_logging", "hydra_logging") if OmegaConf.select(node, f"{key}.handlers")]
    is_sweep = OmegaConf.select(node, "mode", default=None) is not None
    sets_environment = node.job.env_set or node.job.env_copy
    return bool(callbacks or logs or is_sweep or sets_environment or node.run.dir != "." or node.verbose)


def _run_hydra_main(config_name: str, arguments: Sequence[str], task: Task) -> None:
    """Run a function through `hydra.main`; raise what it raised, since Hydra would print a text of its own on top."""
    task_errors: list[BaseException] = []
    user_value = os.environ.get(FULL_ERROR)

    @functools.wraps(task)
    def run_task(cfg: DictConfig) -> Any:
        _set_full_error(user_value)  # the processes that the task starts get the user's own value
        try:
            return task(cfg, list(HydraConfig.get().overrides.task))
        except BaseException as error:
            task_errors.append(error)
            return None
        finally:
            _set_full_error("1")

    with hydra_internals.without_migration_warnings():
        composed = hydra.main(
            config_path=str(loading.folder()), config_name=config_name, version_base=hydra_internals.VERSION_BASE
        )(run_task)
    with _command_line(arguments):
        _set_full_error("1")
        try:
            composed()
        finally:
            _set_full_error(user_value)
    if task_errors:
        raise task_errors[0]


def overrides_last(arguments: Sequence[str]) -> list[str]:
    """Return a command line with its options first: the parser refuses overrides on both sides of one."""
    options, overrides = [], []
    for previous, argument in zip(["", *arguments[:-1]], arguments):
        is_value = previous in _OPTIONS_WITH_VALUE or (previous in _INFO and "=" not in argument)
        if argument.startswith("-") or is_value:
            options.append(argument)
        else:
            overrides.append(argument)
    return options + overrides


def _set_full_error(value: str | None) -> None:
    if value is None:
        os.environ.pop(FULL_ERROR, None)
    else:
        os.environ[FULL_ERROR] = value


@contextlib.contextmanager
def _command_line(arguments: Sequence[str]) -> Iterator[None]:
    """Let `hydra.main` read these arguments, from `sys.argv` as it always does."""
    arguments = overrides_last(arguments)
    hydra_internals.check_command_line(arguments)
    original = sys.argv
    sys.argv = [original[0], *arguments]
    try:
        yield
    finally:
        sys.argv = original
