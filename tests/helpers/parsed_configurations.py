"""Parsing and merging of configuration files once a process for each choice of groups: tests compose some 1500 configurations."""

from __future__ import annotations

from contextlib import ExitStack

from vitscope.config import hydra_internals, loading

_sharing = ExitStack()


def install() -> None:
    """Let all compositions of this process share their files."""
    _sharing.enter_context(hydra_internals.sharing_compositions(str(loading.folder())))


def uninstall() -> None:
    """Put Hydra's own functions back."""
    _sharing.close()
