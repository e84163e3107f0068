"""Needs of Python that a release has changed: see each test for the function that has to be changed for the next one."""

from __future__ import annotations

import inspect
import multiprocessing.queues
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


def test_a_queue_calls_a_method_with_an_error_and_the_item_that_it_could_not_send() -> None:
    # `torch_internals.replace_unsent_items` puts another item in its place, in the workers of loaders
    assert list(inspect.signature(multiprocessing.queues.Queue._on_queue_feeder_error).parameters) == ["e", "obj"]
    assert "self._on_queue_feeder_error" in inspect.getsource(multiprocessing.queues.Queue._start_thread)
