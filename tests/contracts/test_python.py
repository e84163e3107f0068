"""Needs of Python that a release has changed: see each test for the function that has to be changed for the next one."""

from __future__ import annotations

import inspect
import typing

import pytest
from hydra._internal import utils as hydra_utils

import vitscope as vs
from vitscope.config import hydra_internals


@pytest.mark.parametrize("name", sorted(vs.measures()))
def test_a_decorated_measure_has_the_hints_of_its_signature(name: str) -> None:
    # `functools.wraps` of Python 3.14 drops annotations that a decorator has set: `vitscope.core.measure_options`. Without
    # hints the configuration of an analysis is not checked
    measure = getattr(vs, name)
    assert typing.get_type_hints(measure).keys() - {"return"} == inspect.signature(measure).parameters.keys()


def test_the_parser_of_hydra_takes_help_that_is_no_string(monkeypatch: pytest.MonkeyPatch) -> None:
    # argparse of Python 3.14 checks the help of each option that is added: `hydra_internals.CommandLineParser`
    checked = []
    monkeypatch.setattr(
        hydra_internals.argparse.ArgumentParser,
        "_check_help",
        lambda _, action: checked.append(action.help),
        raising=False,
    )
    parser = hydra_utils.get_args_parser()
    assert isinstance(parser, hydra_internals.CommandLineParser)
    before = len(checked)
    for action in parser._actions:
        parser._check_help(action)
    texts = [action.help for action in parser._actions if isinstance(action.help, str)]
    assert 0 < len(texts) < len(parser._actions)
    assert checked[before:] == texts
