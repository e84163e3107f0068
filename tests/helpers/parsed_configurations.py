"""Parsing of each configuration file once a process: parsing is 40 % of a composition, and tests compose 1500 times."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from vitscope.config import loading

_parse = OmegaConf.load
_parsed: dict[tuple[str, int, int], Any] = {}


def load(file: str | Path | IO[Any]) -> Any:
    """Return what ``OmegaConf.load`` returns, as a copy of the first parsing where the file is one of ``conf``."""
    path = str(file if isinstance(file, str | Path) else getattr(file, "name", ""))
    if not path.startswith(str(loading.folder())):
        return _parse(file)
    facts = os.stat(path)
    key = (path, facts.st_mtime_ns, facts.st_size)
    if key not in _parsed:
        _parsed[key] = _parse(file)
    return copy.deepcopy(_parsed[key])


def install() -> None:
    """Put `load` in the place of ``OmegaConf.load`` for the rest of this process."""
    OmegaConf.load = staticmethod(load)
