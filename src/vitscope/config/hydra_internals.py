"""Private and experimental interfaces of Hydra, which may change with any release: the only module that touches them.

`tests/contracts/test_hydra.py` states what each of them has to do. On a new release of Hydra, run ``make test-newest``.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import omegaconf.base
from hydra import initialize_config_dir
from hydra._internal import config_loader_impl
from hydra._internal import utils as hydra_utils
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override as Override
from hydra.experimental.callback import Callback as Callback
from omegaconf import DictConfig, OmegaConf

from vitscope.runtime.errors import ConfigError

#: targets of Hydra's own launcher and sweeper in its configuration
BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
#: target of a callback that Hydra ships
LOG_JOB_RETURN_CALLBACK = "hydra.experimental.callbacks.LogJobReturnCallback"

#: the release of Hydra whose defaults the configuration files are written for
VERSION_BASE = "1.3"


class CommandLineParser(argparse.ArgumentParser):
    """Parser of Hydra's options, one of which has a help in Hydra 1.3 that is no string until it is printed.

    argparse of Python 3.14 checks the help of every option that is added, and refuses that one.
    """

    def _check_help(self, action: argparse.Action) -> None:
        if isinstance(action.help, str):
            check = getattr(super(), "_check_help", None)  # since Python 3.14
            if check is not None:
                check(action)


# the only class that Hydra's module takes from argparse
cast(Any, hydra_utils).argparse = SimpleNamespace(ArgumentParser=CommandLineParser)


@contextmanager
def without_migration_warnings() -> Iterator[None]:
    """Silence Hydra 1.4's warning that ``version_base``, which 1.3 needs, goes away in 1.5."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The version_base parameter is deprecated")
        yield


@contextmanager
def composing_from(folder: str, job_name: str | None = None) -> Iterator[None]:
    """Let `hydra.compose` find its files in an absolute folder while the context is open.

    Args:
        folder: The folder of the configuration files.
        job_name: Value of ``hydra.job.name``; None for Hydra's own.
    """
    names = {} if job_name is None else {"job_name": job_name}
    with without_migration_warnings():
        session = initialize_config_dir(folder, version_base=VERSION_BASE, **names)
    with session:
        yield


class _SharedCompositions:
    """Files, lists of files and merged files of compositions, each made once; takes the place of functions of Hydra.

    Args:
        folder: The absolute folder of the configuration files.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._parse_file = cast(Any, OmegaConf).load
        self._create_list = cast(Any, config_loader_impl).create_defaults_list
        self._merge_files = ConfigLoaderImpl._compose_config_from_defaults_list
        self._files: dict[str, bytes] = {}
        self._lists: dict[Any, Any] = {}
        self._merged: dict[Any, bytes] = {}

    def _is_shared(self, repository: Any) -> bool:
        """Tell whether a repository of configuration files looks into the folder and Hydra's own files alone."""
        paths = {source.full_path() for source in repository.get_sources()}
        return paths <= {f"file://{self._folder}", "pkg://hydra.conf", "structured://"}

    def load(self, file: Any) -> Any:
        """Return a copy of a file's content, in the place of `OmegaConf.load`."""
        path = str(getattr(file, "name", file))
        if Path(self._folder) not in Path(path).parents:
            return self._parse_file(file)
        if path not in self._files:
            self._files[path] = pickle.dumps(self._parse_file(file))
        return pickle.loads(self._files[path])  # of bytes written above; a twentieth of the time of copy.deepcopy

    def create_defaults_list(
        self,
        repo: Any,
        config_name: str | None,
        overrides_list: list[Override],
        prepend_hydra: bool,
        skip_missing: bool,
    ) -> Any:
        """Return the list of files for a choice of groups, with the values of this composition; Hydra calls it by keyword."""
        if not self._is_shared(repo):
            return self._create_list(repo, config_name, overrides_list, prepend_hydra, skip_missing)
        groups, values = [], []
        for override in overrides_list:
            is_value = isinstance(override.value(), dict) or not repo.group_exists(override.key_or_group)
            (values if is_value and not override.is_sweep_override() else groups).append(override)
        key = (config_name, tuple(override.input_line for override in groups), prepend_hydra, skip_missing)
        if key not in self._lists:
            self._lists[key] = self._create_list(repo, config_name, groups, prepend_hydra, skip_missing)
        return dataclasses.replace(self._lists[key], config_overrides=values)

    def merge_files(self, loader: ConfigLoaderImpl, defaults: Sequence[Any], repo: Any) -> DictConfig:
        """Return a copy of the merged files of a list."""
        if not self._is_shared(repo):
            return self._merge_files(loader, list(defaults), repo)
        key = tuple(tuple(vars(default).items()) for default in defaults)
        if key not in self._merged:
            self._merged[key] = pickle.dumps(self._merge_files(loader, list(defaults), repo))
        return pickle.loads(self._merged[key])


@contextmanager
def sharing_compositions(folder: str) -> Iterator[None]:
    """Let compositions of one process share what they have in common while the context is open; their results are the same.

    A file is parsed once, an interpolation too, a list of files is made once for each choice of groups, and the files of a list
    are merged once. Every composition gets copies. Compositions that look into other folders share nothing.

    Args:
        folder: The absolute folder of the configuration files, whose content must not change meanwhile.
    """
    loader_module, node_module, loaders = cast(Any, config_loader_impl), cast(Any, omegaconf.base), cast(Any, OmegaConf)
    parse_file, create_list = loaders.load, loader_module.create_defaults_list
    merge_files, parse_interpolation = ConfigLoaderImpl._compose_config_from_defaults_list, node_module.parse
    shared = _SharedCompositions(folder)

    def merge_shared_files(loader: ConfigLoaderImpl, defaults: Sequence[Any], repo: Any) -> DictConfig:
        return shared.merge_files(loader, defaults, repo)  # a function, which the loader's class binds to a loader

    loaders.load = staticmethod(shared.load)
    loader_module.create_defaults_list = shared.create_defaults_list
    ConfigLoaderImpl._compose_config_from_defaults_list = cast(Any, merge_shared_files)
    node_module.parse = functools.lru_cache(maxsize=4096)(parse_interpolation)
    try:
        yield
    finally:
        loaders.load = staticmethod(parse_file)
        loader_module.create_defaults_list = create_list
        ConfigLoaderImpl._compose_config_from_defaults_list = merge_files
        node_module.parse = parse_interpolation


def judge_compositions(
    check_sources: Callable[[Any, str | None, Sequence[str]], None], judge: Callable[[DictConfig, Sequence[str]], None]
) -> None:
    """Let Hydra's loader check everything that it composes, before Hydra acts on it; a second call changes nothing.

    A callback of Hydra's would come too late: it is created from the configuration that has to be checked.

    Args:
        check_sources: A function that is called with a repository of configuration files, the name of the primary
            one and the overrides, before the loader looks into its search path.
        judge: A function that is called with the composed configuration, its ``hydra`` node included, and the overrides.

    Raises:
        ConfigError: From a composition, where ``hydra.job.env_copy`` names a variable that is not set.
    """
    original = ConfigLoaderImpl.load_configuration
    if getattr(original, "is_judged", False):
        return

    @functools.wraps(original)
    def load_configuration(self: Any, config_name: str | None, overrides: list[str], *args: Any, **kwargs: Any) -> Any:
        check_sources(self.repository, config_name, overrides)
        try:
            cfg = original(self, config_name, overrides, *args, **kwargs)
        except KeyError as error:  # of hydra.job.env_copy
            name = error.args[0] if error.args else None
            if isinstance(name, str) and name not in os.environ:
                raise ConfigError("hydra.job.env_copy", name, "not set in the environment", "leave it out") from None
            raise
        judge(cfg, overrides)
        return cfg

    cast(Any, load_configuration).is_judged = True
    ConfigLoaderImpl.load_configuration = load_configuration


def check_command_line(arguments: Sequence[str]) -> None:
    """Refuse options that Hydra's parser does not know; it would print its usage and end the process.

    Raises:
        ConfigError: With the parser's message.
    """

    def refuse(message: str) -> NoReturn:
        raise ConfigError("arguments", None, message, "see --help")

    parser = hydra_utils.get_args_parser()
    cast(Any, parser).error = refuse  # of this parser alone
    parser.parse_args(list(arguments))


def parse_overrides(arguments: Sequence[str]) -> list[Override]:
    """Return the overrides of a command line, parsed by Hydra's grammar.

    `hydra.compose` parses them too, but applies them to a configuration that it composes and does not return them.

    Raises:
        hydra.errors.OverrideParseException: An argument is not an override.
    """
    return OverridesParser.create().parse_overrides(list(arguments))


def clear_application() -> None:
    """Forget the application that Hydra runs in this process, so that `hydra.initialize_config_dir` can be called within it."""
    GlobalHydra.instance().clear()
