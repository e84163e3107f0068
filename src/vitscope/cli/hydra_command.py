"""Runs a command through Hydra and raises what its task raised, so that every error is one line."""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

from omegaconf import DictConfig

from vitscope.config import composition
from vitscope.runtime.errors import ConfigError

T = TypeVar("T")

_errors: list[BaseException] = []


def kept_error(task: Callable[[DictConfig], T]) -> Callable[[DictConfig], T | None]:
    """Keep a task's error for `uncaught`: Hydra would print text of its own on top of our one line."""

    @functools.wraps(task)
    def guarded(cfg: DictConfig) -> T | None:
        try:
            return task(cfg)
        except BaseException as error:
            _errors.append(error)
            return None

    return guarded


def uncaught(composed: Callable[[], object]) -> None:
    """Run a Hydra command and raise what its task raised."""
    _errors.clear()
    composition.check_options(sys.argv[1:])
    with _refusals_of_argparse():
        composed()
    if _errors:
        raise _errors.pop()


@contextlib.contextmanager
def _refusals_of_argparse() -> Iterator[None]:
    """Let an option that Hydra does not know be an error of one line; argparse would print its usage and exit."""

    def refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
        raise ConfigError("arguments", None, message, "see --help")

    original = argparse.ArgumentParser.error
    setattr(argparse.ArgumentParser, "error", refuse)  # noqa: B010  its own signature says NoReturn
    try:
        yield
    finally:
        argparse.ArgumentParser.error = original
