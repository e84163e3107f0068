"""Parsing of each configuration file and each interpolation once a process: tests compose some 1500 configurations."""

from __future__ import annotations

import functools
import os
import pickle
from pathlib import Path
from typing import IO, Any

import omegaconf.base
import omegaconf.basecontainer
from omegaconf import OmegaConf, grammar_parser

from vitscope.config import loading

_parse = OmegaConf.load
_parsed: dict[tuple[str, int, int], bytes] = {}


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


def install() -> None:
    """Put `load` in the place of ``OmegaConf.load`` and keep parse trees, which are only read, for the rest of this process."""
    OmegaConf.load = staticmethod(load)
    parse = functools.lru_cache(maxsize=4096)(grammar_parser.parse)
    for module in (grammar_parser, omegaconf.base, omegaconf.basecontainer):
        if hasattr(module, "parse"):
            module.parse = parse
