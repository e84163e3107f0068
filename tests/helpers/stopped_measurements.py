"""Stop a command at one of its measurements, as a signal would."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from vitscope.analyses import runner
from vitscope.runtime import stop_flag


@contextmanager
def stopping_at_measurement(number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Return a context in which SIGTERM is requested when the measurement of that number, from 1, asks for its images."""
    build, n_probes = runner.factories.probe, 0

    def stopping(*arguments: Any) -> Any:
        nonlocal n_probes
        n_probes += 1
        if n_probes == number:
            stop_flag.request(signal.SIGTERM)
            stop_flag.check()
        return build(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("vitscope.analyses.runner.factories.probe", stopping)
        yield
