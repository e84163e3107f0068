"""Messages and warnings of a command: one line each, rank 0 only, from the level that the user asks for."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings

import pytest

from tests.fixtures.programs.processes import ENVIRONMENT, ROOT
from vitscope.data.sources import notices
from vitscope.runtime.errors import ConfigError
from vitscope.runtime.logging import command_logging, is_main_process, log_problem

PACKAGE = logging.getLogger("vitscope")


def test_a_command_prints_messages_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with command_logging():
        PACKAGE.info("nothing to do")
        logging.getLogger("vitscope.runs.run_lock").warning("the lock is stale")
        logging.getLogger("vitscope.runs").debug("not shown")
    assert capsys.readouterr().err == "nothing to do\nwarning: the lock is stale\n"


def test_the_environment_sets_the_level(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITSCOPE_LOG_LEVEL", "warning")
    with command_logging():
        PACKAGE.info("nothing to do")
        PACKAGE.warning("damaged")
    assert capsys.readouterr().err == "warning: damaged\n"
    monkeypatch.setenv("VITSCOPE_LOG_LEVEL", "loud")
    with (
        pytest.raises(ConfigError, match="VITSCOPE_LOG_LEVEL=loud: no such level; set one of DEBUG, INFO"),
        command_logging(),
    ):
        pass


def test_other_ranks_print_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with command_logging():
        PACKAGE.warning("damaged")
        assert warnings.formatwarning("null", UserWarning, "x.py", 3) == ""
    assert capsys.readouterr().err == ""


def test_a_warning_is_one_line_without_source_text() -> None:
    """In a process of its own: pytest records warnings before they are formatted."""
    program = (
        "import warnings\n"
        "from vitscope.runtime.logging import command_logging\n"
        "with command_logging():\n"
        "    warnings.warn('two\\n  lines')\n"
        "warnings.warn('outside')\n"
    )
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
                             check=True)  # fmt: skip
    first, second, *_ = process.stderr.splitlines()
    assert first == "warning: two lines"
    assert second.endswith("UserWarning: outside")


def test_a_program_keeps_its_own_logging(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    """Outside of a command nothing is printed, and the program's handlers and level hold again after one."""
    with command_logging():
        pass
    assert (PACKAGE.handlers, PACKAGE.level, PACKAGE.propagate) == ([], logging.NOTSET, True)
    with caplog.at_level(logging.INFO, logger="vitscope"):
        PACKAGE.info("nothing to do")
    assert caplog.messages == ["nothing to do"]
    assert capsys.readouterr().err == ""


def test_a_line_with_its_own_label_is_printed_as_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ("failed: run x: test/nll (not finite)", "missing: run y: fourier (not measured at end)")
    with command_logging():
        for line in lines:
            log_problem(PACKAGE, line)
    assert capsys.readouterr().err.splitlines() == list(lines)
    monkeypatch.setenv("VITSCOPE_LOG_LEVEL", "error")
    with command_logging():
        for line in lines:
            log_problem(PACKAGE, line)
    assert capsys.readouterr().err.splitlines() == [lines[0]]


def test_a_labeled_line_has_the_level_of_its_label_and_the_place_of_its_caller(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for line in ("failed: trial 1", "missing: run y", "damaged: run z"):
        log_problem(PACKAGE, line)
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING", "WARNING"]
    assert {record.funcName for record in caplog.records} == {
        "test_a_labeled_line_has_the_level_of_its_label_and_the_place_of_its_caller"
    }


def test_the_process_group_tells_the_rank_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    assert not is_main_process()
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    assert is_main_process()


def test_a_notice_on_data_is_logged_once(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    """In a notebook it is a record of level INFO, and nothing is printed."""
    with caplog.at_level(logging.INFO, logger="vitscope"):
        for _ in range(2):
            notices.report_once("x.gif:\n the first of its 7 frames is used")
    assert caplog.record_tuples == [
        ("vitscope.data.sources.notices", logging.INFO, "note: x.gif: the first of its 7 frames is used")
    ]
    assert capsys.readouterr().err == ""
