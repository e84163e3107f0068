"""Parsing and merging of configuration files once a process for each choice of groups: tests compose some 1500 configurations."""

from __future__ import annotations

import dataclasses
import functools
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import omegaconf.base
import omegaconf.basecontainer
from hydra._internal import config_loader_impl, defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, grammar_parser

from vitscope.config import loading

_parse = OmegaConf.load
_create_defaults_list = defaults_list.create_defaults_list
_merge_files = ConfigLoaderImpl._compose_config_from_defaults_list

_parsed: dict[tuple[str, int, int], bytes] = {}
_defaults: dict[Any, defaults_list.DefaultsList] = {}
_merged: dict[Any, bytes] = {}


def load(file: str | Path | IO[Any]) -> Any:
    """Return what ``OmegaConf.load`` returns, as a copy of the first parsing where the file is one of ``conf``."""
    path = str(file if isinstance(file, str | Path) else getattr(file, "name", ""))
    if not path.startswith(str(loading.folder())):
        return _parse(file)
    facts = os.stat(path)
    key = (path, facts.st_mtime_ns, facts.st_size)
    if key not in _parsed:
        _parsed[key] = pickle.dumps(_parse(file))
    return pickle.loads(_parsed[key])  # a twentieth of the time of copy.deepcopy


def create_defaults_list(
    repo: IConfigRepository,
    config_name: str | None,
    overrides_list: list[Override],
    prepend_hydra: bool,
    skip_missing: bool,
) -> defaults_list.DefaultsList:
    """Return Hydra's list of files, which overrides of groups decide, with this call's overrides of values."""
    if not _is_ours(repo):
        return _create_defaults_list(repo, config_name, overrides_list, prepend_hydra, skip_missing)
    groups, values = [], []
    for override in overrides_list:
        is_value = isinstance(override.value(), dict) or not repo.group_exists(override.key_or_group)
        (values if is_value and not override.is_sweep_override() else groups).append(override)
    key = (config_name, tuple(override.input_line for override in groups), prepend_hydra, skip_missing)
    if key not in _defaults:
        _defaults[key] = _create_defaults_list(repo, config_name, groups, prepend_hydra, skip_missing)
    return dataclasses.replace(_defaults[key], config_overrides=values)


def merge_files(
    loader: ConfigLoaderImpl, defaults: Sequence[defaults_list.ResultDefault], repo: IConfigRepository
) -> DictConfig:
    """Return Hydra's merge of the files of a list, as a copy of the first one."""
    if not _is_ours(repo):
        return _merge_files(loader, list(defaults), repo)
    key = tuple(tuple(vars(default).items()) for default in defaults)
    if key not in _merged:
        _merged[key] = pickle.dumps(_merge_files(loader, list(defaults), repo))
    return pickle.loads(_merged[key])


def _is_ours(repo: IConfigRepository) -> bool:
    """Tell whether files come from the package's folder and Hydra alone, whose content no test changes."""
    ours = {f"file://{loading.folder()}", "pkg://hydra.conf", "structured://"}
    return {source.full_path() for source in repo.get_sources()} <= ours


def install() -> None:
    """Put these functions in the place of OmegaConf's and Hydra's for the rest of this process; keep parse trees too."""
    OmegaConf.load = staticmethod(load)
    config_loader_impl.create_defaults_list = create_defaults_list
    ConfigLoaderImpl._compose_config_from_defaults_list = merge_files
    parse = functools.lru_cache(maxsize=4096)(grammar_parser.parse)
    for module in (grammar_parser, omegaconf.base, omegaconf.basecontainer):
        if hasattr(module, "parse"):
            module.parse = parse


def uninstall() -> None:
    """Put Hydra's own functions back."""
    config_loader_impl.create_defaults_list = _create_defaults_list
    ConfigLoaderImpl._compose_config_from_defaults_list = _merge_files
