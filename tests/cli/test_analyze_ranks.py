"""``analyze.py`` in two processes: one process's numbers, written once, and an end for all where one fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.analyses.test_process_group import free_port, torchrun_variables
from tests.diagnostics.test_hessian_distributed import assert_equal
from tests.fixtures.programs.processes import ENVIRONMENT, PATIENCE, ROOT, ForkedProcess, wait_until
from vitscope.cli import analyze, exit_codes, rank_launcher
from vitscope.runs import metrics_log, result_store
from vitscope.runtime.errors import ConfigError, DistributedError

#: of float64 networks; three batches for two ranks
SMALL = ["model=vit", "model.depth=1", "model.patch_size=8", "logger=none", "data=digits", "seed=3",
         "analysis=[hessian_eigenvalues,slice]", "+analysis.hessian_eigenvalues.dtype=float64",
         "analysis.hessian_eigenvalues.k=2", "analysis.hessian_eigenvalues.probe.n_images=12",
         "analysis.hessian_eigenvalues.probe.batch_size=4", "+analysis.slice.dtype=float64", "analysis.slice.n=3",
         "analysis.slice.n_directions=2", "analysis.slice.probe.n_images=12", "analysis.slice.probe.batch_size=4"]  # fmt: skip
PAIR = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]


def results(run: Path) -> dict[str, object]:
    return {file.parent.name: result_store.load(file) for file in sorted(run.glob("results/*/*.npz"))}


def assert_one_process_s_numbers(one: Path, several: Path) -> None:
    expected, received = results(one), results(several)
    assert expected.keys() == received.keys()
    assert expected
    for name, result in expected.items():
        assert_equal(result, received[name], 1e-10, name)  # sums over images in another order, float64
    for file in (one / "results").rglob("*.npz"):  # the same names: one is taken for the other's result
        assert (several / file.relative_to(one)).is_file()
    rows = metrics_log.read(several / "metrics.jsonl")
    assert len(rows) == len(expected)  # each written once
    assert not list(several.rglob(".partial-*"))
    assert not list(several.rglob(".unpublished-*"))


def test_two_ranks_write_one_process_s_numbers_once(call: Callable[..., int], tmp_path: Path):
    assert call("analyze", *SMALL, "device=cpu", f"run_dir={tmp_path}/one") == 0

    def run() -> int:
        sys.argv = ["analyze.py", *SMALL, *PAIR, f"run_dir={tmp_path}/two"]
        return exit_codes.run_command(analyze._command)

    port = free_port()
    processes = [ForkedProcess(run, tmp_path / f"errors-{rank}", torchrun_variables(rank, port)) for rank in range(2)]
    assert [process.wait(120)[0] for process in processes] == [0, 0], (tmp_path / "errors-0").read_text()
    assert_one_process_s_numbers(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "errors-1").read_text() == ""


CHILDREN = {
    "fails": "import sys, os, time; sys.exit(5 if os.environ['RANK'] == '1' else 7)",
    "dies": "import os, time; os.kill(os.getpid(), 9) if os.environ['RANK'] == '1' else time.sleep(60)",
    "stopped": "import os, time; os.kill(os.getpid(), 19) if os.environ['RANK'] == '1' else os._exit(7)",
    "fine": "import os; assert os.environ['WORLD_SIZE'] == '2' and os.environ['MASTER_PORT'].isdigit()",
}


@pytest.mark.parametrize(("child", "code"), [("fails", 5), ("dies", 7), ("stopped", 7), ("fine", 0)])
def test_the_launcher_ends_all_ranks(child: str, code: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rank_launcher, "GRACE", 0.3)
    monkeypatch.setattr(rank_launcher, "_program", lambda: [sys.executable, "-S", "-c", CHILDREN[child]])
    started: list[subprocess.Popen[bytes]] = []
    start_rank = rank_launcher.start_rank
    monkeypatch.setattr(rank_launcher, "start_rank", lambda *args: started.append(start_rank(*args)) or started[-1])
    try:
        rank_launcher.run_ranks(2, [])
        received, text = 0, ""
    except DistributedError as error:
        received, text = error.exit_code, str(error)
    except SystemExit as error:
        received, text = error.code, ""
    assert ("rank 1 was killed by SIGKILL" in text) == (child == "dies")
    assert received == code
    assert len(started) == 2
    assert all(process.poll() is not None for process in started)


def test_a_multirun_starts_no_ranks():
    with pytest.raises(ConfigError, match="leave out -m"):
        rank_launcher.run_ranks(2, ["-m"])


def start(*arguments: str, launcher: Sequence[str] = ("analyze.py",)) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, *launcher, *arguments], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)  # fmt: skip


def processes_of(text: str) -> list[int]:
    """Return the ids of the ranks whose command line has ``text``."""
    ids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
            is_rank = b"\0LOCAL_RANK=" in (folder / "environ").read_bytes()
        except OSError:
            continue
        if text in command and is_rank:
            ids.append(int(folder.name))
    return sorted(ids)


TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29521")


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [("analyze.py",), (*TORCHRUN, "analyze.py"), (*TORCHRUN, "-m", "vitscope", "analyze")]
)
def test_started_processes_give_one_process_s_numbers(tmp_path: Path, launcher: tuple[str, ...]):
    """``analyze.py trainer=ddp``, torchrun on the script, and torchrun on the installed package."""
    one = start(*SMALL, "device=cpu", f"run_dir={tmp_path}/one")
    _, errors = one.communicate(timeout=PATIENCE)
    assert one.returncode == 0, errors
    request = PAIR if launcher == ("analyze.py",) else ["device=cpu"]
    two = start(*SMALL, *request, f"run_dir={tmp_path}/two", launcher=launcher)
    _, errors = two.communicate(timeout=PATIENCE)
    assert two.returncode == 0, errors
    assert_one_process_s_numbers(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [("analyze.py",), (*TORCHRUN, "analyze.py")])
@pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
def test_all_end_where_one_dies_or_hangs(tmp_path: Path, what: int, launcher: tuple[str, ...]):
    """SIGTERM goes to the process that was started: the command is then stopped, not failed."""
    longer = ["analysis=[hessian_trace]", "analysis.hessian_trace.n_vectors=100000"]
    process = start(
        *SMALL[:6], *longer, *PAIR, "trainer.strategy.timeout_s=10", f"run_dir={tmp_path}/run", launcher=launcher
    )
    wait_until(
        lambda: len(processes_of(f"{tmp_path}/run")) > 1 and (tmp_path / "run/provenance.json").exists(),
        "ranks",
        process,
    )
    time.sleep(5)  # they measure
    ranks = processes_of(f"{tmp_path}/run")
    os.kill(process.pid if what == signal.SIGTERM else max(ranks), what)
    _, err = process.communicate(timeout=PATIENCE)
    if launcher == ("analyze.py",):  # torchrun has an exit code of its own
        assert process.returncode == (143 if what == signal.SIGTERM else 7), err
        assert ("stopped by SIGTERM" if what == signal.SIGTERM else "error: trainer.devices") in err
        assert "Traceback" not in err
    assert process.returncode != 0
    wait_until(lambda: not processes_of(f"{tmp_path}/run"), "end of all processes")
    assert np.isin(process.returncode, [1, 7, 143, -15])
